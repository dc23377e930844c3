"""Tools in the chat: calls and results in the transcript, approval, what is saved, and all the ways it may end."""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import WorkerDiedError
from runtime.messages import Message, Tool, ToolCall
from runtime.tool_loop import NOT_DONE
from runtime.tools import Limits, Result, Rule, Toolbox, ToolError
from tests.fakes import FakeEngine
from tests.test_chat import Chat, running
from tui.history import SCHEMA, History, HistoryError, Turn, TurnCall
from tui.screens.approval import ApprovalScreen
from tui.talker import messages_for
from tui.widgets.calls import CallBlock


class Winds:
    """Tools: `wind` answers, `storm` fails, `calm` waits until it may answer."""

    limits = Limits(seconds=30.0)

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.called: list[Mapping[str, Any]] = []

    def tools(self) -> Sequence[Tool]:
        return [Tool(name, "", '{"type": "object"}') for name in ("wind", "storm", "calm")]

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        self.called.append(arguments)
        if name == "storm":
            raise ToolError("blown away")
        if name == "calm":
            self.may_answer.wait(30)
        return f"the {arguments['from']} wind"

    def close(self) -> None:
        self.may_answer.set()


def wind(from_: str = "north", id_: str = "a", name: str = "wind") -> ToolCall:
    return ToolCall(id_, name, json.dumps({"from": from_}))


@pytest.fixture
def winds() -> Iterator[Winds]:
    source = Winds()
    yield source
    source.close()


@pytest.fixture
def toolbox(winds: Winds) -> Toolbox:
    return Toolbox([winds], [Rule("*", "allow")])


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(tmp_path / "history.db")
    yield history
    history.close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def blocks(chat: Chat) -> list[str]:
    return [str(block.visual) for block in chat.app.screen_stack[0].query(CallBlock)]


async def ask(chat: Chat, text: str = "Which wind?") -> None:
    await chat.paste(text)
    await chat.press("enter")


def path_of(history: History) -> list[Turn]:
    return history.messages(history.conversations()[0].id)


async def test_a_call_is_shown_and_its_result_answered(engine: FakeEngine, history: History, toolbox: Toolbox) -> None:
    engine.enqueue(["Let me ", "look."], calls=[wind(), wind("[b]west[/b]", "b", "storm")])
    engine.enqueue(["The mistral."])
    async with running(engine, history, toolbox=toolbox) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: chat.turns == ["Which wind?", "Let me look.", "The mistral."])
        await chat.ready()
        first, second = blocks(chat)
        assert first.startswith("▸ wind · 0.")
        assert first.endswith('s  {"from": "north"} → the north wind')
        assert second.startswith("▸ storm · 0.")
        assert second.endswith('s · failed  {"from": "[b]west[/b]"} → blown away')
        chat.app.screen.query(CallBlock).first().focus()
        await chat.press("enter")
        await chat.until(lambda: '\n{\n  "from": "north"\n}\n→ the north wind' in blocks(chat)[0])
        await chat.press("enter")
        assert blocks(chat)[0] == first
    assert [tool.name for tool in engine.offers[0][0]] == ["wind", "storm", "calm"]
    asked = Message("user", "Which wind?")
    assert engine.prompts[1][0] == [
        asked,
        Message("assistant", "Let me look.", (wind(), wind("[b]west[/b]", "b", "storm"))),
        Message("tool", "the north wind", call_id="a"),
        Message("tool", "blown away", call_id="b"),
    ]
    turns = path_of(history)
    assert [(turn.role, turn.content, turn.stop) for turn in turns] == [
        ("user", "Which wind?", None),
        ("assistant", "Let me look.", "calls"),
        ("assistant", "The mistral.", "end"),
    ]
    results = [each.result for each in turns[1].calls]
    assert [(result.text, result.ok) for result in results if result is not None] == [
        ("the north wind", True),
        ("blown away", False),
    ]
    assert messages_for(None, turns) == [*engine.prompts[1][0], Message("assistant", "The mistral.")]


async def test_a_model_without_calls_answers_without_tools(
    engine: FakeEngine, history: History, toolbox: Toolbox
) -> None:
    engine.has_calls = False
    engine.enqueue(["The mistral."])
    async with running(engine, history, toolbox=toolbox) as chat:
        await chat.ready()
        assert "this model's prompt format has no calls of tools" in chat.seen
        await ask(chat)
        await chat.until(lambda: chat.turns == ["Which wind?", "The mistral."])
    assert engine.offers == [((), "auto")]


async def test_an_answer_of_calls_alone_is_kept(engine: FakeEngine, history: History, toolbox: Toolbox) -> None:
    engine.enqueue([], calls=[wind()])
    engine.enqueue([], calls=[wind("east", "b")])
    engine.enqueue(["Both."])
    async with running(engine, history, toolbox=toolbox) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: chat.turns[-1] == "Both.")
        await chat.ready()
        assert chat.turns == ["Which wind?", "", "", "Both."]
        assert len(blocks(chat)) == 2
    assert [len(turn.calls) for turn in path_of(history)] == [0, 1, 1, 0]


