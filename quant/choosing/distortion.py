"""How far each tensor is from its weights at each type: made by the real encoder, taken back, and compared.

The figure is the squared error of what a tensor's product gives, summed over its rows: Σ rows Σ columns m·(w − q)²,
where m is the importance of a column, the mean square of what it is multiplied with. Without importance, m is 1. Where
the means µ of the columns are known too, it is Σ rows (Σ columns (m − µ²)·(w − q)² + (Σ columns µ·(w − q))²). Large
tensors are sampled: whole chunks of rows, evenly spread. Reads each chunk once for all types.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from quant.blocks import Chunk, check_weights, chunks, encode, to_float32
from quant.imatrix import ImportanceMatrix
from quant.naming import is_rotary
from quant.recipes import Encoding, TensorSpec
from quant.source import Source, WeightReader
from quant.work import WINDOW, Stop, usable_cores
from runtime.errors import UserError
from runtime.ggml import GgmlType, dequantize, initialize
from runtime.levels import Search

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLE = 1 << 22
"""Weights of a tensor that are looked at, at least; smaller tensors are looked at whole."""


@dataclass(frozen=True, slots=True)
class Distortion:
    """Of one tensor, estimated for all its rows where it was sampled."""

    energy: float
    """Σ m·w²: of what its product gives."""
    errors: Mapping[GgmlType, float]
    """Σ m·(w − q)² at each type."""

    def relative(self, type_: GgmlType) -> float:
        """The squared error as a part of the energy."""
        return self.errors[type_] / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is. Weights are those that are looked at."""

    tensor: str
    done: int
    total: int
    seconds: float


def distortions(
    source: Source,
    types: Mapping[str, Sequence[GgmlType]],
    importance: ImportanceMatrix | None = None,
    *,
    search: Search = Search.GGML,
    sample: int = SAMPLE,
    threads: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Distortion]:
    """Tensor name → its distortion at each of `types`, for the tensors that these name.

    `search` is how blocks are made. `progress` is called from this thread. Raises CheckpointError for weights that
    cannot be used, UserError for a number of threads below 1.
    """
    if threads is not None and threads < 1:
        raise UserError(f"{threads} threads cannot measure anything; give 1 or more")
    threads = threads or usable_cores()
    for type_ in {type_ for wanted in types.values() for type_ in wanted}:
        initialize(type_)
    specs = [spec for spec in source.specs if spec.name in types]
    sampled = {spec.name: _sample(spec, source.shape.head_dim, sample) for spec in specs}
    work = ((spec, chunk) for spec in specs for chunk in sampled[spec.name])
    total = sum(chunk.count * spec.row_length for spec in specs for chunk in sampled[spec.name])
    sums: dict[str, NDArray[np.float64]] = {}
    began, done = time.monotonic(), 0
    stop = Stop()
    pool = ThreadPoolExecutor(threads, "distortion")
    window: deque[tuple[TensorSpec, Chunk, Future[NDArray[np.float64]]]] = deque()
    with WeightReader(source.files) as reader:

        def measure(spec: TensorSpec, chunk: Chunk) -> "NDArray[np.float64]":
            return _measure(spec, chunk, source, reader, types[spec.name], importance, search, stop)

        try:
            while True:
                for spec, chunk in islice(work, WINDOW * threads - len(window)):
                    window.append((spec, chunk, pool.submit(measure, spec, chunk)))
                if not window:
                    break
                spec, chunk, future = window.popleft()  # in order, so that sums are the same with any number of threads
                sums[spec.name] = sums.get(spec.name, 0) + future.result()
                done += chunk.count * spec.row_length
                progress(Progress(spec.name, done, total, time.monotonic() - began))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    found = {}
    for spec in specs:
        whole = spec.rows / sum(chunk.count for chunk in sampled[spec.name])
        energy, *errors = (sums[spec.name] * whole).tolist()
        found[spec.name] = Distortion(energy, dict(zip(types[spec.name], errors, strict=True)))
    return found


def _sample(spec: TensorSpec, head_dim: int, sample: int) -> tuple[Chunk, ...]:
    """Chunks of at least `sample` weights, evenly spread over the rows; all of a smaller tensor."""
    every = tuple(chunks(spec, head_dim if is_rotary(spec) else 1))
    wanted = min(len(every), -(-sample // (every[0].count * spec.row_length)))
    return tuple(every[i * len(every) // wanted] for i in range(wanted))


def _measure(
    spec: TensorSpec,
    chunk: Chunk,
    source: Source,
    reader: WeightReader,
    types: Sequence[GgmlType],
    importance: ImportanceMatrix | None,
    search: Search,
    stopped: Callable[[], bool],
) -> "NDArray[np.float64]":
    """In a thread: energy and the error of each type, (1 + len(types),), of one chunk."""
    import numpy as np

    tensor = source.tensors[spec.name]
    rows = to_float32(reader.rows(tensor, chunk.first, chunk.count), tensor.dtype)
    check_weights(rows, types, tensor.name, chunk.first)
    columns, means = (importance.of(spec), importance.mean_of(spec)) if importance is not None else (None, None)
    back = np.empty_like(rows)
    found = [_weighted_square(rows, columns, means)]
    for type_ in types:
        if stopped():
            break
        by = Encoding.of(type_, search).search
        dequantize(encode(rows, type_, columns, spec.name, search=by, means=means), type_, back)
        found.append(_weighted_square(np.subtract(back, rows, out=back), columns, means))
    return np.array(found)


def _weighted_square(
    rows: "NDArray[np.float32]", columns: "NDArray[np.float32] | None", means: "NDArray[np.float32] | None"
) -> float:
    """Σ rows (Σ columns (m − µ²)·x² + (Σ columns µ·x)²) of (rows, row_length)."""
    import numpy as np

    squares = np.einsum("rc,rc->c", rows, rows).astype(np.float64)
    if columns is None:
        return float(squares.sum())
    if means is None:
        return float(squares @ columns)
    return float(squares @ np.maximum(columns - means**2, 0)) + float(((rows @ means).astype(np.float64) ** 2).sum())
