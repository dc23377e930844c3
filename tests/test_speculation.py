"""Speculation in a real engine: the same answers as without, and a KV cache that holds what the engine says.

Guesses are computed here whenever they are not hopeless, as though a batch took no longer than one token: where they
really pay depends on the machine. Of a quantized model two tokens at once give the logits of one, bit by bit, on one
thread of a processor; larger batches, and BF16, move those of the demo by up to a tenth, and a tie may fall otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.answering import Answerer
from runtime.draft_model import emptiest
from runtime.drafting import Costs
from runtime.engine import Engine
from runtime.errors import EngineError
from runtime.events import EngineSettings, Event, Finished, Reply
from runtime.grammar import Grammar
from runtime.hardware import Device
from runtime.kv_store import n_common
from runtime.messages import Message
from runtime.native_context import AbortedError
from runtime.prompts import prompter
from runtime.sampling import Sampling
from tests.checkpoints import DEMO

SETTINGS = EngineSettings(n_ctx=512, n_batch=64, n_ubatch=32, n_threads=1)
GREEDY = Sampling(temperature=0.0)
TIE = 0.2

PROSE = (DEMO.parent / "eval" / "prose.txt").read_text(encoding="utf-8")
CODE = (DEMO.parent / "eval" / "code.txt").read_text(encoding="utf-8")
PROMPTS = (PROSE[:400], 2 * PROSE[2000:2300], 2 * CODE[:300], "a b c d " * 20)
"""Of the last three, the demo's answers repeat some."""


class FreeCosts(Costs):
    """Batches that take no time. The first token's must be known for a draft model to be asked."""

    def __init__(self) -> None:
        super().__init__()
        for n in (1, 2, 4, 8, 16):
            super().took(n, 1.0)

    def took(self, n: int, seconds: float) -> None:
        pass


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[..., Engine]]:
    """Opens engines with some settings, once each, and closes them."""
    engines: dict[object, Engine] = {}

    def open_engine(path: Path, **settings: object) -> Engine:
        key = (path, *settings.items())
        if key not in engines:
            engine = engines[key] = Engine(path, replace(SETTINGS, **settings))  # type: ignore[arg-type]
            if engine._speculation is not None:
                engine._speculation._costs = FreeCosts()
        return engines[key]

    yield open_engine
    for engine in engines.values():
        engine.close()


def ignore(*_: int) -> None:
    """Progress that nobody watches."""


def answer(engine: Engine, text: str, n: int, sampling: Sampling = GREEDY, grammar: Grammar | None = None) -> list[int]:
    """The first `n` ids, also past an end."""
    engine.read(engine.vocabulary.tokenize(text, bos=True), ignore)
    engine.start_sampling(sampling, grammar)
    drawn: list[int] = []
    while len(drawn) < n and engine.has_room():
        drawn.append(engine.next())
        if grammar is not None and engine.vocabulary.ends_answer(drawn[-1]):
            break
        engine.extend(drawn[-1])
    return drawn


def assert_same(plain: Engine, text: str, expected: Sequence[int], found: Sequence[int]) -> None:
    """Alike, or from a place on where the model, token by token, finds both nearly as likely."""
    if list(expected) == list(found):
        return
    at = n_common(expected, found)
    plain.read([*plain.vocabulary.tokenize(text, bos=True), *expected[:at]], ignore)
    logits = plain.logits()
    assert abs(logits[expected[at]] - logits[found[at]]) < TIE, (at, len(expected))


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("model", [None, "Q2_K"])
def test_the_likeliest_tokens_stay_the_same(
    model: str | None, text: str, opened: Callable[..., Engine], demo: Path, demo_levels: dict[str, Path]
) -> None:
    plain, drafted = opened(demo), opened(demo, drafts="always", draft_model=demo_levels[model] if model else None)
    expected, found = answer(plain, text, 120), answer(drafted, text, 120)
    assert_same(plain, text, expected, found)
    assert plain.n_drafted == 0
    if text != PROMPTS[0] or model:
        assert 0 < drafted.n_accepted <= drafted.n_drafted


