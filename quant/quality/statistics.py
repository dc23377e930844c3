"""Figures of single tokens → perplexity and divergence with their errors, as llama-perplexity states them.

Takes the arrays (T,) of scores.py, gives plain numbers. An error is one standard deviation of the mean, tokens taken as
independent. Natural logarithms; probabilities and shares are fractions of 1, not per cent. The formulas are those of
llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp:1750–1990; where it subtracts squared means, variances here are
taken around the mean, which is the same figure without the loss of digits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.quality.scores import Comparison

PERCENTS = (0.0, 0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)
"""The percentiles that are kept; 0 is the minimum, 50 the median, 100 the maximum."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and one standard deviation of it."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Distribution:
    """How a figure of single tokens is spread."""

    mean: Estimate
    percentiles: Mapping[str, float]
    """Keys are PERCENTS, written as short as they go: "0", "0.1", "1", …"""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model compared with its base, token by token."""

    ppl: Estimate
    ppl_base: Estimate
    """From the 16-bit base log-probabilities, which lose the tail below 16 nats: slightly less than the base's own."""
    correlation: float | None
    """Of the two models' token losses; None where one of them does not vary."""
    ln_ratio: Estimate
    """ln(PPL / PPL base). Its error and the next two know that both models read the same tokens."""
    ratio: Estimate
    difference: Estimate
    kld: Distribution
    """KL divergence from the base, in nats a token."""
    p_diff: Distribution
    """Probability of the true token, minus the base's."""
    p_diff_rms: Estimate
    same_top: Estimate
    """Share of tokens where both find the same token likeliest."""


def perplexity(nll: NDArray[np.float64]) -> Estimate:
    """exp of the mean loss of all tokens (T,), T ≥ 2."""
    mean = _mean(nll)
    value = math.exp(mean.value)
    return Estimate(value, value * mean.error)


def divergence(tokens: Comparison) -> Divergence:
    """Every statistic of a comparison of T ≥ 2 tokens."""
    ppl, ppl_base = perplexity(tokens.nll), perplexity(tokens.nll_base)
    # The error of a difference of means of paired values is that of the mean of their differences: the covariance of
    # perplexity.cpp:1908 is in it, and it cannot come out negative.
    ln_ratio = _mean(tokens.nll - tokens.nll_base)
    ratio = math.exp(ln_ratio.value)
    difference = _mean(ppl.value * tokens.nll - ppl_base.value * tokens.nll_base)
    square = _mean(tokens.p_diff**2)
    rms = math.sqrt(square.value)
    n, share = len(tokens.same_top), float(tokens.same_top.mean())
    return Divergence(
        ppl=ppl,
        ppl_base=ppl_base,
        correlation=_correlation(tokens.nll, tokens.nll_base),
        ln_ratio=ln_ratio,
        ratio=Estimate(ratio, ratio * ln_ratio.error),
        difference=Estimate(ppl.value - ppl_base.value, difference.error),
        kld=_distribution(tokens.kld),
        p_diff=_distribution(tokens.p_diff),
        p_diff_rms=Estimate(rms, 0.5 * square.error / rms if rms > 0 else 0.0),
        same_top=Estimate(share, math.sqrt(share * (1 - share) / (n - 1))),
    )


def _mean(values: NDArray[np.float64]) -> Estimate:
    assert len(values) >= 2, "one token has no error"
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values) - 1))


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread > 0 else None


def _distribution(values: NDArray[np.float64]) -> Distribution:
    """Percentiles lie between the two nearest of the sorted values, linearly (perplexity.cpp:1930)."""
    return Distribution(
        _mean(values),
        {
            f"{percent:g}": float(value)
            for percent, value in zip(PERCENTS, np.percentile(values, PERCENTS), strict=True)
        },
    )
