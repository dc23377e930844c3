"""The choice of options against all choices, and its bound against every choice that can be drawn."""

import itertools
import math
import random

import pytest

from quant.choosing.knapsack import Option, Solution, solve

Groups = list[list[Option]]


def _option(rng: random.Random) -> Option:
    return Option(rng.randint(1, 20), rng.choice([rng.random(), float(rng.randint(0, 3))]))


def _groups(rng: random.Random, most_groups: int = 6) -> Groups:
    """Small enough to try all; losses are often equal, as sizes are."""
    return [[_option(rng) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, most_groups))]


def _budgets(groups: Groups) -> tuple[int, int]:
    least = sum(min(option.n_bytes for option in options) for options in groups)
    return least, sum(max(option.n_bytes for option in options) for options in groups)


def _like_a_model(rng: random.Random, n_layers: int) -> tuple[Groups, int]:
    """Tensors of 7 kinds in layers at 7 sizes of element, losses falling by 4 a bit; and their elements."""
    kinds = [12_288 * 12_288, 12_288 * 1_024] * 2 + [12_288 * 28_672] * 3
    bits = [2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5, 16]
    groups = []
    for size in kinds * n_layers:
        sensitivity = math.exp(rng.gauss(0, 1.5))
        groups.append([Option(int(size * b / 8), sensitivity * 4**-b * math.exp(rng.gauss(0, 0.1))) for b in bits])
    return groups, sum(kinds) * n_layers


def _check(groups: Groups, budget: int, solution: Solution) -> None:
    """What it says of its choice is so."""
    chosen = [options[i] for options, i in zip(groups, solution.chosen, strict=True)]
    assert solution.n_bytes == sum(option.n_bytes for option in chosen) <= budget
    assert solution.loss == pytest.approx(math.fsum(option.loss for option in chosen))
    assert solution.bound <= solution.loss


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_is_better(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        groups = _groups(rng)
        budget = rng.randint(*_budgets(groups))
        solution = solve(groups, budget)
        _check(groups, budget, solution)
        best = min(
            sum(option.loss for option in choice)
            for choice in itertools.product(*groups)
            if sum(option.n_bytes for option in choice) <= budget
        )
        assert solution.loss == pytest.approx(best), (groups, budget)
        assert solution.is_best
        assert solution.bound <= best + 1e-12


def test_a_choice_of_hundreds_of_tensors_is_the_best_and_no_random_one_beats_the_bound() -> None:
    rng = random.Random(1)
    groups, n_elements = _like_a_model(rng, 88)
    for bits in (2.7, 3.3, 4.5, 6.0, 8.49):
        budget = int(n_elements * bits / 8)
        solution = solve(groups, budget)
        _check(groups, budget, solution)
        assert solution.is_best
        assert solution.gap < 0.005
        for _ in range(20):  # better than chance and than any exchange of two options
            chosen = list(solution.chosen)
            for g in rng.sample(range(len(groups)), 2):
                chosen[g] = rng.randrange(len(groups[g]))
            options = [groups[g][i] for g, i in enumerate(chosen)]
            if sum(option.n_bytes for option in options) <= budget:
                assert math.fsum(option.loss for option in options) >= solution.loss * (1 - 1e-9)


def test_a_search_cut_short_says_so_and_its_bound_holds() -> None:
    rng = random.Random(2)
    groups, n_elements = _like_a_model(rng, 20)
    budget = int(n_elements * 4.2 / 8)
    best = solve(groups, budget)
    short = solve(groups, budget, most_states=2)
    _check(groups, budget, short)
    assert best.is_best
    assert not short.is_best
    assert short.bound <= best.loss <= short.loss


def test_room_for_everything_takes_what_loses_least() -> None:
    groups = [[Option(1, 3.0), Option(5, 1.0), Option(9, 1.0)], [Option(2, 0.5), Option(3, 0.7)]]
    solution = solve(groups, 100)
    assert (solution.chosen, solution.loss, solution.gap) == ((1, 0), 1.5, 0.0)
    assert solve(groups, 3).chosen == (0, 0)
