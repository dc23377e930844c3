"""Answers with tools in a real engine: what each choice makes of them, how they end, and what they may not be.

The demo's answers are nonsense, so that what is right about its calls is the grammar's doing. It calls tools of its own
accord where the opening is made likely.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest

from runtime.answering import Answerer
from runtime.calls import CallForm
from runtime.drafting import Costs
from runtime.engine import Engine
from runtime.errors import EngineError
from runtime.events import CallPiece, Drafts, EngineSettings, Event, Finished, Load, Notice, Piece, Reply
from runtime.grammar import Grammar
from runtime.messages import Message, NamedTool, Tool, ToolCall
from runtime.native import Vocabulary
from runtime.prompts import Prompter, prompter
from runtime.sampling import Sampling
from runtime.session import Session
from tests.checkpoints import DEMO
from tests.vocabularies import mistral

GREEDY = Sampling(temperature=0.0)
CALLS = 5
"""`[TOOL_CALLS]` of the demo."""
EAGER = ((CALLS, 60.0),)
HALF_EAGER = 16.5
"""With this bias the opening becomes the likeliest token in the middle of the demo's definition of a horse."""

SCHEMAS: dict[str, dict[str, Any]] = {
    "add": {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": -5, "maximum": 300}, "unit": {"enum": ["m", "km", None]}},
        "required": ["x"],
        "additionalProperties": False,
    },
    "find-2": {
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 1, "maxLength": 9},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
        },
        "required": ["text", "tags"],
        "additionalProperties": False,
        "$defs": {"tag": {"type": "string", "maxLength": 4}},
    },
}
TOOLS = tuple(Tool(name, f"to {name}", json.dumps(schema)) for name, schema in SCHEMAS.items())
LOOSE = Tool("loose", "", '{"type": "object", "properties": {"s": {"pattern": "^a$"}}, "required": ["never-guessed"]}')
QUESTION = Message("user", "Define a horse.")


class FreeCosts(Costs):
    """Batches that take no time, so that guesses are computed whenever they are not hopeless."""

    def __init__(self) -> None:
        super().__init__()
        for n in (1, 2, 4, 8, 16):
            super().took(n, 1.0)

    def took(self, n: int, seconds: float) -> None:
        pass


DRAFTS: tuple[Drafts, ...] = ("off", "always")


def opened(path: Path, *, drafts: Drafts = "off", n_ubatch: int = 256) -> Answerer:
    engine = Engine(path, EngineSettings(1024, 256, n_ubatch, n_threads=1, drafts=drafts))
    if engine._speculation is not None:
        engine._speculation._costs = FreeCosts()
    prompts = prompter("mistral-v3", engine.vocabulary, template=None, tokenizer=DEMO / "tokenizer.model")
    return Answerer(engine, prompts)


@pytest.fixture(scope="module")
def answerer(demo_levels: dict[str, Path]) -> Iterator[Answerer]:
    """The demo."""
    answerer = opened(demo_levels["Q8_0"])
    yield answerer
    answerer.close()


