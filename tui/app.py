"""The chat program. `chat_app` builds it, for the command line and for the tests alike."""

import asyncio
from collections.abc import Mapping
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.theme import Theme

from runtime.events import Sampling
from runtime.tool_loop import MAX_ROUNDS
from runtime.tools import Toolbox
from tui.history import History
from tui.screens.chat import ChatScreen
from tui.talker import Speaker, Talker

_THEME = Theme(
    name="bise",
    primary="#7aa6c2",
    secondary="#9db4c0",
    accent="#8fc1d4",
    foreground="#d5dbe1",
    background="#14181d",
    surface="#1a1f26",
    panel="#222932",
    warning="#e0b060",
    error="#e07a6a",
    success="#8fbf8f",
    dark=True,
)


class ChatApp(App[None]):
    """Shows one chat screen, and closes the talker however it ends."""

    CSS_PATH = "chat.tcss"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", priority=True),
    ]

    def __init__(self, talker: Talker, chat: ChatScreen) -> None:
        super().__init__()
        self._talker = talker
        self._chat = chat
        self.register_theme(_THEME)
        self.theme = _THEME.name

    def get_default_screen(self) -> ChatScreen:
        return self._chat

    async def on_unmount(self) -> None:
        # Closing waits for a process; the screen has saved by now.
        await asyncio.to_thread(self._talker.close)


def chat_app(
    talker: Talker,
    history: History,
    *,
    title: str,
    notice: str | None,
    system: str | None,
    presets: Mapping[str, Sampling],
    preset: str,
    conversation: int | None = None,
    model_key: str,
    level: str | None = None,
    toolbox: Toolbox | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> ChatApp:
    """The chat with `talker`, called `title`.

    `notice` is a line above the transcript. `preset` is one of `presets`. `conversation` is the saved one to open;
    `HistoryError` is raised where there is none. `model_key` and `level` are saved with every answer. The model may
    call the tools of `toolbox`, in at most `max_rounds` rounds. The app closes `talker` when it ends; `history` and
    `toolbox` stay open.
    """
    if conversation is not None:
        history.conversation(conversation)
    assert preset in presets
    chat = ChatScreen(
        talker,
        history,
        speaker=Speaker(title, model_key, level),
        notice=notice,
        system=system,
        presets=presets,
        preset=preset,
        conversation=conversation,
        toolbox=toolbox,
        max_rounds=max_rounds,
    )
    return ChatApp(talker, chat)
