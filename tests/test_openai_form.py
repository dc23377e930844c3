"""Conversations in OpenAI's form: read as mistral-common reads them, and every fault told with its place."""

import json
from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from runtime.messages import Message, Tool, ToolCall
from runtime.openai_form import ConversationError, conversation
from tests.vocabularies import large, mistral, packaged

CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Vals"}'}}
TALK: list[Any] = [
    {"role": "developer", "content": [{"type": "text", "text": t} for t in ("Be brief.", "", "Be kind.")]},
    {"role": "user", "content": [{"type": "text", "text": "Warm?"}], "name": "ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []},
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": [{"type": "text", "text": "20"}]},
    {"role": "assistant", "content": "It is.", "tool_calls": []},
    {"role": "user", "content": "Thanks."},
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "é"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": SCHEMA, "strict": None}},
    {"type": "function", "function": {"name": "time", "description": None, "parameters": None}},
]


def test_messages_and_tools_are_read() -> None:
    messages, tools = conversation({"messages": TALK, "tools": TOOLS, "model": "x", "temperature": 0.5})
    assert messages == [
        Message("system", "Be brief.\n\nBe kind."),
        Message("user", "Warm?"),
        Message("assistant", "", (ToolCall("abcdefgh1", "weather", '{"city": "Vals"}'),)),
        Message("tool", "20", call_id="abcdefgh1"),
        Message("assistant", "It is."),
        Message("user", "Thanks."),
    ]
    assert tools == [Tool("weather", "Now", json.dumps(SCHEMA, ensure_ascii=False)), Tool("time", "", "{}")]
    assert conversation(TALK) == conversation({"messages": TALK, "tools": None}) == (messages, [])


@pytest.mark.parametrize("version", [3, 7])
def test_what_is_read_gives_mistral_commons_ids(version: int) -> None:
    request: ChatCompletionRequest[Any] = ChatCompletionRequest.from_openai(TALK, tools=TOOLS)
    ids = packaged(version).encode_chat_completion(request).tokens
    assert (
        mistral(f"mistral-v{version}", large(version)).encode(*conversation({"messages": TALK, "tools": TOOLS})) == ids
    )


def test_what_says_nothing_else_may_be_left_out() -> None:
    calls = [{"function": {"name": "f", "arguments": {"a": [1, "é"]}}}, {"id": None, "function": {"name": "g"}}]
    messages, _ = conversation([{"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "x"}])
    assert messages == [
        Message("assistant", "", (ToolCall("", "f", '{"a": [1, "é"]}'), ToolCall("", "g", ""))),
        Message("tool", "x"),
    ]
    refusals = [
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant"},
    ]
    assert [message.content for message in conversation(refusals)[0]] == ["No.", "No.", ""]


DEEP: dict[str, Any] = {}
for _ in range(100_000):
    DEEP = {"a": DEEP}


def user(content: object) -> list[object]:
    return [{"role": "user", "content": content}]


def calling(call: object) -> list[object]:
    return [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [CALL, call]}]


def knowing(tool: object) -> dict[str, object]:
    return {"messages": user("x"), "tools": [TOOLS[0], tool]}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, 'a list of messages is wanted, or an object with "messages" and "tools"'),
        ({"message": []}, 'a list of messages is wanted, or an object with "messages" and "tools"'),
        ("x", 'a list of messages is wanted, or an object with "messages" and "tools"'),
        ([], "messages: an empty list, where a list of one or more messages is wanted"),
        ({"messages": {}}, "messages: an object, where a list of one or more messages is wanted"),
        (["x"], "messages[0]: 'x', where an object is wanted"),
        ([{"content": "x"}], "messages[0].role: nothing, where one of system, developer, user, "),
        ([{"role": "bot"}], "messages[0].role: 'bot', where one of system, developer, user, "),
        ([{"role": []}], "messages[0].role: an empty list, where one of system, developer, user, "),
        (user(None), "messages[0].content: nothing, where text or a list of text parts is wanted"),
        (user(7), "messages[0].content: a number, 7, where text or a list of text parts is wanted"),
        (user(10**5000), "messages[0].content: a number, where text or a list of text parts is wanted"),
        (user(["x"]), "messages[0].content[0]: 'x', where an object is wanted"),
        (user([{"type": "image_url"}]), "messages[0].content[0].type: 'image_url', where `text`, since "),
        (user([{"type": "text", "text": 1.5}]), "messages[0].content[0].text: a number, 1.5, where text is wanted"),
        (user([{"type": [1]}]), "messages[0].content[0].type: a list, where `text`, since "),
        ([{"role": "assistant", "content": {}}], "messages[0].content: an object, where text or "),
        ([{"role": "assistant", "refusal": 1}], "messages[0].refusal: a number, 1, where text or "),
        ([{"role": "assistant", "function_call": {}}], "messages[0].function_call: the older form of a call; write "),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls: an object, where a list is wanted"),
        ([{"role": "tool", "content": "", "tool_call_id": 1}], "messages[0].tool_call_id: a number, 1, where text "),
        (calling(None), "messages[1].tool_calls[1]: nothing, where an object is wanted"),
        (calling({"function": "f"}), "messages[1].tool_calls[1].function: 'f', where an object is wanted"),
        (calling({"function": {}}), "messages[1].tool_calls[1].function.name: nothing, where text is wanted"),
        (calling({"type": "custom"}), "messages[1].tool_calls[1].type: 'custom', where `function` is wanted"),
        (calling({"id": 1, "function": {"name": "f"}}), "messages[1].tool_calls[1].id: a number, 1, where text "),
        (
            calling({"function": {"name": "f", "arguments": [1]}}),
            "messages[1].tool_calls[1].function.arguments: a list, where JSON as text, or an object is wanted",
        ),
        (
            calling({"function": {"name": "f", "arguments": DEEP}}),
            "messages[1].tool_calls[1].function.arguments: nested too deeply",
        ),
        ({"messages": user("x"), "tools": {"a": 1}}, "tools: an object, where a list is wanted"),
        (knowing(True), "tools[1]: true, where an object is wanted"),
        (knowing({"function": {"name": "two words"}}), "tools[1].function.name: 'two words', where letters, digits, "),
        (knowing({"function": {"name": "é" * 100}}), f"tools[1].function.name: '{'é' * 60}…', where letters, digits, "),
        (knowing({"function": {"name": "f", "description": []}}), "tools[1].function.description: an empty list, "),
        (knowing({"function": {"name": "f", "parameters": "{}"}}), "tools[1].function.parameters: '{}', where a JSON "),
        (knowing({"function": {"name": "f", "parameters": DEEP}}), "tools[1].function.parameters: nested too deeply"),
    ],
)
def test_a_fault_is_told_with_its_place(value: object, told: str) -> None:
    with pytest.raises(ConversationError) as caught:
        conversation(value)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
