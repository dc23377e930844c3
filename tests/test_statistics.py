"""Figures of tokens and their statistics, against closed forms and against sums written out in plain Python."""

import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.quality import statistics
from quant.quality.baselog import encode
from quant.quality.scores import BaseRows, Comparison, compare, concatenate, losses
from quant.quality.statistics import Estimate, divergence, perplexity

RANDOM = np.random.default_rng(7)


def base_rows(log_p: NDArray[np.float64]) -> BaseRows:
    """Log-probabilities (T, V) as a base file keeps them; V is even."""
    rows = encode(log_p.astype(np.float32))
    return BaseRows(rows["scale"], rows["low"], rows["steps"])


def base_log_p(base: BaseRows) -> NDArray[np.float64]:
    """What a base file says, in double."""
    return base.scale[:, None].astype(np.float64) * base.steps.astype(np.float64) + base.low[:, None].astype(np.float64)


def log_softmax(logits: NDArray[np.float32]) -> list[list[float]]:
    """One number after the other, in double."""
    rows = []
    for row in logits.tolist():
        top = max(row)
        total = math.fsum(math.exp(x - top) for x in row)
        rows.append([x - top - math.log(total) for x in row])
    return rows


@pytest.mark.parametrize("n_vocab", [2, 100, 40_000])
def test_losses_are_those_of_the_softmax(n_vocab: int) -> None:
    logits = (RANDOM.normal(0, 5, (9, n_vocab)) + 30).astype(np.float32)
    targets = RANDOM.integers(0, n_vocab, 9).astype(np.int32)
    expected = [-row[target] for row, target in zip(log_softmax(logits), targets, strict=True)]
    assert losses(logits, targets) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    nll = losses(np.full((50, 4096), 3, np.float32), np.arange(50, dtype=np.int32))
    estimate = perplexity(nll)
    assert estimate.value == pytest.approx(4096, rel=1e-9)
    assert estimate.error == pytest.approx(0, abs=1e-6)


def test_the_error_of_perplexity_is_that_of_the_mean_loss() -> None:
    """Losses of 1 and 3 in equal parts: mean 2, variance 1, so the error of the mean is 1/√(n−1)."""
    estimate = perplexity(np.tile([1.0, 3.0], 50))
    assert estimate.value == pytest.approx(math.exp(2))
    assert estimate.error == pytest.approx(math.exp(2) / math.sqrt(99))


def test_two_known_distributions_have_their_known_divergence() -> None:
    p, q = [0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]
    base = base_rows(np.log([p] * 5))
    logits = np.log([q] * 5).astype(np.float32) + 11
    tokens = compare(logits, base, np.array([0, 1, 2, 3, 0], np.int32))
    assert tokens.kld == pytest.approx([0.25 * math.log(2)] * 5, abs=2e-5)
    assert tokens.nll == pytest.approx([math.log(4)] * 5, rel=1e-6)
    assert tokens.nll_base == pytest.approx(-np.log([p[i] for i in (0, 1, 2, 3, 0)]), abs=2e-5)
    assert tokens.p_diff == pytest.approx([-0.25, 0, 0.125, 0.125, -0.25], abs=2e-5)
    assert tokens.same_top.all()  # of a tie the lowest id counts


def test_the_likeliest_token_is_compared() -> None:
    base = base_rows(np.log([[0.6, 0.4], [0.4, 0.6]]))
    tokens = compare(np.log([[0.9, 0.1], [0.9, 0.1]]).astype(np.float32), base, np.zeros(2, np.int32))
    assert tokens.same_top.tolist() == [True, False]


@pytest.mark.parametrize("n_vocab", [6, 1000, 33_000])
def test_a_comparison_is_the_sum_over_the_vocabulary(n_vocab: int) -> None:
    """Against sums in double over what the base file says; entries at or below −16 do not count."""
    truth = RANDOM.normal(0, 6, (20, n_vocab))
    truth[:, 0] += 20
    base = base_rows(truth)
    logits = (truth + RANDOM.normal(0, 0.5, truth.shape)).astype(np.float32)
    targets = RANDOM.integers(0, n_vocab, 20).astype(np.int32)
    tokens = compare(logits, base, targets)
    expected = []
    for row, row_base in zip(log_softmax(logits), base_log_p(base).tolist(), strict=True):
        expected.append(math.fsum(math.exp(b) * (b - q) for b, q in zip(row_base, row, strict=True) if b > -16))
    assert (base_log_p(base) <= -16).any()
    # Differences of float32 logits of about 40, as in llama-perplexity, are good to 4e-6.
    assert tokens.kld == pytest.approx(expected, rel=1e-4, abs=1e-5)


