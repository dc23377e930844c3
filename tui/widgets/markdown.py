"""An answer's Markdown: GitHub's, read as chats read it, and drawn right while it grows."""

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from textual.app import ComposeResult, RenderResult
from textual.geometry import NULL_REGION
from textual.widgets import Markdown
from textual.widgets._markdown import MarkdownTable, MarkdownTableContent
from textual.widgets.markdown import MarkdownBlock


class _Cells(MarkdownTableContent):
    """Draws the lines around its cells again if they had no place yet.

    Textual 8.2.8 draws them around the cells that stand where the last layout put them, and keeps them until the size
    of the table changes. A row that comes in replaces the last one by new cells; where the screen is painted before
    they are laid out, that row would stay without lines.
    """

    def render(self) -> RenderResult:
        if any(cell.region == NULL_REGION for cell in self.children):
            self.call_after_refresh(self.refresh)
        return super().render()


class _Table(MarkdownTable):
    def compose(self) -> ComposeResult:
        for content in super().compose():
            assert isinstance(content, MarkdownTableContent), content
            yield _Cells(content.headers, content.rows)


class AnswerMarkdown(Markdown):
    """The Markdown of an answer, which must be printable."""

    def __init__(self, text: str) -> None:
        # Links are copied, not opened: a browser started over SSH would take the terminal.
        super().__init__(text, parser_factory=_parser, open_links=False)

    def get_block_class(self, block_name: str) -> type[MarkdownBlock]:
        return _Table if block_name == "table_open" else super().get_block_class(block_name)


def _parser() -> MarkdownIt:
    """GitHub's Markdown, but what a model writes as HTML stays to be read, and its line breaks stay line breaks."""
    parser = MarkdownIt("gfm-like", {"html": False})
    parser.core.ruler.push("line_breaks", _keep_line_breaks)
    return parser


def _keep_line_breaks(state: StateCore) -> None:
    for token in state.tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