async def test_a_saved_conversation_goes_on_with_its_calls(
    engine: FakeEngine, history: History, toolbox: Toolbox
) -> None:
    conversation = history.create(model="large")
    asked = history.append(conversation, None, "user", "Which wind?")
    answer = history.append(conversation, asked.id, "assistant", "", model="large", level="Q4_K_M")
    done = TurnCall(wind(), Result("the north wind", seconds=1.25))
    history.update(Turn(answer.id, "assistant", "", "large", "Q4_K_M", "calls", calls=(done, TurnCall(wind(id_="b")))))
    engine.enqueue(["Yes."])
    async with running(engine, history, conversation=conversation, toolbox=toolbox) as chat:
        await chat.ready()
        assert blocks(chat) == [
            '▸ wind · 1.2 s  {"from": "north"} → the north wind',
            '▸ wind · not carried out  {"from": "north"}',
        ]
        await ask(chat, "And?")
        await chat.until(lambda: chat.turns[-1] == "Yes.")
    assert engine.prompts[0][0] == [
        Message("user", "Which wind?"),
        Message("assistant", "", (wind(), wind(id_="b"))),
        Message("tool", "the north wind", call_id="a"),
        Message("tool", NOT_DONE, call_id="b"),
        Message("user", "And?"),
    ]


async def test_again_answers_the_message_anew_calls_and_all(
    engine: FakeEngine, history: History, toolbox: Toolbox
) -> None:
    for _ in range(2):
        engine.enqueue(["Look."], calls=[wind()])
        engine.enqueue(["North."])
    async with running(engine, history, toolbox=toolbox) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: chat.turns[-1] == "North." and chat.state == "ready")
        await chat.press("ctrl+r")
        await chat.until(lambda: len(engine.prompts) == 4 and chat.state == "ready")
        assert chat.turns == ["Which wind?", "Look.", "North."]
        assert len(blocks(chat)) == 1
    assert engine.prompts[2][0] == [Message("user", "Which wind?")]
    assert len(path_of(history)) == 3


# Approval


@pytest.mark.parametrize(
    ("keys", "n_asked", "results"),
    [
        (["y", "n"], 2, ["the north wind", "the user does not allow this call"]),
        (["a"], 1, ["the north wind", "the east wind"]),
        (["escape", "enter", "y"], 2, ["the user does not allow this call", "the east wind"]),
    ],
)
async def test_calls_are_asked_for(
    keys: Sequence[str], n_asked: int, results: Sequence[str], engine: FakeEngine, history: History, winds: Winds
) -> None:
    engine.enqueue([], calls=[wind(), wind("east", "b")])
    engine.enqueue(["Done."])
    async with running(engine, history, toolbox=Toolbox([winds])) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: isinstance(chat.app.screen, ApprovalScreen))
        await chat.until(lambda: "May wind be called?" in chat.seen and '{"from": "north"}' in chat.seen)
        assert chat.state == "calling tools"
        assert winds.called == []
        for i, key in enumerate(keys):
            before = chat.app.screen
            await chat.press(key)
            if key != "enter" and i < len(keys) - 1:
                await chat.until(lambda before=before: chat.app.screen is not before)  # type: ignore[misc]
                await chat.until(lambda: isinstance(chat.app.screen, ApprovalScreen))
        await chat.until(lambda: chat.turns[-1] == "Done." and chat.state == "ready")
    told = [message.content for message in engine.prompts[1][0] if message.role == "tool"]
    assert told == results


async def test_hostile_arguments_cannot_steer_the_question(engine: FakeEngine, history: History, winds: Winds) -> None:
    hostile = ToolCall("a", "wind", '{"from": "[bold]\x1b[31m[@click=app.quit]x[/]\u2028y"}')
    engine.enqueue([], calls=[hostile])
    engine.enqueue(["Done."])
    async with running(engine, history, toolbox=Toolbox([winds])) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: isinstance(chat.app.screen, ApprovalScreen) and "[bold]" in chat.seen)
        assert "[31m[@click=app.quit]x[/]" in chat.seen
        await chat.press("n")
        await chat.until(lambda: chat.turns[-1] == "Done.")
        assert "[bold][31m[@click=app.quit]x[/]" in blocks(chat)[0]
        chat.app.screen.query(CallBlock).first().focus()
        await chat.press("enter")
        await chat.until(lambda: blocks(chat)[0].startswith("▾"))
        assert "[bold][31m[@click=app.quit]x[/]" in blocks(chat)[0]


# Ends


