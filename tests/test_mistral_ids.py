"""Our ids beside mistral-common's own: the conversations its tests are about, and a hundred that nobody wrote.

The oracle is mistral-common asked directly, with requests in OpenAI's form that are made here and never pass through
runtime/. The texts are expected to be Mistral's to the letter: hostile ones spell control tokens, cut and glued.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from runtime import prompts
from runtime.messages import Message, Tool, ToolCall
from tests.vocabularies import AWKWARD, controls, mistral_format, spoken

Turn = dict[str, Any]

KINDS = [kind for kind in prompts.KINDS if kind != "template"]


def reference(kind: str, turns: list[Turn], tools: list[Turn] | None = None, *, continued: bool = False) -> list[int]:
    request: ChatCompletionRequest[Any] = ChatCompletionRequest.from_openai(
        turns, tools=tools, continue_final_message=continued
    )
    return list(mistral_format(kind)[2].encode_chat_completion(request).tokens)


def told(turns: list[Turn], tools: list[Turn] | None = None) -> tuple[list[Message], list[Tool]]:
    """Turns and tools in OpenAI's form as ours."""
    messages = [
        Message(
            turn["role"],
            turn.get("content") or "",
            tuple(
                ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
                for call in turn.get("tool_calls", ())
            ),
            turn.get("tool_call_id"),
        )
        for turn in turns
    ]
    return messages, [
        Tool(tool["function"]["name"], tool["function"]["description"], json.dumps(tool["function"]["parameters"]))
        for tool in tools or ()
    ]


def ours(kind: str, turns: list[Turn], tools: list[Turn] | None = None) -> list[int]:
    return mistral_format(kind)[0].encode(*told(turns, tools))


def said(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def called(*names: str, content: str | None = None, first: int = 0, arguments: str = "{}") -> Turn:
    functions = [{"name": name, "arguments": arguments} for name in names]
    calls = [{"id": f"{first + i:09}", "type": "function", "function": f} for i, f in enumerate(functions)]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(number: int, content: str) -> Turn:
    return {"role": "tool", "content": content, "tool_call_id": f"{number:09}"}


def function(name: str, description: str = "", **parameters: object) -> Turn:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# What mistral-common's tests are about

TALKS: dict[str, list[Turn]] = {
    "one turn": [said("user", "a")],
    "several turns": [said("user", "a"), said("assistant", "b"), said("user", "c")],
    "a system prompt": [said("system", "SYSTEM"), said("user", "a"), said("assistant", "b"), said("user", "c")],
    "two system prompts": [said("system", "S"), said("system", "T"), said("user", "a")],
    "a system prompt behind the first question": [said("user", "a"), said("system", "S"), said("user", "b")],
    "neighbours": [
        said("user", "a"),
        said("user", "b"),
        said("assistant", "c"),
        said("assistant", "d"),
        said("user", "e"),
    ],
    "a reply first": [said("assistant", "a"), said("user", "b")],
    "spaces at the ends": [said("user", " a "), said("assistant", " b  "), said("user", "\n c \n")],
    "an empty question": [said("user", ""), said("assistant", "b"), said("user", "")],
}
CALLING: dict[str, list[Turn]] = {
    "one call": [said("user", "a"), called("t"), result(0, "d")],
    "a result in JSON": [said("user", "a"), called("t", arguments='{"g":"é"}'), result(0, '{"a":1, "b": [null]}')],
    "a result that looks like JSON": [said("user", "a"), called("t"), result(0, '{"a": 1')],
    "an empty result": [said("user", "a"), called("t"), result(0, "")],
    "arguments that are no JSON": [said("user", "a"), called("t", arguments='{"g": '), result(0, "d")],
    "parallel calls": [said("user", "a"), called("t", "q"), result(0, "d"), result(1, "e")],
    "sequential calls": [said("user", "a"), called("t"), result(0, "d"), called("q", first=1), result(1, "e")],
    "calls with a history": [
        *(said("user", "a"), called("t", "q"), result(0, "d"), result(1, "d"), said("assistant", "e")),
        *(said("user", "f"), called("q", "t", first=2), result(2, "d"), result(3, "d")),
    ],
    "a question behind results": [said("user", "a"), called("t"), result(0, "d"), said("user", "b")],
}
TOOLS = [
    function("t", type="object", properties={"g": {"type": "string"}, "h": {"type": "string", "enum": ["é", "\n"]}}),
    function("q", 'Asks "why"?'),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TALKS)
def test_conversations(name: str, kind: str) -> None:
    turns = TALKS[name]
    assert ours(kind, turns) == reference(kind, turns)
    continued = [*turns, said("assistant", "Go on ")]
    assert ours(kind, continued) == reference(kind, continued, continued=True)
    if kind != "mistral-v1":
        assert ours(kind, turns, TOOLS) == reference(kind, turns, TOOLS)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", CALLING)
def test_conversations_with_calls(name: str, kind: str) -> None:
    for turns in (CALLING[name], [said("system", "S"), *CALLING[name]]):
        for tools in (None, TOOLS[:1], TOOLS):
            assert ours(kind, turns, tools) == reference(kind, turns, tools)
        answered = [*turns, said("assistant", "So: ")]
        assert ours(kind, answered, TOOLS) == reference(kind, answered, TOOLS, continued=True)
        asked = [*turns, said("assistant", "Done."), said("user", "And now?")]
        assert ours(kind, asked, TOOLS) == reference(kind, asked, TOOLS)


@pytest.mark.parametrize("kind", KINDS[3:])
def test_text_and_calls_in_one_reply(kind: str) -> None:
    turns = [said("user", "a"), called("t", content="b"), result(0, "d")]
    assert ours(kind, turns, TOOLS) == reference(kind, turns, TOOLS)


def test_ids_written_by_hand() -> None:
    """Of both Large releases, as mistral-common's own tests know the letters: a 1032, b 1055, c 1045, f 1053."""
    talk = TALKS["several turns"]
    assert ours("mistral-v3", talk) == ours("mistral-v7", talk) == [1, 3, 1032, 4, 1055, 2, 3, 1045, 4]
    results = ours("mistral-v7", [said("user", "a"), called("t"), result(0, "f")])
    assert results[:4] + results[-3:] == [1, 3, 1032, 4, 18, 1053, 9]


# Conversations that nobody wrote

FRAGMENTS = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "</s>", "<s>"),
    *("[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "<unk>", "[IMG]", "[control_8]"),
    *("[IN", "ST]", "<", "/s>", "[/", '[{"name": "t"', '"}]', "{}", "null", "\\u0000", "\\"),
    *(text for text in AWKWARD if text.strip()),
)


