"""User → calls → results → answer: by scripted models, by the demo, and as `bise ask` shows it."""

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from runtime.errors import EngineError
from runtime.events import EngineSettings, Finished, Load, Piece, ReplyEvent, Sampling, StopReason
from runtime.messages import Message, NamedTool, Tool, ToolCall, ToolChoice
from runtime.session import Session
from runtime.tool_functions import Functions
from runtime.tool_loop import Called, Calling, LoopEvent, Told, loop
from runtime.tools import Rule, Toolbox
from tests.checkpoints import DEMO
from tests.terminal import Terminal
from tests.test_rpc import BISE

HERE = Path(__file__).parent
ALLOWED = [Rule("*", "allow")]
ASKED = (Message("user", "How much is twice four?"),)


class Scripted:
    """A model that says what a test told it to, and remembers what it was asked."""

    def __init__(self, *replies: tuple[str, Sequence[ToolCall], StopReason]) -> None:
        self._replies = list(replies)
        self.asked: list[tuple[tuple[Message, ...], tuple[Tool, ...], ToolChoice]] = []

    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool], choice: ToolChoice) -> Iterator[ReplyEvent]:
        self.asked.append((tuple(messages), tuple(tools), choice))
        text, calls, reason = self._replies.pop(0)
        yield Piece(text, 1)
        yield Finished(reason, 1, 0, 1, 0.1, 0.1, 10, 100, calls=tuple(calls))


def double(number: int, id_: str = "a") -> ToolCall:
    return ToolCall(id_, "double", json.dumps({"n": number}))


@pytest.fixture
def toolbox() -> Iterator[Toolbox]:
    with Toolbox([Functions("tests.fixed_tool")], ALLOWED) as opened:
        yield opened


def run(model: Scripted, toolbox: Toolbox, **options: Any) -> list[LoopEvent]:
    with closing(loop(model, ASKED, toolbox, None, threading.Event(), **options)) as events:
        return list(events)


def test_calls_are_carried_out_and_their_results_asked_about(toolbox: Toolbox) -> None:
    calls = (double(4, "a"), double(5, "b"))
    model = Scripted(("Let me see.", calls, "calls"), ("", (double(9, "c"),), "calls"), ("It is 8.", (), "end"))
    events = run(model, toolbox)
    assert [type(event).__name__ for event in events] == [
        *("Piece", "Finished", "Calling", "Called", "Called", "Told"),
        *("Piece", "Finished", "Calling", "Called", "Told", "Piece", "Finished"),
    ]
    assert {(e.call.id, e.result.text) for e in events if isinstance(e, Called)} == {
        ("a", "8"),
        ("b", "10"),
        ("c", "18"),
    }
    first = (Message("assistant", "Let me see.", calls), *told("a", "8", "b", "10"))
    second = (Message("assistant", "", (double(9, "c"),)), *told("c", "18"))
    assert [asked[0] for asked in model.asked] == [ASKED, (*ASKED, *first), (*ASKED, *first, *second)]
    assert [asked[2] for asked in model.asked] == ["auto"] * 3
    assert all(asked[1] == toolbox.tools for asked in model.asked)


def told(*pairs: str) -> tuple[Message, ...]:
    return tuple(Message("tool", text, call_id=id_) for id_, text in zip(pairs[::2], pairs[1::2], strict=True))


def test_the_rounds_are_bounded_and_the_last_may_not_call(toolbox: Toolbox) -> None:
    model = Scripted(*[("", (double(i),), "calls") for i in range(3)], ("Enough.", (), "end"))
    run(model, toolbox, max_rounds=3, tool_choice="any")
    assert [asked[2] for asked in model.asked] == ["any", "auto", "auto", "none"]
    named = Scripted(("", (double(1),), "calls"), ("Done.", (), "end"))
    run(named, toolbox, tool_choice=NamedTool("double"))
    assert [asked[2] for asked in named.asked] == [NamedTool("double"), "auto"]


def test_what_is_wrong_with_a_call_is_told_to_the_model(toolbox: Toolbox) -> None:
    calls = (ToolCall("a", "double", "{", error="not JSON"), ToolCall("b", "triple", "{}"), double(2, "c"))
    model = Scripted(("", calls, "calls"), ("Sorry.", (), "end"))
    run(model, toolbox)
    results = {message.call_id: message.content for message in model.asked[1][0] if message.role == "tool"}
    assert results == {"a": "not JSON", "b": "there is no tool 'triple'; there are double", "c": "4"}


@pytest.mark.parametrize("reason", ["stopped", "length", "context"])
def test_calls_of_an_answer_that_was_cut_off_have_results_and_end_it(reason: StopReason, toolbox: Toolbox) -> None:
    calls = (double(1, "a"), ToolCall("b", "double", '{"n', error="cut off"))
    events = run(Scripted(("Well", calls, reason)), toolbox)
    assert not any(isinstance(event, Called) for event in events)
    assert events[-1] == Told(told("a", "the answer ended before this call was carried out", "b", "cut off"))


def test_a_stop_while_calls_run_ends_it(toolbox: Toolbox) -> None:
    model, stopped = Scripted(("", (double(1, "a"),), "calls"), ("never", (), "end")), threading.Event()
    events: list[LoopEvent] = []
    for event in loop(model, ASKED, toolbox, None, stopped):
        events.append(event)
        if isinstance(event, Calling):
            stopped.set()
    assert events[-1] == Told(told("a", "cancelled by the user"))
    assert len(model.asked) == 1


def test_who_leaves_early_leaves_the_reply(toolbox: Toolbox) -> None:
    left = threading.Event()

    def endless(*_: object) -> Iterator[ReplyEvent]:
        try:
            while True:
                yield Piece("more", 1)
        finally:
            left.set()

    events = loop(endless, ASKED, toolbox, None, threading.Event())
    next(events)
    events.close()
    assert left.is_set()


