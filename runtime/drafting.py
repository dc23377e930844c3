"""Guesses at what comes next, and which of them pay: prompt lookup, acceptance by confidence, time by batch size.

A guess costs next to nothing beside the model; computing it costs part of a decode, and gains the tokens that the model
would have drawn as well. Both are learnt from what happened. Pure; knows token ids alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_DRAFTS = 15
"""A batch has one token that is certain, and at most so many guesses."""

_SIZES = (1, 2, 4, 8, 16)
"""Tokens of a batch. Few, so that each is measured; kernels like them."""

_FIRST_SLOPE = 0.3
"""What a further token adds to a batch's time, per that of one token, before anything is measured."""

_MARGIN = 1.1
"""Expected gain below which nothing is drafted: measured times are uncertain."""

_LENGTHS = np.array((1, 2, 3, 4, 5, 6, 8, 11, 16, 24, 40, 64))
_MATCHED = (0.18, 0.36, 0.43, 0.51, 0.57, 0.60, 0.69, 0.80, 0.86, 0.90, 0.93, 0.95)
"""How often what followed a match of so many tokens followed again: six texts of prose, code and documentation."""

_PROBABLE = tuple(0.05 + 0.1 * tenth for tenth in range(10))

_PRIOR_TRIALS = 4.0
_FORGETTING = 0.98
"""Of what was seen, at each further trial of the same confidence: about 50 trials count."""


@dataclass(frozen=True, slots=True)
class Guess:
    """Ids that may come next, and a confidence for each: an index into `Odds`."""

    tokens: tuple[int, ...] = ()
    confidences: tuple[int, ...] = ()


def by_probability(probability: float) -> int:
    """The confidence in a token that a draft model finds so likely."""
    return len(_MATCHED) + min(int(10 * probability), 9)


class Lookup:
    """Guesses that the text goes on as it did where it was last as it is now."""

    def __init__(self, capacity: int) -> None:
        """`capacity` is the longest text in tokens."""
        self._ids = np.zeros(capacity, np.int32)
        self._n = 0

    def start(self, ids: Sequence[int]) -> None:
        self._n = len(ids)
        self._ids[: self._n] = ids

    def push(self, token: int) -> None:
        self._ids[self._n] = token
        self._n += 1

    def guess(self, n: int) -> Guess:
        """`n` ids behind the longest earlier match of the text's end, of equal ones the last; none without a match."""
        ids: NDArray[np.int32] = self._ids[: self._n]
        if not self._n:
            return Guess()
        ends = np.flatnonzero(ids[:-1] == ids[-1]) + 1
        if not len(ends):
            return Guess()
        length = 1
        while len(ends) > 1 and length < _LENGTHS[-1]:
            longer = ends[ends > length]
            longer = longer[ids[longer - 1 - length] == ids[-1 - length]]
            if not len(longer):
                break
            ends, length = longer, length + 1
        at = int(ends[-1])
        if len(ends) == 1:
            most = min(at, int(_LENGTHS[-1]))
            different = np.flatnonzero(ids[at - most : at] != ids[-most:])
            length = most - 1 - int(different[-1]) if len(different) else most
        behind = at + np.arange(n) % (self._n - at)  # a repetition that runs into the end goes on itself
        confidences = np.searchsorted(_LENGTHS, length + np.arange(n), side="right") - 1
        return Guess(tuple(ids[behind].tolist()), tuple(confidences.tolist()))


class Odds:
    """How often guesses of each confidence were right, of late."""

    def __init__(self) -> None:
        self._prior = (*_MATCHED, *_PROBABLE)
        self._right = [_PRIOR_TRIALS * chance for chance in self._prior]
        self._trials = [_PRIOR_TRIALS] * len(self._prior)

    def saw(self, confidence: int, right: bool) -> None:
        self._right[confidence] = self._right[confidence] * _FORGETTING + right
        self._trials[confidence] = self._trials[confidence] * _FORGETTING + 1

    def chance(self, confidence: int) -> float:
        return self._right[confidence] / self._trials[confidence]


class Costs:
    """How long batches take, per one token."""

    def __init__(self) -> None:
        self._ratios: dict[int, float] = {}  # of the sizes that were measured
        self.one = 0.0
        """Seconds that one token takes; 0 where none was measured."""

    def took(self, n: int, seconds: float) -> None:
        """A batch of `n` tokens took so long."""
        if n == 1:
            self.one = seconds if not self.one else self.one + (seconds - self.one) / 8
        elif self.one:
            ratio = self._ratios.get(n)
            self._ratios[n] = seconds / self.one if ratio is None else ratio + (seconds / self.one - ratio) / 4
        for size in self._ratios:
            if size != n:  # what was slow once is tried again some day
                self._ratios[size] -= (self._ratios[size] - 1) / 2000

    def ratio(self, n: int) -> float:
        """Time of `n` tokens; of a size that was never measured, by the largest below it that was."""
        if n == 1 or n in self._ratios:
            return self._ratios.get(n, 1.0)
        below = max((size for size in self._ratios if size < n), default=None)
        slope = (self._ratios[below] - 1) / (below - 1) if below is not None else _FIRST_SLOPE
        return 1 + slope * (n - 1)

    def most(self) -> int:
        """The largest batch worth trying: sizes are measured one after the other."""
        return 2 * max(self._ratios, default=1)


class Trust:
    """How many of the guesses that were computed were right, per those that the odds had promised.

    What promises most was chosen, so promises are too high as a rule; less so while nothing is computed.
    """

    def __init__(self) -> None:
        self.share = 1.0
        self._right = self._promised = _PRIOR_TRIALS

    def saw(self, promised: float, right: int) -> None:
        """Of the guesses of a batch, of which so many were promised to be right, so many were."""
        self._right, self._promised = 0.9 * self._right + right, 0.9 * self._promised + promised
        self.share = min(self._right / self._promised, 1.0)

    def rest(self) -> None:
        """A token without guesses."""
        self._right += (self._promised - self._right) / 500
        self.share = min(self._right / self._promised, 1.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """How many guesses to compute, and what that promises."""

    n: int = 0
    rate: float = 1.0
    """Tokens in the time of one."""
    right: float = 0.0
    """How many will be right, by the odds alone."""


def best_size(
    chances: Sequence[float], costs: Costs, *, each: float = 0.0, most: int = MOST_DRAFTS, trust: float = 1.0
) -> Choice:
    """How many of the guesses to compute, whose chances to be right are given in order; none where that does not pay.

    `each` is what a guess itself costs, per one token. `trust` is a factor for what the chances promise.
    """
    best = Choice()
    right, together = 0.0, 1.0
    for n, chance in enumerate(chances[:most], 1):
        together *= chance
        right += together
        if n + 1 > costs.most():
            break
        if n + 1 in _SIZES and (rate := (1 + trust * right) / (costs.ratio(n + 1) + n * each)) > max(
            best.rate, _MARGIN
        ):
            best = Choice(n, rate, right)
    return best
