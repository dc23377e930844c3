"""An answer while it grows: heard piece by piece, painted and saved when its screen says so."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from time import monotonic
from typing import Final

from textual.screen import Screen
from textual.timer import Timer

from runtime.errors import UserError
from runtime.events import Finished, Piece, StopReason
from runtime.tools import Result
from tui.history import History, Turn, TurnCall
from tui.talker import Speaker
from tui.widgets.lines import StatusLine
from tui.widgets.printable import printable
from tui.widgets.turns import AnswerTurn

PAINT_SECONDS: Final = 0.04
"""A growing answer is painted at most this often."""
SAVE_SECONDS: Final = 2.0
"""A growing answer is saved this often; what came after the last time is all that a killed program loses."""

UNSAVED: Final = 0
"""The id of a turn that is not in the history; SQLite's own begin at 1."""


class LiveAnswer:
    """The answer to the turn `parent`. It enters the history with its first words."""

    def __init__(
        self,
        history: History,
        conversation: int,
        parent: int | None,
        speaker: Speaker,
    ) -> None:
        self.turn = Turn(UNSAVED, "assistant", "", speaker.model, speaker.level)
        """The answer as it was last saved."""
        self.stop: StopReason | None = None
        self.n_tokens = 0
        self.tokens_per_second = 0.0
        self._history = history
        self._conversation = conversation
        self._parent = parent
        self._pieces: list[str] = []
        self._n_painted = 0
        self._first: tuple[float, int] | None = None  # when the first piece came, and how many tokens it had

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def hear(self, piece: Piece) -> None:
        """Take in the next piece."""
        self._pieces.append(printable(piece.text))
        self.n_tokens = piece.n_tokens
        if self._first is None:
            self._first = monotonic(), piece.n_tokens
        seconds = monotonic() - self._first[0]
        self.tokens_per_second = (piece.n_tokens - self._first[1]) / seconds if seconds > 0 else 0.0

    def end(self, finished: Finished) -> None:
        """Take over the engine's own figures, and the calls."""
        self.stop = finished.reason
        self.turn = replace(self.turn, calls=tuple(map(TurnCall, finished.calls)))
        self.n_tokens = finished.answer_tokens
        self.tokens_per_second = finished.tokens_per_second

    async def paint(self, widget: AnswerTurn) -> None:
        """Show the pieces that came since the last time."""
        pending = "".join(self._pieces[self._n_painted :])
        self._n_painted = len(self._pieces)
        await widget.write(pending)

    def save(self) -> None:
        """Write what was heard so far. Raises `HistoryError`; `turn` holds the text even so."""
        self.turn = replace(
            self.turn,
            content=self.text,
            stop=self.stop,
            n_tokens=self.n_tokens,
            tokens_per_second=self.tokens_per_second,
        )
        if not self.turn.content and not self.turn.calls:
            return
        if self.turn.id == UNSAVED:
            begun = self._history.append(
                self._conversation, self._parent, "assistant", "", model=self.turn.model, level=self.turn.level
            )
            self.turn = replace(self.turn, id=begun.id)
        self._history.update(self.turn)


def with_results(turn: Turn, results: Mapping[str, Result]) -> Turn:
    """The turn with these results of its calls, by the calls' ids."""
    return replace(
        turn, calls=tuple(replace(each, result=results.get(each.call.id, each.result)) for each in turn.calls)
    )


class GrowingAnswer:
    """A live answer and its widget, painted and saved now and then by timers of `screen`."""

    def __init__(
        self,
        live: LiveAnswer,
        widget: AnswerTurn,
        screen: Screen[None],
        on_fault: Callable[[UserError], Awaitable[None]],
    ) -> None:
        """`on_fault` hears why it cannot be saved."""
        self.live, self.widget = live, widget
        self._screen, self._on_fault = screen, on_fault
        self._saver = screen.set_interval(SAVE_SECONDS, self._save)
        self._painter: Timer | None = None

    def hear(self, piece: Piece) -> None:
        self.live.hear(piece)
        if self._painter is None:
            self._painter = self._screen.set_timer(PAINT_SECONDS, self._paint)

    async def end(self) -> None:
        """Show and save what is left, and the figures and calls; without either, nothing of it stays."""
        self._saver.stop()
        await self._save()
        await self._paint()
        if self.is_something:
            await self.widget.finish(self.live.turn)
        else:
            await self.widget.remove()

    @property
    def is_something(self) -> bool:
        return bool(self.live.text or self.live.turn.calls)

    async def _paint(self) -> None:
        self._painter = None
        if self.live.n_tokens and self.live.text:
            await self.live.paint(self.widget)
            self._screen.query_one(StatusLine).show_answer(self.live.n_tokens, self.live.tokens_per_second)

    async def _save(self) -> None:
        try:
            self.live.save()
        except UserError as error:
            self._saver.stop()  # one line is enough
            await self._on_fault(error)
