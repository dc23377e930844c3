"""Judges levels by texts: the base first, then every level in one pass, each model loaded once.

Takes a `Trial` and something that opens a file for scoring, gives `Results`, saved after every row. The base's
log-probabilities go to disk, one file a text, and are removed when all is done. What the result file already holds is
not measured again, so a run that was interrupted goes on where it stopped. Knows nothing of llama.cpp, of terminals, or
of how results are shown.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant.quality.baselog import BaseLog, BaseLogWriter
from quant.quality.measurement import Measurement, Scorer, measure
from quant.quality.results import Environment, ModelRecord, Results, Row, Run, save
from quant.quality.statistics import divergence, perplexity
from quant.quality.texts import Text, split_chunks
from quant.quality.trial import LevelFile, Trial, begin, examine
from runtime import library
from runtime.events import EngineSettings

OpenScorer = Callable[[Path, EngineSettings], Scorer]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    activity: str
    """`check` (reading a file for its SHA-256), `load` or `score`."""
    level: str
    text: str
    """Empty unless scoring."""
    part: float
    """Of the file that is checked, or of the text that is scored; 0 to 1."""
    done_chunks: int
    """Over all levels and texts, earlier runs included."""
    total_chunks: int | None
    """None until the first model has tokenized the texts."""
    tokens_per_second: float
    """Of this text so far, decoding and statistics together."""
    seconds_left: float | None
    """None until there is a rate to judge by."""
    ppl: float | None
    """Perplexity of this text so far."""


def judge(
    trial: Trial,
    open_scorer: OpenScorer,
    environment: Environment,
    command: Sequence[str],
    progress: Callable[[Progress], None] = lambda _: None,
) -> Results:
    """Measure what the result file does not hold yet, and give all of it.

    Raises ResultsError where the file is of another measurement; TextError for a text that is too short; BaseLogError,
    OutputError, ModelFileError and EngineError. Whatever ends it early, Ctrl-C too, the rows measured so far are in the
    file, and the base log-probabilities stay for the next run.
    """
    return _Judging(trial, open_scorer, begin(trial, environment), progress).run(command)


class _Judging:
    """One run: the results so far, and what is left to do."""

    def __init__(
        self, trial: Trial, open_scorer: OpenScorer, results: Results, progress: Callable[[Progress], None]
    ) -> None:
        self._trial = trial
        self._open = open_scorer
        self._results = results
        self._progress = progress
        self._order: list[tuple[LevelFile, list[Text]]] = []  # what is to be measured
        self._wanted: set[str] = set()  # texts that some level is to be compared on
        self._n_chunks: dict[str, int] = {}  # of each text, once a model has tokenized it
        self._began: float | None = None  # when the first text was
        self._run_chunks = 0  # done by this run

    def run(self, command: Sequence[str]) -> Results:
        trial = self._trial
        for file in trial.levels:  # refuse now what would be refused in hours
            library.first_shard(file.path)
            if self._results.record(file.level) is not None:
                self._examine(file)
        left = {file.level: self._unmeasured(file) for file in trial.others}
        self._wanted = {text.name for texts in left.values() for text in texts}
        self._order = [(file, left[file.level]) for file in trial.others if left[file.level]]
        if trial.base_file is not None and (texts := self._base_texts(trial.base_file)):
            self._order.insert(0, (trial.base_file, texts))
        if self._order:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._results = replace(self._results, runs=(*self._results.runs, Run(now, tuple(command))))
        for file, texts in self._order:
            self._judge_level(file, texts)
        if not trial.keep_base:
            self._remove_base_logs()
        return self._results

    def _unmeasured(self, file: LevelFile) -> list[Text]:
        return [text for text in self._trial.texts if self._results.row(file.level, text.name) is None]

    def _base_texts(self, base: LevelFile) -> list[Text]:
        """Texts that the base must read: those it has no row of, and those whose log-probabilities a level needs."""
        record = self._results.record(base.level)
        return [
            text
            for text in self._trial.texts
            if self._results.row(base.level, text.name) is None
            or record is None
            or (text.name in self._wanted and not self._base_log(record, text).exists())
        ]

    def _examine(self, file: LevelFile) -> None:
        """Enter the level's files in the results, or check that they are the ones entered."""
        known = self._results.record(file.level)
        record = examine(file, known, lambda share: self._report("check", file, part=share))
        models = tuple(record if model == known else model for model in self._results.models)
        self._results = replace(self._results, models=models if known is not None else (*models, record))

    def _judge_level(self, file: LevelFile, texts: Sequence[Text]) -> None:
        """Load a model once and measure it on each text."""
        if self._results.record(file.level) is None:
            self._examine(file)
        self._report("load", file)
        settings = self._results.settings
        scorer = self._open(file.path, settings)
        try:
            assert scorer.n_ctx == settings.n_ctx, (scorer.n_ctx, settings.n_ctx)
            tokens = {text.name: self._chunks(scorer, text) for text in self._trial.texts}
            self._n_chunks = {name: len(chunks) for name, chunks in tokens.items()}
            for text in texts:
                if self._began is None:
                    self._began = time.monotonic()
                measurement = self._measure(scorer, file, text, tokens[text.name])
                self._keep(self._row(scorer, file, text, tokens[text.name], measurement))
        finally:
            scorer.close()

    def _chunks(self, scorer: Scorer, text: Text) -> NDArray[np.int32]:
        return split_chunks(scorer.tokenize(text.content), scorer.n_ctx, text.name, self._trial.max_chunks)

    def _measure(self, scorer: Scorer, file: LevelFile, text: Text, chunks: NDArray[np.int32]) -> Measurement:
        began = time.monotonic()

        def on_chunk(done: int, loss: float) -> None:
            self._run_chunks += 1
            seconds = time.monotonic() - began
            self._report(
                "score",
                file,
                text.name,
                part=done / len(chunks),
                tokens_per_second=done * scorer.n_ctx / seconds if seconds > 0 else 0.0,
                ppl=math.exp(loss),
            )

        base = self._base_record()
        with ExitStack() as stack:
            log = keep = None
            if base is not None and file.level != base.level:
                log = stack.enter_context(BaseLog(self._base_log(base, text)))
                log.check(scorer.n_vocab, chunks)
            elif base is not None and (text.name in self._wanted or self._trial.keep_base):
                path = self._base_log(base, text)
                keep = stack.enter_context(BaseLogWriter(path, scorer.n_vocab, chunks))
            return measure(scorer, chunks, source=file.path, base=log, keep=keep, on_chunk=on_chunk)

    def _row(
        self, scorer: Scorer, file: LevelFile, text: Text, chunks: NDArray[np.int32], measurement: Measurement
    ) -> Row:
        ppl = perplexity(measurement.nll)
        statistics = divergence(measurement.comparison) if measurement.comparison is not None else None
        info = scorer.info()
        return Row(
            model=self._trial.model,
            level=file.level,
            text=text.name,
            context=chunks.shape[1],
            chunks=len(chunks),
            tokens=len(measurement.nll),
            ppl=ppl.value,
            ppl_error=ppl.error,
            kld_mean=statistics.kld.mean.value if statistics else None,
            kld_error=statistics.kld.mean.error if statistics else None,
            same_top=statistics.same_top.value if statistics else None,
            file_bytes=library.file_bytes(file.path),
            bits_per_weight=8 * info.tensor_bytes / info.n_params,
            prompt_tokens_per_second=chunks.size / measurement.seconds if measurement.seconds > 0 else 0.0,
            statistics=statistics,
        )

    def _keep(self, row: Row) -> None:
        """Enter a row in the results, in place of an older one of its level and text, and save them."""
        old = self._results.row(row.level, row.text)
        rows = tuple(row if other is old else other for other in self._results.results)
        self._results = replace(self._results, results=rows if old is not None else (*rows, row))
        save(self._results, self._trial.out)

    def _base_record(self) -> ModelRecord | None:
        return self._results.record(self._trial.base) if self._trial.base is not None else None

    def _base_log(self, base: ModelRecord, text: Text) -> Path:
        """Where the base's log-probabilities of a text lie: a name that only the same measurement gives."""
        results = self._results
        identity = (base.content, text.sha256, results.settings, results.max_chunks, results.environment)
        return self._trial.base_folder / f"{text.name}-{sha256(repr(identity).encode()).hexdigest()[:12]}.kld"

    def _remove_base_logs(self) -> None:
        base = self._base_record()
        if base is not None:
            for text in self._trial.texts:
                self._base_log(base, text).unlink(missing_ok=True)
        if self._trial.base_folder.is_dir() and not any(self._trial.base_folder.iterdir()):
            self._trial.base_folder.rmdir()

    def _report(
        self,
        activity: str,
        file: LevelFile,
        text: str = "",
        *,
        part: float = 0.0,
        tokens_per_second: float = 0.0,
        ppl: float | None = None,
    ) -> None:
        total = seconds_left = None
        done = self._run_chunks
        if self._n_chunks:
            total = len(self._trial.levels) * sum(self._n_chunks.values())
            planned = sum(self._n_chunks[text.name] for _, texts in self._order for text in texts)
            done += total - planned
            if self._began is not None and self._run_chunks:
                seconds = time.monotonic() - self._began
                seconds_left = (planned - self._run_chunks) * seconds / self._run_chunks
        self._progress(Progress(activity, file.level, text, part, done, total, tokens_per_second, seconds_left, ppl))
