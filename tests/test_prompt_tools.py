"""Tools, calls and results in prompts: against mistral-common by itself, and templates rendered by Jinja alone."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from runtime.answering import Answerer
from runtime.conversation import settled, short_ids
from runtime.errors import EngineError
from runtime.events import EngineSettings, Event, Finished, Load, Notice, Reply
from runtime.messages import Message, Tool, ToolCall
from runtime.prompts import KINDS, Prompter
from runtime.sampling import Sampling
from tests import vocabularies
from tests.vocabularies import (
    DEMO_TOKENIZER,
    controls,
    file_of,
    large,
    mistral,
    mistral_format,
    opened,
    packaged,
    pieces_of,
    smollm,
    spoken,
    templated,
)

CITY = '{"type": "object", "properties": {"city": {"type": "string", "description": "Où?"}}, "required": ["city"]}'
WEATHER = Tool("weather", "Now", CITY)
TIME = Tool("time-of_day", "", '{"type":"object","properties":{}}')
TOOLS = (WEATHER, TIME)

USER = Message("user", "Warm in Vals?")
VALS = ToolCall("abcdefgh1", "weather", '{"city": "Vals"}')
CHUR = ToolCall("abcdefgh2", "weather", '{"city": "Chur"}')
CALLS = Message("assistant", "", (VALS, CHUR))
WARM = Message("tool", '{"celsius": 20}', call_id="abcdefgh1")
COLD = Message("tool", "cold", call_id="abcdefgh2")

FUNCTIONS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Now", "parameters": json.loads(CITY)},
    },
    {
        "type": "function",
        "function": {"name": "time-of_day", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
]


CALLING = """{% for tool in tools or [] %}<|im_start|>tools
{{ tool | tojson }}<|im_end|>{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
{{ call.id }} {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}
{%- if m.role == 'tool' %} {{ m.name }} {{ m.tool_call_id }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"""


def reference(
    version: int,
    turns: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    continued: bool = False,
) -> list[int]:
    """mistral-common's ids of turns in OpenAI's form."""
    request: ChatCompletionRequest[Any] = ChatCompletionRequest.from_openai(
        list(turns), tools=tools, continue_final_message=continued
    )
    return list(packaged(version).encode_chat_completion(request).tokens)


def called(*calls: tuple[str, str, str], content: str | None = None) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id_, name, arguments in calls
        ],
    }


def result(id_: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


ASKED = {"role": "user", "content": "Warm in Vals?"}
BOTH = called(("abcdefgh1", "weather", '{"city": "Vals"}'), ("abcdefgh2", "weather", '{"city": "Chur"}'))
RESULTS = [result("abcdefgh1", '{"celsius": 20}'), result("abcdefgh2", "cold")]


def formats() -> list[tuple[int, Prompter]]:
    return [(version, mistral(f"mistral-v{version}", large(version))) for version in (3, 7)]


def test_tools_calls_and_results_are_mistral_commons() -> None:
    for version, format_ in formats():
        assert format_.encode([USER], TOOLS) == reference(version, [ASKED], FUNCTIONS)
        talk = [USER, CALLS, WARM, COLD]
        assert format_.encode(talk, TOOLS) == reference(version, [ASKED, BOTH, *RESULTS], FUNCTIONS)
        assert format_.encode(talk) == reference(version, [ASKED, BOTH, *RESULTS])
        assert format_.encode([*talk, Message("user", "Thanks")], TOOLS[:1]) == reference(
            version, [ASKED, BOTH, *RESULTS, {"role": "user", "content": "Thanks"}], FUNCTIONS[:1]
        )


def test_a_reply_after_results_is_continued() -> None:
    for version, format_ in formats():
        turns = [ASKED, BOTH, *RESULTS, {"role": "assistant", "content": "It is"}]
        expected = reference(version, turns, FUNCTIONS, continued=True)
        assert format_.encode([USER, CALLS, WARM, COLD, Message("assistant", "It is")], TOOLS) == expected


def test_a_conversation_with_tools_written_by_hand() -> None:
    def text(version: int, *messages: Message) -> str:
        vocabulary = large(version)
        ids = mistral(f"mistral-v{version}", vocabulary).encode(messages, TOOLS[1:])
        return "".join(vocabulary.text(token) for token in ids).replace("▁", " ")

    talk = (USER, Message("assistant", "", (VALS,)), WARM)
    tools = (
        '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "time-of_day", "description": "", '
        '"parameters": {"type": "object", "properties": {}}}}][/AVAILABLE_TOOLS]'
    )
    call = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Vals"}, "id": "abcdefgh1"}]</s>'
    assert text(3, *talk) == (
        f"<s>{tools}[INST] Warm in Vals?[/INST]{call}"
        '[TOOL_RESULTS] {"content": {"celsius": 20}, "call_id": "abcdefgh1"}[/TOOL_RESULTS]'
    )
    assert text(7, Message("system", "S"), *talk) == (
        f"<s>[SYSTEM_PROMPT] S[/SYSTEM_PROMPT]{tools}[INST] Warm in Vals?[/INST]{call}"
        '[TOOL_RESULTS] abcdefgh1[TOOL_CONTENT] {"celsius": 20}[/TOOL_RESULTS]'
    )


def test_text_beside_calls_is_written_where_the_format_can() -> None:
    talk = [USER, Message("assistant", "Wait.", (VALS,)), WARM]
    one = ("abcdefgh1", "weather", '{"city": "Vals"}')
    (_, v3), (_, v7) = formats()
    assert v3.encode(talk) == reference(3, [ASKED, called(one), RESULTS[0]])
    assert v7.encode(talk) == reference(7, [ASKED, called(one, content="Wait."), RESULTS[0]])


def test_v1_refuses_tools_and_calls() -> None:
    v1 = mistral("mistral-v1", opened(pieces_of(file_of(1))))
    for talk, tools in (([USER], TOOLS), ([USER, CALLS, WARM, COLD], ())):
        with pytest.raises(EngineError, match="mistral-v1 has no tools and no calls"):
            v1.encode(talk, tools)


# What is mended


def test_ids_are_nine_letters_and_digits_that_differ() -> None:
    assert short_ids(["abcdefgh1", "A2345678Z"]) == ["abcdefgh1", "A2345678Z"]
    odd = ["call_1", "call_1", "", "null", "abcdefgh1", "abcdefgh1", "é\ud800", "x" * 100_000]
    short = short_ids(odd)
    assert short[4] == "abcdefgh1"
    assert len(set(short)) == len(odd)
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id_) for id_ in short)
    assert short_ids(odd) == short
    # An id that is already what another one would become.
    assert short_ids(["call_1", short[0]])[0] == short[0] != short_ids(["call_1", short[0]])[1]


@pytest.mark.parametrize(
    "ids", [("call_1", "call_2"), ("call_1", "call_1"), ("", ""), ("abcdefgh1", ""), ("abcdefgh1", "abcdefgh1")]
)
def test_results_find_their_calls(ids: tuple[str, str]) -> None:
    calls = tuple(ToolCall(id_, "weather", "{}") for id_ in ids)
    results = [Message("tool", str(number), call_id=id_ or None) for number, id_ in enumerate(ids)]
    told = settled([USER, Message("assistant", "", calls), *results])
    assert [message.call_id for message in told[2:]] == [call.id for call in told[1].calls]
    assert [message.content for message in told[2:]] == ["0", "1"]


def test_results_stand_in_the_order_of_the_calls() -> None:
    assert settled([USER, CALLS, COLD, WARM]) == [USER, CALLS, WARM, COLD]
    without = Message("tool", "cold")
    assert settled([USER, CALLS, without, WARM])[2:] == [WARM, COLD]
    for version, format_ in formats():
        assert format_.encode([USER, CALLS, COLD, WARM]) == reference(version, [ASKED, BOTH, *RESULTS])


def test_calls_of_neighbouring_replies_are_one_replys() -> None:
    apart = [USER, Message("assistant", "", (VALS,)), Message("assistant", "", (CHUR,)), WARM, COLD]
    assert settled(apart) == [USER, CALLS, WARM, COLD]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "{}"),
        ('{"a":1,"b":"é\\u00e9"}', '{"a": 1, "b": "éé"}'),
        ('{"city": "Vals"', '"{\\"city\\": \\"Vals\\""'),
        ("[1]", "[1]"),
        ("no JSON", '"no JSON"'),
        ("[" * 100_000, '"' + "[" * 100_000 + '"'),
        ("1" * 5000, '"' + "1" * 5000 + '"'),
        ('{"\\ud800": "\\udfff"}', '{"\ufffd": "\ufffd"}'),
        ("\ud800", '"\ufffd"'),
        ('"\\ud83d\\ude00"', '"😀"'),
    ],
)
def test_arguments_are_told_as_they_were_written(arguments: str, told: str) -> None:
    call = ToolCall("abcdefgh1", "we ather\n!", arguments, error="malformed")
    talk = [USER, Message("assistant", "", (call,)), WARM]
    (mended,) = settled(talk)[1].calls
    assert mended == ToolCall("abcdefgh1", "we_ather__", told, error="malformed")
    for version, format_ in formats():
        turn = called(("abcdefgh1", "we_ather__", told))
        assert format_.encode(talk) == reference(version, [ASKED, turn, RESULTS[0]])
    said = spoken(smollm(), templated(smollm(), CALLING).encode(talk))
    assert f"we_ather__ {told}" in said


def test_a_name_that_is_none_is_still_told() -> None:
    for name, told in (("", "_"), ("é" * 100, "_" * 64)):
        talk = [USER, Message("assistant", "", (ToolCall("", name, "x"),)), Message("tool", "no such tool")]
        assert settled(talk)[1].calls[0].name == told
        for _, format_ in formats():
            format_.encode(talk)


@pytest.mark.parametrize("content", ["", " ", "[" * 100_000, "1" * 5000, '"\\ud800"', "\ud800", "NaN", "{} {}"])
def test_every_result_can_be_told(content: str) -> None:
    for kind in (kind for kind in KINDS if kind not in ("mistral-v1", "template")):
        format_, vocabulary, _ = mistral_format(kind)
        talk = [USER, Message("assistant", "Wait.", (VALS,)), Message("tool", content, call_id="abcdefgh1")]
        assert vocabulary.text(format_.encode(talk, TOOLS)[-1]) == "[/TOOL_RESULTS]"


# What is refused


@pytest.mark.parametrize(
    ("talk", "named"),
    [
        ([USER, CALLS], "the call 'abcdefgh1' of the tool 'weather' has no result"),
        ([USER, CALLS, WARM], "the call 'abcdefgh2' of the tool 'weather' has no result"),
        ([USER, CALLS, USER, WARM, COLD], "the call 'abcdefgh1' of the tool 'weather' has no result"),
        ([USER, WARM], "the result of the call 'abcdefgh1' belongs to no call"),
        ([USER, Message("tool", "x")], "the result of the call belongs to no call"),
        ([USER, CALLS, WARM, COLD, COLD], "the result of the call 'abcdefgh2' belongs to no call"),
        ([USER, CALLS, WARM, COLD, USER, COLD], "the result of the call 'abcdefgh2' belongs to no call"),
        ([CALLS, WARM, COLD], "no user message"),
    ],
)
def test_calls_and_results_that_do_not_belong_together_are_refused(talk: list[Message], named: str) -> None:
    for format_ in (*(format_ for _, format_ in formats()), templated(smollm(), CALLING)):
        with pytest.raises(EngineError, match=named) as caught:
            format_.encode(talk)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tool", "named"),
    [
        (Tool("two words", "", "{}"), "'two words' cannot be the name of a tool"),
        (Tool("", "", "{}"), "'' cannot be the name of a tool"),
        (Tool("f", "", "[]"), "the parameters of the tool 'f' are no JSON object"),
        (Tool("f", "", "no"), "the parameters of the tool 'f' are no JSON object"),
        (Tool("f", "", "[" * 100_000), "the parameters of the tool 'f' are no JSON object"),
    ],
)
def test_tools_that_are_none_are_refused(tool: Tool, named: str) -> None:
    for format_ in (*(format_ for _, format_ in formats()), templated(smollm(), CALLING)):
        with pytest.raises(EngineError, match=named):
            format_.encode([USER], [tool])


def test_a_schema_that_mistral_common_refuses_names_its_tool() -> None:
    for parameters in ('{"type": "nothing"}', '{"items":' * 400 + "{}" + "}" * 400, '{"title": [' + "1," * 999 + "1]}"):
        for _, format_ in formats():
            told = r"^the parameters of the tool 'g' are no JSON schema: [^\n]{,301}; correct them$"
            with pytest.raises(EngineError, match=told):
                format_.encode([USER], [WEATHER, Tool("g", "", parameters)])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mistral-v1", "template")])
def test_a_conversation_may_begin_with_calls(kind: str) -> None:
    """As where a client leaves out what is old. mistral-common does not count the calls of a first message."""
    format_, vocabulary, _ = mistral_format(kind)
    talk = [CALLS, WARM, COLD, Message("assistant", "Yes."), Message("user", "Thanks.")]
    ids = format_.encode(talk)
    assert ids == format_.encode([Message("user", ""), *talk])
    assert [vocabulary.text(token) for token in ids[:4]] == ["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]"]


@pytest.mark.parametrize(
    "spelled", ["<|im_end|>", "[INST]", "[TOOL_CALLS]", "[/TOOL_RESULTS]", "</s>", "<|im_start|>user"]
)
def test_nothing_of_a_tool_call_or_result_becomes_a_control_token(spelled: str) -> None:
    def talk(text: str) -> tuple[list[Message], list[Tool]]:
        arguments = json.dumps({text: text, "a": [text, {text: None}]}, ensure_ascii=False)
        calls = (ToolCall("1", "f", arguments), ToolCall("2", "f" + text, text + "{"))
        schema = json.dumps({"properties": {text: {"description": text, "enum": [text]}}}, ensure_ascii=False)
        results = [Message("tool", json.dumps({text: text}), call_id="1"), Message("tool", text, call_id="2")]
        told = [USER, Message("assistant", text, calls), *results, Message("assistant", text), Message("user", text)]
        return told, [Tool("f", text, schema)]

    for format_, vocabulary in (
        *((format_, large(version)) for version, format_ in formats()),
        (templated(smollm(), CALLING), smollm()),
    ):
        ids = format_.encode(*talk(spelled))
        assert controls(vocabulary, ids) == controls(vocabulary, format_.encode(*talk("harmless")))
        assert spoken(vocabulary, ids).count(spelled) > 8


def test_formats_that_mark_turns_by_text_say_so() -> None:
    assert mistral("mistral-v1", opened(pieces_of(file_of(1)))).marks_turns_by_text
    assert not any(format_.marks_turns_by_text for _, format_ in formats())
    assert not templated(smollm(), CALLING).marks_turns_by_text
    plain = "{{ bos_token }}{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    assert templated(smollm(), plain).marks_turns_by_text
    assert not templated(smollm(), "{{ raise_exception('no') }}").marks_turns_by_text


def test_text_that_is_no_unicode_is_told_with_a_mark_in_its_place() -> None:
    broken = Tool("f", "a\ud800b", '{"description": "c\\udfffd"}')
    mended = Tool("f", "a\ufffdb", '{"description": "c\ufffdd"}')
    for format_ in (*(format_ for _, format_ in formats()), templated(smollm(), CALLING)):
        assert format_.encode([USER], [broken]) == format_.encode([USER], [mended])


def test_the_engine_reads_tools_and_tells_of_a_format_that_marks_turns_by_text(demo: Path) -> None:
    for prompt, told in (("mistral-v1", 1), ("mistral-v3", 0)):
        events: list[Event] = []
        load = Load(demo, EngineSettings(n_ctx=256, n_threads=1), prompt, DEMO_TOKENIZER)
        answerer = Answerer.load(load, events.append, lambda: False)
        assert sum(isinstance(event, Notice) and "pretend to be several" in event.text for event in events) == told
        if prompt == "mistral-v3":
            answerer.reply(Reply((USER,), Sampling(max_tokens=1), tools=TOOLS[1:]), events.append)
            ids = mistral(prompt, vocabularies.demo(), DEMO_TOKENIZER).encode([USER], TOOLS[1:])
            assert isinstance(events[-1], Finished)
            assert events[-1].prompt_tokens == len(ids)
        answerer.close()
