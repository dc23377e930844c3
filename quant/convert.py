"""Runs a conversion plan: every weight read once, every wanted level written from that one read.

Levels that are there already are left alone; one that was interrupted, by Ctrl-C, a full disk or a power cut, goes on
where it stopped, if the same bytes would be made. Otherwise it is refused, with what has changed.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from quant.blocks import UnusableImportanceError, UnusableWeightError
from quant.disks import check_space
from quant.inputs import open_source
from quant.journal import Fingerprint
from quant.kernels import Kernels, best
from quant.plan import ConversionPlan, LevelPlan, plan_conversion
from quant.provenance import VERSION_KEYS, versions
from quant.recipes import Encoding
from quant.shards import SYNC_SECONDS, LevelFiles, LevelState, demand, examine, tidy
from quant.source import WeightReader
from quant.work import Progress, Work, check, jobs, usable_cores
from runtime.errors import OutputError, UserError
from runtime.levels import Search, plain

ASPECTS = {
    "source": "the weights",
    "recipe": "the recipe or the size of shards",
    "metadata": "the metadata",
    "imatrix": "the importance matrix",
    "versions": "the version of Bise or of ggml",
}
"""What a fingerprint tells apart, in words."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did."""

    made: Mapping[str, tuple[Path, ...]]
    """Level → its files, for the levels this run completed."""
    already_there: tuple[str, ...]
    """Levels that an earlier run had made from the same weights."""
    cancelled: bool
    written_bytes: int
    seconds: float


def make_levels(
    folder: Path, name: str, levels: Iterable[str], out: Path, *, threads: int | None = None, overwrite: bool = False
) -> dict[str, Path]:
    """Convert a checkpoint folder and give the first file of each level, those that were already there too."""
    plan = plan_conversion(open_source(folder, name), map(plain, levels), out)
    convert(plan, threads=threads, overwrite=overwrite)
    return {level.level: level.files[0].path for level in plan.levels}


def convert(
    plan: ConversionPlan,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
    sync_seconds: float = SYNC_SECONDS,
    kernels: Kernels | None = None,
) -> Report:
    """Make every level of the plan that is not already there.

    `threads` is by default the number of cores this process may use. `overwrite` allows replacing finished files, and
    beginning anew what was begun otherwise. `progress` and `cancelled` are called from this thread, after every chunk.
    A kill loses at most about `sync_seconds` of work. `kernels` are the best by default; all that can make what
    is wanted make the same bytes.
    Raises CheckpointError, OutputError.
    """
    if threads is not None and threads < 1:
        raise UserError(f"{threads} threads cannot convert anything; give 1 or more")
    threads = threads or usable_cores()
    began = time.monotonic()
    kernels = kernels or best()
    for encoding in {tensor.encoding for level in plan.levels for tensor in level.tensors}:
        kernels.check(encoding.type, encoding.search)
    left = unfinished(plan, overwrite)
    for level in plan.levels:
        if level not in [unfinished_level for unfinished_level, _ in left]:
            tidy(level)
    check_space(demand(level, state) for level, state in left)

    written_bytes = 0
    with ExitStack() as stack:
        reader = stack.enter_context(WeightReader(plan.source.files))
        digests: dict[str, Callable[[], str]] = {}
        levels = []
        for level, _ in left:
            files = LevelFiles(level, fingerprint(plan, level), lambda name: digests[name](), sync_seconds)
            stack.callback(files.close)
            files.open(_state(plan, level, overwrite))  # again, now that nobody else can change it
            levels.append(files)
        check(levels, threads, progress)
        todo = jobs(plan, levels)
        digests |= {job.spec.name: job.source_digest for job in todo}
        work = Work(plan, reader, todo, kernels)
        try:
            finished = work.run(threads, progress, cancelled)
        except (UnusableWeightError, UnusableImportanceError):
            for files in levels:
                files.discard()
            raise
        written_bytes = work.written_bytes
        if finished:
            for files in levels:
                files.publish(versions(), plan.described, plan.source.name)
    paths = {level.level: tuple(file.path for file in level.files) for level, _ in left}
    return Report(
        made=paths if finished else {},
        already_there=tuple(level.level for level in plan.levels if level.level not in paths),
        cancelled=not finished,
        written_bytes=written_bytes,
        seconds=time.monotonic() - began,
    )


def survey(plan: ConversionPlan) -> dict[str, LevelState]:
    """Level → what earlier runs left of it, whether it is of use or in the way. Raises OutputError."""
    return {level.level: examine(level, fingerprint(plan, level)) for level in plan.levels}


def unfinished(plan: ConversionPlan, overwrite: bool) -> list[tuple[LevelPlan, LevelState]]:
    """The levels to work on, and what earlier runs left of them. Raises OutputError."""
    for level in plan.levels:
        _check_input_stays(plan, level)
    states = [(level, _state(plan, level, overwrite)) for level in plan.levels]
    return [(level, state) for level, state in states if not state.complete]


def _check_input_stays(plan: ConversionPlan, level: LevelPlan) -> None:
    """Refuse a level whose files would take the place of what is read, in one piece or in any number of shards."""
    folder = level.folder.resolve()
    for file in plan.source.files:
        for path in (file.path, file.path.resolve()):
            stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
            if path.suffix == ".gguf" and stem == level.stem and path.parent.resolve() == folder:
                raise OutputError(
                    f"{path} is what is read, and {level.level} would take its place; leave {level.level} out or name "
                    "another folder"
                )


def fingerprint(plan: ConversionPlan, level: LevelPlan) -> Fingerprint:
    """Changes whenever a level's bytes could, one value for each of ASPECTS."""
    layout = [
        f"{file.path.name} {tensor.spec.name} {_word(tensor.encoding)} {tensor.offset - len(file.header)}"
        for file in level.files
        for tensor in file.tensors
    ]
    files = [f"{file.path.name} {file.n_bytes} {file.mtime_ns}" for file in plan.source.files]
    files += [tensor.content.hex() for tensor in plan.source.tensors.values() if tensor.content is not None]
    metadata = [repr((key, value)) for key, value in level.metadata.items() if key not in VERSION_KEYS]
    return {
        "source": _digest(files),
        "recipe": _digest(layout),
        "metadata": _digest(metadata),
        "imatrix": plan.importance.sha256 if plan.importance is not None else "",
        "versions": ", ".join(f"{key} {value}" for key, value in versions().items()),
    }


def _word(encoding: Encoding) -> str:
    """Of a plain level, as it always was, so that what an earlier version made is still known."""
    return encoding.type.name if encoding.search is Search.GGML else f"{encoding.type.name}:{encoding.search}"


def _state(plan: ConversionPlan, level: LevelPlan, overwrite: bool) -> LevelState:
    """What there is of a level, in so far as it is of use. Raises OutputError where it is in the way."""
    mark = fingerprint(plan, level)
    state = examine(level, mark)
    if overwrite:
        return LevelState() if state.complete or state.begun_otherwise else state
    if state.obstacles:
        raise OutputError(
            f"{state.obstacles[0]} already exists and was not made by this conversion; use --force to replace it, "
            "or name another folder"
        )
    if state.begun_otherwise is not None:
        changed = [words for key, words in ASPECTS.items() if state.begun_otherwise.get(key) != mark[key]]
        raise OutputError(
            f"{level.stem} in {level.folder} was begun by another conversion and is unfinished: "
            f"{' and '.join(changed)} changed since; use --force to begin it anew, or name another folder"
        )
    return state


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
