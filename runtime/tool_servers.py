"""Tools of an MCP server, over its standard input and output or over HTTP, by the official `mcp` package.

The package is asynchronous: each server has a thread with an event loop, in which it is started, asked and ended. What
a server writes to stderr goes to a log in the user's state folder, of which the end is told where it does not start.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from runtime.conversation import NAME
from runtime.engine_log import EngineLog
from runtime.messages import Tool
from runtime.tools import Limits, ToolError

START_SECONDS = 30.0
"""A server that is fetched by its command, such as npx, takes a while at first."""

_END_SECONDS = 10.0
_MOST_PAGES = 100


@dataclass(frozen=True, slots=True)
class Command:
    """A server to be started here."""

    command: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Besides the few variables that MCP servers get: HOME, PATH and the like, and none of the user's secrets."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server that runs somewhere."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Server:
    """An MCP server's tools, each called NAME_TOOL. A `Source` of tools. Raises ToolError where it does not start."""

    def __init__(self, name: str, place: Command | Address, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        self.name, self.limits = name, limits
        self._place = place
        self._log = EngineLog()
        self._originals: dict[str, str] = {}
        self._tools: list[Tool] = []
        self._loop = asyncio.new_event_loop()
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ending = asyncio.Event()
        self._client: Any = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"MCP {name}", daemon=True)
        self._thread.start()
        try:
            self._ready.result(START_SECONDS)
        except TimeoutError:
            self.close()
            raise ToolError(f"the MCP server {name} did not start in {START_SECONDS:g} seconds{self._said()}") from None
        except BaseException as error:
            said = self._said()
            self.close()
            if isinstance(error, Exception) and not isinstance(error, ToolError):
                raise ToolError(f"the MCP server {name} does not start: {_words(error)}{said}") from None
            raise

    def tools(self) -> Sequence[Tool]:
        return self._tools

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Its answer's text. Raises ToolError where the server says so, is gone, or takes longer."""
        if not self._thread.is_alive():
            raise ToolError(f"the MCP server {self.name} has ended")
        asked = asyncio.run_coroutine_threadsafe(self._ask(self._originals[name], arguments), self._loop)
        try:
            answer = asked.result(self.limits.seconds)
        except (TimeoutError, concurrent.futures.TimeoutError):
            asked.cancel()
            raise ToolError(f"no answer after {self.limits.seconds:g} seconds") from None
        except concurrent.futures.CancelledError:
            raise ToolError(f"the MCP server {self.name} has ended") from None
        except Exception as error:
            raise ToolError(f"the MCP server {self.name}: {_words(error)}") from None
        text = _text(answer)
        if answer.is_error:
            raise ToolError(text or "the tool failed and does not say why")
        return text

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join(_END_SECONDS)
        self._log.close(keep=False)

    def _run(self) -> None:
        """The server's thread."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # of a group's, the first says why
            if not self._ready.done():
                self._ready.set_exception(_first(error))
        finally:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            with contextlib.suppress(BaseException):
                self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    async def _serve(self) -> None:
        async with AsyncExitStack() as stack:
            self._client = await stack.enter_async_context(await self._connected(stack))
            await self._list()
            self._ready.set_result(None)
            await self._ending.wait()

    async def _connected(self, stack: AsyncExitStack) -> Any:
        import httpx2
        from mcp import Client, StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client

        if isinstance(self._place, Address):
            http = httpx2.AsyncClient(headers=dict(self._place.headers), timeout=None, follow_redirects=True)
            await stack.enter_async_context(http)
            return Client(streamable_http_client(self._place.url, http_client=http))
        command = StdioServerParameters(
            command=self._place.command, args=list(self._place.arguments), env=dict(self._place.environment)
        )
        log = stack.enter_context(os.fdopen(os.dup(self._log.descriptor), "w", encoding="utf-8"))
        return Client(stdio_client(command, errlog=log))

    async def _list(self) -> None:
        cursor = None
        for _ in range(_MOST_PAGES):
            page = await self._client.list_tools(cursor=cursor)
            for tool in page.tools:
                name = f"{self.name}_{tool.name}"
                if not NAME.fullmatch(name):
                    raise ToolError(f"the MCP server {self.name}: its tool {tool.name!r} has a name no model may call")
                self._originals[name] = tool.name
                self._tools.append(Tool(name, tool.description or tool.title or "", json.dumps(tool.input_schema)))
            cursor = page.next_cursor
            if not cursor:
                return
        raise ToolError(f"the MCP server {self.name} lists tools without end")

    async def _ask(self, name: str, arguments: Mapping[str, Any]) -> Any:
        return await self._client.call_tool(name, dict(arguments))

    def _said(self) -> str:
        lines = [line for line in self._log.tail().splitlines() if line.strip()]
        return f"; it said: {lines[-1].strip()}" if lines else ""


def _text(answer: Any) -> str:
    """The parts that are text, the others by their kind; structured content where there are no parts."""
    parts = []
    for part in answer.content:
        if part.type == "text":
            parts.append(part.text)
        elif part.type == "resource" and hasattr(part.resource, "text"):
            parts.append(part.resource.text)
        elif part.type == "resource_link":
            parts.append(str(part.uri))
        else:
            parts.append(f"[{part.type}, which a model of texts cannot read]")
    if not parts and answer.structured_content is not None:
        return json.dumps(answer.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return error


def _words(error: BaseException) -> str:
    error = _first(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