def hostile(chance: random.Random) -> str:
    pieces = [chance.choice((*FRAGMENTS, "word", " ", "\n", chr(chance.randrange(0xA0, 0xD800)))) for _ in range(6)]
    return "x" + "".join(pieces)  # never blank: what is blank is left out


def harmless(chance: random.Random) -> str:
    hostile(chance)  # the same draws: the conversation keeps its form
    return "harmless"


def value(chance: random.Random, text: Callable[[random.Random], str], depth: int = 2) -> Any:
    kind = chance.randrange(6 if depth else 4)
    if kind == 4:
        return [value(chance, text, depth - 1) for _ in range(chance.randrange(3))]
    if kind == 5:
        return {f"{i}{text(chance)}": value(chance, text, depth - 1) for i in range(chance.randrange(3))}
    return [text(chance), chance.randrange(-9, 10**9), chance.random(), chance.choice([None, True])][kind]


def generated(seed: int, kind: str, text: Callable[[random.Random], str]) -> tuple[list[Turn], list[Turn], bool]:
    """Turns, tools, and whether the last turn is a reply to be continued."""
    chance = random.Random(seed)
    turns = [said("system", text(chance)) for _ in range(chance.choice([0, 0, 1, 2]))]
    number = 0
    for _ in range(chance.randrange(1, 4)):
        turns += [said("user", text(chance)) for _ in range(chance.choice([1, 1, 2]))]
        while kind != "mistral-v1" and chance.random() < 0.4:
            n_calls = chance.randrange(1, 4)
            arguments = json.dumps(value(chance, text), ensure_ascii=chance.random() < 0.5)
            if chance.random() < 0.2:
                arguments = text(chance) + "{"
            content = (
                text(chance) if kind not in ("mistral-v3", "mistral-v3-tekken") and chance.random() < 0.5 else None
            )
            turns.append(called(*["t", "q", "t-1"][:n_calls], content=content, first=number, arguments=arguments))
            for i in range(n_calls):
                plain = chance.random() < 0.5
                turns.append(result(number + i, text(chance) if plain else json.dumps(value(chance, text))))
            number += n_calls
        turns += [said("assistant", text(chance)) for _ in range(chance.choice([1, 1, 1, 2]))]
    end = chance.randrange(3)
    if end < 2:  # no reply to go on with: the last word is a question's or a result's
        while turns[-1]["role"] == "assistant":
            turns.pop()
    tools = [
        function(f"tool_{i}", text(chance), type="object", properties={text(chance): {"description": text(chance)}})
        for i in range(chance.choice([0, 1, 3]) if kind != "mistral-v1" else 0)
    ]
    return turns, tools, end == 2


@pytest.mark.parametrize("kind", KINDS)
def test_generated_conversations(kind: str) -> None:
    vocabulary = mistral_format(kind)[1]
    n_calls = n_continued = 0
    for seed in range(60):
        turns, tools, continued = generated(seed, kind, hostile)
        ids = ours(kind, turns, tools)
        assert ids == reference(kind, turns, tools or None, continued=continued), seed
        structure, other_tools, _ = generated(seed, kind, harmless)
        assert controls(vocabulary, ids) == controls(vocabulary, ours(kind, structure, other_tools)), seed
        n_calls += sum(len(turn.get("tool_calls", ())) for turn in turns)
        n_continued += continued
    assert n_continued > 10
    assert n_calls > 30 or kind == "mistral-v1"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_spells_a_control_token_is_letters(kind: str) -> None:
    vocabulary = mistral_format(kind)[1]
    spelled = [vocabulary.text(token) for token in range(vocabulary.n_tokens) if vocabulary.is_control(token)]
    text = "".join(spelled)
    assert len(spelled) > 700
    ids = ours(kind, [said("user", text)])
    assert controls(vocabulary, ids) == [1, 3, 4]
    assert spoken(vocabulary, ids).strip() == text
