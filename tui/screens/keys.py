"""The chat's keys, and the list of them."""

from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Label, Static

_KEYS: Final = (
    ("Enter", "send the message"),
    ("Ctrl+J", "new line; Shift+Enter too, if the terminal has it"),
    ("Escape, Ctrl+C", "stop the answer and keep what was said, or stop the load"),
    ("Ctrl+R", "answer the last message again"),
    ("Ctrl+E", "edit the last message, from an empty input"),
    ("Ctrl+Y", "copy the last answer"),
    ("Ctrl+C", "copy what is selected"),
    ("Ctrl+N", "new conversation"),
    ("F2, Ctrl+O", "saved conversations: search, open, delete"),
    ("F3, Ctrl+S", "system prompt"),
    ("F4", "next sampling preset"),
    ("F5", "load the model again after a fault"),
    ("Tab, Enter", "go to a call of a tool, open and close it"),
    ("PgUp, PgDn", "scroll; Ctrl+Home and Ctrl+End go to the ends"),
    ("Ctrl+Q", "quit; an answer in progress is kept"),
)


CHAT_BINDINGS: Final[list[BindingType]] = [
    Binding("escape", "stop", "Stop"),
    Binding("f1", "keys", "Keys"),
    Binding("ctrl+q", "app.quit", "Quit"),
    Binding("ctrl+n", "new", "New"),
    Binding("f2,ctrl+o", "conversations", "Open"),
    Binding("f5", "reload", "Reload"),
    Binding("f3,ctrl+s", "system", "System"),
    Binding("f4", "preset", "Preset"),
    Binding("ctrl+r", "again", "Again"),
    Binding("ctrl+e", "edit", show=False),
    # The composer is a TextArea, which has uses of its own for these.
    Binding("ctrl+y", "copy_answer", show=False, priority=True),
    Binding("ctrl+c", "interrupt", show=False, priority=True),
    Binding("pageup", "scroll('page_up')", show=False, priority=True),
    Binding("pagedown", "scroll('page_down')", show=False, priority=True),
    Binding("ctrl+home", "scroll('home')", show=False, priority=True),
    Binding("ctrl+end", "scroll('end')", show=False, priority=True),
]
"""What they do in the chat."""


class KeysScreen(ModalScreen[None]):
    """Shows what every key does, until a key closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,enter,ctrl+c", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            yield Label("Keys", classes="heading")
            for keys, effect in _KEYS:
                yield Static(Content.assemble((f"{keys:<16}", "bold"), effect))
            yield Label("esc close", classes="keys")