class Answer:
    """What is told of one."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.text = "".join(event.text for event in events if isinstance(event, Piece))
        self.pieces = [event for event in events if isinstance(event, CallPiece)]
        self.most_drawn = max((len(event.drawn) for event in events if isinstance(event, Piece)), default=0)
        self.tokens = [one.token for event in events if isinstance(event, Piece) for one in event.drawn]
        self.drawn = [token.id for token in self.tokens]
        self.notices = [event.text for event in events if isinstance(event, Notice)]
        end = events[-1]
        assert isinstance(end, Finished)
        self.end = end
        for i, call in enumerate(end.calls):
            told = [piece for piece in self.pieces if piece.index == i]
            assert [(told[0].id, told[0].name)] == [(piece.id, piece.name) for piece in told if piece.id]
            assert (told[0].id, told[0].name) == (call.id, call.name)
            assert "".join(piece.arguments for piece in told) == call.arguments
        assert {piece.index for piece in self.pieces} == set(range(len(end.calls)))

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return self.end.calls


def ask(answerer: Answerer, *messages: Message, **reply: Any) -> Answer:
    events: list[Event] = []
    answerer.reply(Reply(messages or (QUESTION,), **{"sampling": GREEDY, "tools": TOOLS, **reply}), events.append)
    return Answer(events)


def assert_valid(call: ToolCall) -> None:
    assert call.error is None
    assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)
    jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


# Choices


SAMPLINGS = [GREEDY, *(Sampling(temperature=t, seed=3, top_p=1.0) for t in (0.7, 1.5)), Sampling(0.9, mirostat=2)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.temperature} {s.mirostat}")
def test_a_named_tool_is_called_once_with_valid_arguments(sampling: Sampling, answerer: Answerer) -> None:
    n_prompt = ask(answerer, sampling=Sampling(max_tokens=1), tool_choice="none").end.prompt_tokens
    for name in SCHEMAS:
        answer = ask(answerer, sampling=sampling, tool_choice=NamedTool(name))
        (call,) = answer.calls
        assert call.name == name
        assert_valid(call)
        assert (answer.end.reason, answer.text) == ("calls", "")
        assert answer.end.prompt_tokens == n_prompt + 1, "the opening is part of it"
        assert answer.end.sampling.startswith("grammar → ")


def test_with_any_every_call_is_of_a_tool_and_valid(answerer: Answerer) -> None:
    names: list[str] = []
    for seed in range(4):
        sampling = Sampling(temperature=1.3, seed=seed, max_tokens=300, top_p=1.0)
        answer = ask(answerer, sampling=sampling, tool_choice="any")
        assert answer.text == ""
        assert answer.end.reason in ("calls", "length")
        whole = answer.calls if answer.end.reason == "calls" else answer.calls[:-1]
        for call in whole:
            assert_valid(call)
        names += [call.name for call in whole]
        assert len({call.id for call in answer.calls}) == len(answer.calls)
    assert set(names) == set(SCHEMAS)


def test_with_none_the_opening_is_never_drawn(answerer: Answerer) -> None:
    sampling = Sampling(temperature=1.0, seed=1, logit_bias=EAGER, max_tokens=40)
    answer = ask(answerer, sampling=sampling, tool_choice="none", logprobs=0)
    assert CALLS not in answer.drawn
    assert answer.text
    assert not answer.calls
    grammar = Grammar('root ::= "yes" | "no"')
    assert ask(answerer, tool_choice="none", grammar=grammar).text in ("yes", "no")


def test_with_auto_text_is_free_until_the_opening(answerer: Answerer) -> None:
    free, forbidden = ask(answerer), ask(answerer, tool_choice="none")
    assert (free.text, free.end.reason, free.calls) == (forbidden.text, "end", ())
    assert not free.end.sampling.startswith("in calls")
    for seed in range(4):
        sampling = Sampling(temperature=1.3, seed=seed, logit_bias=EAGER, max_tokens=300)
        answer = ask(answerer, sampling=sampling, logprobs=0)
        assert answer.drawn[0] == CALLS
        assert answer.calls
        assert answer.text == ""
        assert answer.end.sampling.startswith("in calls grammar → logit bias")
        for call in answer.calls if answer.end.reason == "calls" else answer.calls[:-1]:
            assert_valid(call)


def test_text_may_stand_before_calls(answerer: Answerer) -> None:
    sampling = Sampling(temperature=0.0, logit_bias=((CALLS, HALF_EAGER),), max_tokens=150)
    answer = ask(answerer, sampling=sampling)
    assert answer.text == "a person who is a"
    assert answer.calls
    for call in answer.calls if answer.end.reason == "calls" else answer.calls[:-1]:
        assert_valid(call)


def test_guesses_change_no_calls(demo_levels: dict[str, Path]) -> None:
    """Two tokens at once give the logits of one, bit by bit (test_speculation.py)."""
    answerers = [opened(demo_levels["Q8_0"], drafts=drafts, n_ubatch=2) for drafts in DRAFTS]
    n_accepted = 0
    replies: list[dict[str, Any]] = [
        {"tool_choice": "any"},
        {"tool_choice": NamedTool("find-2")},
        {"sampling": Sampling(temperature=0.0, logit_bias=EAGER, max_tokens=150)},
        {"sampling": Sampling(temperature=0.0, logit_bias=((CALLS, HALF_EAGER),), max_tokens=150)},
    ]
    for reply in replies:
        reply = {"sampling": Sampling(temperature=0.0, max_tokens=150), **reply}
        plain, drafted = (ask(answerer, **reply) for answerer in answerers)
        assert (plain.text, plain.end.reason) == (drafted.text, drafted.end.reason)
        assert [(c.name, c.arguments, c.error) for c in plain.calls] == [
            (c.name, c.arguments, c.error) for c in drafted.calls
        ]
        assert plain.calls
        n_accepted += drafted.end.accepted_tokens
    assert n_accepted > 0
    for answerer in answerers:
        answerer.close()


def test_a_seed_repeats_the_ids_and_other_prompts_have_others(answerer: Answerer) -> None:
    def id_of(seed: int | None, *messages: Message) -> str:
        return ask(answerer, *messages, sampling=Sampling(0.0, seed=seed), tool_choice=NamedTool("add")).calls[0].id

    other = Message("user", "Define a cow.")
    assert id_of(1) == id_of(1)
    assert len({id_of(1), id_of(2), id_of(1, other), id_of(None), id_of(None)}) == 5


def test_log_probabilities_tell_every_token_of_calls(answerer: Answerer) -> None:
    sampling = Sampling(temperature=0.0, logit_bias=EAGER, max_tokens=300)
    for choice in ("auto", NamedTool("add")):
        answer = ask(answerer, sampling=sampling, tool_choice=choice, logprobs=2)
        assert len(answer.drawn) == answer.end.answer_tokens + (answer.end.reason == "calls")
        assert (answer.drawn[0] == CALLS) == (choice == "auto")
        assert answer.most_drawn == 1


class Headed:
    """A prompt format whose calls are those of Mistral's v11, with control tokens that the demo has."""

    calls = CallForm("[TOOL_CALLS]", CALLS, arguments_token=6, id_token=7)

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.encode = mistral("mistral-v3", vocabulary, DEMO / "tokenizer.model").encode


