"""The chat, driven by its keys against a fake engine and a real history file."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual import events
from textual.pilot import Pilot
from textual.widgets import Label, OptionList, Static
from textual.widgets import Markdown as MarkdownWidget

from runtime.errors import EngineError, ModelFileError, WorkerDiedError
from runtime.events import LoadProgress, Notice, PromptProgress, Sampling, Silent
from runtime.messages import Message
from runtime.tools import Toolbox
from tests.fakes import FakeEngine
from tui.app import ChatApp, chat_app
from tui.history import History, HistoryError, Turn
from tui.screens.chat import ChatScreen
from tui.screens.confirm import ConfirmScreen
from tui.screens.conversations import ConversationsScreen
from tui.screens.system_prompt import SystemPromptScreen
from tui.widgets.composer import Composer, PlainTextArea
from tui.widgets.lines import ProgressLine
from tui.widgets.markdown import AnswerMarkdown
from tui.widgets.printable import one_line, printable
from tui.widgets.transcript import WINDOW, Transcript
from tui.widgets.turns import Earlier, Fault, UserTurn

BALANCED, PRECISE = Sampling(temperature=0.7), Sampling(temperature=0.2)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(tmp_path / "history.db")
    yield history
    history.close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


class Chat:
    """A running chat, seen as its user sees it."""

    def __init__(self, app: ChatApp, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    async def until(self, met: Callable[[], bool]) -> None:
        """Wait until `met`; for ten seconds, which no test needs."""
        for _ in range(1000):
            if met():
                await self.pilot.pause()
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"still not so; the screen shows:\n{self.seen}")

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)

    async def paste(self, text: str) -> None:
        self.app.post_message(events.Paste(text))
        await self.pilot.pause()

    async def ready(self) -> None:
        await self.until(lambda: self.state == "ready")

    async def send(self, text: str) -> None:
        """Send `text` and wait for the whole answer."""
        n_turns = len(self.turns)
        await self.paste(text)
        await self.press("enter")
        await self.until(lambda: len(self.turns) == n_turns + 2 and self.state == "ready")

    @property
    def state(self) -> str:
        return str(self.app.screen_stack[0].query_one("#state", Label).visual)

    @property
    def composer(self) -> Composer:
        return self.app.screen_stack[0].query_one(Composer)

    @property
    def turns(self) -> list[str]:
        """The text of each turn in the transcript."""
        texts: list[str] = []
        for widget in self.app.screen_stack[0].query("UserTurn, AnswerTurn"):
            if isinstance(widget, UserTurn):
                texts.append(str(widget.visual).removeprefix("You\n"))
            else:
                texts.append(
                    "".join(shown.source for shown in widget.query(MarkdownWidget))
                )  # none until it is composed
        return texts

    @property
    def figures(self) -> str:
        """The line below the last answer."""
        return str(self.app.screen.query(".figures").last(Label).visual)

    @property
    def faults(self) -> list[str]:
        return [str(fault.visual) for fault in self.app.screen.query(Fault)]

    @property
    def seen(self) -> str:
        """The characters on the screen."""
        return "\n".join(strip.text for strip in self.app.screen._compositor.render_strips())

    def status(self, id: str) -> str:
        return str(self.app.screen_stack[0].query_one(f"#{id}", Static).visual)


@asynccontextmanager
async def running(
    engine: FakeEngine,
    history: History,
    *,
    size: tuple[int, int] = (100, 30),
    title: str = "Large",
    notice: str | None = None,
    system: str | None = None,
    conversation: int | None = None,
    toolbox: Toolbox | None = None,
    max_rounds: int = 10,
) -> AsyncIterator[Chat]:
    app = chat_app(
        engine,
        history,
        title=title,
        notice=notice,
        system=system,
        presets={"balanced": BALANCED, "precise": PRECISE},
        preset="balanced",
        conversation=conversation,
        model_key="large",
        level="Q4_K_M",
        toolbox=toolbox,
        max_rounds=max_rounds,
    )
    async with app.run_test(size=size, notifications=True) as pilot:
        yield Chat(app, pilot)


def saved(history: History) -> list[list[str]]:
    """The shown path of every conversation, the latest first."""
    return [[turn.content for turn in history.messages(found.id)] for found in history.conversations()]


# Loading


async def test_loading_shows_its_progress_then_ready(engine: FakeEngine, history: History) -> None:
    engine.holds_load = True
    async with running(engine, history, notice="A [b]small[/b] model.") as chat:
        await chat.until(lambda: "50%" in chat.seen)
        assert chat.state == "loading"
        assert "Large · Q4_K_M" in chat.seen
        assert "A [b]small[/b] model." in chat.seen
        await chat.paste("early")
        await chat.press("enter")
        await chat.until(lambda: "still loading" in chat.seen)
        assert chat.composer.text == "early"
        engine.let_load()
        await chat.ready()
        assert not chat.app.screen.query_one(ProgressLine).display
        assert chat.status("context") == "context 1,000"
    assert engine.prompts == []


async def test_a_load_that_fails_says_why_and_can_be_tried_again(engine: FakeEngine, history: History) -> None:
    engine.load_errors = [ModelFileError("large.gguf is cut off at 5 of 9 bytes"), ModelFileError("again")]
    async with running(engine, history) as chat:
        await chat.until(lambda: chat.state == "not loaded")
        assert "large.gguf is cut off at 5 of 9 bytes" in chat.faults[0]
        await chat.press("f5")
        await chat.until(lambda: engine.n_loads == 2 and chat.state == "not loaded")
        chat.app.screen.query(Fault).last().focus()
        await chat.press("enter")
        await chat.ready()
        assert chat.faults == []
    assert engine.n_loads == 3


async def test_rates_and_times_left_are_shown(engine: FakeEngine, history: History) -> None:
    engine.holds_load = True
    engine.load_events = [LoadProgress(0.25, 1.5e9, 75.2)]
    engine.enqueue([], holds=True, events=[PromptProgress(512, 2048, 3, 120.4, 12.7)])
    async with running(engine, history) as chat:
        await chat.until(lambda: "25%  1.5 GB/s  1:15 left" in chat.seen)
        engine.let_load()
        await chat.ready()
        await chat.paste("hello")
        await chat.press("enter")
        await chat.until(lambda: chat.state == "reading 512/2,048 tokens, 3 reused, 120/s, 0:13 left")
        await chat.press("escape")
        await chat.ready()


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
async def test_a_load_can_be_stopped_and_begun_again(engine: FakeEngine, history: History, key: str) -> None:
    engine.holds_load = True
    async with running(engine, history) as chat:
        await chat.until(lambda: "50%" in chat.seen)
        await chat.press(key)
        await chat.until(lambda: chat.state == "not loaded")
        assert "loading was cancelled" in chat.faults[0]
        engine.holds_load = False
        await chat.press("f5")
        await chat.ready()


async def test_what_the_engine_tells_besides_is_shown(engine: FakeEngine, history: History) -> None:
    engine.holds_load = True
    engine.load_events = [Notice("Loaded [b]without[/b] repacking."), Silent(10.2)]
    engine.enqueue(["a", "b"], holds=True, events=[Notice("Started again."), Silent(20.4)])
    async with running(engine, history) as chat:
        await chat.until(lambda: chat.state == "no sign of the engine for 10 s; Escape ends it")
        assert "Loaded [b]without[/b] repacking." in chat.seen
        engine.let_load()
        await chat.ready()
        await chat.paste("hello")
        await chat.press("enter")
        await chat.until(lambda: chat.state == "answering" and chat.turns == ["hello", "ab"])
        assert "Started again." in chat.seen
        await chat.press("escape")
        await chat.ready()


async def test_silence_in_mid_answer_is_shown(engine: FakeEngine, history: History) -> None:
    engine.enqueue([], holds=True, events=[Silent(20.4)])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.paste("hello")
        await chat.press("enter")
        await chat.until(lambda: chat.state == "no sign of the engine for 20 s; Escape ends it")
        await chat.press("escape")
        await chat.ready()


# Asking and answering


async def test_an_answer_streams_in_and_is_saved(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["It is ", "a **wi", "nd**."], context_used=900)
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.send("What is\nthe mistral?")
        assert chat.turns == ["What is\nthe mistral?", "It is a **wind**."]
        assert "It is a wind." in chat.seen
        assert chat.figures == "3 tokens · 6.0 tokens/s"
        assert chat.status("speed") == "3 tokens  6.0/s"
        assert chat.status("context") == "context 900/1,000 90% !"
        assert chat.composer.text == ""
    assert engine.prompts == [([Message("user", "What is\nthe mistral?")], BALANCED)]
    (conversation,) = history.conversations()
    _, answer = history.messages(conversation.id)
    assert (conversation.title, answer.content) == ("What is", "It is a **wind**.")
    assert (answer.model, answer.level, answer.stop) == ("large", "Q4_K_M", "end")
    assert (answer.n_tokens, answer.tokens_per_second) == (3, 6.0)


async def test_the_next_question_carries_the_conversation(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["one"])
    engine.enqueue(["two"])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.send("first")
        await chat.press("f4")
        assert chat.status("preset") == "precise"
        await chat.until(lambda: "temperature 0.2 → draw" in chat.seen)
        await chat.send("second")
    messages, sampling = engine.prompts[1]
    assert messages == [Message("user", "first"), Message("assistant", "one"), Message("user", "second")]
    assert sampling == PRECISE
    assert saved(history) == [["first", "one", "second", "two"]]


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
async def test_stop_keeps_what_was_said(engine: FakeEngine, history: History, key: str) -> None:
    engine.enqueue(["half an ", "ans"], holds=True)
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.paste("hello")
        await chat.press("enter")
        await chat.until(lambda: chat.turns == ["hello", "half an ans"])
        assert chat.state == "answering"
        await chat.press(key)
        await chat.ready()
        assert chat.figures == "2 tokens · 4.0 tokens/s · stopped"
    (conversation,) = history.conversations()
    answer = history.messages(conversation.id)[-1]
    assert (answer.content, answer.stop) == ("half an ans", "stopped")


async def test_a_question_stopped_before_its_answer_joins_the_next(engine: FakeEngine, history: History) -> None:
    engine.enqueue([], holds=True)
    engine.enqueue(["answer"])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.paste("first")
        await chat.press("enter")
        await chat.until(lambda: "7/7 tokens, 3 reused" in chat.state)
        await chat.press("escape")
        await chat.ready()
        assert chat.turns == ["first"]
        await chat.send("second")
    assert engine.prompts[1][0] == [Message("user", "first\n\nsecond")]
    assert saved(history) == [["first", "second", "answer"]]


async def test_a_growing_answer_is_saved_as_it_grows(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["so far"], holds=True)
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.paste("hello")
        await chat.press("enter")
        await chat.until(lambda: saved(history) == [["hello", "so far"]])
        (conversation,) = history.conversations()
        assert history.messages(conversation.id)[-1].stop is None
        await chat.press("escape")
        await chat.ready()
        assert saved(history) == [["hello", "so far"]]


async def test_an_error_is_one_line_and_the_chat_goes_on(engine: FakeEngine, history: History) -> None:
    engine.enqueue([], error=EngineError("the prompt has 2,000 tokens,\nthe context 1,000"))
    engine.enqueue(["fine"])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.paste("long")
        await chat.press("enter")
        await chat.until(lambda: bool(chat.faults))
        assert chat.faults == ["✗ the prompt has 2,000 tokens, the context 1,000"]
        assert chat.state == "ready"
        await chat.press("ctrl+r")
        await chat.until(lambda: chat.turns == ["long", "fine"])
        await chat.ready()
        assert chat.faults == []


async def test_a_dead_engine_is_reported_and_started_again(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["half"], error=WorkerDiedError("the engine ended with signal 9"))
    engine.enqueue(["whole"])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.paste("hello")
        await chat.press("enter")
        await chat.until(lambda: chat.state == "not loaded")
        assert chat.turns == ["hello", "half"]
        assert chat.figures.endswith("cut off")
        assert len(chat.faults) == 1
        assert "the engine ended with signal 9" in chat.faults[0]
        assert saved(history) == [["hello", "half"]]
        await chat.press("f5")
        await chat.ready()
        assert engine.n_loads == 2
        assert chat.faults == []
        await chat.press("ctrl+r")
        await chat.until(lambda: chat.turns == ["hello", "whole"])
        await chat.ready()
    assert saved(history) == [["hello", "whole"]]


# Writing


async def test_a_message_may_have_many_lines(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["ok"])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.press("a", "ctrl+j", "b", "shift+enter", "c")
        await chat.paste("d\r\ne\rf")
        assert chat.composer.text == "a\nb\ncd\ne\nf"
        await chat.press("enter")
        await chat.until(lambda: len(chat.turns) == 2)
        await chat.ready()
    assert engine.prompts[0][0] == [Message("user", "a\nb\ncd\ne\nf")]


async def test_keys_typed_right_behind_enter_belong_to_the_next_message(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["ok"])
    async with running(engine, history) as chat:
        await chat.ready()
        # All at once, as a fast typist's keys come out of a slow connection.
        for key, character in (("a", "a"), ("ctrl+j", None), ("b", "b"), ("enter", "\r"), ("c", "c")):
            chat.app.post_message(events.Key(key, character))
        await chat.until(lambda: len(chat.turns) == 2)
        await chat.ready()
        assert chat.turns[0] == "a\nb"
        assert chat.composer.text == "c"


async def test_nothing_is_sent_while_there_is_nothing_to_say(engine: FakeEngine, history: History) -> None:
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.press("enter", "space", "ctrl+j", "enter")
        assert chat.turns == []
    assert history.conversations() == []


async def test_again_answers_anew_on_a_branch(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["first"])
    engine.enqueue(["second"])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.send("hello")
        await chat.press("ctrl+r")
        await chat.until(lambda: chat.turns == ["hello", "second"])
        await chat.ready()
    assert engine.prompts[1] == engine.prompts[0]
    assert saved(history) == [["hello", "second"]]
    assert len(history.search("first")) == 1


async def test_editing_takes_the_message_back(engine: FakeEngine, history: History) -> None:
    for answer in ("one", "two", "three"):
        engine.enqueue([answer])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.send("first")
        await chat.send("secnd")
        await chat.press("ctrl+e")
        await chat.until(lambda: chat.composer.text == "secnd")
        assert chat.turns == ["first", "one"]
        await chat.press("escape")
        await chat.until(lambda: chat.turns == ["first", "one", "secnd", "two"])
        assert chat.composer.text == ""
        await chat.press("ctrl+e", "left", "left", "o", "ctrl+e", "!", "enter")
        await chat.until(lambda: chat.turns == ["first", "one", "second!", "three"])
        await chat.ready()
    assert engine.prompts[2][0][-1] == Message("user", "second!")
    assert saved(history) == [["first", "one", "second!", "three"]]


async def test_copying(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["**whole** answer"])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.press("ctrl+y")
        await chat.until(lambda: "no answer to copy" in chat.seen)
        await chat.send("hello")
        await chat.press("ctrl+y")
        assert chat.app.clipboard == "**whole** answer"
        await chat.press("a", "b", "shift+left", "ctrl+c")
        assert chat.app.clipboard == "b"
        await chat.press("right", "ctrl+c")
        await chat.until(lambda: "Ctrl+Q quits" in chat.seen)
        assert chat.app.clipboard == "b"


# Conversations and system prompts


async def test_an_old_conversation_is_found_opened_and_continued(engine: FakeEngine, history: History) -> None:
    for answer in ("a wind", "a river", "blue"):
        engine.enqueue([answer])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.send("What is the mistral?")
        await chat.press("ctrl+n")
        await chat.until(lambda: chat.turns == [])
        await chat.send("What is the Rhône?")
        await chat.press("f2")
        await chat.until(lambda: isinstance(chat.app.screen, ConversationsScreen))
        assert chat.app.screen.query_one(OptionList).option_count == 2
        assert "large · 1 turn" in chat.seen
        await chat.paste("mistral")
        await chat.until(lambda: chat.app.screen.query_one(OptionList).option_count == 1)
        await chat.press("enter")
        await chat.until(lambda: chat.turns == ["What is the mistral?", "a wind"])
        await chat.send("Its colour?")
    assert [message.content for message in engine.prompts[2][0]] == ["What is the mistral?", "a wind", "Its colour?"]
    assert saved(history)[0] == ["What is the mistral?", "a wind", "Its colour?", "blue"]


@pytest.mark.parametrize("keys", [["ctrl+d"], ["tab", "d"]])
async def test_deleting_asks_first(engine: FakeEngine, history: History, keys: list[str]) -> None:
    engine.enqueue(["answer"])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.send("hello")
        await chat.press("ctrl+o")
        await chat.until(lambda: isinstance(chat.app.screen, ConversationsScreen))
        for answer, n_left in (("n", 1), ("y", 0)):
            await chat.press(*keys)
            await chat.until(lambda: isinstance(chat.app.screen, ConfirmScreen))
            assert "Delete “hello”" in chat.seen
            await chat.press(answer)
            await chat.until(lambda: isinstance(chat.app.screen, ConversationsScreen))
            assert len(history.conversations()) == n_left
            await chat.press("shift+tab")
        await chat.until(lambda: "Nothing saved yet" in chat.seen)
        await chat.press("enter", "escape")
        await chat.until(lambda: chat.turns == [])


async def test_the_system_prompt_reaches_the_talker_and_is_saved(engine: FakeEngine, history: History) -> None:
    for _ in range(3):
        engine.enqueue(["ok"])
    async with running(engine, history, system="Be brief.") as chat:
        await chat.ready()
        assert "System: Be brief." in chat.seen
        await chat.send("one")
        await chat.press("f3")
        await chat.until(lambda: isinstance(chat.app.screen, SystemPromptScreen))
        await chat.paste("\nAnd kind.")
        await chat.press("ctrl+s")
        await chat.until(lambda: "And kind." in chat.seen)
        await chat.send("two")
        assert history.conversations()[0].system == "Be brief.\nAnd kind."
        await chat.press("f3")
        await chat.until(lambda: isinstance(chat.app.screen, SystemPromptScreen))
        chat.app.screen.query_one(PlainTextArea).clear()
        await chat.press("f3")
        await chat.until(lambda: "System:" not in chat.seen)
        await chat.send("three")
    systems = [[message.content for message in prompt if message.role == "system"] for prompt, _ in engine.prompts]
    assert systems == [["Be brief."], ["Be brief.\nAnd kind."], []]
    assert history.conversations()[0].system is None


async def test_a_saved_conversation_can_be_opened_at_the_start(engine: FakeEngine, history: History) -> None:
    conversation = history.create(model="small", system="Be kind.")
    asked = history.append(conversation, None, "user", "hello")
    history.append(conversation, asked.id, "assistant", "hi", model="small", level="Q8_0")
    async with running(engine, history, system="Be brief.", conversation=conversation) as chat:
        await chat.ready()
        assert chat.turns == ["hello", "hi"]
        assert "small Q8_0" in chat.seen
        assert "System: Be kind." in chat.seen
    with pytest.raises(HistoryError, match="no conversation 7"):
        async with running(engine, history, conversation=7):
            pass


async def test_a_long_conversation_shows_its_end_and_the_rest_on_demand(engine: FakeEngine, history: History) -> None:
    conversation, parent = history.create(model="large"), None
    for index in range(WINDOW + 3):
        role = "assistant" if index % 2 else "user"
        parent = history.append(conversation, parent, role, f"message {index}").id  # type: ignore[arg-type]
    async with running(engine, history, conversation=conversation) as chat:
        await chat.ready()
        assert len(chat.turns) == WINDOW
        assert f"message {WINDOW + 2}" in chat.seen
        chat.app.screen.query_one(Earlier).focus()
        await chat.press("enter")
        await chat.until(lambda: len(chat.turns) == WINDOW + 3)
        assert chat.turns[0] == "message 0"
        assert "message 3" in chat.seen


# Reading

MARKDOWN = """# A title

