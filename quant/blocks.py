"""Float32 rows of one tensor → the bytes of its blocks, in pieces small enough for every core to hold one.

Rows are quantized independently of each other, so a tensor's bytes do not depend on how it is cut. Knows nothing of
files or of the level a type was chosen for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant.kernels import Kernels, best
from quant.recipes import TensorSpec
from runtime.errors import CheckpointError, UserError
from runtime.ggml import GgmlType, block_bytes, row_bytes, widen
from runtime.levels import Search

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK_BYTES = 2 << 20
"""Float32 bytes of a chunk: a few hundredths of a second of work a type, and little memory even on 64 cores."""

FLOAT16_MAX = 65504.0
"""A block keeps its scale as float16; no weight above this is sure to survive."""

SCALES = {
    GgmlType.Q4_0: (0,),
    GgmlType.Q5_0: (0,),
    GgmlType.Q5_1: (0, 2),
    GgmlType.Q2_K: (80, 82),
    GgmlType.Q3_K: (108,),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q5_K: (0, 2),
    GgmlType.Q6_K: (208,),
}
"""Where in a block its float16 numbers lie (ggml/src/ggml-common.h, llama.cpp 0c1e57098): of the types whose making
the importance of columns steers."""


class UnusableWeightError(CheckpointError):
    """A weight that no block can hold. What was converted so far is of no use, whoever repeats the run."""


class UnusableImportanceError(UserError):
    """Importance so large or uneven that sums over a block overflow. What was converted so far is of no use either."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `first` to `first + count` of a tensor."""

    first: int
    count: int


def chunks(spec: TensorSpec, multiple: int = 1, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a tensor into chunks of about `chunk_bytes` as float32, each a multiple of `multiple` rows."""
    assert spec.rows % multiple == 0, (spec, multiple)
    count = max(chunk_bytes // (4 * spec.row_length * multiple), 1) * multiple
    for first in range(0, spec.rows, count):
        yield Chunk(first, min(count, spec.rows - first))


def to_float32(rows: "NDArray[Any]", dtype: GgmlType) -> "NDArray[np.float32]":
    """Rows as their source stores them (float32, or uint16 of F16 or BF16 bits) as float32, exactly."""
    import numpy as np

    if dtype is GgmlType.F32:
        return rows
    wide = np.empty(rows.shape, np.float32)
    widen(rows.view(np.uint8).reshape(-1), dtype, wide)
    return wide


def check_weights(rows: "NDArray[np.float32]", types: Iterable[GgmlType], name: str, first: int = 0) -> None:
    """Raise UnusableWeightError if a weight is NaN, infinite, or too large for one of `types`.

    It names the tensor, and the row and column, where row `first` of the tensor is the first of these.
    """
    import numpy as np

    largest = max(float(rows.max()), -float(rows.min()))
    if not largest < float("inf"):  # NaN compares false, and wins in numpy's max and min
        row, column = np.argwhere(~np.isfinite(rows))[0].tolist()
        raise UnusableWeightError(
            f"{name} holds a weight that is NaN or infinite, in row {first + row:,}, column {column:,}; download the "
            "checkpoint again"
        )
    too_small = [type_.name for type_ in types if type_ not in (GgmlType.F32, GgmlType.BF16)]
    if largest > FLOAT16_MAX and too_small:
        row, column = np.argwhere(np.abs(rows) == largest)[0].tolist()
        raise UnusableWeightError(
            f"{name} holds a weight of {largest:,.0f} in row {first + row:,}, column {column:,}, and {too_small[0]} "
            f"reaches {FLOAT16_MAX:,.0f}; only the BF16 level can hold it"
        )


def encode(
    rows: "NDArray[np.float32]",
    type_: GgmlType,
    importance: "NDArray[np.float32] | None" = None,
    name: str = "a tensor",
    kernels: Kernels | None = None,
    search: Search = Search.GGML,
    means: "NDArray[np.float32] | None" = None,
) -> "NDArray[np.uint8]":
    """Checked rows (count, row_length) as blocks of `type_`: (count * row_bytes,), by the best kernels or those given.

    `importance` (row_length,), finite and not negative, says how much each column matters, the same for all rows, and
    `means` (row_length,), for the best search, what it is multiplied with on average. Raises UnusableImportanceError,
    with the tensor's name, where it makes blocks that hold no numbers.
    """
    import numpy as np

    blocks = np.empty(rows.shape[0] * row_bytes(type_, rows.shape[1]), np.uint8)
    (kernels or best()).encode(rows, type_, blocks, importance, search, means)
    if importance is not None and not _all_finite(blocks, type_):
        raise UnusableImportanceError(
            f"{name} cannot be {type_.name} with this importance matrix: its values for it, up to "
            f"{float(importance.max()):.3g}, are too large to add up; make the matrix again"
        )
    return blocks


def _all_finite(blocks: "NDArray[np.uint8]", type_: GgmlType) -> bool:
    """Whether all scales are numbers, as llama-quantize asks of every row (`ggml_validate_row_data`)."""
    bytes_ = blocks.reshape(-1, block_bytes(type_))
    # a float16 whose exponent, bits 2 to 6 of the higher byte, is all ones is infinite or NaN
    return not any(((bytes_[:, at + 1] & 0x7C) == 0x7C).any() for at in SCALES.get(type_, ()))
