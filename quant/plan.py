"""Checkpoint + levels → every file, and every tensor's place in it, before the first byte is written. Pure, no I/O.

A level lies in a folder of its own, as published: DIR/Q4_K_M/Name-Q4_K_M.gguf, or Name-Q4_K_M-00001-of-00002.gguf and
so on where one file would be larger than a shard may be. Shards are cut as llama.cpp's `gguf-split --split-max-size`
cuts them (tools/gguf-split/gguf-split.cpp, commit 0c1e57098). `str(plan)` is what `--dry-run` prints.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.checkpoint import Checkpoint
from quant.header import Metadata, Value, ValueType, header, padded
from quant.metadata import at_level
from quant.recipes import TensorSpec, tensors, types
from runtime.errors import OutputError
from runtime.ggml import GgmlType
from runtime.levels import LEVELS, ORIGINAL
from runtime.library import file_stem

SHARD_BYTES = 48_000_000_000
"""Tensor bytes of a shard at most. Hugging Face takes files up to 50 GB."""

TypedTensor = tuple[TensorSpec, GgmlType]


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor in a file: its type, and where it starts in bytes from the start of the file."""

    spec: TensorSpec
    type: GgmlType
    offset: int

    @property
    def n_bytes(self) -> int:
        return self.spec.n_bytes(self.type)


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One GGUF file: the bytes it opens with, its tensors, its size."""

    path: Path
    header: bytes
    tensors: tuple[PlacedTensor, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class LevelPlan:
    """The files of a level; llama.cpp loads them by the first one."""

    level: str
    files: tuple[FilePlan, ...]

    @property
    def folder(self) -> Path:
        return self.files[0].path.parent

    @property
    def stem(self) -> str:
        """The name that its files share, such as "Demo-Q4_K_M"."""
        return re.sub(r"-\d{5}-of-\d{5}$", "", self.files[0].path.stem)

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion will write, to the byte."""

    checkpoint: Checkpoint
    folder: Path
    levels: tuple[LevelPlan, ...]

    @property
    def read_bytes(self) -> int:
        """Weights of the checkpoint; they are read once, however many levels there are."""
        return sum(tensor.n_bytes for tensor in self.checkpoint.tensors.values())

    @property
    def write_bytes(self) -> int:
        return sum(level.n_bytes for level in self.levels)

    def __str__(self) -> str:
        n_weights = sum(spec.n_elements for spec in tensors(self.checkpoint.shape))
        lines = [f"read   {self.read_bytes:>19,} bytes   {self.checkpoint.folder}"]
        for level in self.levels:
            bits = 8 * sum(tensor.n_bytes for file in level.files for tensor in file.tensors) / n_weights
            for i, file in enumerate(level.files):
                note = f"   {level.level}, {bits:.2f} bits a weight" if i == 0 else ""
                lines.append(f"write  {file.n_bytes:>19,} bytes   {file.path}{note}")
        return "\n".join([*lines, f"total  {self.write_bytes:>19,} bytes to write"])


def plan_conversion(
    checkpoint: Checkpoint,
    metadata: Metadata,
    name: str,
    levels: Iterable[str],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> ConversionPlan:
    """Lay out `levels` (of LEVELS, or ORIGINAL; repeats count once) below `folder`.

    `metadata` is that of the BF16 file; `name` names the files. Raises OutputError for an unknown level or an unusable
    name.
    """
    stem = file_stem(name)
    if not stem:
        raise OutputError(f"the model's name {name!r} leaves nothing to name a file with; use letters and digits")
    wanted = tuple(dict.fromkeys(levels))
    if unknown := [level for level in wanted if level not in (*LEVELS, ORIGINAL)]:
        raise OutputError(f"there is no level {unknown[0]}; the levels are {', '.join((*LEVELS, ORIGINAL))}")
    if not wanted:
        raise OutputError(f"no level was asked for; the levels are {', '.join((*LEVELS, ORIGINAL))}")
    plans = []
    for level in wanted:
        chosen = types(checkpoint.shape, level)
        typed = [(spec, chosen[spec.name]) for spec in tensors(checkpoint.shape)]
        files = _files(at_level(metadata, level), typed, folder / level / f"{stem}-{level}", shard_bytes)
        plans.append(LevelPlan(level, files))
    return ConversionPlan(checkpoint, folder, tuple(plans))


def _files(metadata: Metadata, typed: Sequence[TypedTensor], base: Path, shard_bytes: int) -> tuple[FilePlan, ...]:
    groups = _cut(typed, shard_bytes)
    if len(groups) == 1:
        return (_file(base.with_name(f"{base.name}.gguf"), metadata, typed),)
    files = []
    for i, group in enumerate(groups):
        keys = {
            "split.no": Value(ValueType.UINT16, i),
            "split.tensors.count": Value(ValueType.INT32, len(typed)),
            "split.count": Value(ValueType.UINT16, len(groups)),
        }
        path = base.with_name(f"{base.name}-{i + 1:05d}-of-{len(groups):05d}.gguf")
        files.append(_file(path, {**metadata, **keys} if i == 0 else keys, group))
    return tuple(files)


def _file(path: Path, metadata: Metadata, typed: Sequence[TypedTensor]) -> FilePlan:
    start = header(metadata, typed)
    placed = tuple(PlacedTensor(spec, type_, at) for (spec, type_), at in zip(typed, start.offsets, strict=True))
    return FilePlan(path, start.data, placed, start.file_bytes)


def _cut(typed: Sequence[TypedTensor], shard_bytes: int) -> list[list[TypedTensor]]:
    """Consecutive tensors whose padded sizes stay within `shard_bytes`; a larger tensor stands alone."""
    groups: list[list[TypedTensor]] = [[]]
    filled = 0
    for spec, type_ in typed:
        n_bytes = padded(spec.n_bytes(type_))
        if groups[-1] and filled + n_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((spec, type_))
        filled += n_bytes
    return groups
