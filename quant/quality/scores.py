"""Logits → figures of each token: its negative log-likelihood, its divergence from a base model.

Takes float32 logits (T, V), the tokens that really followed (T,), and for a comparison the base model's
log-probabilities as baselog.py keeps them. Gives float64 arrays (T,), all in nats. Rows are worked on a block at a time
that stays in the processor's cache; nothing of size (T, V) is made. Exponentials are float32 and sums double, as in
llama-perplexity (llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp:60 and :203).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK_ELEMENTS = 1 << 17

_LOWEST_LOG_PROB = np.float32(-16)
"""Base entries at or below it do not count in a divergence (perplexity.cpp:228)."""


@dataclass(frozen=True, slots=True)
class BaseRows:
    """Log-probabilities of a base model, 16 bits each: ln p = scale · steps + low."""

    scale: NDArray[np.float32]  # (T,)
    low: NDArray[np.float32]  # (T,)
    steps: NDArray[np.uint16]  # (T, V)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The figures of tokens under a model and under the base it is compared with. All arrays are (T,)."""

    nll: NDArray[np.float64]
    nll_base: NDArray[np.float64]
    kld: NDArray[np.float64]
    """KL divergence of the model from the base, Σ p_base · (ln p_base − ln p)."""
    p_diff: NDArray[np.float64]
    """Probability of the true token: the model's minus the base's."""
    same_top: NDArray[np.bool_]
    """Whether both find the same token likeliest."""


def concatenate(parts: list[Comparison]) -> Comparison:
    """The tokens of all parts, in order."""
    return Comparison(
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.nll_base for part in parts]),
        np.concatenate([part.kld for part in parts]),
        np.concatenate([part.p_diff for part in parts]),
        np.concatenate([part.same_top for part in parts]),
    )


def losses(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """Negative log-likelihood of each target, (T,), in nats."""
    top, log_sum = normalizers(logits)
    return _nll(logits, targets, top, log_sum)


def normalizers(logits: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Of each row its largest logit (T,), and ln Σ exp(logit − largest) (T,): ln p = logit − largest − log_sum."""
    top = logits.max(axis=1)
    total = np.empty(len(logits))
    scratch = np.empty((rows_per_block(logits.shape[1]), logits.shape[1]), np.float32)
    for rows in blocks(logits):
        part = np.subtract(logits[rows], top[rows, None], out=scratch[: rows.stop - rows.start])
        np.exp(part, out=part).sum(axis=1, dtype=np.float64, out=total[rows])
    return top, np.log(total)


def compare(logits: NDArray[np.float32], base: BaseRows, targets: NDArray[np.int32]) -> Comparison:
    """Judge each row against the base's row of the same position."""
    top, log_sum = normalizers(logits)
    nll = _nll(logits, targets, top, log_sum)
    index = np.arange(len(targets))
    nll_base = -(base.scale * base.steps[index, targets] + base.low).astype(np.float64)
    normalizer = (top + log_sum).astype(np.float32)
    kld = np.empty(len(targets))
    log_p, gap = np.empty((2, rows_per_block(logits.shape[1]), logits.shape[1]), np.float32)
    for rows in blocks(logits):
        n = rows.stop - rows.start
        log_p_base = np.multiply(base.steps[rows], base.scale[rows, None], out=log_p[:n])
        log_p_base += base.low[rows, None]
        difference = np.subtract(log_p_base, logits[rows], out=gap[:n])
        difference += normalizer[rows, None]
        np.copyto(difference, 0, where=log_p_base <= _LOWEST_LOG_PROB)
        difference *= np.exp(log_p_base, out=log_p_base)
        difference.sum(axis=1, dtype=np.float64, out=kld[rows])
    return Comparison(
        nll=nll,
        nll_base=nll_base,
        kld=kld,
        p_diff=np.exp(-nll) - np.exp(-nll_base),
        # Steps rise with the probability, and both sides give ties to the lowest id.
        same_top=logits.argmax(axis=1) == base.steps.argmax(axis=1),
    )


def rows_per_block(n_vocab: int) -> int:
    """Rows that are worked on together."""
    return max(1, _BLOCK_ELEMENTS // n_vocab)


def blocks(logits: NDArray[np.float32]) -> Iterator[slice]:
    """The rows, a block at a time."""
    step = rows_per_block(logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))


def _nll(
    logits: NDArray[np.float32], targets: NDArray[np.int32], top: NDArray[np.float32], log_sum: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The difference of logits stays float32, as in llama-perplexity; it is exact where it matters."""
    nll: NDArray[np.float64] = log_sum - (logits[np.arange(len(targets)), targets] - top)
    return nll
