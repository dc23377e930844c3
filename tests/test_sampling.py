"""Samplers: the distribution that llama.cpp's chain leaves of the demo's logits, against the same in NumPy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.answering import Answerer
from runtime.engine import Engine
from runtime.errors import EngineError
from runtime.events import Drawn, EngineSettings, Event, Finished, Piece, Reply
from runtime.logprobs import log_probabilities
from runtime.messages import Message, Tool
from runtime.native_sampling import Sampler
from runtime.prompts import Prompter
from runtime.sampling import MAX_SEED, NAMES, Sampling, chain, describe, setting
from tests.checkpoints import DEMO

Row = NDArray[np.float64]
"""One number a token, (n_vocab,)."""

TEXT = (DEMO.parent / "eval" / "prose.txt").read_text(encoding="utf-8")[:600]

PLAIN = Sampling(temperature=1.0, top_p=1.0, seed=1)
"""Draws from the model's own distribution."""

EVERYTHING = replace(
    PLAIN,
    temperature=0.8,
    dynamic_temperature=0.3,
    top_k=200,
    top_p=0.9,
    min_p=0.01,
    typical_p=0.95,
    top_n_sigma=3.0,
    xtc_probability=0.5,
    xtc_threshold=0.2,
    dry_multiplier=0.8,
    repeat_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    logit_bias=((300, -1.0),),
)


def ignore(*_: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def engine(demo: Path) -> Iterator[Engine]:
    engine = Engine(demo, EngineSettings(n_ctx=256, n_batch=64, n_ubatch=32, n_threads=1))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ids(engine: Engine) -> list[int]:
    return engine.vocabulary.tokenize(TEXT, bos=True)[:120]


@pytest.fixture(scope="module")
def logits(engine: Engine, ids: list[int]) -> NDArray[np.float32]:
    """The demo's logits after 120 tokens of prose."""
    engine.read(ids, ignore)
    return engine.logits().copy()


@pytest.fixture
def sampler(engine: Engine) -> Iterator[Callable[..., Sampler]]:
    """Builds samplers on the demo's vocabulary, and closes them."""
    samplers: list[Sampler] = []

    def build(sampling: Sampling, recent: Sequence[int] = (), seed: int = 1) -> Sampler:
        samplers.append(Sampler(sampling, seed, engine.vocabulary, n_ctx=256, recent=recent))
        return samplers[-1]

    yield build
    for one in samplers:
        one.close()


def softmax(logits: Row) -> Row:
    shares = np.exp(logits - logits.max())
    result: Row = shares / shares.sum()
    return result


def entropy(shares: Row) -> float:
    """In nats."""
    there = shares[shares > 0]
    return float(-(there * np.log(there)).sum())


def only(logits: Row, kept: NDArray[np.intp] | NDArray[np.bool_]) -> Row:
    """Probabilities among the kept tokens."""
    masked = np.full_like(logits, -np.inf)
    masked[kept] = logits[kept]
    return softmax(masked)


def left_by(one: Sampler, logits: NDArray[np.float32]) -> Row:
    """The probability of every token after the chain."""
    tokens, _ = one.candidates(logits)
    shares = np.zeros(len(logits))
    shares[tokens["id"]] = tokens["p"]
    return shares


# One sampler after the other: settings, and the distribution they leave


def top_p(logits: Row, p: float) -> Row:
    shares = softmax(logits)
    order = np.argsort(-shares)
    return only(logits, order[: int(np.searchsorted(np.cumsum(shares[order]), p)) + 1])


def typical(logits: Row, p: float) -> Row:
    shares = softmax(logits)
    oddness = np.full(len(shares), np.inf)
    there = shares > 0
    oddness[there] = np.abs(-np.log(shares[there]) - entropy(shares))
    order = np.argsort(oddness, kind="stable")
    return only(logits, order[: int(np.searchsorted(np.cumsum(shares[order]), p, side="right")) + 1])


def top_n_sigma(logits: Row, n: float) -> Row:
    there = np.isfinite(logits)
    return only(logits, logits >= logits.max() - n * logits[there].std())


def xtc(logits: Row, threshold: float) -> Row:
    shares = softmax(logits)
    above = np.flatnonzero(shares >= threshold)
    kept = np.ones(len(shares), bool)
    kept[above] = False
    kept[above[np.argmin(shares[above])]] = True
    return only(logits, kept)


def dynamic(logits: Row, temperature: float, by: float, exponent: float) -> Row:
    low, high = max(0.0, temperature - by), temperature + by
    share = entropy(softmax(logits)) / np.log(len(logits))
    return softmax(logits / (low + (high - low) * share**exponent))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, softmax),
        ({"temperature": 0.3}, lambda logits: softmax(logits / 0.3)),
        ({"temperature": 2.5}, lambda logits: softmax(logits / 2.5)),
        ({"dynamic_temperature": 0.6}, lambda logits: dynamic(logits, 1.0, 0.6, 1.0)),
        (
            {"temperature": 0.5, "dynamic_temperature": 0.9, "dynamic_exponent": 2.0},
            lambda logits: dynamic(logits, 0.5, 0.9, 2.0),
        ),
        ({"top_k": 1}, lambda logits: only(logits, np.argsort(-logits)[:1])),
        ({"top_k": 7}, lambda logits: only(logits, np.argsort(-logits)[:7])),
        ({"top_k": 300}, lambda logits: only(logits, np.argsort(-logits)[:300])),
        ({"top_k": 10_000}, softmax),
        ({"top_p": 0.0}, lambda logits: only(logits, np.argsort(-logits)[:1])),
        ({"top_p": 0.5}, lambda logits: top_p(logits, 0.5)),
        ({"top_p": 0.95}, lambda logits: top_p(logits, 0.95)),
        ({"min_p": 0.05}, lambda logits: only(logits, softmax(logits) >= 0.05 * softmax(logits).max())),
        ({"typical_p": 0.3}, lambda logits: typical(logits, 0.3)),
        ({"typical_p": 0.9}, lambda logits: typical(logits, 0.9)),
        ({"top_n_sigma": 1.5}, lambda logits: top_n_sigma(logits, 1.5)),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.05}, lambda logits: xtc(logits, 0.05)),
        ({"logit_bias": ((5, 3.5), (900, -2.0))}, lambda logits: softmax(logits + bias(logits, {5: 3.5, 900: -2.0}))),
        (
            {"top_k": 20, "min_p": 0.02, "temperature": 0.6},
            lambda logits: softmax(np.where(cut(logits, 20, 0.02), logits, -np.inf) / 0.6),
        ),
    ],
)
def test_what_a_setting_leaves_is_what_numpy_says(
    settings: dict[str, object],
    expected: Callable[[Row], Row],
    sampler: Callable[..., Sampler],
    logits: NDArray[np.float32],
) -> None:
    left = left_by(sampler(replace(PLAIN, **settings)), logits)  # type: ignore[arg-type]
    np.testing.assert_allclose(left, expected(logits.astype(np.float64)), rtol=1e-4, atol=1e-9)