SAMPLINGS = (
    Sampling(temperature=0.7, seed=5, top_k=5),
    Sampling(temperature=0.8, seed=6, repeat_penalty=1.3, dry_multiplier=0.5),
    Sampling(temperature=0.8, seed=7, mirostat=2),
    Sampling(temperature=0.5, seed=8, logit_bias=((300, 3.0), (301, float("-inf")))),
    Sampling(temperature=0.3, seed=9, xtc_probability=0.5, min_p=0.1),
)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_sampler_draws_as_it_did(
    sampling: Sampling, opened: Callable[..., Engine], demo_levels: dict[str, Path]
) -> None:
    path = demo_levels["Q8_0"]
    plain, drafted = opened(path, n_ubatch=2), opened(path, n_ubatch=2, drafts="always")
    n_accepted = 0
    for text in PROMPTS[1:]:
        assert answer(plain, text, 80, sampling) == answer(drafted, text, 80, sampling)
        n_accepted += drafted.n_accepted
    assert n_accepted > 0


def test_a_grammar_holds_the_answer_as_it_did(opened: Callable[..., Engine], demo_levels: dict[str, Path]) -> None:
    path = demo_levels["Q8_0"]
    plain, drafted = opened(path, n_ubatch=2), opened(path, n_ubatch=2, drafts="always")
    grammar = Grammar('root ::= ("[" [a-c]+ "] ")+')
    text = "[abc] [abc] [abc] [abc] [abc] "
    sampling = Sampling(temperature=1.0, seed=2)
    expected, found = (answer(engine, text, 100, sampling, grammar) for engine in (plain, drafted))
    assert expected == found
    assert drafted.n_accepted > 0


@pytest.mark.parametrize("model", [None, "Q2_K"])
def test_every_row_has_the_logits_of_its_token(
    model: str | None, opened: Callable[..., Engine], demo: Path, demo_levels: dict[str, Path]
) -> None:
    plain, drafted = opened(demo), opened(demo, drafts="always", draft_model=demo_levels[model] if model else None)
    ids = plain.vocabulary.tokenize(2 * PROSE[:500], bos=True)
    for engine in (plain, drafted):
        engine.read(ids[:150], ignore)
        engine.start_sampling(GREEDY)
    for token in ids[150:230]:
        assert plain.context_used == drafted.context_used
        plain.extend(token)
        drafted.extend(token)
        np.testing.assert_allclose(drafted.logits(), plain.logits(), atol=TIE)
    assert drafted.n_accepted > 20


def test_after_an_abort_the_cache_holds_what_was_drawn(opened: Callable[..., Engine], demo: Path) -> None:
    plain, stopped = opened(demo), opened(demo, drafts="always")
    text = PROMPTS[3]
    ids = plain.vocabulary.tokenize(text, bos=True)
    for n in range(1, 40, 3):
        drawn = answer(stopped, text, n)
        token = stopped.next()
        stopped.abort()
        with pytest.raises(AbortedError):
            stopped.extend(token)
        stopped.abort(False)
        assert stopped.context_used == len(ids) + n
        assert stopped.read([*ids, *drawn, 400], ignore) == len(ids) + n
        plain.read([*ids, *drawn, 400], ignore)
        np.testing.assert_allclose(stopped.logits(), plain.logits(), atol=TIE)


def test_guesses_end_where_the_context_does(opened: Callable[..., Engine], demo: Path) -> None:
    plain, drafted = opened(demo, n_ctx=256), opened(demo, n_ctx=256, drafts="always")
    text = PROMPTS[3]
    expected, found = (answer(engine, text, 1000) for engine in (plain, drafted))
    assert len(expected) == len(found) == 256 - len(plain.vocabulary.tokenize(text, bos=True))
    assert drafted.context_used == 256
    assert_same(plain, text, expected[:-1], found[:-1])


def test_an_answer_tells_its_guesses_and_a_seed_has_none(opened: Callable[..., Engine], demo: Path) -> None:
    engine = opened(demo, drafts="always")
    template, tokenizer = engine.chat_template(), DEMO / "tokenizer.model"
    answerer = Answerer(engine, prompter("mistral-v3", engine.vocabulary, template=template, tokenizer=tokenizer))
    question = (Message("user", PROMPTS[3]),)
    ends: list[Finished] = []
    for seed in (None, 3):
        events: list[Event] = []
        answerer.reply(Reply(question, Sampling(temperature=0.0, max_tokens=60, seed=seed)), events.append)
        ends += [event for event in events if isinstance(event, Finished)]
    assert 0 < ends[0].accepted_tokens <= ends[0].drafted_tokens
    assert ends[0].accepted_tokens < ends[0].answer_tokens
    assert (ends[1].drafted_tokens, ends[1].accepted_tokens) == (0, 0)


