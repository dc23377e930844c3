"""What stands in a transcript: the turns of both sides, notices and faults. All text is shown literally, but for the
Markdown of an answer."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Label, Static
from textual.widgets.markdown import MarkdownStream

from tui.history import Turn
from tui.widgets.calls import CallBlock
from tui.widgets.markdown import AnswerMarkdown
from tui.widgets.printable import counted, one_line, printable

_ENDS = {
    None: "cut off",
    "end": "",
    "calls": "",
    "length": "length limit reached",
    "stopped": "stopped",
    "context": "context full",
}


class Notice(Static):
    """A line from Bise itself."""

    def __init__(self, text: str, *, id: str | None = None) -> None:
        super().__init__(Content(one_line(text)), id=id)


class Fault(Static, can_focus=True):
    """What went wrong, in one line. With `remedy`, Enter or a click asks for it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "remedy", show=False)]

    class Chosen(Message):
        """The user wants the remedy."""

    def __init__(self, text: str, remedy: str | None = None) -> None:
        lines = Content.assemble(("✗ ", "bold"), one_line(text), *([("\n  " + remedy, "bold")] if remedy else []))
        super().__init__(lines)
        self._remedy = remedy
        self.can_focus = remedy is not None

    def on_click(self) -> None:
        self.action_remedy()

    def action_remedy(self) -> None:
        if self._remedy is not None:
            self.post_message(self.Chosen())


class Earlier(Static, can_focus=True):
    """Stands for the turns before those that are shown. Enter or a click shows more of them."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "show", show=False)]

    class Chosen(Message):
        """The user wants to see earlier turns."""

    def __init__(self, n_turns: int) -> None:
        super().__init__(Content(f"↑ {counted(n_turns, 'earlier message')}: Enter or a click shows more"))

    def on_click(self) -> None:
        self.action_show()

    def action_show(self) -> None:
        self.post_message(self.Chosen())


class UserTurn(Static):
    """A message of the user's."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(Content.assemble(("You", "bold"), "\n", printable(turn.content)))
        self.turn = turn


class AnswerTurn(Vertical):
    """An answer, whole or still growing, under the name of its model and above its figures."""

    def __init__(self, turn: Turn, speaker: str, *, growing: bool = False) -> None:
        super().__init__()
        self.turn = turn
        self._speaker = one_line(speaker)
        self._growing = growing
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        yield Label(Content(self._speaker), classes="speaker")
        yield AnswerMarkdown(printable(self.turn.content))
        yield from map(CallBlock, self.turn.calls)
        figures = Label(Content("" if self._growing else _figures(self.turn)), classes="figures")
        figures.display = not self._growing
        yield figures

    def on_unmount(self) -> None:
        self._stream = None

    async def write(self, text: str) -> None:
        """Add `text`, which is printable, to a growing answer."""
        if self._stream is None:
            self._stream = AnswerMarkdown.get_stream(self.query_one(AnswerMarkdown))
        await self._stream.write(text)

    async def finish(self, turn: Turn) -> None:
        """The answer is complete: show its calls, whose results are still to come, and its figures."""
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None
        self.turn = turn
        figures = self.query_one(".figures", Label)
        await self.mount_all((CallBlock(done, waits=True) for done in turn.calls), before=figures)
        figures.update(Content(_figures(turn)))
        figures.display = True

    def show_calls(self, turn: Turn, *, waits: bool) -> None:
        """Results have come; `waits`: others have not."""
        self.turn = turn
        for block, done in zip(self.query(CallBlock), turn.calls, strict=True):
            block.show(done, waits=waits and done.result is None)


def _figures(turn: Turn) -> str:
    parts = [counted(turn.n_tokens, "token"), f"{turn.tokens_per_second:.1f} tokens/s"] if turn.n_tokens else []
    if end := _ENDS[turn.stop]:
        parts.append(end)
    return " · ".join(parts)
