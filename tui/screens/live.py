"""An answer while it grows: heard piece by piece, painted and saved when its screen says so."""

from dataclasses import replace
from time import monotonic
from typing import Final

from runtime.events import Finished, Piece, StopReason
from tui.history import History, Turn
from tui.talker import Speaker
from tui.widgets.printable import printable
from tui.widgets.turns import AnswerTurn

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
        """Take over the engine's own figures."""
        self.stop = finished.reason
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
        if not self.turn.content:
            return
        if self.turn.id == UNSAVED:
            begun = self._history.append(
                self._conversation, self._parent, "assistant", "", model=self.turn.model, level=self.turn.level
            )
            self.turn = replace(self.turn, id=begun.id)
        self._history.update(self.turn)