def bias(logits: Row, biases: dict[int, float]) -> Row:
    added = np.zeros_like(logits)
    for token, amount in biases.items():
        added[token] = amount
    return added


def cut(logits: Row, k: int, p: float) -> NDArray[np.bool_]:
    kept: NDArray[np.bool_] = (logits >= np.sort(logits)[-k]) & (softmax(logits) >= p * softmax(logits).max())
    return kept


def test_a_forbidden_token_is_never_drawn(sampler: Callable[..., Sampler], logits: NDArray[np.float32]) -> None:
    likeliest = int(logits.argmax())
    left = left_by(sampler(replace(PLAIN, logit_bias=((likeliest, -np.inf),))), logits)
    np.testing.assert_allclose(left, only(logits.astype(np.float64), np.arange(len(logits)) != likeliest), rtol=1e-4)
    assert left[likeliest] == 0


@pytest.mark.parametrize("bias", [(), ((5, 3.5), (7, -float("inf")), (9, -2.0))])
def test_the_likeliest_is_what_llama_cpps_chain_takes(
    bias: tuple[tuple[int, float], ...], sampler: Callable[..., Sampler], logits: NDArray[np.float32]
) -> None:
    """Drawn by NumPy, for speed. Few values, so that many are equal."""
    greedy = sampler(Sampling(temperature=0.0, logit_bias=bias))
    random = np.random.default_rng(4)
    for _ in range(50):
        row = random.integers(-3, 4, len(logits)).astype(np.float32)
        before = row.copy()
        tokens, selected = greedy.candidates(row)
        assert greedy.draw(row) == tokens["id"][selected]
        assert np.array_equal(row, before)