def test_an_error_of_the_model_passes(toolbox: Toolbox) -> None:
    def failing(*_: object) -> Iterator[ReplyEvent]:
        raise EngineError("too long")
        yield

    with pytest.raises(EngineError, match="too long"):
        list(loop(failing, ASKED, toolbox, None, threading.Event()))


# The demo, whose calls are made by the grammar alone


def test_a_real_model_calls_and_goes_on(demo: Path, toolbox: Toolbox) -> None:
    settings = EngineSettings(n_ctx=1024, n_threads=1)
    session = Session(Load(demo, settings, "mistral-v3", DEMO / "tokenizer.model"))
    sampling = Sampling(temperature=0.0, max_tokens=40)

    def ask(messages: Sequence[Message], tools: Sequence[Tool], choice: ToolChoice) -> Iterator[ReplyEvent]:
        return session.reply(messages, sampling, tools=tools, tool_choice=choice)

    try:
        list(session.load())
        events = list(loop(ask, ASKED, toolbox, None, threading.Event(), tool_choice="any", max_rounds=1))
    finally:
        session.close()
    (called,) = (event for event in events if isinstance(event, Called))
    arguments = json.loads(called.call.arguments)
    jsonschema.validate(arguments, json.loads(toolbox.tools[0].parameters))
    assert called.result.text == str(2 * arguments["n"])
    first, last = (event for event in events if isinstance(event, Finished))
    assert (first.reason, last.calls) == ("calls", ())
    assert last.prompt_tokens > first.prompt_tokens
    assert last.reused_tokens > 0


# The command


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A configuration with one tool."""
    (tmp_path / "bise").mkdir()
    value = {"functions": [{"from": str(HERE / "fixed_tool.py")}], "policy": {"other": "allow"}}
    (tmp_path / "bise" / "tools.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")
    return tmp_path


def command(demo: Path, *arguments: str) -> list[str]:
    model = [*("--model", "demo", "--level", "BF16", "--models", str(demo.parent.parent)), "--threads", "1"]
    return [BISE, "ask", *model, "--temperature", "0", "--max-tokens", "60", "--max-rounds", "1", *arguments]


def asked(demo: Path, home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run apart from any terminal."""
    environment = {**os.environ, "XDG_CONFIG_HOME": str(home)}
    return subprocess.run(
        command(demo, *arguments),
        env=environment, capture_output=True, text=True, check=False, start_new_session=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_ask_calls_what_is_allowed(demo: Path, home: Path) -> None:
    run = asked(demo, home, "--tools", "--tool-choice", "any", "--allow-tool", "dou*", "--json", "Twice what?")
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    (done,) = told["calls"]
    number = json.loads(done["arguments"])["n"]
    assert (done["name"], done["ok"], done["result"]) == ("double", True, str(2 * number))
    assert re.search(r"^bise: calls double \{.+\}\nbise: double, 0\.\d s: -?\d+$", run.stderr, re.MULTILINE)


def test_ask_calls_nothing_that_nobody_approves(demo: Path, home: Path) -> None:
    run = asked(demo, home, "--tool", "double", "--tool-choice", "double", "--json", "Twice what?")
    assert run.returncode == 0, run.stderr
    (done,) = json.loads(run.stdout)["calls"]
    assert (done["ok"], done["result"]) == (False, "this tool must be approved, and there is nobody to ask")


@pytest.mark.parametrize(
    ("keys", "result"), [("y\r", r"-?\d+"), ("what\rALWAYS\r", r"-?\d+"), ("n\r", "the user does not allow this call")]
)
def test_ask_asks_at_the_terminal(keys: str, result: str, demo: Path, home: Path) -> None:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(home)}
    arguments = command(demo, "--tools", "--tool-choice", "any", "Twice what?")
    with Terminal(arguments, environment, columns=160) as terminal:
        terminal.wait_for("bise: may it call double {", "? [y]es, [n]o, [a]lways double:")
        terminal.type(keys)
        assert terminal.wait_for_end() == 0
        assert re.search(rf"bise: double, \d\.\d s: (failed: )?{result}", terminal.text), terminal.text


def test_ctrl_c_at_the_question_ends_all(demo: Path, home: Path) -> None:
    arguments = command(demo, "--tools", "--tool-choice", "any", "Twice what?")
    with Terminal(arguments, {**os.environ, "XDG_CONFIG_HOME": str(home)}, columns=160) as terminal:
        terminal.wait_for("[a]lways double:")
        terminal.type("\x03")
        assert terminal.wait_for_end() == 130
        assert "Traceback" not in terminal.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tools", "--max-rounds", "0", "hi"], "--max-rounds 0 is not a number from 1 to 100"),
        (["--tool", "nothing*", "hi"], "no tool is called 'nothing*'; there are double"),
        (["--tools", "--tool-choice", "nothing", "hi"], "there is no tool 'nothing' to be called"),
        (["--tool-choice", "any", "hi"], "--allow-tool and --tool-choice go with --tools or --tool"),
        (["--tools", "--each", "q.jsonl", "--out", "a.jsonl"], "leave out --tools"),
    ],
)
def test_options_that_make_no_sense(arguments: Sequence[str], words: str, demo: Path, home: Path) -> None:
    run = asked(demo, home, *arguments)
    assert run.returncode == 1
    assert words in run.stderr.splitlines()[-1]


def test_without_a_file_it_says_how(demo: Path, tmp_path: Path) -> None:
    run = asked(demo, tmp_path, "--tools", "hi")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"bise: no tools are named in {tmp_path}/bise/tools.yaml; the README says how"