def test_calls_with_the_arguments_behind_a_token_are_valid(answerer: Answerer) -> None:
    headed = Answerer(answerer._engine, cast(Prompter, Headed(answerer._engine.vocabulary)))
    eager = ((CALLS, 60.0), (7, 60.0))
    for seed in range(2):
        sampling = Sampling(temperature=1.3, seed=seed, max_tokens=120, logit_bias=eager)
        answer = ask(headed, sampling=sampling, logprobs=0)
        assert answer.text == ""
        assert answer.drawn.count(CALLS) == len(answer.calls) > 1
        spelled = b"".join({7: b"\1", 6: b"\2"}.get(token.id, token.text) for token in answer.tokens).decode()
        ids = re.findall("\1([^\1\2]*)\2", spelled)
        assert len(ids) >= len(answer.calls) - 1
        assert ids == [call.id for call in answer.calls[: len(ids)]]
        for call in answer.calls if answer.end.reason == "calls" else answer.calls[:-1]:
            assert_valid(call)
        for name in SCHEMAS:
            (call,) = ask(headed, sampling=sampling, tool_choice=NamedTool(name)).calls
            assert call.name == name
            assert_valid(call)


# Ends


def test_a_call_that_breaks_off_is_told_and_the_conversation_goes_on(answerer: Answerer) -> None:
    for n in range(1, 24, 3):
        answer = ask(answerer, sampling=Sampling(0.0, max_tokens=n), tool_choice=NamedTool("find-2"))
        (call,) = answer.calls
        assert answer.end.reason == "length"
        assert "broke off" in (call.error or "")
        result = Message("tool", call.error or "", call_id=call.id)
        again = ask(answerer, QUESTION, Message("assistant", "", (call,)), result, sampling=Sampling(0.0, max_tokens=8))
        assert again.end.answer_tokens > 0


