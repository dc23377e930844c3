"""One option of each group, so that the options' bytes fit a budget and their losses add up to the least.

The multiple-choice knapsack problem. Pure numbers in and out. The bound is that of the linear relaxation (Sinha and
Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27, 1979): no choice within the budget loses less.
From it the search knows which options cannot be part of a better choice than one it has; what is left is few, and is
searched whole. Where it is not few, the search keeps the most promising, and the bound says how far it may be off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MOST_STATES = 1 << 16
"""Partial choices kept at a time."""

_ROUNDING = 1e-12
"""Relative: sums of losses in another order differ by so much."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to have a group."""

    n_bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Solution:
    """What was chosen."""

    chosen: tuple[int, ...]
    """Index of the option of each group."""
    n_bytes: int
    loss: float
    bound: float
    """No choice within the budget has a smaller loss."""
    is_best: bool
    """Whether the search was whole, so that no other choice is better."""

    @property
    def gap(self) -> float:
        """How much of the loss might be saved at most, as a fraction of it."""
        return max(0.0, 1 - self.bound / self.loss) if self.loss > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _Step:
    """From one corner of a group's lower convex hull to the next: more bytes for less loss."""

    group: int
    option: int
    """The one it leads to."""
    n_bytes: int
    gain: float

    @property
    def rate(self) -> float:
        return self.gain / self.n_bytes


def solve(groups: Sequence[Sequence[Option]], budget: int, most_states: int = MOST_STATES) -> Solution:
    """The best choice within `budget` bytes. The smallest options of all groups must fit it."""
    corners = [_corners(options) for options in groups]
    least = sum(options[hull[0]].n_bytes for options, hull in zip(groups, corners, strict=True))
    assert least <= budget, (least, budget)
    steps = [
        _Step(g, b, options[b].n_bytes - options[a].n_bytes, options[a].loss - options[b].loss)
        for g, (options, hull) in enumerate(zip(groups, corners, strict=True))
        for a, b in pairwise(hull)
    ]
    # Along a hull the rate falls, so that the steps of a group stay in their order.
    steps.sort(key=lambda step: step.rate, reverse=True)
    greedy, price = _greedy(groups, [hull[0] for hull in corners], steps, budget)
    bound = _relaxed(groups, price, budget)
    best, is_best = _search(groups, greedy, price, bound, budget, most_states)
    chosen = [options[i] for options, i in zip(groups, best, strict=True)]
    loss = math.fsum(option.loss for option in chosen)
    return Solution(tuple(best), sum(option.n_bytes for option in chosen), loss, min(bound, loss), is_best)


def _corners(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull of bytes and losses, from the smallest option to the one of least loss."""
    hull: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].n_bytes, options[i].loss)):
        if hull and options[i].loss >= options[hull[-1]].loss:
            continue  # no smaller and no better
        while len(hull) > 1 and _rate(options[hull[-2]], options[hull[-1]]) <= _rate(options[hull[-1]], options[i]):
            hull.pop()
        hull.append(i)
    return hull


def _rate(a: Option, b: Option) -> float:
    return (a.loss - b.loss) / (b.n_bytes - a.n_bytes)


def _greedy(
    groups: Sequence[Sequence[Option]], smallest: Sequence[int], steps: Sequence[_Step], budget: int
) -> tuple[list[int], float]:
    """A choice that takes the best steps while they fit, and the loss that a byte saves at the first that does not."""
    chosen = list(smallest)
    left = budget - sum(options[i].n_bytes for options, i in zip(groups, chosen, strict=True))
    price, ended = 0.0, set()
    for step in steps:
        if step.group in ended:
            continue
        if step.n_bytes <= left:
            chosen[step.group] = step.option
            left -= step.n_bytes
        else:
            ended.add(step.group)
            price = price or step.rate
    return chosen, price


def _relaxed(groups: Sequence[Sequence[Option]], price: float, budget: int) -> float:
    """The least loss where a byte more than the budget costs `price`, and one less earns it: never above the best."""
    return math.fsum(min(o.loss + price * o.n_bytes for o in options) for options in groups) - price * budget


def _search(
    groups: Sequence[Sequence[Option]],
    known: list[int],
    price: float,
    bound: float,
    budget: int,
    most_states: int,
) -> tuple[list[int], bool]:
    """The best choice, or `known` where nothing better is found; and whether all that could be better was looked at."""
    is_whole = True
    limit = math.fsum(options[i].loss for options, i in zip(groups, known, strict=True))
    limit += abs(limit) * _ROUNDING
    # An option's surplus is what its priced loss is above its group's best. A choice's loss is at least the bound and
    # the surpluses of its options, so that options of too large a surplus are out.
    cheapest = [min(o.loss + price * o.n_bytes for o in options) for options in groups]
    left = [
        [i for i, o in enumerate(options) if bound + (o.loss + price * o.n_bytes - low) <= limit]
        for options, low in zip(groups, cheapest, strict=True)
    ]
    order = sorted(range(len(groups)), key=lambda g: len(left[g]))
    reserve = sum(min(groups[g][i].n_bytes for i in left[g]) for g in order)
    n_bytes: NDArray[np.int64] = np.zeros(1, np.int64)  # of each state
    loss: NDArray[np.float64] = np.zeros(1)
    surplus: NDArray[np.float64] = np.zeros(1)
    trail: list[tuple[NDArray[np.int32], NDArray[np.int8]]] = []  # of each group: states' parents and options
    for g in order:
        options = [groups[g][i] for i in left[g]]
        reserve -= min(o.n_bytes for o in options)
        parents = np.tile(np.arange(len(loss), dtype=np.int32), len(options))
        picks = np.repeat(np.array(left[g], np.int8), len(loss))
        n_bytes = np.concatenate([n_bytes + o.n_bytes for o in options])
        loss = np.concatenate([loss + o.loss for o in options])
        surplus = np.concatenate([surplus + (o.loss + price * o.n_bytes - cheapest[g]) for o in options])
        kept = np.flatnonzero((n_bytes + reserve <= budget) & (bound + surplus <= limit))
        kept = kept[np.lexsort((loss[kept], n_bytes[kept]))]
        running = np.minimum.accumulate(loss[kept])
        kept = kept[np.concatenate([[True], loss[kept][1:] < running[:-1]])[: len(kept)]]  # none smaller is as good
        if len(kept) > most_states:
            kept = kept[np.sort(np.argpartition(surplus[kept], most_states)[:most_states])]
            is_whole = False
        if not len(kept):
            return known, is_whole
        n_bytes, loss, surplus = n_bytes[kept], loss[kept], surplus[kept]
        trail.append((parents[kept], picks[kept]))
    state = int(np.argmin(loss))
    found = list(known)
    for g, (parents, picks) in zip(reversed(order), reversed(trail), strict=True):
        found[g] = int(picks[state])
        state = int(parents[state])
    return found, is_whole
