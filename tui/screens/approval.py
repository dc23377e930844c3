"""May a tool be called? Asked over the chat, for each call that no rule decides."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Label, Static

from runtime.messages import ToolCall
from runtime.tools import Approval
from tui.widgets.printable import one_line, printable


class ApprovalScreen(ModalScreen[Approval]):
    """`y`, `n` or `a` for always; Escape is no. Enter is none of them, so that a slip allows nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss('yes')", "Yes"),
        Binding("a", "dismiss('always')", "Always"),
        Binding("n,escape", "dismiss('no')", "No"),
    ]

    def __init__(self, call: ToolCall) -> None:
        super().__init__()
        self._call = call

    def compose(self) -> ComposeResult:
        name = one_line(self._call.name)
        with Vertical(classes="dialog"):
            yield Static(Content.assemble("May ", (name, "bold"), " be called?"), classes="heading")
            with VerticalScroll(classes="arguments"):
                yield Static(Content(printable(self._call.arguments)))
            yield Label(Content(f"y yes   n no   a always {name}"), classes="keys")