def test_a_stop_within_a_call_leaves_its_beginning(answerer: Answerer) -> None:
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        if isinstance(event, CallPiece) and event.arguments:
            answerer.stop()

    answerer.reply(Reply((QUESTION,), GREEDY, tools=TOOLS, tool_choice=NamedTool("find-2")), stop)
    answerer.stop(False)
    answer = Answer(events)
    (call,) = answer.calls
    assert answer.end.reason == "stopped"
    assert "broke off" in (call.error or "")
    assert call.arguments
    assert_valid(ask(answerer, tool_choice=NamedTool("add")).calls[0])


def test_a_call_ends_where_the_context_does(answerer: Answerer) -> None:
    n_prompt = ask(answerer, tool_choice=NamedTool("find-2")).end.prompt_tokens
    long = Message("user", "a " * (1024 - n_prompt - 20))
    answer = ask(answerer, long, tool_choice=NamedTool("find-2"))
    assert answer.end.reason == "context"
    assert [call.error is None for call in answer.calls] == [False]


# Schemas that no grammar holds


def test_what_no_grammar_holds_is_checked_and_noticed_once(demo_levels: dict[str, Path]) -> None:
    answerer = opened(demo_levels["Q8_0"])
    faulty = Tool("faulty", "", '{"prefixItems": 5}')
    noticed: list[str] = []
    for seed in range(3):
        sampling = Sampling(temperature=0.3, seed=seed, max_tokens=300)
        answer = ask(answerer, sampling=sampling, tools=(*TOOLS, LOOSE, faulty), tool_choice=NamedTool("loose"))
        noticed += answer.notices
        (call,) = answer.calls
        if answer.end.reason == "calls":
            assert isinstance(json.loads(call.arguments), dict)
            assert "do not fit the tool's schema: $: 'never-guessed' is a required property" in (call.error or "")
    assert len(noticed) == 2
    assert "arguments of the tool 'loose' are checked only when they are written: #/properties/s: 'patt" in noticed[0]
    assert "the schema of the tool 'faulty' is faulty, so its arguments are not checked: $.prefixI" in noticed[1]
    answerer.close()


# Refusals


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"tool_choice": NamedTool("ad")}, "there is no tool 'ad' to be called; there are: add, find-2"),
        ({"tool_choice": "any", "tools": ()}, "a call of a tool is wanted, but there are no tools"),
        ({"tools": (*TOOLS, TOOLS[0])}, "two tools have the name 'add'; rename one"),
        (
            {"grammar": Grammar('root ::= "a"')},
            "a grammar is for answers without calls; leave it out, or choose `none`",
        ),
        ({"tools": (Tool("a b", "", "{}"),)}, "'a b' cannot be the name of a tool"),
        ({"tools": (Tool("a", "", "5"),)}, "the parameters of the tool 'a' are no JSON object"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(reply: dict[str, Any], message: str, answerer: Answerer) -> None:
    with pytest.raises(EngineError, match=re.escape(message)):
        ask(answerer, **reply)
    assert ask(answerer).end.reason == "end"


def test_a_session_carries_calls_between_processes(demo_levels: dict[str, Path]) -> None:
    settings = EngineSettings(n_ctx=512, n_batch=256, n_threads=1)
    session = Session(Load(demo_levels["Q8_0"], settings, "mistral-v3", DEMO / "tokenizer.model"))
    list(session.load())
    answer = Answer(list(session.reply([QUESTION], GREEDY, tools=TOOLS, tool_choice=NamedTool("add"))))
    assert_valid(answer.calls[0])
    session.close()
