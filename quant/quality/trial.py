"""What is to be measured, and whether a result file is of the same measurement.

Rows of one file must be comparable, so everything they share (base, settings, machine, versions) and every model file
and text named in it must be what it was; levels and texts may be added. Files are known by SHA-256, and read for it
again only when size or time changed. Knows nothing of scoring.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from quant.quality.results import (
    SCHEMA,
    Environment,
    FileRecord,
    ModelRecord,
    Results,
    ResultsError,
    TextRecord,
    hash_file,
    load,
)
from quant.quality.texts import Text
from runtime import library
from runtime.errors import UserError
from runtime.events import EngineSettings

_SHORTEST_CONTEXT = 8


@dataclass(frozen=True, slots=True)
class LevelFile:
    """A level to judge."""

    level: str
    path: Path
    """Its GGUF file, or the first shard."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What is to be measured, and where to. Raises UserError where that makes no sense."""

    model: str
    levels: tuple[LevelFile, ...]
    texts: tuple[Text, ...]
    settings: EngineSettings
    """`n_ctx` is the length of a chunk."""
    out: Path
    """The result file."""
    base: str | None = None
    """The level that the others are compared with; None measures perplexity alone."""
    max_chunks: int | None = None
    """Read only so many chunks of each text."""
    keep_base: bool = False
    """Leave the base log-probabilities on disk when all is done, for levels to come."""
    overwrite: bool = False
    """Begin anew, whatever the result file holds."""

    def __post_init__(self) -> None:
        levels, texts = [file.level for file in self.levels], [text.name for text in self.texts]
        for what, names in (("level", levels), ("text", texts)):
            if twice := {name for name in names if names.count(name) > 1}:
                raise UserError(f"two of the {what}s are called {min(twice)}; leave one out or rename its file")
        if self.base is not None and self.base not in levels:
            raise UserError(f"the base {self.base} is not among the levels {', '.join(levels)}; add it")
        if self.max_chunks is not None and self.max_chunks < 1:
            raise UserError(f"{self.max_chunks} chunks measure nothing; take 1 or more")
        if self.settings.n_ctx < _SHORTEST_CONTEXT:
            raise UserError(f"a context of {self.settings.n_ctx} tokens is too short; take {_SHORTEST_CONTEXT} or more")

    @property
    def base_file(self) -> LevelFile | None:
        return next((file for file in self.levels if file.level == self.base), None)

    @property
    def others(self) -> tuple[LevelFile, ...]:
        """The levels that are not the base."""
        return tuple(file for file in self.levels if file.level != self.base)

    @property
    def base_folder(self) -> Path:
        """Where the base log-probabilities lie."""
        return self.out.with_name(f"{self.out.stem}-base")


def begin(trial: Trial, environment: Environment) -> Results:
    """The result file as it stands, with this trial's texts entered, or a new one. Writes nothing.

    Raises ResultsError where the file is of another measurement.
    """
    cores = len(os.sched_getaffinity(0))
    texts = tuple(TextRecord(text.name, text.n_bytes, text.sha256) for text in trial.texts)
    results = Results(
        schema=SCHEMA,
        model=trial.model,
        base=trial.base,
        settings=replace(trial.settings, n_threads=trial.settings.n_threads or cores),
        max_chunks=trial.max_chunks,
        environment=environment,
        runs=(),
        models=(),
        texts=texts,
        results=(),
    )
    if not trial.out.exists() or trial.overwrite:
        return results
    old = load(trial.out)
    for what, ours, theirs in _differences(results, old):
        raise ResultsError(
            f"{trial.out} was measured with {what} {theirs} and this run has {ours}; name another file, or begin anew "
            "with --force"
        )
    return replace(old, texts=old.texts + tuple(text for text in texts if text not in old.texts))


def examine(
    file: LevelFile, known: ModelRecord | None, on_share: Callable[[float], None] = lambda _: None
) -> ModelRecord:
    """Read a level's files for their SHA-256, but not those that are as `known`; `on_share` is told from 0 to 1.

    Raises ResultsError where the content is not the known one, ModelFileError where a shard is missing.
    """
    shards = tuple(library.shards(library.first_shard(file.path)))
    total = library.file_bytes(file.path)
    records: list[FileRecord] = []

    def on_bytes(n_bytes: int) -> None:
        on_share((sum(record.n_bytes for record in records) + n_bytes) / total)

    for i, path in enumerate(shards):
        status = path.stat()
        record = known.files[i] if known is not None and i < len(known.files) else None
        if record is None or (record.n_bytes, record.modified_ns) != (status.st_size, status.st_mtime_ns):
            record = hash_file(path, on_bytes)
        records.append(record)
    found = ModelRecord(file.level, tuple(records))
    if known is not None and found.content != known.content:
        raise ResultsError(
            f"{file.path}: not the {file.level} that was measured before (SHA-256 {found.content[0][:12]}…, then "
            f"{known.content[0][:12]}…); name another result file, or begin anew with --force"
        )
    return found


def _differences(ours: Results, theirs: Results) -> Iterator[tuple[str, object, object]]:
    """Name, ours and theirs of everything that must be the same and is not."""
    for name in ("model", "base", "settings", "max_chunks", "environment"):
        yield from _unequal(name, getattr(ours, name), getattr(theirs, name))
    before = {text.name: text for text in theirs.texts}
    for text in ours.texts:
        old = before.get(text.name, text)
        if old.sha256 != text.sha256:
            yield f"a text {text.name} of SHA-256", f"{text.sha256[:12]}…", f"{old.sha256[:12]}…"


def _unequal(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, object, object]]:
    if is_dataclass(ours):
        for f in fields(ours):
            yield from _unequal(f.name, getattr(ours, f.name), getattr(theirs, f.name))
    elif ours != theirs:
        yield name, ours, theirs
