"""Measures how much each tensor matters: makes it alone at a type, in the loaded model, and asks what that changes.

One load of the model serves all: a tensor's weights are overwritten where they lie, by the values that blocks of the
type would give, stored as the model stores them; chunks of a text are read; the weights are put back. What is measured
is the KL divergence of the predictions from those of the undisturbed model, whose log-probabilities stay in
memory. Every measurement is kept as it is made (sensitivity.py). Knows nothing of llama.cpp.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quant.blocks import Chunk, check_weights, chunks, encode, to_float32
from quant.choosing.sensitivity import Measurement, Sensitivity, SensitivityError
from quant.imatrix import ImportanceMatrix
from quant.naming import is_rotary
from quant.quality.measurement import Scorer
from quant.quality.scores import blocks, normalizers
from quant.quality.texts import first_scored, model_input, n_scored
from quant.recipes import Encoding, TensorSpec
from quant.source import Source, WeightReader
from quant.work import usable_cores
from runtime.ggml import GgmlType, dequantize, initialize, row_bytes
from runtime.levels import Search

CONTEXT = 512
"""Tokens of a chunk, as where levels are judged."""

MOST_BASE_BYTES = 4 << 30
"""Memory for the undisturbed model's log-probabilities at most: 130 chunks of 512 tokens at a vocabulary of 32,768."""