def random_tokens(n: int) -> Comparison:
    nll_base = RANDOM.gamma(2, 1.5, n)
    nll = np.abs(nll_base + RANDOM.normal(0.05, 0.3, n))
    return Comparison(
        nll=nll,
        nll_base=nll_base,
        kld=RANDOM.gamma(1, 0.02, n),
        p_diff=np.exp(-nll) - np.exp(-nll_base),
        same_top=RANDOM.random(n) < 0.9,
    )


@pytest.mark.parametrize("n", [2, 11, 5000])
def test_every_statistic_is_that_of_llama_perplexity(n: int) -> None:
    """Its formulas, with sums of squares and products, and the covariance put in by hand."""
    tokens = random_tokens(n)
    found = divergence(tokens)

    def mean(values: NDArray[np.float64]) -> Estimate:
        f = math.fsum(values) / n
        return Estimate(f, math.sqrt((math.fsum(values**2) / n - f * f) / (n - 1)))

    def close(estimate: Estimate, value: float, error: float) -> None:
        assert (estimate.value, estimate.error) == pytest.approx((value, error), rel=1e-6, abs=1e-9)

    q, b = mean(tokens.nll), mean(tokens.nll_base)
    ppl, ppl_base = math.exp(q.value), math.exp(b.value)
    covariance = (math.fsum(tokens.nll * tokens.nll_base) / n - q.value * b.value) / (n - 1)
    close(found.ppl, ppl, ppl * q.error)
    close(found.ppl_base, ppl_base, ppl_base * b.error)
    assert found.correlation == pytest.approx(covariance / (q.error * b.error))
    error = math.sqrt(q.error**2 + b.error**2 - 2 * covariance)
    close(found.ln_ratio, q.value - b.value, error)
    close(found.ratio, ppl / ppl_base, ppl / ppl_base * error)
    squares = (ppl * q.error) ** 2 + (ppl_base * b.error) ** 2
    close(found.difference, ppl - ppl_base, math.sqrt(squares - 2 * ppl * ppl_base * covariance))
    kld, p_diff, square = mean(tokens.kld), mean(tokens.p_diff), mean(tokens.p_diff**2)
    close(found.kld.mean, kld.value, kld.error)
    close(found.p_diff.mean, p_diff.value, p_diff.error)
    close(found.p_diff_rms, math.sqrt(square.value), 0.5 * square.error / math.sqrt(square.value))
    share = sum(tokens.same_top.tolist()) / n
    close(found.same_top, share, math.sqrt(share * (1 - share) / (n - 1)))


def test_percentiles_lie_between_the_sorted_values() -> None:
    values = np.array([4.0, 0.0, 1.0, 2.0, 3.0])
    tokens = Comparison(np.ones(5), np.ones(5), values, values / 10, np.ones(5, np.bool_))
    found = divergence(tokens).kld.percentiles
    assert found["0"] == 0
    assert found["0.1"] == pytest.approx(0.004)  # 0.001 of the way through four steps
    assert found["10"] == pytest.approx(0.4)
    assert found["50"] == 2
    assert found["99.9"] == pytest.approx(3.996)
    assert found["100"] == 4
    assert [float(key) for key in found] == list(statistics.PERCENTS)


def test_a_model_that_is_its_base_has_no_divergence() -> None:
    logits = RANDOM.normal(0, 2, (300, 512)).clip(-7, 7).astype(np.float32)
    base = base_rows(logits.astype(np.float64))
    found = divergence(compare(logits, base, RANDOM.integers(0, 512, 300).astype(np.int32)))
    # A step is 2.4e-4 at most, so a token's divergence is rounding below that, and mostly cancels.
    assert abs(found.kld.mean.value) < 2e-5
    assert found.ratio.value == pytest.approx(1, abs=2e-5)
    assert found.same_top.value > 0.99
    assert found.correlation == pytest.approx(1)


def test_losses_that_do_not_vary_have_no_correlation() -> None:
    ones = np.ones(4)
    found = divergence(Comparison(ones, ones, 0 * ones, 0 * ones, ones.astype(np.bool_)))
    assert found.correlation is None
    assert found.p_diff_rms == Estimate(0.0, 0.0)
    assert found.same_top == Estimate(1.0, 0.0)


def test_parts_are_joined_in_order() -> None:
    parts = [random_tokens(n) for n in (3, 4, 5)]
    joined = concatenate(parts)
    assert len(joined.nll) == 12
    offsets = [0, 3, 7, 12]
    for part, (start, end) in zip(parts, pairwise(offsets), strict=True):
        for name in ("nll", "nll_base", "kld", "p_diff", "same_top"):
            assert getattr(joined, name)[start:end].tolist() == getattr(part, name).tolist()
