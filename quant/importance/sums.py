"""Sums and sums of squares: how much goes into each column of each weight.

`Collector` watches a model compute and adds up, for every product with a weight of a layer, each element of what the
weight is multiplied with, and its square, column by column. Which products count, and what a count is, follows
llama-imatrix: `IMatrixCollector::collect_imatrix` of tools/imatrix/imatrix.cpp, llama.cpp 0c1e57098. It adds squares
alone, in float32; here the rows of one ubatch are added in float32, and these sums in float64.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant.imatrix_file import Sum
from runtime.errors import ModelFileError
from runtime.ggml import GgmlType
from runtime.native_graph import Node

LEAST_ROWS = 16
"""llama-imatrix passes over products of fewer tokens."""

OUTPUT = "output.weight"


Sums = Mapping[str, Sum]
"""Name of a weight → what was added up for it."""


def total(parts: Iterable[Sums]) -> Sums:
    """All parts together. What is of the same weight must be of the same shape."""
    result: dict[str, Sum] = {}
    for part in parts:
        for name, added in part.items():
            result[name] = result[name] + added if name in result else added
    return result


class Collector:
    """An observer (runtime/native_graph.py) that adds up what the batches since the last `take` went through."""

    def __init__(self, source: Path, *, output: bool = False) -> None:
        """`source` is the model's file, for errors. `output` adds the output matrix, if the model has one."""
        self._source = source
        self._output = output
        self._added: dict[str, NDArray[np.float64]] = {}  # squares and totals, (2, row_length)
        self._counts: dict[str, int] = {}
        self._last_input: tuple[int, str] | None = None
        self._last_sums: NDArray[np.float32] = np.empty((2, 0), np.float32)
        self._shared_by: set[str] = set()

    def wants(self, node: Node) -> bool:
        """Raises ModelFileError for a model with experts."""
        operation = node.operation
        if operation == "MUL_MAT_ID":
            raise ModelFileError(
                f"{self._source}: a model with experts, and Bise measures dense models only; take llama-imatrix"
            )
        if operation != "MUL_MAT":
            return False
        inputs = node.source(1)
        if inputs.type != GgmlType.F32 or len(inputs.shape) < 2 or inputs.shape[-2] < LEAST_ROWS:
            return False
        name = node.source(0).name
        return name.startswith("blk.") or (self._output and name == OUTPUT)

    def observe(self, node: Node) -> None:
        """Raises ModelFileError for numbers that are not finite."""
        weight, inputs = node.source(0), node.source(1)
        name = weight.name
        if len(weight.shape) > 2:
            raise ModelFileError(f"{self._source}: {name} is no matrix, and Bise collects for matrices only")
        # q, k and v read the same input one after the other, and so do gate and up. A weight that comes again is of the
        # next ubatch, whose tensors may lie where those of the last one lay.
        identity = (inputs.address, inputs.name)
        if identity != self._last_input or name in self._shared_by:
            rows = inputs.floats().reshape(-1, inputs.shape[-1])
            squares = np.einsum("ij,ij->j", rows, rows)
            if not np.isfinite(squares).all():
                raise ModelFileError(
                    f"{self._source}: what {name} is multiplied with is not finite; the file is damaged, make it again"
                )
            self._last_sums = np.stack([squares, rows.sum(axis=0)])
            self._last_input = identity
            self._shared_by.clear()
        self._shared_by.add(name)
        if name in self._added:
            self._added[name] += self._last_sums
        else:
            self._added[name] = self._last_sums.astype(np.float64)
        n_rows = int(np.prod(inputs.shape[:-1]))
        self._counts[name] = self._counts.get(name, 0) + n_rows

    def take(self) -> Sums:
        """What was added up since the last time."""
        taken = {
            name: Sum(squares[None], np.array([self._counts[name]]), totals[None])
            for name, (squares, totals) in self._added.items()
        }
        self._added, self._counts, self._last_input = {}, {}, None
        return taken
