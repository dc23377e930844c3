"""The editor of the system prompt."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label

from tui.widgets.composer import PlainTextArea


class SystemPromptScreen(ModalScreen[str | None]):
    """Edit `text`. Gives the new text, which may be empty, or None when the user cancels."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s,f3", "save", "Save"),
        Binding("escape", "dismiss(None)", "Cancel"),
    ]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog -tall"):
            yield Label("System prompt", classes="heading")
            yield PlainTextArea(self._text, placeholder="How the model should behave in this conversation")
            yield Label("^s save   esc cancel   empty: none", classes="keys")

    def action_save(self) -> None:
        self.dismiss(self.query_one(PlainTextArea).text.strip())
