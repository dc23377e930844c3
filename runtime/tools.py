"""Tools that a model calls: which there are, who may be asked, and what carrying a call out gives.

A tool is a Python function (tool_functions.py) or belongs to an MCP server (tool_servers.py); both are a `Source` here.
Whatever goes wrong with a call becomes its result, in words for the model. Knows nothing of models (tool_loop.py).
"""

import fnmatch
import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from runtime.errors import UserError
from runtime.messages import Tool, ToolCall

Policy = Literal["ask", "allow", "deny"]
"""Whether a tool is carried out: asked for each time, always, never."""

Approval = Literal["yes", "no", "always"]
"""Whether a call may be carried out. `always` holds for its tool from then on, until the toolbox closes."""

Approve = Callable[[ToolCall], Approval]
"""Asks the user. Called by one thread at a time."""

TIMEOUT_SECONDS = 60.0
OUTPUT_LIMIT = 20_000
"""Characters of a result, some 5,000 tokens."""

_POLL_SECONDS = 0.1
_CANCELLED = "cancelled by the user"


class ToolError(UserError):
    """A call that failed, in words for the model; or a tool or its configuration that cannot be used."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a call may take."""

    seconds: float = TIMEOUT_SECONDS
    characters: int = OUTPUT_LIMIT


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a call."""

    text: str
    """For the model."""
    ok: bool = True
    seconds: float = 0.0


class Source(Protocol):
    """Where tools come from."""

    limits: Limits

    def tools(self) -> Sequence[Tool]:
        """The tools, by the names that the model calls."""

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The tool's answer. For any thread. Raises ToolError, where it can so when its seconds are up."""

    def close(self) -> None:
        """End what it runs."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy for the tools whose names match a pattern such as `files_*`."""

    pattern: str
    policy: Policy


class Toolbox:
    """Tools of several sources, under one policy: the first rule that matches a name; else the user is asked.

    Raises ToolError where two tools have one name. `close` it.
    """

    def __init__(self, sources: Sequence[Source], rules: Sequence[Rule] = ()) -> None:
        self._sources, self._rules = tuple(sources), tuple(rules)
        self._by_name: dict[str, Source] = {}
        self._allowed: set[str] = set()
        found: list[Tool] = []
        for source in self._sources:
            for tool in source.tools():
                if tool.name in self._by_name:
                    raise ToolError(f"two tools are called {tool.name}; rename one of them or leave one out")
                self._by_name[tool.name] = source
                found.append(tool)
        self.tools = tuple(found)

    def __enter__(self) -> "Toolbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def policy(self, name: str) -> Policy:
        if name in self._allowed:
            return "allow"
        return next((rule.policy for rule in self._rules if fnmatch.fnmatchcase(name, rule.pattern)), "ask")

    def limits(self, name: str) -> Limits:
        return self._by_name[name].limits

    def narrowed(self, names: Sequence[str]) -> "Toolbox":
        """A view of the tools whose names match one of these patterns. Raises ToolError for one that matches none.

        Closing either closes both.
        """
        for pattern in names:
            if not fnmatch.filter(self._by_name, pattern):
                raise ToolError(
                    f"no tool is called {pattern!r}; there are {', '.join(sorted(self._by_name)) or 'none'}"
                )
        view = Toolbox((), self._rules)
        view._sources, view._allowed = self._sources, self._allowed
        wanted = {name for pattern in names for name in fnmatch.filter(self._by_name, pattern)}
        view._by_name = {name: source for name, source in self._by_name.items() if name in wanted}
        view.tools = tuple(tool for tool in self.tools if tool.name in wanted)
        return view

    def run(
        self, calls: Sequence[ToolCall], approve: Approve | None, stopped: threading.Event
    ) -> Generator[tuple[int, Result], None, None]:
        """Carry the calls of one turn out side by side: (number of the call, result) as they are done, each once.

        Each is approved first, one after the other; with nobody to ask, `approve` is None, what must be asked for is
        denied. A set `stopped` ends the waiting; a Python function that is at work then, or after its time is up, goes
        on in the background, since a thread cannot be ended.
        """
        done: queue.SimpleQueue[tuple[int, Result]] = queue.SimpleQueue()
        deadlines: dict[int, float] = {}
        for i, call in enumerate(calls):
            refusal = _CANCELLED if stopped.is_set() else self._refusal(call, approve)
            if stopped.is_set():  # while it was asked for
                refusal = _CANCELLED
            if refusal is not None:
                yield i, Result(refusal, ok=False)
                continue
            source = self._by_name[call.name]
            deadlines[i] = time.monotonic() + source.limits.seconds
            threading.Thread(target=_carry_out, args=(i, call, source, done), name=call.name, daemon=True).start()
        while deadlines:
            try:
                i, result = done.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                late = {i: at for i, at in deadlines.items() if stopped.is_set() or at < time.monotonic()}
                for i in late:
                    del deadlines[i]
                    seconds = self._by_name[calls[i].name].limits.seconds
                    text = _CANCELLED if stopped.is_set() else f"no answer after {seconds:g} seconds"
                    yield i, Result(text, ok=False, seconds=seconds)
            else:
                if deadlines.pop(i, None) is not None:
                    yield i, result

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def _refusal(self, call: ToolCall, approve: Approve | None) -> str | None:
        """Why a call is not carried out; None where it is."""
        if call.error is not None:
            return call.error
        if call.name not in self._by_name:
            return f"there is no tool {call.name!r}; there are {', '.join(self._by_name) or 'none'}"
        match self.policy(call.name):
            case "allow":
                return None
            case "deny":
                return "the user does not allow this tool"
        if approve is None:
            return "this tool must be approved, and there is nobody to ask"
        answer = approve(call)
        if answer == "always":
            self._allowed.add(call.name)
        return "the user does not allow this call" if answer == "no" else None


def _carry_out(i: int, call: ToolCall, source: Source, done: "queue.SimpleQueue[tuple[int, Result]]") -> None:
    began, ok = time.monotonic(), False
    try:
        text = source.call(call.name, _arguments(call))
        ok = True
    except ToolError as error:
        text = str(error)
    except BaseException as error:  # a tool may raise SystemExit, too
        text = f"{type(error).__name__}: {error}"
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8
    done.put((i, Result(_cut(text, source.limits.characters), ok, time.monotonic() - began)))


def _arguments(call: ToolCall) -> Mapping[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError) as error:
        raise ToolError(f"the arguments are not valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ToolError("the arguments must be a JSON object")
    return arguments


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n[cut here: {len(text) - limit:,} of {len(text):,} characters are left out]"
