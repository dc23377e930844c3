"""Conversations in the form of OpenAI's chat API → messages and tools.

Takes what json.loads gives: a list of messages, or an object with `messages` and perhaps `tools`, such as the body of a
request to /v1/chat/completions. Everything is checked here, and a fault is told with its place:
`messages[3].tool_calls[0].function.name: …`. Keys that say nothing to a model, such as `temperature` or `refusal:
null`, are passed over.

Taken: the roles system, developer (as system), user, assistant and tool; text, and lists of text parts, which are
joined by a blank line as mistral-common joins them; `tool_calls` of functions, their arguments as JSON text or as an
object. Not taken: images, sound and files, since the models read text; the older `function_call`.
"""

import json
from collections.abc import Mapping
from typing import Any

from runtime.conversation import NAME
from runtime.errors import UserError
from runtime.messages import Message, Role, Tool, ToolCall

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


class ConversationError(UserError):
    """A conversation that is not in the form of OpenAI's chat API; says where."""


def conversation(value: Any) -> tuple[list[Message], list[Tool]]:
    """The messages and tools of a conversation. Raises ConversationError."""
    if isinstance(value, list):
        return messages(value), []
    if not isinstance(value, Mapping) or "messages" not in value:
        raise ConversationError('a list of messages is wanted, or an object with "messages" and "tools"')
    return messages(value["messages"]), tools(value.get("tools"))


def messages(value: Any, where: str = "messages") -> list[Message]:
    """The messages of a list, one at least. Raises ConversationError."""
    if not isinstance(value, list) or not value:
        raise ConversationError(f"{where}: {_found(value)}, where a list of one or more messages is wanted")
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(value)]


def tools(value: Any, where: str = "tools") -> list[Tool]:
    """The tools of a list; none for null. Raises ConversationError."""
    return [_tool(tool, f"{where}[{i}]") for i, tool in enumerate(_list(value, where))]


def _message(value: Any, where: str) -> Message:
    message = _object(value, where)
    role = _ROLES.get(message["role"]) if isinstance(message.get("role"), str) else None
    if role is None:
        raise _wrong(message.get("role"), f"{where}.role", f"one of {', '.join(_ROLES)}")
    calls: tuple[ToolCall, ...] = ()
    if role == "assistant":
        if message.get("function_call") is not None:
            raise ConversationError(f"{where}.function_call: the older form of a call; write tool_calls")
        found = _list(message.get("tool_calls"), f"{where}.tool_calls")
        calls = tuple(_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(found))
    key = "content"
    if role == "assistant" and message.get("content") is None:
        key = "refusal"
        message = {"refusal": "", **{k: v for k, v in message.items() if v is not None}}
    call_id = message.get("tool_call_id") if role == "tool" else None
    if call_id is not None and not isinstance(call_id, str):
        raise _wrong(call_id, f"{where}.tool_call_id", "text")
    return Message(role, _text(message.get(key), f"{where}.{key}"), calls, call_id)


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong(value, where, "text or a list of text parts")
    parts = []
    for i, item in enumerate(value):
        part = _object(item, f"{where}[{i}]")
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise _wrong(kind, f"{where}[{i}].type", "`text`, since the models read nothing else")
        if not isinstance(part.get(kind), str):
            raise _wrong(part.get(kind), f"{where}[{i}].{kind}", "text")
        parts.append(part[kind])
    return "\n\n".join(filter(None, parts))


def _call(value: Any, where: str) -> ToolCall:
    call = _object(value, where)
    function = _function(call, where)
    id_ = call.get("id")
    if id_ is not None and not isinstance(id_, str):
        raise _wrong(id_, f"{where}.id", "text")
    if not isinstance(function.get("name"), str):
        raise _wrong(function.get("name"), f"{where}.function.name", "text")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = _json(arguments, f"{where}.function.arguments")
    if arguments is not None and not isinstance(arguments, str):
        raise _wrong(arguments, f"{where}.function.arguments", "JSON as text, or an object")
    return ToolCall(id_ or "", function["name"], arguments or "")


def _tool(value: Any, where: str) -> Tool:
    function = _function(_object(value, where), where)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _wrong(name, f"{where}.function.name", "letters, digits, `_` and `-`, at most 64 of them")
    if description is not None and not isinstance(description, str):
        raise _wrong(description, f"{where}.function.description", "text")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise _wrong(parameters, f"{where}.function.parameters", "a JSON schema, an object")
    return Tool(name, description or "", _json(parameters or {}, f"{where}.function.parameters"))


def _function(value: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if value.get("type", "function") != "function":
        raise _wrong(value["type"], f"{where}.type", "`function`")
    return _object(value.get("function"), f"{where}.function")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(value, where, "an object")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise _wrong(value, where, "a list")
    return value or []


def _json(value: Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise ConversationError(f"{where}: nested too deeply") from None


def _wrong(value: Any, where: str, wanted: str) -> ConversationError:
    return ConversationError(f"{where}: {_found(value)}, where {wanted} is wanted")


def _found(value: Any) -> str:
    """What stands there, in JSON's words, short."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return repr(value if len(value) <= 60 else f"{value[:60]}…")
        case Mapping():
            return "an object"
        case list():
            return "a list" if value else "an empty list"
    return f"a number, {str(value)[:60]}" if not isinstance(value, int) or abs(value) < 10**60 else "a number"
