"""Collects an importance matrix: a model reads texts, and what goes into its weights is added up.

Takes a `Collection` and something that opens a model for reading, writes a matrix file as llama-imatrix does, and the
plain sums, for means. The sums are kept on disk every minute and when a run ends early, Ctrl-C too; the same call goes
on there and ends with the file of an undisturbed run, bit for bit. Earlier matrices can be added, sum to sum. Knows
nothing of llama.cpp or terminals.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quant.header import Metadata, Value, ValueType
from quant.imatrix import check_fits, importance_matrix, read_contents
from quant.imatrix_file import Contents, ImatrixError, Sum, serialize
from quant.importance.checkpoint import (
    Checkpoint,
    check_writable,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
    write_whole,
)
from quant.importance.corpus import CalibrationText, text_chunks
from quant.importance.identity import as_kept, difference, fingerprint, model_files, settings_identity
from quant.importance.sums import LEAST_ROWS, Collector, Sums, total
from quant.provenance import versions
from quant.quality.texts import TextError, model_input
from quant.reading.gguf_file import read_gguf_header
from quant.recipes import TensorSpec
from runtime import library
from runtime.errors import ModelFileError, UserError
from runtime.events import EngineSettings, Load
from runtime.native_graph import Observer
from runtime.prompts import Prompter, Transcript, Vocabulary, prompter

SAVE_SECONDS = 60.0
_FINGERPRINT = "bise.imatrix.fingerprint"


class Reader(Protocol):
    """A loaded model that reads chunks while it is watched; `runtime.engine.ScoringEngine` is one."""

    n_seq: int
    """Most chunks read together."""
    bos: int
    adds_bos: bool

    @property
    def vocabulary(self) -> Vocabulary: ...

    def chat_template(self) -> str | None: ...

    def tokenize(self, text: str) -> NDArray[np.int32]: ...

    def read(self, chunks: NDArray[np.int32]) -> None: ...

    def close(self) -> None: ...


OpenReader = Callable[[Path, EngineSettings, Observer], Reader]


@dataclass(frozen=True, slots=True)
class Collection:
    """What is to be collected. Raises UserError where that makes no sense."""

    model: Load | None
    """What to read with; None where there are no texts. `settings.n_ctx` is the length of a chunk."""
    texts: tuple[CalibrationText, ...]
    out: Path
    merged: tuple[Path, ...] = ()
    """Matrices to add."""
    chunk_size: int = 512
    """Tokens; where nothing is read, what a chunk is in the file."""
    max_chunks: int | None = None
    """Read only so many chunks of each text."""
    output: bool = False
    """Collect for the output matrix too."""
    overwrite: bool = False
    """Begin anew, and replace the file."""

    def __post_init__(self) -> None:
        if not self.texts and not self.merged:
            raise UserError("no text and no matrix given, so there is nothing to collect; name one")
        if self.max_chunks is not None and self.max_chunks < 1:
            raise UserError(f"{self.max_chunks} chunks measure nothing; take 1 or more")
        if self.chunk_size < LEAST_ROWS:
            raise UserError(f"a context of {self.chunk_size} tokens is too short; take {LEAST_ROWS} or more")
        names = [text.name for text in self.texts]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"two of the texts are called {min(twice)}; leave one out or rename its file")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    activity: str
    """`check` (reading the model's file for its SHA-256), `load` or `read`."""
    share: float
    """Of this activity, 0 to 1."""
    text: str = ""
    done_chunks: int = 0
    """Earlier runs included."""
    total_chunks: int = 0
    tokens_per_second: float = 0.0
    """Of this run."""
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it."""

    out: Path
    n_entries: int
    n_chunks: int
    """In the file: also those of the matrices that were added."""
    n_tokens: int
    """Read for it, in this run and those it went on from."""
    already_there: bool
    """The file was whole before."""
    resumed_chunks: int
    """Read by earlier runs."""
    seconds: float


def collect(
    collection: Collection,
    open_reader: OpenReader,
    engine: str,
    progress: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Make the matrix file, or find it made. `engine` names version of what computes; `say` hears what to know.

    Raises ImatrixError where a file or an unfinished run is of something else, or a matrix to add of another model;
    TextError, OutputError, ModelFileError, EngineError.
    """
    return _Collecting(collection, engine, progress, say).run(open_reader)


class _Collecting:
    """One run."""

    def __init__(
        self,
        collection: Collection,
        engine: str,
        progress: Callable[[Progress], None],
        say: Callable[[str], None],
    ) -> None:
        self._collection = collection
        self._progress = progress
        self._say = say
        self._began = time.monotonic()
        self._merged = [(path, *read_contents(path)) for path in collection.merged]
        self._check_merged()
        model = collection.model
        self._files = (
            model_files(model.path, lambda share: progress(Progress("check", share))) if model is not None else ()
        )
        self._identity = as_kept(
            {
                "engine": engine,
                "sums": ["squares", "totals"],
                "model": self._files,
                "prompt": model.prompt if model else None,
                "texts": [(text.name, text.sha256) for text in collection.texts],
                "settings": settings_identity(model.settings) if model else {"n_ctx": collection.chunk_size},
                "chunks": collection.max_chunks,
                "output": collection.output,
                "merged": [sha256 for _, _, sha256 in self._merged],
            }
        )
        self._kept = Checkpoint(self._identity, "", 0, {})
        self._datasets: list[str] = []
        self._n_tokens: list[int] = []

    def run(self, open_reader: OpenReader) -> Report:
        collection = self._collection
        if collection.out.exists() and not collection.overwrite:
            return self._found()
        check_writable(collection.out)
        self._tell_lost_means()
        partial = checkpoint_path(collection.out)
        resumed = 0
        if collection.model is not None and collection.texts:
            kept = None if collection.overwrite else load_checkpoint(partial)
            if kept is not None:
                self._check_same(kept, partial)
                self._kept, resumed = kept, kept.n_chunks
            self._read(collection.model, open_reader, partial)
        return self._finish(partial, resumed)

    def _check_merged(self) -> None:
        """Each matrix to add must be of the model, if one is read with, and of the same tensors as the others."""
        model = self._collection.model
        if model is not None and self._merged:
            headers = map(read_gguf_header, library.shards(library.first_shard(model.path)))
            specs = [TensorSpec(info.name, info.shape) for header in headers for info in header.tensors]
            for path, contents, sha256 in self._merged:
                check_fits(importance_matrix(path, contents, sha256), specs)
        first: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for path, contents, _ in self._merged:
            for name, added in contents.sums.items():
                other, shape = first.setdefault(name, (path, added.squares.shape))
                if shape != added.squares.shape:
                    raise ImatrixError(
                        f"{path}: {added.squares.size:,} values for {name}, and {np.prod(shape):,} in {other}; "
                        "merge matrices of one model"
                    )

    def _tell_lost_means(self) -> None:
        """Where one matrix has no means, what is added to it has none either."""
        lacks = {path: any(s.totals is None for s in contents.sums.values()) for path, contents, _ in self._merged}
        if any(lacks.values()) and (self._collection.texts or not all(lacks.values())):
            names = [path.name for path, lacking in lacks.items() if lacking]
            who = "they" if len(names) > 1 else "it"
            self._say(f"note: no means in {', '.join(names)}, so that the matrix has none for what {who} measured")

    def _found(self) -> Report:
        """The file that is there, if it is the one to make."""
        out = self._collection.out
        contents, _ = read_contents(out)
        noted = contents.metadata.get(_FINGERPRINT)
        if noted is None or noted.data != fingerprint(self._identity):
            raise ImatrixError(
                f"{out} is there already, and was made of another model, other texts or settings; name another file "
                "with --out, or replace it with --force"
            )
        return Report(out, len(contents.sums), contents.n_chunks, 0, True, 0, time.monotonic() - self._began)

    def _check_same(self, kept: Checkpoint, partial: Path) -> None:
        found = difference(kept.identity, self._identity)
        if found is not None:
            what, before, now = found
            raise ImatrixError(
                f"{partial} was begun with {what} {before}, and this run has {now}; take back the change, or begin "
                "anew with --force"
            )

    def _read(self, model: Load, open_reader: OpenReader, partial: Path) -> None:
        """Read what is left, and keep the sums."""
        self._progress(Progress("load", 0.0))
        collector = Collector(model.path, output=self._collection.output)
        reader = open_reader(model.path, model.settings, collector)
        try:
            chunks, names = self._chunks(reader, model)
            self._check_tokens(chunks, partial)
            self._read_chunks(reader, collector, chunks, names, partial)
        finally:
            reader.close()

    def _chunks(self, reader: Reader, model: Load) -> tuple[NDArray[np.int32], list[str]]:
        """All chunks (C, n_ctx) as the model reads them, and of which text each is."""
        n_ctx = model.settings.n_ctx
        formats: list[Prompter] = []

        def transcribe(conversation: Transcript) -> list[int]:
            if not formats:
                template = reader.chat_template()
                formats.append(prompter(model.prompt, reader.vocabulary, template=template, tokenizer=model.tokenizer))
            return formats[0].transcribe(conversation)

        parts: list[NDArray[np.int32]] = []
        names: list[str] = []
        fault: UserError | None = None
        for text in self._collection.texts:
            try:
                chunks, n_left_out = text_chunks(text, reader.tokenize, transcribe, n_ctx, self._collection.max_chunks)
            except (TextError, ModelFileError) as error:
                if not text.conversations:
                    raise
                fault = error  # not every model has a chat format; the other texts are worth reading
                self._say(f"note: {text.name} is left out: {error}")
                continue
            if n_left_out:
                n_all = len(text.conversations)
                self._say(f"note: {n_left_out} of {n_all} conversations of {text.name} have no form in this model")
            parts.append(model_input(chunks, reader.bos, reader.adds_bos))
            names += [text.name] * len(chunks)
            self._datasets.append(text.name)
            self._n_tokens.append(chunks.size)
        if not parts:
            assert fault is not None
            raise fault
        return np.concatenate(parts), names

    def _check_tokens(self, chunks: NDArray[np.int32], partial: Path) -> None:
        """The texts must be the same tokens as before: tokenizers and prompt formats have versions too."""
        tokens = hashlib.sha256(chunks.tobytes()).hexdigest()
        if self._kept.n_chunks and self._kept.tokens_sha256 != tokens:
            raise ImatrixError(f"{partial} was begun with other tokens of the same texts; begin anew with --force")
        self._kept = replace(self._kept, tokens_sha256=tokens)

    def _read_chunks(
        self, reader: Reader, collector: Collector, chunks: NDArray[np.int32], names: Sequence[str], partial: Path
    ) -> None:
        first = self._kept.n_chunks
        began = saved = time.monotonic()
        n_saved = first
        try:
            for start in range(first, len(chunks), reader.n_seq):
                batch = chunks[start : start + reader.n_seq]
                reader.read(batch)
                # One assignment: whatever comes between, Ctrl-C too, the sums are of the chunks that are counted.
                done = start + len(batch)
                self._kept = replace(self._kept, n_chunks=done, sums=total([self._kept.sums, collector.take()]))
                now = time.monotonic()
                if now - saved >= SAVE_SECONDS:
                    save_checkpoint(partial, self._kept)
                    saved, n_saved = now, done
                rate = (done - first) / (now - began) if now > began else 0.0
                self._progress(
                    Progress(
                        "read",
                        done / len(chunks),
                        names[done - 1],
                        done,
                        len(chunks),
                        rate * chunks.shape[1],
                        (len(chunks) - done) / rate if rate else None,
                    )
                )
        except BaseException:
            if self._kept.n_chunks > n_saved:
                save_checkpoint(partial, self._kept)
            raise

    def _finish(self, partial: Path, resumed: int) -> Report:
        collection = self._collection
        size = collection.model.settings.n_ctx if collection.model else collection.chunk_size
        sums = total([*(_in_rows(contents, size) for _, contents, _ in self._merged), self._kept.sums])
        n_chunks = max((int(added.counts.max()) for added in sums.values()), default=0) // size
        datasets = [name for _, contents, _ in self._merged for name in contents.datasets] + self._datasets
        data = serialize(sums, datasets, n_chunks, size, self._notes())
        write_whole(collection.out, data)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        seconds = time.monotonic() - self._began
        return Report(collection.out, len(sums), n_chunks, sum(self._n_tokens), False, resumed, seconds)

    def _notes(self) -> Metadata:
        """The keys of the `bise.` namespace."""
        found = {
            "bise.version": Value(ValueType.STRING, versions()["bise"]),
            "bise.ggml_version": Value(ValueType.STRING, versions()["ggml"]),
        }
        lists: dict[str, tuple[str, ...]] = {
            "model": tuple(name for name, _, _ in self._files),
            "model_sha256": tuple(sha256 for _, _, sha256 in self._files if isinstance(sha256, str)),
            "texts_sha256": tuple(t.sha256 for t in self._collection.texts if t.name in self._datasets),
            "merged_sha256": tuple(sha256 for _, _, sha256 in self._merged),
        }
        found |= {f"bise.imatrix.{key}": Value(ValueType.STRING, values) for key, values in lists.items() if values}
        if self._n_tokens:
            found["bise.imatrix.tokens"] = Value(ValueType.UINT64, tuple(self._n_tokens))
        found[_FINGERPRINT] = Value(ValueType.STRING, fingerprint(self._identity))
        return found


def _in_rows(contents: Contents, chunk_size: int) -> Sums:
    """The sums of an earlier matrix. A `.dat` file has means of each chunk; its chunks are taken to be of our size."""
    if contents.chunk_size:
        return contents.sums
    return {name: Sum(added.squares * chunk_size, added.counts * chunk_size) for name, added in contents.sums.items()}