def test_typical_bears_tokens_of_no_probability(sampler: Callable[..., Sampler], logits: NDArray[np.float32]) -> None:
    """The sampler itself takes the logarithm of 0 there, and every score becomes NaN."""
    row = logits.copy()
    row[::2] = -np.inf
    left = left_by(sampler(replace(PLAIN, typical_p=0.3)), row)
    np.testing.assert_allclose(left, typical(row.astype(np.float64), 0.3), rtol=1e-4, atol=1e-9)


def test_xtc_acts_as_often_as_it_is_told(sampler: Callable[..., Sampler], logits: NDArray[np.float32]) -> None:
    one = sampler(replace(PLAIN, xtc_probability=0.3, xtc_threshold=0.05))
    n, whole = 400, len(logits)
    times = sum(len(one.candidates(logits)[0]) < whole for _ in range(n))
    assert abs(times - 0.3 * n) < 5 * np.sqrt(n * 0.3 * 0.7)


def test_draws_come_as_often_as_they_are_likely(sampler: Callable[..., Sampler], logits: NDArray[np.float32]) -> None:
    sampling = replace(PLAIN, top_k=5, temperature=1.3)
    expected, n = only(logits.astype(np.float64) / 1.3, np.argsort(-logits)[:5]), 4000
    one = sampler(sampling)
    times = np.bincount([one.draw(logits) for _ in range(n)], minlength=len(logits))
    assert (np.abs(times - n * expected) <= 5 * np.sqrt(n * expected * (1 - expected))).all()
    assert set(np.flatnonzero(times)) == set(np.argsort(-logits)[:5])


# Samplers that remember


def penalized(logits: Row, counts: NDArray[np.intp], repeat: float, frequency: float, presence: float) -> Row:
    there = counts > 0
    scaled = np.where(logits > 0, logits / repeat, logits * repeat)
    changed: Row = np.where(there, scaled - counts * frequency - presence, logits)
    return changed


@pytest.mark.parametrize(("window", "sees"), [(64, 64), (3, 3), (-1, 256), (2**31 - 1, 256), (0, 0)])
def test_penalties_see_prompt_and_answer_in_their_window(
    window: int, sees: int, sampler: Callable[..., Sampler], logits: NDArray[np.float32], ids: list[int]
) -> None:
    sampling = replace(PLAIN, repeat_penalty=1.3, frequency_penalty=0.2, presence_penalty=-0.4, penalty_window=window)
    one = sampler(sampling, recent=ids)
    read = list(ids)
    for _ in range(3):  # as drawn tokens come in, old ones fall out of the window
        counts = np.bincount(read[len(read) - min(sees, len(read)) :], minlength=len(logits))
        expected = softmax(penalized(logits.astype(np.float64), counts, 1.3, 0.2, -0.4))
        np.testing.assert_allclose(left_by(one, logits), expected, rtol=1e-4, atol=1e-9)
        read.append(one.draw(logits))


def dry(logits: Row, read: Sequence[int], multiplier: float, base: float, allowed: int, breaks: set[int]) -> Row:
    """By trying every earlier place: how long the end of the text is a repetition there, and of what comes next."""
    n = len(read)
    reach = next((i for i, token in enumerate(reversed(read)) if token in breaks), n)
    longest: dict[int, int] = {}
    for place in range(1, n):
        length = 0
        while length < min(place, reach) and read[place - 1 - length] == read[n - 1 - length]:
            length += 1
        if length >= allowed:
            longest[read[place]] = max(longest.get(read[place], 0), length)
    changed = logits.copy()
    for token, length in longest.items():
        if token not in breaks:
            changed[token] -= multiplier * base ** (length - allowed)
    return changed


@pytest.mark.parametrize(
    "read",
    [
        [7, 500, 501, 502, 503, 8, 500, 501, 502],
        [500, 501, 502, 503, 500, 501, 502, 504, 9, 500, 501, 502],
        [500, 501] * 8,
        [500] * 10,
        [500, 501, 502, 503, 500],
        [1, 2, 3, 4],
    ],
)
@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_dry_charges_what_goes_on_a_repetition(
    read: list[int], allowed: int, engine: Engine, sampler: Callable[..., Sampler], logits: NDArray[np.float32]
) -> None:
    sampling = replace(PLAIN, dry_multiplier=0.9, dry_base=1.6, dry_allowed_length=allowed, dry_breakers=("\n",))
    breaks = {t for t in range(len(logits)) if b"\n" in engine.vocabulary.piece(t, special=True)}
    assert not breaks & set(read)
    left = left_by(sampler(sampling, recent=read), logits)
    expected = softmax(dry(logits.astype(np.float64), read, 0.9, 1.6, allowed, breaks))
    np.testing.assert_allclose(left, expected, rtol=1e-4, atol=1e-9)