@pytest.mark.parametrize(("temperature", "guesses"), [(0.0, False), (0.01, True)])
def test_by_default_only_what_is_drawn_at_random_is_guessed(
    temperature: float, guesses: bool, opened: Callable[..., Engine], demo: Path
) -> None:
    engine = opened(demo, drafts="always")
    template, tokenizer = engine.chat_template(), DEMO / "tokenizer.model"
    prompts = prompter("mistral-v3", engine.vocabulary, template=template, tokenizer=tokenizer)
    events: list[Event] = []
    sampling = Sampling(temperature=temperature, max_tokens=60)
    Answerer(engine, prompts, "auto").reply(Reply((Message("user", PROMPTS[3]),), sampling), events.append)
    (end,) = (event for event in events if isinstance(event, Finished))
    assert (end.drafted_tokens > 0) == guesses


def test_a_model_that_talks_says_the_same(opened: Callable[..., Engine], smollm2: Path) -> None:
    text = "<|im_start|>user\nRepeat this line:\n" + "The quick brown fox jumps over the lazy dog. " * 2
    text += "<|im_end|>\n<|im_start|>assistant\n"
    plain, drafted = opened(smollm2), opened(smollm2, drafts="always")
    expected, found = answer(plain, text, 60), answer(drafted, text, 60)
    assert_same(plain, text, expected, found)
    assert drafted.n_accepted > 20


def test_without_drafting_nothing_is_guessed(opened: Callable[..., Engine], demo: Path) -> None:
    engine = opened(demo, drafts="always")
    answer(engine, PROMPTS[3], 40)
    assert engine.n_drafted > 0
    engine.read(engine.vocabulary.tokenize(PROMPTS[3], bos=True), ignore)
    engine.start_sampling(GREEDY, drafting=False)
    for _ in range(20):
        engine.extend(engine.next())
    assert engine.n_drafted == 0


def test_what_is_kept_on_the_disk_has_no_guesses_in_it(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = replace(SETTINGS, drafts="always", kept_kv_bytes=1 << 30)
    engine, again = Engine(demo, settings), Engine(demo, settings)
    assert engine._speculation is not None
    engine._speculation._costs = FreeCosts()
    drawn = answer(engine, PROMPTS[3], 5)
    assert engine._n_drafts, "there are guesses in the cache"
    engine.keep()
    ids = [*engine.vocabulary.tokenize(PROMPTS[3], bos=True), *drawn, 400]
    assert again.read(ids, ignore) == len(ids) - 1
    engine.read(ids, ignore)
    np.testing.assert_allclose(engine.logits(), again.logits(), atol=1e-3)
    engine.close()
    again.close()


def test_a_draft_model_of_another_vocabulary_is_refused(demo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    content = demo.read_bytes()
    piece = "▁the".encode()
    at = content.index(len(piece).to_bytes(8, "little") + piece)
    other.write_bytes(content[: at + 8] + "▁zqj".encode() + content[at + 8 + len(piece) :])
    with pytest.raises(EngineError, match=r"other\.gguf has '▁zqj' for token \d+ and the model '▁the'; a draft model"):
        Engine(demo, replace(SETTINGS, draft_model=other))


def test_a_draft_model_of_another_size_of_vocabulary_is_refused(demo: Path, smollm2: Path) -> None:
    with pytest.raises(EngineError, match="has 49152 tokens and the model 4096; a draft model needs the same vocab"):
        Engine(demo, replace(SETTINGS, draft_model=smollm2))


def test_a_draft_model_goes_to_the_emptiest_gpu_of_this_machine() -> None:
    devices = [
        Device("CPU", "", "cpu", 900, 900),
        Device("CUDA0", "", "gpu", 30, 80),
        Device("CUDA1", "", "gpu", 70, 80),
        Device("RPC0", "", "gpu", 80, 80),
    ]
    assert emptiest(devices) == 2  # behind RPC0 and CUDA0: llama.cpp's order
    assert emptiest([devices[0], devices[3]]) is None


def test_a_draft_model_that_is_none_is_named_as_such(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"the draft model: .*none\.gguf: no such file.*; or leave out --draft"):
        Engine(demo, replace(SETTINGS, draft_model=tmp_path / "none.gguf"))