async def test_escape_cancels_what_is_called(
    engine: FakeEngine, history: History, winds: Winds, toolbox: Toolbox
) -> None:
    engine.enqueue(["Hm."], calls=[wind(name="calm")])
    async with running(engine, history, toolbox=toolbox) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: blocks(chat) == ['▸ calm · …  {"from": "north"}'] and chat.state == "calling tools")
        await chat.until(lambda: winds.called != [])
        await ask(chat, "too early")
        await chat.until(lambda: "Escape stops the answer first" in chat.seen)
        await chat.press("escape")
        await chat.ready()
        assert blocks(chat)[0].endswith("→ cancelled by the user")
        engine.enqueue(["Well."])
        await chat.press("enter")
        await chat.until(lambda: chat.turns[-1] == "Well." and chat.state == "ready")
    assert engine.prompts[1][0][1:3] == [
        Message("assistant", "Hm.", (wind(name="calm"),)),
        Message("tool", "cancelled by the user", call_id="a"),
    ]


async def test_an_answer_stopped_in_a_call_keeps_it_undone(
    engine: FakeEngine, history: History, toolbox: Toolbox
) -> None:
    engine.enqueue(["Hm"], holds=True, calls=[wind()])
    async with running(engine, history, toolbox=toolbox) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: chat.turns[-1] == "Hm")
        await chat.press("escape")
        await chat.ready()
        assert blocks(chat) == ['▸ wind · not carried out  {"from": "north"}']
    assert path_of(history)[-1].stop == "stopped"


async def test_an_engine_that_dies_over_results_keeps_them(
    engine: FakeEngine, history: History, toolbox: Toolbox
) -> None:
    engine.enqueue(["Hm."], calls=[wind()])
    engine.enqueue([], error=WorkerDiedError("it died"))
    async with running(engine, history, toolbox=toolbox) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: chat.state == "not loaded")
        assert chat.faults == ["✗ it died\n  F5 loads the model again"]
        await chat.press("f5")
        await chat.ready()
        engine.enqueue(["North."])
        await ask(chat, "And?")
        await chat.until(lambda: chat.turns[-1] == "North.")
    assert engine.prompts[2][0][2] == Message("tool", "the north wind", call_id="a")


async def test_rounds_are_bounded(engine: FakeEngine, history: History, toolbox: Toolbox) -> None:
    engine.enqueue([], calls=[wind()])
    engine.enqueue(["Enough."])
    async with running(engine, history, toolbox=toolbox, max_rounds=1) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: chat.turns[-1] == "Enough.")
    assert [choice for _, choice in engine.offers] == ["auto", "none"]


async def test_quitting_while_a_call_waits_for_approval(engine: FakeEngine, history: History, winds: Winds) -> None:
    engine.enqueue(["Hm."], calls=[wind()])
    async with running(engine, history, toolbox=Toolbox([winds])) as chat:
        await chat.ready()
        await ask(chat)
        await chat.until(lambda: isinstance(chat.app.screen, ApprovalScreen))
        await chat.press("ctrl+q")
    await asyncio.sleep(0.5)  # the thread hears of it at its next look
    assert winds.called == []
    assert path_of(history)[-1].calls == (TurnCall(wind()),)


# The file


OLD = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY, title TEXT NOT NULL, system TEXT, model TEXT NOT NULL,
    tip INTEGER REFERENCES messages(id), updated REAL NOT NULL
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY, conversation INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    parent INTEGER REFERENCES messages(id), role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
    content TEXT NOT NULL, model TEXT, level TEXT, stop TEXT, n_tokens INTEGER NOT NULL DEFAULT 0,
    tokens_per_second REAL NOT NULL DEFAULT 0
);
INSERT INTO conversations VALUES (1, 'Why?', NULL, 'large', 2, 1e9);
INSERT INTO messages VALUES (1, 1, NULL, 'user', 'Why?', NULL, NULL, NULL, 0, 0);
INSERT INTO messages VALUES (2, 1, 1, 'assistant', 'Because.', 'large', 'Q8_0', 'end', 3, 7.5);
PRAGMA user_version = 1;
"""


def test_a_history_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(OLD)
    for _ in range(2):
        history = History(path)
        assert history.messages(1) == [
            Turn(1, "user", "Why?"),
            Turn(2, "assistant", "Because.", "large", "Q8_0", "end", 3, 7.5),
        ]
        history.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
    history = History(path)
    turn = history.append(1, 2, "assistant", "")
    kept = Turn(
        turn.id, "assistant", "", calls=(TurnCall(wind(), Result("gone", ok=False, seconds=2.0)), TurnCall(wind()))
    )
    history.update(kept)
    assert history.messages(1)[-1] == kept
    history.close()


def test_calls_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(OLD)
    History(path).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("""UPDATE messages SET calls = '[{"call": 3}]' WHERE id = 2""")
        database.commit()
    history = History(path)
    with pytest.raises(HistoryError, match="holds calls that cannot be read"):
        history.messages(1)
    history.close()
