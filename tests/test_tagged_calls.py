"""Calls in the tags of Hermes's form, in real engines: as text, and as tokens of either kind."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import pytest

from runtime.answering import Answerer
from runtime.calls import CallForm
from runtime.engine import Engine
from runtime.errors import EngineError
from runtime.events import CallPiece, EngineSettings, Event, Finished, Piece, Reply
from runtime.messages import Message, NamedTool, Tool, ToolCall
from runtime.prompts import prompter
from runtime.sampling import Sampling
from tests.vocabularies import CONTROL, USER_DEFINED

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", "the weather of a city", json.dumps(SCHEMA))
OTHER = Tool("time-of_day", "", '{"type": "object", "properties": {"utc": {"type": "boolean"}}}')

TEMPLATE = """{% if tools %}<|im_start|>system
Call them within <tool_call> and </tool_call>: {{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

ROME = Message("user", "Weather in Rome?")
PARIS = Message("user", "Weather in Paris?")
CALL = Message("assistant", "", (ToolCall("abcdefghi", "weather", '{"city": "Rome"}'),))
WARM = Message("tool", "warm", call_id="abcdefghi")


def answerer_of(path: Path, template: str = TEMPLATE) -> Answerer:
    engine = Engine(path, EngineSettings(n_ctx=1024, n_batch=256, n_threads=1))
    return Answerer(engine, prompter("template", engine.vocabulary, template=template, tokenizer=None))


@pytest.fixture(scope="module")
def talker(smollm2: Path) -> Iterator[Answerer]:
    """A small model that can follow an example; its vocabulary has no tags."""
    answerer = answerer_of(smollm2)
    yield answerer
    answerer.close()


def ask(answerer: Answerer, *messages: Message, **reply: Any) -> tuple[str, Finished, int]:
    """Text, end, and the number of pieces of calls."""
    events: list[Event] = []
    reply = {"sampling": Sampling(0.0, max_tokens=50), "tools": (WEATHER, OTHER), **reply}
    answerer.reply(Reply(messages, **reply), events.append)
    assert isinstance(events[-1], Finished)
    text = "".join(event.text for event in events if isinstance(event, Piece))
    return text, events[-1], sum(isinstance(event, CallPiece) for event in events)


def test_text_that_opens_a_call_begins_the_grammar(talker: Answerer) -> None:
    text, end, n_pieces = ask(talker, ROME, CALL, WARM, PARIS)
    assert text == ""
    assert [(call.name, json.loads(call.arguments), call.error) for call in end.calls] == [
        ("weather", {"city": "Paris"}, None)
    ]
    assert end.reason == "calls"
    assert end.sampling.startswith("in calls grammar → ")
    assert n_pieces > 2


def test_a_model_may_answer_without_calls(talker: Answerer) -> None:
    text, end, _ = ask(talker, Message("user", "Hello!"), tool_choice="none")
    assert text
    assert (end.calls, "calls" in end.reason) == ((), False)


def test_a_tool_is_called_where_it_must_be(talker: Answerer) -> None:
    for choice in (NamedTool("time-of_day"), NamedTool("weather"), "any"):
        text, end, _ = ask(talker, Message("user", "Hello!"), tool_choice=choice)
        assert text == ""
        assert end.calls
        if isinstance(choice, NamedTool):
            assert [(call.name, call.error) for call in end.calls] == [(choice.name, None)]
            assert end.reason == "calls"
            assert isinstance(json.loads(end.calls[0].arguments), dict)


def test_a_template_whose_calls_cannot_be_read_is_refused_with_tools(talker: Answerer, demo: Path) -> None:
    for template in (TEMPLATE.replace("tool_call>", "other>"), TEMPLATE + "{# <function= #}"):
        engine = talker._engine
        other = Answerer(engine, prompter("template", engine.vocabulary, template=template, tokenizer=None))
        with pytest.raises(
            EngineError, match="calls of tools cannot be read out of answers in this model's prompt format"
        ):
            ask(other, PARIS)
        assert ask(other, PARIS, tools=(), sampling=Sampling(0.0, max_tokens=3))[1].answer_tokens == 3


# Tags that are tokens


@pytest.fixture(scope="module")
def tagged(demo_levels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The demo with two words of its vocabulary made tags, tokens of the type that is asked for."""

    def write(kind: int) -> Path:
        path = tmp_path_factory.mktemp("tagged") / "tagged.gguf"
        shutil.copyfile(demo_levels["Q8_0"], path)
        reader = gguf.GGUFReader(path, "r+")
        tokens, types = (reader.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
        for tag in (b"<tool_call>", b"</tool_call>"):
            index = next(
                i for i, part in enumerate(tokens.data) if i > 500 and len(tokens.parts[part]) == len(tag)
                and tokens.parts[part].tobytes()[:1] != b"<"
            )  # fmt: skip
            tokens.parts[tokens.data[index]][:] = list(tag)
            types.parts[types.data[index]][:] = kind
        return path

    return write


@pytest.mark.parametrize("kind", [USER_DEFINED, CONTROL])
def test_tags_that_are_tokens_are_known_by_their_ids(kind: int, tagged: Callable[[int], Path]) -> None:
    answerer = answerer_of(tagged(kind))
    form = answerer._prompts.calls
    assert form is not None
    assert form.token is not None
    closing = "" if kind == CONTROL else "</tool_call>"
    assert form == CallForm("<tool_call>", form.token, closing=closing, closing_token=form.closing_token)
    assert (form.closing_token is None) == (kind == USER_DEFINED)
    eager = ((form.token, 60.0),)
    for seed in range(2):
        _, end, _ = ask(
            answerer, PARIS, sampling=Sampling(1.0, seed=seed, max_tokens=100), tool_choice=NamedTool("weather")
        )
        assert [call.name for call in end.calls] == ["weather"]
        assert_valid(end)
        text, end, _ = ask(answerer, PARIS, sampling=Sampling(1.0, seed=seed, logit_bias=eager, max_tokens=120))
        assert text == ""
        assert len(end.calls) > 2, "the opening is likely behind each call, too"
        assert_valid(end)
        text, end, _ = ask(
            answerer, PARIS, sampling=Sampling(1.0, seed=seed, logit_bias=eager, max_tokens=20), tool_choice="none"
        )
        assert text
        assert end.calls == ()
    answerer.close()


def assert_valid(end: Finished) -> None:
    for call in end.calls if end.reason == "calls" else end.calls[:-1]:
        assert call.error is None
        if call.name == "weather":
            jsonschema.validate(json.loads(call.arguments), SCHEMA)
        else:
            assert call.name == "time-of_day"
