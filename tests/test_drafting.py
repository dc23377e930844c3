"""What is guessed, how sure it is, and when it pays: on texts made of ids, with no model."""

import random

import pytest

from runtime.drafting import MOST_DRAFTS, Costs, Lookup, Odds, Trust, best_size, by_probability
from runtime.speculation import Speculation

PROCESSOR = {2: 1.7, 4: 2.9, 8: 5.0, 16: 9.0}
"""Seconds of a batch per those of one token, as measured on a processor."""


def naive(ids: list[int], n: int) -> list[int]:
    """What followed the longest earlier occurrence of the end, of up to 64 tokens; of equal ones the last."""
    found: list[int] = []
    for length in range(1, 65):
        starts = [at for at in range(length, len(ids)) if ids[at - length : at] == ids[-length:]]
        if not starts:
            break
        found = list(ids)
        while len(found) < len(ids) + n:
            found.append(found[starts[-1] + len(found) - len(ids)])
    return found[len(ids) :]


def test_a_lookup_finds_what_a_naive_search_finds() -> None:
    chance = random.Random(1)
    for _ in range(300):
        alphabet = chance.choice((1, 2, 3, 8, 40))
        ids = [chance.randrange(alphabet) for _ in range(chance.randrange(1, 60))]
        lookup, n_read = Lookup(64), chance.randrange(len(ids))
        lookup.start(ids[:n_read])
        for token in ids[n_read:]:
            lookup.push(token)
        assert list(lookup.guess(9).tokens) == naive(ids, 9), ids


def test_the_longer_a_match_the_surer_it_is() -> None:
    lookup = Lookup(64)
    lookup.start([*range(20), 50, *range(20)])
    sure = lookup.guess(3)
    assert sure.tokens == (50, 0, 1)
    lookup.start([1, 2, 3, 9, 8, 3])
    unsure = lookup.guess(3)
    assert unsure.tokens == (9, 8, 3)
    odds = Odds()
    assert odds.chance(unsure.confidences[0]) < odds.chance(unsure.confidences[2]) < odds.chance(sure.confidences[0])


def test_the_odds_follow_what_happens() -> None:
    odds, before = Odds(), Odds().chance(by_probability(0.95))
    for _ in range(50):
        odds.saw(by_probability(0.95), False)
    assert odds.chance(by_probability(0.95)) < 0.2 < before
    assert odds.chance(by_probability(0.85)) == Odds().chance(by_probability(0.85))
    for _ in range(50):
        odds.saw(by_probability(0.95), True)
    assert odds.chance(by_probability(0.95)) > 0.7


def measured(ratios: dict[int, float]) -> Costs:
    costs = Costs()
    for _ in range(20):
        costs.took(1, 0.01)
        for n, ratio in ratios.items():
            costs.took(n, 0.01 * ratio)
    return costs


@pytest.mark.parametrize(
    ("chance", "ratios", "expected"),
    [
        (1.0, {2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 15),
        (1.0, {2: 1.0, 4: 1.0, 8: 1.0, 16: 4.0}, 7),
        (1.0, {2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}, 0),
        (0.5, PROCESSOR, 0),
        (0.8, PROCESSOR, 0),
        (0.9, PROCESSOR, 3),
        (0.97, PROCESSOR, 7),
        (0.0, {2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 0),
    ],
)
def test_as_much_is_computed_as_pays(chance: float, ratios: dict[int, float], expected: int) -> None:
    """By hand: (1 + p + … + p^n) / ratio."""
    choice = best_size([chance] * MOST_DRAFTS, measured(ratios))
    assert choice.n == expected
    assert choice.rate == 1.0 if choice.n == 0 else choice.rate > 1.0


def test_guesses_that_cost_time_must_gain_it() -> None:
    costs = measured({2: 1.1, 4: 1.2, 8: 1.4, 16: 1.6})
    assert best_size([0.9] * 15, costs).n == 15
    assert 0 < best_size([0.9] * 15, costs, each=0.2).n < 15
    assert best_size([0.9] * 15, costs, each=0.9).n == 0
    assert best_size([0.9] * 15, costs, most=2).n == 1


def test_what_was_slow_once_is_tried_again_some_day() -> None:
    costs = measured({2: 9.0})
    assert best_size([1.0], costs).n == 0
    for _ in range(5000):
        costs.took(1, 0.01)
    assert best_size([1.0], costs).n == 1


def test_promises_that_were_not_kept_are_trusted_less_for_a_time() -> None:
    trust, costs = Trust(), measured(PROCESSOR)
    assert best_size([0.9] * 3, costs, trust=trust.share).n == 3
    for _ in range(10):
        trust.saw(2.4, 1)
    assert trust.share < 0.6
    assert best_size([0.9] * 3, costs, trust=trust.share).n == 0
    for _ in range(2000):
        trust.rest()
    assert trust.share > 0.95
    for _ in range(20):
        trust.saw(2.4, 3)
    assert trust.share == 1.0


def steps(text: list[int], n_prompt: int) -> tuple[float, int]:
    """Time of a text per that of one token at a time, on the processor; and how many guesses were computed."""
    speculation = Speculation(len(text), None)
    speculation.start(text[:n_prompt])
    seconds, n_guessed, pending = 0.0, 0, list[int]()
    for token in text[n_prompt:]:
        speculation.drawn(token)
        if pending and pending[0] == token:
            pending.pop(0)
            continue
        pending = speculation.drafts(MOST_DRAFTS)
        n_guessed += len(pending)
        took = PROCESSOR.get(1 + len(pending), 1.0)
        speculation.took(1 + len(pending), took)
        seconds += took
    return seconds / (len(text) - n_prompt), n_guessed


@pytest.mark.parametrize("alphabet", [2, 10, 100, 10_000])
def test_hopeless_text_costs_little(alphabet: int) -> None:
    chance = random.Random(2)
    text = [chance.randrange(alphabet) for _ in range(1500)]
    seconds, n_guessed = steps(text, 500)
    assert seconds < 1.05
    assert n_guessed < 200


def test_text_that_repeats_its_prompt_gains_nearly_all_there_is_to_gain() -> None:
    chance = random.Random(3)
    prompt = [chance.randrange(1000) for _ in range(500)]
    changed = [token if chance.random() < 0.98 else 1000 + chance.randrange(1000) for token in prompt]
    seconds, n_guessed = steps([*prompt, *changed], 500)
    assert seconds < 0.8  # a batch of 16 takes 9/16
    assert n_guessed > 300
