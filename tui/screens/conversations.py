"""The list of saved conversations: find, open, delete."""

from datetime import datetime
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Label, OptionList
from textual.widgets.option_list import Option

from runtime.errors import UserError
from tui.history import Conversation, History
from tui.screens.confirm import ConfirmScreen
from tui.widgets.printable import counted, one_line


class ConversationsScreen(ModalScreen[int | None]):
    """Gives the number of the conversation to open, or None.

    What is typed filters; the arrows move in the list meanwhile. `d` deletes where the list itself has the focus
    (Tab), Ctrl+D anywhere.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
        Binding("down", "move('cursor_down')", show=False),
        Binding("up", "move('cursor_up')", show=False),
        Binding("pagedown", "move('page_down')", show=False),
        Binding("pageup", "move('page_up')", show=False),
        Binding("d", "delete", "Delete"),
        # Input has a Ctrl+D of its own, for the character under the cursor.
        Binding("ctrl+d", "delete", "Delete", priority=True),
    ]

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog -tall"):
            yield Label("Conversations", classes="heading")
            filter_input = Input(placeholder="Type to search", compact=True)
            filter_input.cursor_blink = False
            yield filter_input
            yield OptionList(compact=True)
            yield Label("⏎ open   ^d delete   esc close", classes="keys")

    def on_mount(self) -> None:
        self._list("")

    @on(Input.Changed)
    def _filter(self, event: Input.Changed) -> None:
        self._list(event.value)

    @on(Input.Submitted)
    def _open_highlighted(self) -> None:
        self.query_one(OptionList).action_select()

    @on(OptionList.OptionSelected)
    def _open(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(_number(event.option))

    def action_move(self, where: str) -> None:
        getattr(self.query_one(OptionList), f"action_{where}")()

    @work
    async def action_delete(self) -> None:
        options = self.query_one(OptionList)
        if (option := options.highlighted_option) is None:
            return
        conversation = _number(option)
        try:
            title = self._history.conversation(conversation).title
            if await self.app.push_screen_wait(ConfirmScreen(f"Delete “{title}” for good?")):
                self._history.delete(conversation)
        except UserError as error:
            self.notify(one_line(str(error)), severity="error", markup=False)
        index = options.highlighted
        self._list(self.query_one(Input).value)
        if index is not None and options.option_count:
            options.highlighted = min(index, options.option_count - 1)

    def _list(self, text: str) -> None:
        options = self.query_one(OptionList)
        try:
            found = self._history.search(text)
        except UserError as error:
            found = []
            self.notify(one_line(str(error)), severity="error", markup=False)
        options.clear_options()
        if not found:
            options.add_option(Option("Nothing found" if text.strip() else "Nothing saved yet", disabled=True))
            return
        options.add_options(Option(_prompt(conversation), id=str(conversation.id)) for conversation in found)
        options.highlighted = 0


def _number(option: Option) -> int:
    assert option.id is not None  # only the option that says there is nothing has none, and it is disabled
    return int(option.id)


def _prompt(conversation: Conversation) -> Content:
    today = conversation.updated.date() == datetime.now().date()
    when = f"{conversation.updated:%H:%M}" if today else f"{conversation.updated:%Y-%m-%d %H:%M}"
    details = " · ".join([when, one_line(conversation.model), counted(conversation.n_turns, "turn")])
    return Content.assemble(one_line(conversation.title) or "untitled", "\n", (details, "dim"))
