"""One model on one text: chunks go in, figures of every scored token come out.

The only place that holds logits, one batch of chunks at a time. Decoding and statistics take turns: the logits are a
view into the engine's memory, and copying them to overlap the two would cost more than it gains where decoding is slow.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from quant.quality.baselog import BaseLog, BaseLogWriter
from quant.quality.scores import Comparison, compare, concatenate, losses
from quant.quality.texts import first_scored, model_input
from runtime.errors import ModelFileError

if TYPE_CHECKING:
    from runtime.native import ModelInfo

_HIGHEST_LOSS = 700.0
"""Nats; exp of more overflows. A model that works stays below ln V plus a few tens."""


class Scorer(Protocol):
    """A loaded model that gives the logits of whole chunks; `runtime.scoring.ScoringEngine` is one."""

    n_vocab: int
    n_ctx: int
    """Tokens in a chunk."""
    n_seq: int
    """Most chunks decoded together. llama-perplexity's number is needed for its figures."""
    bos: int
    adds_bos: bool

    def info(self) -> "ModelInfo": ...

    def tokenize(self, text: str) -> NDArray[np.int32]: ...

    def logits(self, chunks: NDArray[np.int32], first: int) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of all scored tokens (T,), in order."""

    nll: NDArray[np.float64]
    comparison: Comparison | None
    """With the base, if there was one."""
    seconds: float
    """In the engine."""


def measure(
    scorer: Scorer,
    chunks: NDArray[np.int32],
    *,
    source: Path,
    base: BaseLog | None = None,
    keep: BaseLogWriter | None = None,
    on_chunk: Callable[[int, float], None] = lambda _, __: None,
) -> Measurement:
    """Score chunks (C, n_ctx); compare with `base`, or write the log-probabilities to `keep`.

    `on_chunk` is told how many chunks are done and their mean loss. Raises ModelFileError, which names the `source` of
    the model, for logits that are no numbers; the engine's errors, BaseLogError, OutputError.
    """
    first = first_scored(scorer.n_ctx)
    targets = chunks[:, first + 1 :]
    nll = np.empty(targets.shape)
    comparisons: list[Comparison] = []
    seconds = 0.0
    done = 0
    for batch in _batches(model_input(chunks, scorer.bos, scorer.adds_bos), scorer.n_seq):
        began = time.monotonic()
        logits = scorer.logits(batch, first)  # (S, n_ctx − first, V)
        seconds += time.monotonic() - began
        for rows in logits[:, :-1]:  # the last position predicts what is not in the chunk
            if base is not None:
                comparisons.append(compare(rows, base.read(), targets[done]))
                nll[done] = comparisons[-1].nll
            else:
                nll[done] = losses(rows, targets[done])
            if n_lost := int((~(nll[done] < _HIGHEST_LOSS)).sum()):  # NaN is not below anything
                raise ModelFileError(
                    f"{source}: gives {n_lost} of the {len(nll[done])} tokens of chunk {done + 1} no probability at "
                    "all; the file is damaged, make it again"
                )
            if keep is not None:
                keep.append(rows)
            done += 1
            on_chunk(done, float(nll[:done].mean()))
    return Measurement(nll.reshape(-1), concatenate(comparisons) if base is not None else None, seconds)


def _batches(chunks: NDArray[np.int32], size: int) -> Iterator[NDArray[np.int32]]:
    for start in range(0, len(chunks), size):
        yield chunks[start : start + size]
