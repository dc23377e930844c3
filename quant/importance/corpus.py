"""Calibration texts, and the chunks of tokens that a model reads of them.

Takes the name of the bundled texts or paths: UTF-8 text, or `.jsonl` files whose every line is a conversation in the
form of OpenAI's chat API, `{"messages": […], "tools": […]}`. Gives token ids in chunks (C, n_ctx), laid out as
llama-imatrix lays them out. Conversations come as their model's prompt format writes them, one behind the other. Knows
nothing of llama.cpp.

Source: `compute_imatrix` of tools/imatrix/imatrix.cpp, llama.cpp 0c1e57098.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.quality.texts import TextError, read_text
from runtime.errors import EngineError
from runtime.prompts import Transcript

BUNDLED = "calibration"
"""The name of the texts that come with Bise, in quant/calibration."""

BUNDLED_FILES = ("prose.txt", "code.txt", "languages.txt", "conversations.jsonl")

_FOLDER = Path(__file__).resolve().parent.parent / "calibration"
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A text to measure on."""

    name: str
    """Of the file, without its folder: it goes into the matrix."""
    content: str
    """Empty for conversations."""
    conversations: tuple[Transcript, ...]
    sha256: str
    """Of the file."""


Encode = Callable[[str], NDArray[np.int32]]
"""Text → ids, with BOS if the model adds it; text that spells a control token stays text."""

Transcribe = Callable[[Transcript], list[int]]
"""A conversation → ids. Raises EngineError where the model's format cannot express it."""


def read_texts(argument: str) -> tuple[CalibrationText, ...]:
    """All bundled texts by their common name, any other by its path.

    Raises TextError for a file that is missing, unreadable, not UTF-8, or not of conversations.
    """
    if argument == BUNDLED:
        return tuple(_read(_FOLDER / name, f"{BUNDLED}/{name}") for name in BUNDLED_FILES)
    path = Path(argument).expanduser()
    return (_read(path, path.name),)


def _read(path: Path, name: str) -> CalibrationText:
    text = read_text(str(path.absolute()))
    if path.suffix.lower() != ".jsonl":
        return CalibrationText(name, text.content, (), text.sha256)
    lines = enumerate(text.content.split("\n"), 1)
    conversations = tuple(_conversation(line, f"{path}, line {i}") for i, line in lines if line.strip())
    if not conversations:
        raise TextError(f"{path}: no conversation in it; each line must be one JSON object with messages")
    return CalibrationText(name, "", conversations, text.sha256)


def _conversation(line: str, where: str) -> Transcript:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: not JSON: {error}") from None
    messages = data.get("messages") if isinstance(data, dict) else None
    if not isinstance(messages, list) or not messages:
        raise TextError(f'{where}: not a conversation; it must be an object with "messages", one or more')
    for i, message in enumerate(messages, 1):
        if fault := _fault(message):
            raise TextError(f"{where}: message {i}: {fault}")
    tools = data.get("tools") or []
    if not isinstance(tools, list) or not all(_names_function(tool) for tool in tools):
        raise TextError(f'{where}: "tools" must be a list of objects with a "function" that has a "name"')
    return Transcript(tuple(messages), tuple(tools))


def _fault(message: Any) -> str:
    """What is wrong with a message; empty where nothing is."""
    if not isinstance(message, dict):
        return "not an object"
    if message.get("role") not in _ROLES:
        return f'"role" is {message.get("role")!r}, and must be one of {", ".join(_ROLES)}'
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        return '"tool_calls" must be a list of objects with a "function" that has "name" and "arguments"'
    if not isinstance(content, str) and not (content is None and calls):
        return f'"content" must be text, not {type(content).__name__}'
    if not isinstance(message.get("tool_call_id", ""), str):
        return '"tool_call_id" must be text'
    return ""


def _is_call(call: Any) -> bool:
    return (
        _names_function(call)
        and isinstance(call["function"].get("arguments"), str | dict)
        and isinstance(call.get("id", ""), str)
    )


def _names_function(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("function"), dict)
        and isinstance(value["function"].get("name"), str)
    )


def text_chunks(
    text: CalibrationText, encode: Encode, transcribe: Transcribe, n_ctx: int, max_chunks: int | None
) -> tuple[NDArray[np.int32], int]:
    """Whole chunks (C, n_ctx) of a text, the first `max_chunks`, and how many of its conversations were left out.

    Left out are those that the model's format cannot express. What does not fill a chunk is not read. Raises TextError
    for a text that does not fill one, and where no conversation is left.
    """
    n_left_out = 0
    if text.conversations:
        ids: list[int] = []
        refusal = ""
        for conversation in text.conversations:
            try:
                ids.extend(transcribe(conversation))
            except EngineError as error:
                n_left_out, refusal = n_left_out + 1, str(error)
        if n_left_out == len(text.conversations):
            raise TextError(f"{text.name}: none of its {n_left_out} conversations can be read: {refusal}")
        tokens = np.array(ids, np.int32)
    else:
        tokens = encode(text.content)
    if len(tokens) < n_ctx:
        raise TextError(
            f"{text.name} has {len(tokens):,} tokens and a chunk {n_ctx:,}; take a longer text or a smaller --context"
        )
    n_chunks = len(tokens) // n_ctx
    if max_chunks is not None:
        n_chunks = min(n_chunks, max_chunks)
    return tokens[: n_chunks * n_ctx].reshape(n_chunks, n_ctx), n_left_out
