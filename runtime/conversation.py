"""Conversations made ready for any prompt format: put in order, and written in the form of OpenAI's chat API.

Takes messages.py's values. Knows no format: prompts.py names them, mistral.py and template.py write them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from itertools import chain, count
from typing import Any

from runtime.errors import EngineError
from runtime.messages import Message, Tool, ToolCall

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""Of a tool: what OpenAI's API and mistral-common take."""


def settled(messages: Sequence[Message]) -> list[Message]:
    """The messages that say something, in the order and the form that every format can take.

    Mended is what leaves the meaning as it is:

    - A blank system prompt and a reply that was stopped before its first word are left out.
    - Neighbouring messages of the user's, and of the assistant's, are joined by a blank line.
    - Call ids become nine letters and digits, which Mistral's formats want, different ones for the calls of a reply;
      ids that are so already stay. Their results follow them, and stand in the order of the calls. A result without
      an id is that of the first call without another result.
    - Arguments are written as json.dumps writes them. Those that are no JSON become a JSON string, so that the model
      sees what it wrote; none at all are `{}`. In a name of a call, what no name may have becomes `_`.
    - A lone surrogate, which has no UTF-8, becomes U+FFFD.

    Raises EngineError when nothing is asked, when a call has no result behind it, and for a result without a call.
    """
    told = _joined(map(_sound, filter(_says_something, messages)))
    if not any(message.role == "user" for message in told):
        raise EngineError("the conversation has no user message, so there is nothing to answer; write one")
    return list(_paired(told))


def in_openai_form(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Settled messages as OpenAI's chat API writes them; `arguments` are JSON text."""
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.calls:
            names = {call.id: call.name for call in message.calls}
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.calls
            ]
        if message.role == "tool" and message.call_id is not None:
            turn |= {"tool_call_id": message.call_id, "name": names[message.call_id]}
        turns.append(turn)
    return turns


def functions(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as OpenAI's chat API writes them. Raises EngineError for a bad name or parameters that are no object."""
    return [
        {
            "type": "function",
            "function": {
                "name": _tool_name(tool),
                "description": _unicode(tool.description),
                "parameters": _schema(tool),
            },
        }
        for tool in tools
    ]


def as_json(text: str) -> str:
    """The JSON in `text` as json.dumps writes it, or else a JSON string of the text itself; `{}` for no text."""
    try:
        value = json.loads(text or "{}")
        told = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):  # also a number of more digits than Python reads, and too deep a nesting
        told = json.dumps(text, ensure_ascii=False)
    return _unicode(told)


def with_parsed_arguments(turns: Iterable[Mapping[str, Any]], *, as_mappings: bool = False) -> list[Mapping[str, Any]]:
    """The turns, in OpenAI's form, with the arguments of their calls parsed, where they are JSON.

    `as_mappings` puts arguments that are no object into one, under the key `arguments`.
    """

    def parsed(call: Mapping[str, Any]) -> Mapping[str, Any]:
        arguments = call["function"].get("arguments")
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if as_mappings and not isinstance(arguments, Mapping):
            arguments = {"arguments": arguments}
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [
        {**turn, "tool_calls": list(map(parsed, turn["tool_calls"]))} if turn.get("tool_calls") else turn
        for turn in turns
    ]


def texts(value: Any) -> Iterator[str]:
    """Every text in a value made of JSON's types, keys included."""
    match value:
        case str():
            yield value
        case Mapping():
            yield from chain.from_iterable(map(texts, chain(value.keys(), value.values())))
        case list() | tuple():
            yield from chain.from_iterable(map(texts, value))


def short_ids(ids: Iterable[str]) -> list[str]:
    """Of the calls of one reply: nine letters and digits each, all different. The same ids give the same."""
    short: list[str] = []
    for id_ in ids:
        tries = (sha256((id_ + "#" * n).encode("utf-8", "surrogatepass")).hexdigest()[:9] for n in count())
        candidates = (short_id for short_id in chain([id_], tries) if re.fullmatch(r"[a-zA-Z0-9]{9}", short_id))
        short.append(next(candidate for candidate in candidates if candidate not in short))
    return short


def _says_something(message: Message) -> bool:
    return message.role in ("user", "tool") or bool(message.content.strip() or message.calls)


def _sound(message: Message) -> Message:
    calls = [
        replace(call, name=re.sub(r"[^a-zA-Z0-9_-]", "_", call.name)[:64] or "_", arguments=as_json(call.arguments))
        for call in message.calls
    ]
    return replace(message, content=_unicode(message.content), calls=tuple(calls))


def _joined(messages: Iterable[Message]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if before is not None and before.role == message.role and message.role in ("user", "assistant"):
            content = "\n\n".join(filter(None, (before.content, message.content)))
            joined[-1] = replace(before, content=content, calls=before.calls + message.calls)
        else:
            joined.append(message)
    return joined


def _paired(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages with short call ids, and behind each reply the results of its calls in their order."""
    calls: tuple[ToolCall, ...] = ()
    results: list[Message] = []
    for message in messages:
        if message.role == "tool":
            results.append(message)
            continue
        yield from _results(calls, results)
        calls, results = message.calls, []
        ids = short_ids(call.id for call in calls)
        yield replace(message, calls=tuple(replace(call, id=id_) for call, id_ in zip(calls, ids, strict=True)))
    yield from _results(calls, results)


def _results(calls: Sequence[ToolCall], results: Sequence[Message]) -> Iterator[Message]:
    found: dict[int, Message] = {}
    for result in sorted(results, key=lambda result: not result.call_id):  # those that name their call come first
        fits = (i for i, call in enumerate(calls) if i not in found and result.call_id in (call.id, None, ""))
        index = next(fits, None)
        if index is None:
            named = f" {result.call_id!r}" if result.call_id else ""
            raise EngineError(
                f"the result of the call{named} belongs to no call of the reply before it; "
                "put each result behind the reply with its call, once"
            )
        found[index] = result
    for index, (call, id_) in enumerate(zip(calls, short_ids(call.id for call in calls), strict=True)):
        if index not in found:
            raise EngineError(f"the call {call.id!r} of the tool {call.name!r} has no result; put one behind the reply")
        yield replace(found[index], call_id=id_)


def _tool_name(tool: Tool) -> str:
    if not NAME.fullmatch(tool.name):
        raise EngineError(
            f"{tool.name!r} cannot be the name of a tool; take letters, digits, `_` and `-`, at most 64 of them"
        )
    return tool.name


def _schema(tool: Tool) -> dict[str, Any]:
    schema = json.loads(as_json(tool.parameters))
    if not isinstance(schema, dict):
        raise EngineError(f"the parameters of the tool {tool.name!r} are no JSON object; give a JSON schema of one")
    return schema


def _unicode(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
