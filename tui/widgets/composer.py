"""Where the user writes: plain text of many lines, shown as it is."""

from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.actions import SkipAction
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from tui.widgets.printable import printable


class PlainTextArea(TextArea):
    """A text area that pastes no control characters and does not blink, so that it costs nothing while it waits."""

    def __init__(self, text: str = "", *, placeholder: str = "", id: str | None = None) -> None:
        super().__init__(printable(text), placeholder=placeholder, id=id, highlight_cursor_line=False, compact=True)
        self.cursor_blink = False
        self.move_cursor(self.document.end)

    async def _on_paste(self, event: events.Paste) -> None:
        # TextArea's own handler runs after this one.
        event.text = printable(event.text)


class Composer(PlainTextArea):
    """The message being written. Enter sends it; Ctrl+J, or Shift+Enter where the terminal tells it from Enter, breaks
    the line. Ctrl+E in an empty composer is left to the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send", key_display="⏎"),
        Binding("ctrl+j,shift+enter,alt+enter", "new_line", "New line", key_display="^j"),
        Binding("ctrl+e", "line_end_or_edit", show=False),
        # Ctrl+Y, TextArea's redo, copies the answer.
        Binding("ctrl+shift+z,alt+z", "redo", "Redo", show=False),
    ]

    @dataclass
    class Sent(Message):
        """The user sent `text`, which is not blank. The composer is empty again; `restore` takes the text back."""

        text: str

    async def _on_key(self, event: events.Key) -> None:
        # Acted on here and now: a binding runs after the keys typed behind it.
        match event.key:
            case "enter":
                self.action_send()
            case "ctrl+j" | "shift+enter" | "alt+enter":
                self.action_new_line()
            case _:
                return
        event.stop()
        event.prevent_default()

    def action_send(self) -> None:
        if text := self.text.rstrip():
            self.clear()
            self.post_message(self.Sent(text))

    def action_new_line(self) -> None:
        self.replace("\n", *self.selection, maintain_selection_offset=False)

    def action_line_end_or_edit(self) -> None:
        if not self.text:
            raise SkipAction
        self.action_cursor_line_end()

    def restore(self, text: str) -> None:
        """Put `text` before what was typed meanwhile, and the cursor at the end."""
        self.text = printable(text) + self.text
        self.move_cursor(self.document.end)
        self.focus()