class Weight(Protocol):
    """One tensor of the loaded model; `runtime.native_graph.Tensor` is one."""

    @property
    def type(self) -> int: ...

    @property
    def n_bytes(self) -> int: ...

    def read(self) -> NDArray[np.uint8]: ...

    def write(self, data: NDArray[np.uint8]) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is, in measurements."""

    tensors: tuple[str, ...]
    """Being measured; none while the undisturbed model reads."""
    type: str
    done: int
    """Earlier runs included."""
    total: int
    seconds_left: float | None
    """None until there is a rate to judge by."""
    tokens_per_second: float


class Disturbance:
    """A loaded model, the text it reads, and the weights it is disturbed with."""

    def __init__(
        self,
        scorer: Scorer,
        weights: Mapping[str, Sequence[Weight]],
        source: Source,
        importance: ImportanceMatrix | None,
        search: Search = Search.GGML,
        threads: int | None = None,
    ) -> None:
        """`weights` are those of the loaded model, by name; all that have a name hold the same."""
        self._scorer = scorer
        self._weights = weights
        self._source = source
        self._importance = importance
        self._search = search
        self._threads = threads or usable_cores()
        self._specs = {spec.name: spec for spec in source.specs}

    def measure(
        self,
        tokens: NDArray[np.int32],
        wanted: Sequence[tuple[Sequence[str], GgmlType]],
        known: Sensitivity,
        keep: Callable[[Sensitivity], None],
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> Sensitivity:
        """Measure what `known` lacks of `wanted` on chunks `tokens` (C, n_ctx); `keep` is given all after each.

        Whatever ends it early, the model is as it was. Raises SensitivityError, the engine's and the reader's errors.
        """
        left = [(tuple(names), type_) for names, type_ in wanted if known.find(names, type_) is None]
        if not left:
            return known
        n_bytes = 4 * len(tokens) * n_scored(self._scorer.n_ctx) * self._scorer.n_vocab
        if n_bytes > MOST_BASE_BYTES:
            raise SensitivityError(
                f"{len(tokens)} chunks need {n_bytes:,} bytes of memory for log-probabilities, and at most "
                f"{MOST_BASE_BYTES:,} are taken; take fewer chunks"
            )
        for type_ in {type_ for _, type_ in left}:
            initialize(type_)
        total, began = len(wanted), time.monotonic()
        progress(Progress((), "", total - len(left), total, None, 0.0))
        base = [_log_probabilities(rows) for rows in self._logits(tokens)]
        rate = tokens.size / max(time.monotonic() - began, 1e-9)
        began = time.monotonic()
        with WeightReader(self._source.files) as reader:
            for done, (names, type_) in enumerate(left):
                seconds_left = (time.monotonic() - began) / done * (len(left) - done) if done else None
                progress(Progress(names, type_.name, total - len(left) + done, total, seconds_left, rate))
                kld = self._disturbed(names, type_, reader, lambda: self._divergence(tokens, base))
                error = float(kld.std()) / math.sqrt(len(kld) - 1)
                klds = tuple(kld.reshape(len(tokens), -1).mean(axis=1).tolist())
                known = replace(known, measurements=(*known.measurements, Measurement(names, type_, klds, error)))
                keep(known)
        return known

    def _logits(self, tokens: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
        """Of each chunk the scored rows, (n_scored, V): a view that the next batch overwrites."""
        first = first_scored(self._scorer.n_ctx)
        read = model_input(tokens, self._scorer.bos, self._scorer.adds_bos)
        for start in range(0, len(read), self._scorer.n_seq):
            yield from self._scorer.logits(read[start : start + self._scorer.n_seq], first)[:, :-1]

    def _divergence(self, tokens: NDArray[np.int32], base: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """From the undisturbed model, of each scored token (T,)."""
        parts = [divergence(rows, its) for rows, its in zip(self._logits(tokens), base, strict=True)]
        return np.concatenate(parts)

    def _disturbed(
        self, names: Sequence[str], type_: GgmlType, reader: WeightReader, score: Callable[[], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """What `score` gives while these tensors are made at that type."""
        if missing := [name for name in names if name not in self._weights]:
            raise SensitivityError(f"the loaded model does not compute with {missing[0]}; load a file of this model")
        before: list[tuple[Weight, NDArray[np.uint8]]] = []
        try:
            for name in names:
                for weight in self._weights[name]:
                    disturbed = self._made(self._specs[name], type_, weight, reader)
                    before.append((weight, weight.read()))
                    weight.write(disturbed)
            return score()
        finally:
            for weight, data in before:
                weight.write(data)

    def _made(self, spec: TensorSpec, type_: GgmlType, weight: Weight, reader: WeightReader) -> NDArray[np.uint8]:
        """A tensor's values at a type, as the loaded model stores them."""
        stored = GgmlType(weight.type)
        made = np.empty(spec.n_bytes(stored), np.uint8)
        if made.nbytes != weight.n_bytes:
            raise SensitivityError(
                f"{spec.name} has {weight.n_bytes:,} bytes in the loaded model, and {made.nbytes:,} by the weights to "
                "make it of; load a file of this model"
            )
        tensor = self._source.tensors[spec.name]
        matrix = self._importance
        columns, means = (matrix.of(spec), matrix.mean_of(spec)) if matrix is not None else (None, None)
        by = Encoding.of(type_, self._search).search

        def make(chunk: Chunk) -> None:
            rows = to_float32(reader.rows(tensor, chunk.first, chunk.count), tensor.dtype)
            check_weights(rows, (type_,), tensor.name, chunk.first)
            values = np.empty_like(rows)
            dequantize(encode(rows, type_, columns, spec.name, search=by, means=means), type_, values)
            start = chunk.first * row_bytes(stored, spec.row_length)
            data = values.view(np.uint8).reshape(-1) if stored is GgmlType.F32 else encode(values, stored)
            made[start : start + len(data)] = data

        with ThreadPoolExecutor(self._threads, "disturb") as pool:
            for _ in pool.map(make, chunks(spec, self._source.shape.head_dim if is_rotary(spec) else 1)):
                pass
        return made


def spread(texts: Sequence[NDArray[np.int32]], count: int) -> NDArray[np.int32]:
    """`count` of all texts' chunks (C, n_ctx), evenly spread over them; all, where there are fewer."""
    every = np.concatenate(texts)
    count = min(count, len(every))
    chosen: NDArray[np.int32] = every[np.arange(count) * len(every) // count]
    return chosen


def divergence(logits: NDArray[np.float32], base: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL divergence from log-probabilities `base` (T, V), of each row (T,): Σ p_base · (ln p_base − ln p).

    With all of both distributions and without rounding it is never below 0 and its first order vanishes, which small
    differences need; scores.py follows llama-perplexity's 16 bits.
    """
    top, log_sum = normalizers(logits)
    found = np.empty(len(logits))
    for rows in blocks(logits):
        difference = base[rows] - logits[rows]
        difference += (top[rows] + log_sum[rows].astype(np.float32))[:, None]
        difference *= np.exp(base[rows])
        difference.sum(axis=1, dtype=np.float64, out=found[rows])
    return found


def _log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(T, V)"""
    top, log_sum = normalizers(logits)
    return logits - (top + log_sum.astype(np.float32))[:, None]
