"""Chat with a model in the terminal. Conversations are saved; Ctrl+O inside lists them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tui import tool_use
from tui.choose import add_model_arguments
from tui.engine_options import add_engine_arguments, add_sampling_arguments

if TYPE_CHECKING:
    from tui.history import History

HELP = "chat in the terminal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="default: the one used last, else SmolLM2, else the demo"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--conversation", type=int, metavar="N", help="open a saved conversation")
    parser.add_argument("--list", action="store_true", help="list the saved conversations and stop")
    parser.add_argument("--history", type=Path, metavar="FILE", help="default: in the user's data folder")
    add_model_arguments(parser)
    add_engine_arguments(parser)
    add_sampling_arguments(parser)
    tool_use.add_arguments(parser, choice=False)


def run(arguments: argparse.Namespace) -> int:
    import sys

    from runtime.errors import EngineError
    from runtime.library import data_folder
    from tui.history import History

    history = History(arguments.history or data_folder() / "conversations.sqlite")
    try:
        if arguments.list:
            _print_conversations(history)
            return 0
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise EngineError("the chat needs a terminal; for pipes there is `bise ask`")
        return _chat(arguments, history)
    finally:
        history.close()


def _chat(arguments: argparse.Namespace, history: "History") -> int:
    import sys

    from runtime.session import Session
    from tui.app import chat_app
    from tui.choose import choose, remember
    from tui.engine_options import engine_settings, presets

    choice = choose(arguments.model, arguments.level, arguments.models, lambda line: print(line, file=sys.stderr))
    settings = presets(arguments, choice.file)
    load = choice.file.load(engine_settings(arguments, choice.file))
    faults: list[str] = []
    toolbox = tool_use.opened(arguments, faults.append)
    session = Session(load)
    app = chat_app(
        session,
        history,
        title=choice.file.title,
        notice=" ".join(filter(None, [choice.notice, *faults])) or None,
        system=arguments.system,
        presets=settings,
        preset=arguments.preset,
        conversation=arguments.conversation,
        model_key=choice.file.key,
        level=choice.file.level,
        toolbox=toolbox,
        max_rounds=arguments.max_rounds,
    )
    remember(choice)
    try:
        app.run()
    finally:
        session.close()
        tool_use.close(toolbox)
    return app.return_code or 0


def _print_conversations(history: "History") -> None:
    from tui.widgets.printable import one_line

    for conversation in history.conversations():
        print(f"{conversation.id:>5}  {conversation.updated:%Y-%m-%d %H:%M}  {one_line(conversation.title)}")
