"""The conversation on the screen: a scrolled column of turns that stays at its end until the reader scrolls up.

Only the last turns of a long conversation are mounted; `Earlier` stands for the rest.
"""

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalGroup, VerticalScroll
from textual.content import Content
from textual.widget import Widget

from tui.history import Turn
from tui.talker import Speaker
from tui.widgets.printable import one_line
from tui.widgets.turns import AnswerTurn, Earlier, Fault, Notice, UserTurn

WINDOW = 40
"""Messages mounted when a conversation is opened, and again each time earlier ones are asked for."""


class Transcript(VerticalScroll, can_focus=False):
    """Turns, notices and faults in their order. `speaker` is the model that answers now."""

    def __init__(self, speaker: Speaker, notice: str | None) -> None:
        super().__init__()
        self._speaker = speaker
        self._notice = notice
        self._earlier: list[Turn] = []

    def compose(self) -> ComposeResult:
        # As high as the transcript at least: an anchored scroll would push a shorter column down to its end.
        yield VerticalGroup()

    @property
    def _column(self) -> VerticalGroup:
        return self.query_exactly_one("Transcript > VerticalGroup", VerticalGroup)

    async def show(self, turns: Sequence[Turn], system: str | None) -> None:
        """Replace everything by the last turns of a conversation."""
        self._earlier = list(turns[:-WINDOW])
        head: list[Widget] = [Notice(self._notice)] if self._notice else []
        head.append(_SystemLine(system))
        if self._earlier:
            head.append(Earlier(len(self._earlier)))
        with self.app.batch_update():
            await self._column.remove_children()
            await self._column.mount_all([*head, *map(self._widget, turns[-WINDOW:])])
        self.anchor()

    def show_system(self, system: str | None) -> None:
        self.query_one(_SystemLine).show(system)

    async def add(self, turn: Turn) -> None:
        """Append a turn and go to the end."""
        await self._column.mount(self._widget(turn))
        self.anchor()

    async def add_growing(self, turn: Turn) -> AnswerTurn:
        """Append an answer that is still to come and go to the end."""
        widget = AnswerTurn(turn, self._speaker.title, growing=True)
        await self._column.mount(widget)
        self.anchor()
        return widget

    async def add_notice(self, text: str) -> None:
        await self._column.mount(Notice(text))

    async def add_fault(self, text: str, remedy: str | None = None) -> None:
        await self._column.mount(Fault(text, remedy))

    async def remove_faults(self) -> None:
        await self.query(Fault).remove()

    async def remove_from(self, turn: Turn) -> None:
        """Remove `turn`, the very one that was added, and everything after it."""
        doomed: list[Widget] = []
        for child in self._column.children:
            if doomed or (isinstance(child, UserTurn | AnswerTurn) and child.turn is turn):
                doomed.append(child)
        await self._column.remove_children(doomed)

    @property
    def n_turns(self) -> int:
        """Turns that are mounted."""
        return sum(isinstance(child, UserTurn | AnswerTurn) for child in self._column.children)

    async def on_earlier_chosen(self) -> None:
        self.query_one(Earlier).remove()
        first = next(child for child in self._column.children if isinstance(child, UserTurn | AnswerTurn))
        shown, self._earlier = self._earlier[-WINDOW:], self._earlier[:-WINDOW]
        above: list[Widget] = [Earlier(len(self._earlier))] if self._earlier else []
        self.release_anchor()
        await self._column.mount_all([*above, *map(self._widget, shown)], before=first)
        self.call_after_refresh(self.scroll_to_widget, first, top=True, animate=False)

    def _widget(self, turn: Turn) -> UserTurn | AnswerTurn:
        if turn.role == "user":
            return UserTurn(turn)
        if (turn.model, turn.level) == (self._speaker.model, self._speaker.level):
            return AnswerTurn(turn, self._speaker.title)
        return AnswerTurn(turn, f"{turn.model} {turn.level or ''}")


class _SystemLine(Notice):
    """The system prompt, shortened to one line; not shown where there is none."""

    def __init__(self, system: str | None) -> None:
        super().__init__("")
        self.show(system)

    def show(self, system: str | None) -> None:
        self.display = system is not None
        self.update(Content(f"System: {one_line(system or '')}"))
