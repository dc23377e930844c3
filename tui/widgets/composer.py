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
    """The message being written. Enter sends it; Ctrl+J, or Shift+Enter where the terminal tells it apart, breaks the
    line. Page keys move the transcript, and Ctrl+E in an empty composer is left to the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Send", key_display="⏎"),
        Binding("ctrl+j,shift+enter,alt+enter", "new_line", "New line", key_display="^j"),
        Binding("ctrl+e", "line_end_or_edit", show=False),
        Binding("pageup", "screen.scroll_transcript(-1)", show=False),
        Binding("pagedown", "screen.scroll_transcript(1)", show=False),
        # Ctrl+Y, TextArea's redo, copies the answer.
        Binding("ctrl+shift+z,alt+z", "redo", "Redo", show=False),
    ]

    @dataclass
    class Sent(Message):
        """The user sent `text`, which is not blank. The composer keeps it until it is told to `clear`."""

        text: str

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            # TextArea would insert a newline; the key goes on to the bindings instead.
            event.prevent_default()

    def action_send(self) -> None:
        if self.text.strip():
            self.post_message(self.Sent(self.text))

    def action_new_line(self) -> None:
        self.insert("\n")

    def action_line_end_or_edit(self) -> None:
        if not self.text:
            raise SkipAction
        self.action_cursor_line_end()

    def write(self, text: str) -> None:
        """Replace the text and put the cursor at its end."""
        self.text = printable(text)
        self.move_cursor(self.document.end)
        self.focus()
