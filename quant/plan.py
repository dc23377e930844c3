"""Source + recipes → every file, and every tensor's place in it, before the first byte is written. Pure, no I/O.

A level lies in a folder of its own, as published: DIR/Q4_K_M/Name-Q4_K_M.gguf, or Name-Q4_K_M-00001-of-00002.gguf and
so on where one file would be larger than a shard may be. Shards are cut as llama.cpp's `gguf-split --split-max-size`
cuts them (tools/gguf-split/gguf-split.cpp, commit 0c1e57098). estimate.py says what a plan costs.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quant.header import Metadata, Value, ValueType, header, padded
from quant.imatrix import ImportanceMatrix, check_fits, imatrix_metadata
from quant.metadata import at_recipe
from quant.provenance import described
from quant.recipes import Encoding, TensorSpec, types
from quant.source import Source
from runtime.errors import OutputError
from runtime.ggml import GgmlType
from runtime.levels import EVERY_LEVEL, Recipe
from runtime.library import file_stem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


SHARD_BYTES = 48_000_000_000
"""Tensor bytes of a shard at most. Hugging Face takes files up to 50 GB."""

EncodedTensor = tuple[TensorSpec, Encoding]


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor in a file: how it is made, and where it starts in bytes from the start of the file."""

    spec: TensorSpec
    encoding: Encoding
    offset: int

    @property
    def type(self) -> GgmlType:
        return self.encoding.type

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

    recipe: Recipe
    metadata: Metadata
    """Of the first file, without what says that it is one of several."""
    files: tuple[FilePlan, ...]

    @property
    def level(self) -> str:
        """The recipe's name."""
        return self.recipe.name

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

    @property
    def tensors(self) -> tuple[PlacedTensor, ...]:
        """Of all files, in order."""
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Without headers and padding."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / sum(tensor.spec.n_elements for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion will write, to the byte."""

    source: Source
    levels: tuple[LevelPlan, ...]
    importance: ImportanceMatrix | None = None

    @property
    def read_bytes(self) -> int:
        """Weights of the source; they are read once, however many levels there are."""
        return self.source.n_bytes

    @property
    def write_bytes(self) -> int:
        return sum(level.n_bytes for level in self.levels)

    @property
    def described(self) -> Mapping[str, str]:
        """What a manifest says of what the levels are made of."""
        matrix = {"imatrix_sha256": self.importance.sha256} if self.importance is not None else {}
        return {**described(self.source), **matrix}

    def importance_of(self, spec: TensorSpec) -> "NDArray[np.float32] | None":
        """Of each column of a tensor, (row_length,); None where it has none."""
        return self.importance.of(spec) if self.importance is not None else None

    def means_of(self, spec: TensorSpec) -> "NDArray[np.float32] | None":
        """What each column is multiplied with on average, (row_length,); None where that is not known."""
        return self.importance.mean_of(spec) if self.importance is not None else None


def plan_conversion(
    source: Source,
    recipes: Iterable[Recipe],
    folder: Path,
    *,
    elsewhere: Mapping[str, Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
    importance: ImportanceMatrix | None = None,
) -> ConversionPlan:
    """Lay out recipes (repeats count once) below `folder`, or below the folder that `elsewhere` gives for their name.

    Raises OutputError for an unusable name, RecipeError for a recipe that the model cannot follow, ImatrixError for an
    importance matrix of another model.
    """
    stem = file_stem(source.name)
    if not stem:
        raise OutputError(
            f"the model's name {source.name!r} leaves nothing to name a file with; use letters and digits"
        )
    wanted = tuple(dict.fromkeys(recipes))
    if not wanted:
        raise OutputError(f"no level was asked for; the levels are {', '.join(EVERY_LEVEL)}")
    extra = {}
    if importance is not None:
        check_fits(importance, source.specs)
        extra = imatrix_metadata(importance)
    plans = []
    for recipe in wanted:
        chosen = types(source.shape, recipe, source.specs)
        encoded = [(spec, Encoding.of(chosen[spec.name], recipe.search)) for spec in source.specs]
        metadata = at_recipe(source.metadata, recipe, extra)
        base = (elsewhere or {}).get(recipe.name, folder) / recipe.name / f"{stem}-{recipe.name}"
        plans.append(LevelPlan(recipe, metadata, _files(metadata, encoded, base, shard_bytes)))
    return ConversionPlan(source, tuple(plans), importance)


def _files(metadata: Metadata, encoded: Sequence[EncodedTensor], base: Path, shard_bytes: int) -> tuple[FilePlan, ...]:
    groups = _cut(encoded, shard_bytes)
    if len(groups) == 1:
        return (_file(base.with_name(f"{base.name}.gguf"), metadata, encoded),)
    files = []
    for i, group in enumerate(groups):
        keys = {
            "split.no": Value(ValueType.UINT16, i),
            "split.tensors.count": Value(ValueType.INT32, len(encoded)),
            "split.count": Value(ValueType.UINT16, len(groups)),
        }
        path = base.with_name(f"{base.name}-{i + 1:05d}-of-{len(groups):05d}.gguf")
        files.append(_file(path, {**metadata, **keys} if i == 0 else keys, group))
    return tuple(files)


def _file(path: Path, metadata: Metadata, encoded: Sequence[EncodedTensor]) -> FilePlan:
    start = header(metadata, [(spec, encoding.type) for spec, encoding in encoded])
    placed = tuple(
        PlacedTensor(spec, encoding, at) for (spec, encoding), at in zip(encoded, start.offsets, strict=True)
    )
    return FilePlan(path, start.data, placed, start.file_bytes)


def _cut(encoded: Sequence[EncodedTensor], shard_bytes: int) -> list[list[EncodedTensor]]:
    """Consecutive tensors whose padded sizes stay within `shard_bytes`; a larger tensor stands alone."""
    groups: list[list[EncodedTensor]] = [[]]
    filled = 0
    for spec, encoding in encoded:
        n_bytes = padded(spec.n_bytes(encoding.type))
        if groups[-1] and filled + n_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((spec, encoding))
        filled += n_bytes
    return groups
