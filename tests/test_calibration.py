"""The calibration text: clean files, conversations that Mistral's formats take, and nothing of the evaluation texts."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from runtime.events import EngineSettings
from runtime.messages import Message
from runtime.native import Model, Vocabulary
from runtime.prompts import prompter
from tests.vocabularies import file_of, pieces_of, write_vocabulary

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "quant" / "calibration"
TEXTS = ("prose.txt", "code.txt", "languages.txt")
FILES = (*TEXTS, "conversations.jsonl")
EVALUATION = sorted((ROOT / "quant" / "demo" / "eval").iterdir())

Talk = dict[str, Any]


def conversations() -> list[Talk]:
    lines = (FOLDER / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def said(talk: Talk) -> Iterator[str]:
    """Every text of a conversation as the model reads it."""
    for message in talk["messages"]:
        yield message["content"]
        yield from (call["function"]["arguments"] for call in message.get("tool_calls", []))


@pytest.mark.parametrize("name", FILES)
def test_files_are_clean(name: str) -> None:
    text = (FOLDER / name).read_bytes().decode("utf-8")
    allowed = "\n\t" if name == "code.txt" else "\n"
    odd = {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Co", "Cn"} and c not in allowed}
    assert odd == set()
    assert unicodedata.is_normalized("NFC", text)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert [line for line in text.split("\n") if line != line.rstrip()] == []


def test_the_readme_gives_the_sizes() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    given = {name: int(size.replace(",", "")) for name, size in re.findall(r"^\| `(\S+)` \| ([\d,]+) \|", readme, re.M)}
    assert given == {name: (FOLDER / name).stat().st_size for name in FILES}
    talks = conversations()
    with_tools = sum("tools" in talk for talk in talks)
    assert f"{len(talks)} conversations, {with_tools} of them with tools" in readme


def test_nothing_of_it_is_in_the_evaluation_texts() -> None:
    evaluated = [path.read_text(encoding="utf-8") for path in EVALUATION]
    assert len(evaluated) == 4
    lines = {line.strip() for name in FILES for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()}
    lines |= {line.strip() for talk in conversations() for text in said(talk) for line in text.splitlines()}
    assert [line for line in lines if len(line) >= 40 and any(line in text for text in evaluated)] == []


def test_no_line_stands_twice() -> None:
    """Repeated lines would weigh twice. Short ones, such as closing brackets, are bound to come again."""
    text = "".join((FOLDER / name).read_text(encoding="utf-8") for name in FILES)
    assert [line for line, n in Counter(text.splitlines()).items() if n > 1 and len(line) >= 60] == []


@pytest.mark.parametrize("talk", conversations(), ids=(f"line {n}" for n in count(1)))
def test_a_conversation_is_one(talk: Talk) -> None:
    """Keys, order of roles, tools that are offered, arguments that fit their schema, a result for each call."""
    assert set(talk) <= {"messages", "tools"}
    offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in talk.get("tools", [])}
    messages = talk["messages"]
    roles = "".join(message["role"][0] for message in messages)
    assert re.fullmatch(r"s?(u(at+)*a)+", roles), roles
    waiting: list[tuple[str, str]] = []
    for message in messages:
        match message:
            case {"role": "tool", "content": str(), "tool_call_id": id_, "name": name}:
                assert waiting.pop(0) == (id_, name)
            case {"role": "assistant", "content": "", "tool_calls": [*calls]}:
                assert not waiting
                for call in calls:
                    assert re.fullmatch(r"[A-Za-z0-9]{9}", call["id"])
                    schema = offered[call["function"]["name"]]
                    arguments = json.loads(call["function"]["arguments"])
                    assert set(schema["required"]) <= set(arguments) <= set(schema["properties"])
                    waiting.append((call["id"], call["function"]["name"]))
            case {"role": "system" | "user" | "assistant", "content": str(content), **rest}:
                assert content == content.strip()
                assert content
                assert not rest
                assert not waiting
            case _:
                pytest.fail(f"unexpected message: {message}")


def test_ids_of_calls_are_unique() -> None:
    calls = (call for talk in conversations() for m in talk["messages"] for call in m.get("tool_calls", []))
    assert max(Counter(call["id"] for call in calls).values()) == 1


@cache
def reference(version: int) -> MistralTokenizer[Any, Any, Any, Any, Any]:
    tokenizer: MistralTokenizer[Any, Any, Any, Any, Any] = getattr(MistralTokenizer, f"v{version}")()
    return tokenizer


@pytest.mark.parametrize("version", [3, 7])
def test_mistral_common_takes_every_conversation(version: int) -> None:
    """Each user turn, call and result is there, in the control tokens that announce it."""
    pieces = reference(version).instruct_tokenizer.tokenizer
    for talk in conversations():
        request: ChatCompletionRequest[Any] = ChatCompletionRequest.from_openai(**talk, continue_final_message=True)
        ids = Counter(reference(version).encode_chat_completion(request).tokens)
        roles = [message["role"] for message in talk["messages"]]
        assert ids[pieces.get_special_token("[INST]")] == roles.count("user")
        assert ids[pieces.get_special_token("[AVAILABLE_TOOLS]")] == ("tools" in talk)
        assert ids[pieces.get_special_token("[TOOL_CALLS]")] == sum(
            "tool_calls" in message for message in talk["messages"]
        )
        assert ids[pieces.get_special_token("[TOOL_RESULTS]")] == roles.count("tool")


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Vocabulary]]:
    """llama.cpp's reading of both releases' vocabularies."""
    models: dict[int, Model] = {}
    for version in (3, 7):
        path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
        write_vocabulary(path, "test", pieces_of(file_of(version)))
        models[version] = Model(path, EngineSettings(n_ctx=64), vocab_only=True)
    yield {version: model.vocabulary for version, model in models.items()}
    for model in models.values():
        model.close()


@pytest.mark.parametrize("version", [3, 7])
def test_our_prompts_take_every_conversation_without_tools(version: int, vocabularies: dict[int, Vocabulary]) -> None:
    vocabulary = vocabularies[version]
    format_ = prompter(f"mistral-v{version}", vocabulary, template=None, tokenizer=None)
    plain = [talk["messages"] for talk in conversations() if "tools" not in talk]
    assert len(plain) >= 20
    for messages in plain:
        ids = format_.encode([Message(message["role"], message["content"]) for message in messages])
        spoken = b"".join(vocabulary.piece(token) for token in ids).decode()
        assert all(message["content"] in spoken for message in messages)


def test_a_wheel_has_the_folder() -> None:
    shipped = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {f"quant/calibration/{name}" for name in (*FILES, "README.md")} <= shipped
