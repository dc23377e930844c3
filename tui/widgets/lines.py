"""The one-line widgets around the transcript: title, progress, status. They show values and keep no state of a chat."""

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Label

from tui.widgets.printable import counted, one_line

NEARLY_FULL = 0.8
"""Share of the context from which the status line warns."""


class TitleLine(Horizontal):
    """The model on the left, what it is doing on the right."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = one_line(title)

    def compose(self) -> ComposeResult:
        yield Label(Content(self._title), id="title")
        yield Label("", id="state", markup=False)

    def show(self, state: str) -> None:
        self.query_one("#state", Label).update(state)


class ProgressLine(Widget):
    """A bar with a word before it and figures after it; takes no room while there is nothing to show."""

    def __init__(self) -> None:
        super().__init__()
        self.display = False
        self._label = ""
        self._fraction = 0.0
        self._figures = ""

    def show(self, label: str, fraction: float, figures: str) -> None:
        self._label, self._fraction, self._figures = label, min(max(fraction, 0.0), 1.0), figures
        self.display = True
        self.refresh()

    def hide(self) -> None:
        self.display = False

    def render(self) -> Content:
        width = max(self.size.width - len(self._label) - len(self._figures) - 2, 0)
        filled = round(width * self._fraction)
        return Content.assemble(
            self._label, " ", ("━" * filled, "$accent"), ("─" * (width - filled), "dim"), " ", self._figures
        )


class StatusLine(Horizontal):
    """The last answer's figures on the left; the context and the preset on the right."""

    def compose(self) -> ComposeResult:
        yield Label("", id="speed", markup=False)
        yield Label("", id="context", markup=False)
        yield Label("", id="preset", markup=False)

    def clear(self, n_ctx: int | None) -> None:
        """Show only the size of the context, if it is known: no answer has been given yet."""
        self.query_one("#speed", Label).update("")
        context = self.query_one("#context", Label)
        context.update("" if n_ctx is None else f"context {n_ctx:,}")
        context.remove_class("-full")

    def show_answer(
        self, n_tokens: int, tokens_per_second: float, first_seconds: float | None = None, n_guessed: int = 0
    ) -> None:
        """`n_guessed` of the tokens were computed ahead."""
        guessed = f" ({n_guessed:,} guessed)" if n_guessed else ""
        first = f"  first after {first_seconds:.1f} s" if first_seconds is not None else ""
        tokens = f"{counted(n_tokens, 'token')}{guessed}"
        self.query_one("#speed", Label).update(f"{tokens}  {tokens_per_second:.1f}/s{first}")

    def show_context(self, used: int, n_ctx: int) -> None:
        """`used` of `n_ctx` tokens; marked, not by its colour alone, where it is nearly full."""
        full = used > NEARLY_FULL * n_ctx
        context = self.query_one("#context", Label)
        context.update(f"context {used:,}/{n_ctx:,} {used / n_ctx:.0%}" + (" !" if full else ""))
        context.set_class(full, "-full")

    def show_preset(self, preset: str) -> None:
        self.query_one("#preset", Label).update(one_line(preset))
