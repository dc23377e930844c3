"""Tools on the command line: which are offered, how the user is asked, how calls and results are told."""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.errors import EngineError
from runtime.messages import Message, NamedTool, ToolCall, ToolChoice
from tui.widgets.printable import one_line

if TYPE_CHECKING:
    from runtime.tool_loop import Ask, Called, LoopEvent
    from runtime.tools import Approval, Approve, Result, Toolbox

_SHOWN = 200
"""Characters of arguments and results that are told."""

_MOST_ROUNDS = 100


def add_arguments(parser: argparse.ArgumentParser, *, choice: bool = True) -> None:
    """`choice` is for verbs that ask once."""
    group = parser.add_argument_group("tools")
    group.add_argument("--tools", action="store_true", help="let the model call the tools that `bise tools` lists")
    group.add_argument("--tool", action="append", default=[], metavar="NAME", help="only this one, or such as files_*")
    group.add_argument(
        "--allow-tool", action="append", default=[], metavar="NAME", help="do not ask before this one is called"
    )
    if choice:
        group.add_argument(
            "--tool-choice", default="auto", metavar="HOW", help="auto (default), none, any, or the NAME to call first"
        )
    group.add_argument("--max-rounds", type=int, default=10, metavar="N", help="of calls, at most (default: 10)")


def opened(arguments: argparse.Namespace, say: Callable[[str], None]) -> "Toolbox | None":
    """The tools that the arguments ask for, to be closed; None where they ask for none. Raises UserError."""
    from runtime.tool_config import default_path, open_toolbox, read
    from runtime.tools import Rule

    if not 0 < arguments.max_rounds <= _MOST_ROUNDS:
        raise EngineError(f"--max-rounds {arguments.max_rounds} is not a number from 1 to {_MOST_ROUNDS}")
    if not arguments.tools and not arguments.tool:
        if arguments.allow_tool or getattr(arguments, "tool_choice", "auto") != "auto":
            raise EngineError("--allow-tool and --tool-choice go with --tools or --tool")
        return None
    config = read()
    if not config.entries:
        raise EngineError(f"no tools are named in {default_path()}; the README says how")
    rules = tuple(Rule(pattern, "allow") for pattern in arguments.allow_tool)
    toolbox = open_toolbox(replace(config, rules=(*rules, *config.rules)), lambda text: say(f"bise: {text}"))
    try:
        return toolbox.narrowed(arguments.tool) if arguments.tool else toolbox
    except BaseException:
        toolbox.close()
        raise


def events(
    arguments: argparse.Namespace, toolbox: "Toolbox | None", ask: "Ask", messages: Sequence[Message]
) -> "Iterator[LoopEvent]":
    """The answer to a conversation, by way of tools where there are any."""
    import threading

    from runtime.tool_loop import loop

    if toolbox is None:
        return ask(messages, (), "auto")
    return loop(
        ask,
        messages,
        toolbox,
        _approver(),
        threading.Event(),
        tool_choice=_choice(arguments.tool_choice),
        max_rounds=arguments.max_rounds,
    )


def as_json(done: "Called") -> dict[str, object]:
    return {
        "name": done.call.name,
        "arguments": done.call.arguments,
        "result": done.result.text,
        "ok": done.result.ok,
        "seconds": round(done.result.seconds, 3),
    }


def _choice(said: str) -> ToolChoice:
    match said:
        case "auto" | "none" | "any":
            return said
    return NamedTool(said)


def _approver() -> "Approve | None":
    """Asks at the terminal, whatever stdin and stdout are; None where there is no terminal."""
    try:
        with open("/dev/tty", "r+b", buffering=0):
            return _ask
    except OSError:
        return None


def _ask(call: ToolCall) -> "Approval":
    question = f"bise: may it call {described(call, 2000)}? [y]es, [n]o, [a]lways {call.name}: "
    with open("/dev/tty", "r+b", buffering=0) as terminal:
        while True:
            terminal.write(question.encode("utf-8", "replace"))
            said = _line(terminal.read).strip().lower()
            for word in ("yes", "no", "always"):
                if said in (word, word[0]):
                    return "yes" if word == "yes" else "no" if word == "no" else "always"


def _line(read: Callable[[int], bytes]) -> str:
    """A line; `no` at the end of the input."""
    line = b""
    while not line.endswith(b"\n"):
        if not (more := read(1)):
            return "no"
        line += more
    return line.decode("utf-8", "replace")


def described(call: ToolCall, n_characters: int = _SHOWN) -> str:
    """The call in one line that cannot steer a terminal."""
    return one_line(f"{call.name} {_short(call.arguments, n_characters)}")


def outcome(call: ToolCall, result: "Result") -> str:
    """What became of it, in one line."""
    how = "" if result.ok else "failed: "
    size = f" ({len(result.text):,} characters)" if len(result.text) > _SHOWN else ""
    return one_line(f"{call.name}, {result.seconds:.1f} s: {how}{_short(result.text, _SHOWN)}{size}")


def _short(text: str, n_characters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n_characters else f"{text[:n_characters]}…"


def close(toolbox: "Toolbox | None") -> None:
    if toolbox is not None:
        with contextlib.suppress(Exception):
            toolbox.close()