A *first* paragraph
of two lines.

- one
  - within
- `two`

```python
# not a title

print("- not a list")
```

| wind | from |
|------|-----:|
| mistral | north |
| sirocco | south |

1. first
2. second

> a quote

The end.
"""


async def test_markdown_that_streams_in_ends_as_if_it_had_come_at_once(engine: FakeEngine, history: History) -> None:
    async with running(engine, history, size=(80, 60)) as chat:
        await chat.ready()
        transcript = chat.app.screen.query_one(Transcript)
        answer = await transcript.add_growing(Turn(1, "assistant", "", "large", "Q4_K_M"))
        for character in MARKDOWN:
            await answer.write(character)
            await asyncio.sleep(0.001)
        whole = Turn(1, "assistant", MARKDOWN, "large", "Q4_K_M", "end")
        await answer.finish(whole)
        code, table, items = "# not a title", "│ sirocco", ("• one", "  ▪ within")
        texts = (code, table, *items, "A first paragraph\n", "   of two lines.", "The end.")
        await chat.until(lambda: all(text in re.sub(" +\n", "\n", chat.seen) for text in texts))
        streamed = chat.seen
        await transcript.show([], None)
        await chat.until(lambda: "The end." not in chat.seen)
        await transcript.show([whole], None)
        await chat.until(lambda: chat.seen == streamed)


async def test_a_row_that_is_painted_before_it_has_a_place_gets_its_lines(engine: FakeEngine, history: History) -> None:
    async with running(engine, history) as chat:
        await chat.ready()
        transcript = chat.app.screen.query_one(Transcript)
        answer = await transcript.add_growing(Turn(1, "assistant", "", "large", "Q4_K_M"))

        async def paint() -> None:
            while True:
                assert chat.seen
                await asyncio.sleep(0)

        painting = asyncio.create_task(paint())
        for character in "| wind | from |\n|---|---|\n| mistral | north |\n| sirocco | south |\n":
            await answer.query_one(AnswerMarkdown).append(character)
        painting.cancel()
        await chat.until(lambda: "│ sirocco" in chat.seen)


async def test_the_reader_who_scrolled_up_is_left_in_peace(engine: FakeEngine, history: History) -> None:
    lines = "\n".join(f"line {n}" for n in range(60))
    engine.enqueue([lines])
    engine.enqueue(["more\n\n"] * 50, holds=True)
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.send("first")
        transcript = chat.app.screen.query_one(Transcript)
        await chat.until(lambda: transcript.scroll_y == transcript.max_scroll_y > 0)
        await chat.paste("second")
        await chat.press("enter")
        await chat.until(lambda: chat.turns[-1].count("more") == 50)
        await chat.until(lambda: transcript.scroll_y == transcript.max_scroll_y)
        await chat.press("pageup", "pageup")
        above = transcript.scroll_y
        await chat.press("escape")
        await chat.ready()
        assert transcript.scroll_y == above < transcript.max_scroll_y


HOSTILE = "[bold]b[/bold] [INST] [/] \x1b[31mred\x1b[0m \x9b31m \x07 [@click=app.quit]x[/]"
HARMLESS = "[bold]b[/bold] [INST] [/] [31mred[0m 31m  [@click=app.quit]x[/]"


async def test_hostile_text_is_only_text(engine: FakeEngine, history: History) -> None:
    engine.enqueue([HOSTILE, "\n\n<script>kept</script>\n\n&#27;[2J"], error=EngineError(HOSTILE))
    async with running(engine, history, title=HOSTILE, notice=HOSTILE, system=HOSTILE) as chat:
        await chat.ready()
        await chat.paste(HOSTILE)
        await chat.press("enter")
        await chat.until(lambda: bool(chat.faults))
        await chat.press("ctrl+o")
        await chat.until(lambda: isinstance(chat.app.screen, ConversationsScreen))
        assert one_line(HARMLESS) in chat.seen
        await chat.press("ctrl+d")
        await chat.until(lambda: isinstance(chat.app.screen, ConfirmScreen))
        await chat.press("n", "escape")
        await chat.until(lambda: isinstance(chat.app.screen, ChatScreen))
        # The title, the notice, the system prompt, the question, the speaker, the answer, the fault.
        assert chat.seen.count("[INST]") == 7
        assert "<script>kept</script>" in chat.seen
        assert not [character for character in chat.seen if character != "\n" and not character.isprintable()]
    assert engine.prompts[0][0][-1] == Message("user", HARMLESS)


def test_printable_keeps_lines_and_tabs_alone() -> None:
    controls = "".join(map(chr, [*range(32), *range(127, 160)])) + "\ud800"
    assert printable(controls) == "\t\n\n"  # the other line end is the carriage return
    assert printable("a\r\nb\rc\u2028d") == "a\nb\nc\nd"
    assert printable("Rhône 風 🌬️ שלום") == "Rhône 風 🌬️ שלום"
    assert one_line(" a\n\tb\x1b ") == "a b"


async def test_a_small_terminal_is_enough(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["a wind"])
    async with running(engine, history, size=(60, 15), title="Mistral Large 2411 at its very fullest length") as chat:
        await chat.ready()
        await chat.send("What is the mistral?")
        for text in ("Mistral Large", "ready", "You", "What is the mistral?", "a wind", "1 token", "100/1,000 10%"):
            assert text in chat.seen
        await chat.press(*["ctrl+j"] * 20)
        assert chat.app.screen.query_one(Transcript).size.height >= 2
        for key in ("f2", "f3"):
            await chat.press(key)
            await chat.until(lambda: len(chat.app.screen_stack) == 2)
            assert "esc" in chat.seen
            await chat.press("escape")
            await chat.until(lambda: len(chat.app.screen_stack) == 1)


# Quitting


async def test_quitting_while_it_answers_keeps_the_answer(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["half an ", "answer"], holds=True)
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.paste("hello")
        await chat.press("enter")
        await chat.until(lambda: chat.turns == ["hello", "half an answer"])
        await chat.press("ctrl+q")
    assert engine.closed
    (conversation,) = history.conversations()
    answer = history.messages(conversation.id)[-1]
    assert (answer.content, answer.stop, answer.n_tokens) == ("half an answer", "stopped", 2)


async def test_quitting_while_it_loads(engine: FakeEngine, history: History) -> None:
    engine.holds_load = True
    async with running(engine, history) as chat:
        await chat.until(lambda: "50%" in chat.seen)
        await chat.press("ctrl+q")
    assert engine.closed
    assert chat.app.return_code == 0


async def test_a_history_that_fails_is_one_line_and_the_text_stays(engine: FakeEngine, history: History) -> None:
    async with running(engine, history) as chat:
        await chat.ready()
        history.close()
        await chat.paste("hello")
        await chat.press("enter")
        await chat.until(lambda: bool(chat.faults))
        assert "cannot be used" in chat.faults[0]
        assert chat.composer.text == "hello"


async def test_nothing_ticks_while_nothing_happens(engine: FakeEngine, history: History) -> None:
    engine.enqueue(["answer"])
    async with running(engine, history) as chat:
        await chat.ready()
        await chat.send("hello")
        nodes = [chat.app, chat.app.screen, *chat.app.screen.walk_children(with_self=False)]
        ticking = [timer for node in nodes for timer in node._timers if timer._task and timer._active.is_set()]
        assert ticking == []
