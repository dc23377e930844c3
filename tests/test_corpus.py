"""Calibration texts: which files are taken, what is refused, and the chunks that are read."""

import json
from pathlib import Path

import numpy as np
import pytest

from quant.importance.corpus import BUNDLED, BUNDLED_FILES, read_texts, text_chunks
from quant.quality.texts import TextError
from runtime.errors import EngineError
from runtime.prompts import Transcript


def encode(text: str) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    """A token a character."""
    return np.array([ord(character) for character in text], np.int32)


def transcribe(conversation: Transcript) -> list[int]:
    """The characters of all messages; tools cannot be expressed."""
    if conversation.tools:
        raise EngineError("no tools here")
    return [ord(c) for message in conversation.messages for c in message.get("content") or ""]


def test_the_bundled_texts_have_one_name() -> None:
    texts = read_texts(BUNDLED)
    assert [text.name for text in texts] == [f"calibration/{name}" for name in BUNDLED_FILES]
    assert [bool(text.conversations) for text in texts] == [False, False, False, True]
    assert any(conversation.tools for conversation in texts[3].conversations)


def test_chunks_of_a_text(tmp_path: Path) -> None:
    """One newline at the end is dropped, and so is what fills no chunk."""
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij\n\n")
    (text,) = read_texts(str(path))
    chunks, n_left_out = text_chunks(text, encode, transcribe, 4, None)
    assert [bytes(chunk.tolist()) for chunk in chunks] == [b"abcd", b"efgh"]
    assert n_left_out == 0
    chunks, _ = text_chunks(text, encode, transcribe, 11, 5)
    assert [bytes(chunk.tolist()) for chunk in chunks] == [b"abcdefghij\n"]
    chunks, _ = text_chunks(text, encode, transcribe, 4, 1)
    assert len(chunks) == 1
    with pytest.raises(TextError, match=r"a\.txt has 11 tokens and a chunk 12; take a longer text"):
        text_chunks(text, encode, transcribe, 12, None)


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def test_conversations_follow_each_other(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    lines = ({"messages": [user("abc")]}, {"messages": [user("xyz")], "tools": [tool]}, "", {"messages": [user("de")]})
    (text,) = read_texts(write(tmp_path / "a.jsonl", *lines))
    chunks, n_left_out = text_chunks(text, encode, transcribe, 5, None)
    assert [bytes(chunk.tolist()) for chunk in chunks] == [b"abcde"]
    assert n_left_out == 1
    (text,) = read_texts(write(tmp_path / "b.jsonl", lines[1]))
    with pytest.raises(TextError, match="none of its 1 conversations can be read: no tools here"):
        text_chunks(text, encode, transcribe, 5, None)


CALL = {"function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[" * 100_000, r"line 2: not JSON"),
        ([], 'line 2: not a conversation; it must be an object with "messages"'),
        ({"messages": []}, 'must be an object with "messages", one or more'),
        ({"messages": {"role": "user"}}, "not a conversation"),
        ({"messages": ["x"]}, "line 2: message 1: not an object"),
        (
            {"messages": [user("a"), {"role": "bot", "content": "b"}]},
            "message 2: \"role\" is 'bot', and must be one of",
        ),
        ({"messages": [{"role": "user"}]}, 'message 1: "content" must be text, not NoneType'),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, '"content" must be text, not list'),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, '"tool_calls" must be a list'),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, '"tool_calls" must be'),
        ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "id": 1}]}]}, '"tool_calls" must be'),
        ({"messages": [{**user("a"), "tool_call_id": 1}]}, '"tool_call_id" must be text'),
        ({"messages": [user("a")], "tools": [{"name": "f"}]}, '"tools" must be a list of objects with a "function"'),
        ({"messages": [user("a")], "tools": {"f": 1}}, '"tools" must be a list'),
    ],
)
def test_lines_that_are_no_conversations(line: object, message: str, tmp_path: Path) -> None:
    good = {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    with pytest.raises(TextError, match=message) as caught:
        read_texts(write(tmp_path / "a.jsonl", good, line))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for argument, message in (
        (str(tmp_path / "none.txt"), "no such text"),
        (str(tmp_path), "cannot be read"),
        (str(tmp_path / "latin.txt"), "not UTF-8: byte 3 of 4 is 0xe9"),
        (write(tmp_path / "empty.jsonl", "", ""), "no conversation in it"),
    ):
        with pytest.raises(TextError, match=message):
            read_texts(argument)