def test_no_repetition_reaches_across_a_breaker(
    engine: Engine, sampler: Callable[..., Sampler], logits: NDArray[np.float32]
) -> None:
    sampling = replace(PLAIN, dry_multiplier=2.0, dry_window=-1)
    pieces = [engine.vocabulary.piece(t, special=True) for t in range(len(logits))]
    breaks = {t for t, piece in enumerate(pieces) if any(byte in piece for byte in b'\n:"*')}
    colon = next(t for t in breaks if pieces[t] == b":")
    read = [500, 501, colon, 502, 503, 504, 9, 500, 501, colon, 502, 503]
    expected = dry(logits.astype(np.float64), read, 2.0, 1.75, 2, breaks)
    assert expected[504] == pytest.approx(logits[504] - 2.0)  # two tokens since the colon
    np.testing.assert_allclose(left_by(sampler(sampling, recent=read), logits), softmax(expected), rtol=1e-4, atol=1e-9)
    without = left_by(sampler(replace(sampling, dry_breakers=()), recent=read), logits)
    np.testing.assert_allclose(
        without, softmax(dry(logits.astype(np.float64), read, 2.0, 1.75, 2, set())), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_follows_the_surprise(
    version: int, sampler: Callable[..., Sampler], logits: NDArray[np.float32]
) -> None:
    """Basu et al. 2020, algorithms 1 and 2 of the paper; the slope is estimated from the 100 likeliest tokens."""
    tau, eta, warmth = 3.0, 0.4, 1.2
    one = sampler(replace(PLAIN, mirostat=version, mirostat_tau=tau, mirostat_eta=eta, temperature=warmth))
    row = logits.astype(np.float64) / warmth
    order = np.argsort(-row)
    mu = 2 * tau
    for _ in range(12):
        shares = softmax(row)
        if version == 1:
            ranks = np.arange(1, 100)
            steps = np.log((ranks + 1) / ranks)
            falls = np.log(shares[order[:99]] / shares[order[1:100]])
            slope = (steps * falls).sum() / (steps**2).sum()
            rest = slope - 1
            k = (rest * 2**mu / (1 - float(len(row)) ** -rest)) ** (1 / slope)
            expected = only(row, order[: max(1, int(k))])
        else:
            expected = only(row, -np.log2(shares) <= mu)
        tokens, selected = one.candidates(logits)
        left = np.zeros(len(logits))
        left[tokens["id"]] = tokens["p"]
        np.testing.assert_allclose(left, expected, rtol=2e-4, atol=1e-9)
        mu -= eta * (-np.log2(expected[tokens["id"][selected]]) - tau)


# The chain as a whole


def test_the_chain_has_llama_cpps_order() -> None:
    """common/common.h at 0c1e57098; biases first, the draw last."""
    assert chain(EVERYTHING) == (
        *("logit-bias", "penalties", "dry", "top-n-sigma", "top-k"),
        *("zeros", "typical", "top-p", "min-p", "xtc", "temp-ext", "dist"),
    )
    assert chain(replace(EVERYTHING, temperature=0.0)) == ("logit-bias", "penalties", "dry", "greedy")
    assert chain(replace(EVERYTHING, mirostat=1)) == ("logit-bias", "temp", "zeros", "mirostat")
    assert chain(replace(EVERYTHING, mirostat=2)) == ("logit-bias", "temp", "mirostat-v2")
    assert chain(replace(EVERYTHING, mirostat=2, temperature=0.0))[-1] == "greedy"
    assert chain(PLAIN) == ("dist",)


@pytest.mark.parametrize(
    "sampling",
    [EVERYTHING, PLAIN, *(replace(EVERYTHING, **change) for change in ({"temperature": 0.0}, {"mirostat": 1}))],
)
def test_llama_cpp_runs_the_chain_that_is_said(sampling: Sampling, sampler: Callable[..., Sampler]) -> None:
    assert sampler(sampling).names() == ["min-p" if name == "zeros" else name for name in chain(sampling)]


def test_the_chain_is_said_in_words() -> None:
    assert describe(PLAIN, 7) == "draw, seed 7"
    assert describe(replace(PLAIN, temperature=0.0)) == "the likeliest"
    assert describe(replace(EVERYTHING, repeat_penalty=1.0), 3) == (
        "logit bias of 300: -1 → penalties (frequency 0.1, presence 0.1; the last 64 tokens) → "
        "DRY 0.8 · 1.75^(length − 2) over the last 64 tokens → top-n-sigma 3 → top-k 200 → without zeros → "
        "typical 0.95 → top-p 0.9 → min-p 0.01 → XTC 0.5 above 0.2, seed 3 → "
        "temperature 0.8 ± 0.3 by entropy^1 → draw, seed 3"
    )
    assert (
        describe(replace(PLAIN, mirostat=2, temperature=0.9))
        == "temperature 0.9 → mirostat 2, 5 bits, rate 0.1, any seed"
    )


@pytest.mark.parametrize("change", [{}, {"mirostat": 1}, {"mirostat": 2}])
@pytest.mark.parametrize("seed", [0, 7, MAX_SEED])
def test_a_seed_repeats_the_answer(change: dict[str, object], seed: int, engine: Engine, ids: list[int]) -> None:
    answers: list[list[int]] = []
    for number in (seed, seed, seed - 1 if seed else 1):
        engine.read(ids, ignore)
        said = engine.start_sampling(replace(EVERYTHING, temperature=1.5, seed=number, **change))  # type: ignore[arg-type]
        assert said.endswith(f"seed {number}")
        answers.append([])
        for _ in range(12):
            answers[-1].append(engine.next())
            engine.extend(answers[-1][-1])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("value", [-np.inf, np.nan])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_draw_is_said(
    value: float, temperature: float, sampler: Callable[..., Sampler], logits: NDArray[np.float32]
) -> None:
    one = sampler(replace(PLAIN, temperature=temperature))
    with pytest.raises(EngineError, match="no token is left to draw"):
        one.draw(np.full_like(logits, value))
    assert 0 <= one.draw(logits) < len(logits)


def test_a_bias_needs_a_token_that_is_there(sampler: Callable[..., Sampler]) -> None:
    with pytest.raises(EngineError, match="logit bias of token 4096: the model has 4096 tokens, 0 to 4095"):
        sampler(replace(PLAIN, logit_bias=((4096, 1.0),)))


# Log-probabilities


@pytest.mark.parametrize("n_top", [0, 1, 5, 4096, 9999])
def test_log_probabilities_are_the_log_of_softmax(n_top: int, logits: NDArray[np.float32]) -> None:
    row = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    own, top = log_probabilities(logits, 7, n_top)
    assert own == pytest.approx(row[7], abs=1e-9)
    order = np.argsort(-row, kind="stable")[:n_top]
    assert [id_ for id_, _ in top] == order.tolist()
    np.testing.assert_allclose([logprob for _, logprob in top], row[order], atol=1e-9)


def test_of_equally_likely_tokens_the_smaller_ids_come_first() -> None:
    own, top = log_probabilities(np.array([1, 2, 2, -np.inf, 2], np.float32), 3, 2)
    assert own == -np.inf
    assert [id_ for id_, _ in top] == [1, 2]
    assert [logprob for _, logprob in top] == pytest.approx([-np.log(3 + np.exp(-1))] * 2)
    assert log_probabilities(np.full(3, 1e30, np.float32), 0, 1)[0] == pytest.approx(-np.log(3))


class FixedPrompt:
    """A prompt format that knows one prompt."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        return self._ids


@pytest.mark.parametrize("ends", [False, True])
def test_a_reply_tells_how_likely_each_token_was(ends: bool, engine: Engine, ids: list[int]) -> None:
    """As the model has it, whatever the samplers do."""
    eos = engine.vocabulary.eos
    settings = replace(EVERYTHING, seed=3, max_tokens=20, logit_bias=((eos, -np.inf),))
    if ends:
        settings = replace(settings, temperature=0.0, logit_bias=((eos, 1000.0),))
    events: list[Event] = []
    reply = Reply((Message("user", "unread"),), settings, logprobs=3)
    Answerer(engine, cast(Prompter, FixedPrompt(ids))).reply(reply, events.append)
    pieces = [event for event in events if isinstance(event, Piece)]
    drawn: list[Drawn] = [token for piece in pieces for token in piece.drawn]
    end = events[-1]
    assert isinstance(end, Finished)
    assert (end.reason, end.answer_tokens, len(drawn)) == (("end", 0, 1) if ends else ("length", 20, 20))
    text = b"".join(one.token.text for one in drawn).decode("utf-8", "replace")
    assert text == "".join(piece.text for piece in pieces)
    engine.read(ids, ignore)
    for one in drawn:
        row = engine.logits().astype(np.float64)
        row -= np.logaddexp.reduce(row)
        assert one.token.logprob == pytest.approx(row[one.token.id], abs=0.1)
        assert one.likeliest[0].id == row.argmax()
        np.testing.assert_allclose([other.logprob for other in one.likeliest], np.sort(row)[:-4:-1], atol=0.1)
        assert one.likeliest[0].text == engine.vocabulary.piece(int(row.argmax()), special=True)
        engine.extend(one.token.id)


def test_without_being_asked_a_reply_tells_no_likelihoods(engine: Engine, ids: list[int]) -> None:
    events: list[Event] = []
    reply = Reply(
        (Message("user", "unread"),), replace(PLAIN, max_tokens=3, logit_bias=((engine.vocabulary.eos, -np.inf),))
    )
    Answerer(engine, cast(Prompter, FixedPrompt(ids))).reply(reply, events.append)
    assert all(not event.drawn and event.text for event in events if isinstance(event, Piece))


# Settings


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("temperature", -0.1, 10.1),
        ("temperature", float("nan"), float("inf")),
        ("dynamic_temperature", -0.1, 10.1),
        ("dynamic_exponent", 0.0, 10.1),
        ("top_k", -1, 2**31),
        ("top_p", -0.01, 1.01),
        ("min_p", -0.01, 1.01),
        ("typical_p", -0.01, 1.01),
        ("top_n_sigma", -0.01, 101),
        ("xtc_probability", -0.01, 1.01),
        ("xtc_threshold", -0.01, 0.51),
        ("dry_multiplier", -0.1, 101),
        ("dry_base", 0.9, 10.1),
        ("dry_allowed_length", 0, 2**31),
        ("dry_window", -2, 2**31),
        ("repeat_penalty", 0.0, 10.5),
        ("frequency_penalty", -10.1, 10.1),
        ("presence_penalty", -10.1, 10.1),
        ("penalty_window", -2, 2**31),
        ("mirostat", -1, 3),
        ("mirostat_tau", 0.0, 101),
        ("mirostat_eta", -0.1, 1.1),
        ("seed", -1, 2**32 - 1),
        ("max_tokens", 0, 2**31),
    ],
)
def test_settings_have_ranges(name: str, low: float, high: float) -> None:
    for value in (low, high):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must lie between"):
            replace(Sampling(), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dry_breakers": ("",)}, "dry_breakers has ''; each must have 1 to 40 bytes"),
        ({"dry_breakers": ("é" * 21,)}, "each must have 1 to 40 bytes"),
        ({"logit_bias": ((-1, 0.0),)}, "logit_bias has token -1; ids lie between 0 and"),
        ({"logit_bias": ((1, float("inf")),)}, "logit_bias of token 1 is inf; it must be -inf or at most 1000"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias of token 1 is nan"),
        ({"logit_bias": ((1, 0.5), (1, 0.5))}, "logit_bias has token 1 twice"),
    ],
)
def test_lists_of_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Sampling(), **settings)  # type: ignore[arg-type]


def test_settings_are_read_as_yaml_has_them() -> None:
    assert setting("logit_bias", {5: -1, 6: -np.inf}) == ((5, -1), (6, -np.inf))
    assert setting("dry_breakers", ["\n", "."]) == ("\n", ".")
    assert {"mirostat", "logit_bias", "dry_breakers", "seed"} <= set(NAMES)
    for name, value, message in (
        ("logit_bias", {"a": 1}, "must be a mapping of token ids to numbers"),
        ("logit_bias", [1], "must be a mapping of token ids to numbers"),
        ("dry_breakers", "\n", "must be a list of texts"),
        ("mirostat", 1.5, "must be a whole number"),
        ("top_p", True, "must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            setting(name, value)
