"""Tools: functions with their schemas, approval, time, length, and several calls side by side."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.messages import Tool, ToolCall
from runtime.tool_functions import Functions
from runtime.tools import Approval, Limits, Result, Rule, Toolbox, ToolError

NOTES = '''
import asyncio, dataclasses, enum, time
from typing import Annotated, Literal, TypedDict
from pathlib import Path as _Path

class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"

@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0

def search(
    query: Annotated[str, "what to look for"], limit: int = 5, kind: Literal["old", "new"] | None = None
) -> list[str]:
    """Search the notes.

    Gives lines.
    """
    return [f"{query} {kind}"] * limit

def paint(colour: Colour, at: Point, *, thick: bool = False) -> dict[str, object]:
    return {"colour": colour.name, "x": at.x + at.y, "thick": thick}

async def later(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "later"

def nothing() -> None:
    """Do nothing."""

def wait(seconds: float) -> str:
    time.sleep(seconds)
    return "waited"

def fail() -> str:
    raise KeyError("no such note")

def leave() -> str:
    raise SystemExit(3)

def odd() -> object:
    return {"path": _Path("/a"), "bad": "\\ud800"}

def _private() -> str:
    return "never"
'''


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools") / "notes.py"
    path.write_text(NOTES, encoding="utf-8")
    return path


@pytest.fixture
def toolbox(notes: Path) -> Iterator[Toolbox]:
    with Toolbox([Functions(str(notes), Limits(seconds=5.0, characters=100))], [Rule("*", "allow")]) as opened:
        yield opened


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(f"id-{name}", name, json.dumps(arguments))


def results(
    toolbox: Toolbox, *calls: ToolCall, approve: Callable[[ToolCall], Approval] | None = None
) -> list[tuple[bool, str]]:
    found = dict(toolbox.run(calls, approve, threading.Event()))
    assert len(found) == len(calls)
    return [(found[i].ok, found[i].text) for i in range(len(calls))]


# Functions


def test_a_signature_becomes_a_schema(notes: Path) -> None:
    tools = {tool.name: tool for tool in Functions(str(notes)).tools()}
    assert set(tools) == {"search", "paint", "later", "nothing", "wait", "fail", "leave", "odd"}
    assert tools["search"].description == "Search the notes.\n\nGives lines."
    assert json.loads(tools["search"].parameters) == {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "query": {"type": "string", "description": "what to look for"},
            "limit": {"type": "integer", "default": 5},
            "kind": {"anyOf": [{"type": "string", "enum": ["old", "new"]}, {"type": "null"}], "default": None},
        },
        "required": ["query"],
    }
    for tool in tools.values():
        jsonschema.Draft202012Validator.check_schema(json.loads(tool.parameters))


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("search", {"query": "a"}, '["a None","a None","a None","a None","a None"]'),
        ("search", {"query": "ü", "limit": 1, "kind": "new"}, '["ü new"]'),
        ("paint", {"colour": "red", "at": {"x": 2.5, "y": 1}}, '{"colour":"RED","x":3.5,"thick":false}'),
        ("paint", {"colour": "blue", "at": {"x": 1}, "thick": True}, '{"colour":"BLUE","x":1.0,"thick":true}'),
        ("later", {"seconds": 0}, "later"),
        ("nothing", {}, "done"),
    ],
)
def test_functions_are_called_with_values_of_their_types(
    name: str, arguments: Mapping[str, Any], text: str, toolbox: Toolbox
) -> None:
    assert results(toolbox, call(name, **arguments)) == [(True, text)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "the arguments do not fit: query: Field required"),
        ({"query": 3}, "the arguments do not fit: query: Input should be a valid string"),
        ({"query": "a", "limit": "many"}, "limit: Input should be a valid integer"),
        ({"query": "a", "kind": "other"}, "kind: Input should be 'old' or 'new'"),
        ({"query": "a", "size": 1}, "size: Extra inputs are not permitted"),
    ],
)
def test_arguments_that_do_not_fit_are_told_to_the_model(
    arguments: Mapping[str, Any], words: str, toolbox: Toolbox
) -> None:
    ((ok, text),) = results(toolbox, call("search", **arguments))
    assert not ok
    assert words in text


VALUES = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10))
def test_whatever_the_arguments_the_model_gets_an_answer(value: Any) -> None:
    source = _Echo()
    for text in (json.dumps(value), json.dumps({"query": value})):
        ((ok, said),) = results(Toolbox([source], [Rule("*", "allow")]), ToolCall("1", "echo", text))
        assert not ok or json.loads(text) == json.loads(said)


class _Echo:
    """Says what it was given."""

    limits = Limits(characters=10**6)

    def tools(self) -> Sequence[Tool]:
        return [Tool("echo", "", "{}")]

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return json.dumps(arguments)

    def close(self) -> None:
        pass


def test_what_a_function_raises_is_its_result(toolbox: Toolbox) -> None:
    assert results(toolbox, call("fail"), call("leave"), call("odd")) == [
        (False, "KeyError: 'no such note'"),
        (False, "SystemExit: 3"),
        (True, "{'path': PosixPath('/a'), 'bad': '\\ud800'}"),
    ]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def f(a): ...", "f: a has no type"),
        ("def f(*a: int): ...", "cannot be given by name"),
        ("def f(a: int, /): ...", "cannot be given by name"),
        ("def f(a: 'Nowhere'): ...", "name 'Nowhere' is not defined"),
        ("import threading\ndef f(a: threading.Thread): ...", "Thread"),
        ("x = 1", "defines no function"),
        ("def broken(:", "cannot be loaded: SyntaxError"),
        ("import sys; sys.exit('gone')", "cannot be loaded: SystemExit: gone"),
        ("raise RuntimeError('two\\nlines')", "cannot be loaded: RuntimeError: two lines"),
        (f"def {'f' * 65}(): ...", "a tool cannot be called"),
    ],
)
def test_a_module_that_has_no_tools_is_one_line(code: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(code, encoding="utf-8")
    with pytest.raises(ToolError) as error:
        Functions(str(path))
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_one_function_is_named_and_modules_are_imported(notes: Path) -> None:
    assert [tool.name for tool in Functions(f"{notes}:search").tools()] == ["search"]
    with pytest.raises(ToolError, match="no such function"):
        Functions(f"{notes}:Nothing")
    with pytest.raises(ToolError, match="no such file"):
        Functions("/nowhere/at_all.py")
    with pytest.raises(ToolError, match="No module named 'nowhere_at_all'"):
        Functions("nowhere_at_all")
    assert Functions("tests.fixed_tool:double").call("double", {"n": 4}) == "8"


# Calls


def test_calls_of_one_turn_run_side_by_side_and_come_in_order(toolbox: Toolbox) -> None:
    barrier = threading.Barrier(3)

    class Meeting(_Echo):
        def tools(self) -> Sequence[Tool]:
            return [Tool("meet", "", "{}")]

        def call(self, name: str, arguments: Mapping[str, Any]) -> str:
            barrier.wait(10)  # one after the other, none would get past
            return str(arguments["n"])

    with Toolbox([Meeting()], [Rule("*", "allow")]) as box:
        assert results(box, *(call("meet", n=n) for n in range(3))) == [(True, "0"), (True, "1"), (True, "2")]


def test_what_takes_too_long_is_told_and_the_others_are_done(notes: Path) -> None:
    with Toolbox([Functions(str(notes), Limits(seconds=0.3))], [Rule("*", "allow")]) as box:
        assert results(box, call("wait", seconds=30), call("nothing")) == [
            (False, "no answer after 0.3 seconds"),
            (True, "done"),
        ]


def test_a_stop_cancels_what_runs_and_what_was_to_run(toolbox: Toolbox) -> None:
    stopped = threading.Event()
    running = toolbox.run((call("nothing"), call("wait", seconds=30), call("wait", seconds=30)), None, stopped)
    first = next(running)
    assert (first[0], first[1].text) == (0, "done")
    began = time.monotonic()
    stopped.set()
    assert {i: result.text for i, result in running} == dict.fromkeys((1, 2), "cancelled by the user")
    assert time.monotonic() - began < 20
    ((_, result),) = toolbox.run((call("nothing"),), None, stopped)
    assert result == Result("cancelled by the user", ok=False)


def test_a_long_result_is_cut_and_says_so(toolbox: Toolbox) -> None:
    ((ok, text),) = results(toolbox, call("search", query="a" * 500, limit=1))
    assert ok
    assert text == '["' + "a" * 98 + "\n[cut here: 409 of 509 characters are left out]"


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (ToolCall("1", "search", "{}", error="not a JSON list"), "not a JSON list"),
        (ToolCall("1", "nowhere", "{}"), "there is no tool 'nowhere'; there are search, "),
        (ToolCall("1", "nothing", "[]"), "the arguments must be a JSON object"),
        (ToolCall("1", "nothing", "{"), "the arguments are not valid JSON: "),
        (ToolCall("1", "nothing", "[" * 100_000), "the arguments are not valid JSON: "),
    ],
)
def test_a_malformed_call_is_not_carried_out(made: ToolCall, text: str, toolbox: Toolbox) -> None:
    ((ok, said),) = results(toolbox, made)
    assert not ok
    assert said.startswith(text)


# Approval


def test_the_first_rule_that_matches_decides(notes: Path) -> None:
    rules = [Rule("search", "allow"), Rule("s*", "deny"), Rule("fail", "deny"), Rule("pai[nm]t", "deny")]
    with Toolbox([Functions(str(notes))], rules) as box:
        assert {name: box.policy(name) for name in ("search", "fail", "paint", "nothing")} == {
            "search": "allow",
            "fail": "deny",
            "paint": "deny",
            "nothing": "ask",
        }
        assert results(box, call("fail"), call("nothing")) == [
            (False, "the user does not allow this tool"),
            (False, "this tool must be approved, and there is nobody to ask"),
        ]


def test_each_call_is_asked_for_until_always(notes: Path) -> None:
    asked: list[str] = []
    answers: list[Approval] = ["yes", "no", "always", "yes"]

    def approve(made: ToolCall) -> Approval:
        asked.append(made.name)
        return answers[len(asked) - 1]

    with Toolbox([Functions(str(notes))]) as box:
        calls = [call("nothing") for _ in range(4)]
        assert results(box, *calls, call("search", query="a", limit=0), approve=approve) == [
            (True, "done"),
            (False, "the user does not allow this call"),
            (True, "done"),
            (True, "done"),
            (True, "[]"),
        ]
        assert asked == ["nothing"] * 3 + ["search"]
        assert box.narrowed(["no*"]).policy("nothing") == "allow"


def test_a_call_that_is_approved_after_a_stop_is_not_carried_out(notes: Path) -> None:
    stopped = threading.Event()

    def approve(made: ToolCall) -> Approval:
        stopped.set()
        return "yes"

    with Toolbox([Functions(str(notes))]) as box:
        assert [result.text for _, result in box.run((call("nothing"),), approve, stopped)] == ["cancelled by the user"]


def test_a_narrowed_toolbox_has_only_those(toolbox: Toolbox) -> None:
    few = toolbox.narrowed(["search", "la*"])
    assert [tool.name for tool in few.tools] == ["search", "later"]
    assert results(few, call("nothing"))[0][1].startswith("there is no tool 'nothing'")
    assert results(few, call("search", query="a", limit=0)) == [(True, "[]")]
    with pytest.raises(ToolError, match=r"no tool is called 'x\*'; there are fail, later, leave, nothing, odd"):
        toolbox.narrowed(["search", "x*"])


def test_two_tools_of_one_name_are_refused(notes: Path) -> None:
    with pytest.raises(ToolError, match="two tools are called search; rename one of them or leave one out"):
        Toolbox([Functions(f"{notes}:search"), Functions(str(notes))])
