"""A call of a tool in the transcript: one line, and all of it when it is opened."""

import json
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Static

from tui.history import TurnCall
from tui.widgets.printable import one_line, printable

_SHORT = 300
"""Characters of one line; the terminal cuts it where it ends."""


class CallBlock(Static, can_focus=True):
    """Enter or a click opens and closes it. `waits` says that its result is still to come."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "open", show=False)]

    def __init__(self, done: TurnCall, *, waits: bool = False) -> None:
        super().__init__()
        self._done, self._waits, self._open = done, waits, False

    def on_mount(self) -> None:
        self._draw()

    def on_click(self) -> None:
        self.action_open()

    def action_open(self) -> None:
        self._open = not self._open
        self._draw()

    def show(self, done: TurnCall, *, waits: bool = False) -> None:
        """The call has come to this."""
        self._done, self._waits = done, waits
        self._draw()

    def _draw(self) -> None:
        call, result = self._done.call, self._done.result
        mark = "▾" if self._open else "▸"
        how = "…" if self._waits else "not carried out" if result is None else f"{result.seconds:.1f} s"
        failed = result is not None and not result.ok
        head = Content.assemble(
            (f"{mark} {one_line(call.name)}", "bold"), f" · {how}", *([" · failed"] if failed else [])
        )
        self.set_class(not self._open, "-closed")
        self.set_class(failed, "-failed")
        if not self._open:
            text = "" if result is None else f" → {one_line(result.text[:_SHORT])}"
            self.update(Content.assemble(head, f"  {one_line(call.arguments[:_SHORT])}{text}"))
            return
        answer = "" if result is None else f"\n→ {printable(result.text)}"
        self.update(Content.assemble(head, f"\n{printable(_spread(call.arguments))}{answer}"))


def _spread(arguments: str) -> str:
    """JSON over several lines; what is none, as it is."""
    try:
        return json.dumps(json.loads(arguments), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments
