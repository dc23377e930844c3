"""Tools of real MCP servers, on standard streams and over HTTP, and the file that names them."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime import tool_servers
from runtime.messages import ToolCall
from runtime.tool_config import Config, open_toolbox, read
from runtime.tool_servers import Address, Command, Server
from runtime.tools import Limits, Rule, Toolbox, ToolError
from tests.rpc import free_ports
from tests.test_rpc import BISE, wait_until

HERE = Path(__file__).parent.parent
STDIO = Command(sys.executable, ("-m", "tests.mcp_server"), {"PYTHONPATH": str(HERE), "SAID": "hello"})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server over HTTP."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.mcp_server", str(port)]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is None and answers(port))
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            process.kill()


def answers(port: int) -> bool:
    from runtime.rpc_address import unanswered

    return not unanswered((f"127.0.0.1:{port}",))


@pytest.fixture(params=["stdio", "http"])
def server(request: pytest.FixtureRequest, url: str) -> Iterator[Server]:
    opened = Server("test", STDIO if request.param == "stdio" else Address(url), Limits(seconds=10.0))
    yield opened
    opened.close()


def children() -> set[str]:
    """Of all threads of this process; each server is started by its own."""
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            found.update((thread / "children").read_text(encoding="ascii").split())
    return found


def test_tools_are_listed_and_called(server: Server) -> None:
    tools = {tool.name: tool for tool in server.tools()}
    assert set(tools) == {f"test_{name}" for name in ("add", "long", "fail", "wait", "environment", "picture", "leave")}
    assert tools["test_add"].description == "Add two numbers."
    assert json.loads(tools["test_add"].parameters)["required"] == ["a", "b"]
    assert server.call("test_add", {"a": 2, "b": 40}) == "42"
    assert len(server.call("test_long", {"n": 300_000})) == 300_000
    assert server.call("test_picture", {}) == "[image, which a model of texts cannot read]"
    with pytest.raises(ToolError, match="no luck today"):
        server.call("test_fail", {})
    with pytest.raises(ToolError, match="a"):
        server.call("test_add", {"a": "two"})
    assert server.call("test_add", {"a": 1, "b": 1}) == "2"


def test_calls_side_by_side_and_too_long_ones(server: Server) -> None:
    server.limits = Limits(seconds=1.0)
    calls = [ToolCall("1", "test_wait", '{"seconds": 30}'), ToolCall("2", "test_add", '{"a": 1, "b": 2}')]
    found = dict(Toolbox([server], [Rule("*", "allow")]).run(calls, None, threading.Event()))
    assert (found[0].ok, found[0].text) == (False, "no answer after 1 seconds")


def test_a_server_has_the_environment_that_is_named_and_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    server = Server("test", STDIO)
    try:
        assert server.call("test_environment", {"name": "SAID"}) == "hello"
        assert server.call("test_environment", {"name": "SECRET_TOKEN"}) == "none"
    finally:
        server.close()


def test_a_server_that_leaves_is_told_and_none_is_left_behind() -> None:
    server = Server("test", STDIO)
    with pytest.raises(ToolError, match="the MCP server test"):
        server.call("test_leave", {})
    with pytest.raises(ToolError, match="the MCP server test"):
        server.call("test_add", {"a": 1, "b": 2})
    server.close()
    server.close()
    before = children()
    other = Server("test", STDIO)
    assert len(children() - before) == 1
    other.close()
    assert children() <= before


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (Command("/nowhere/server"), "/nowhere/server: No such file or directory"),
        (
            Command("/bin/sh", ("-c", "echo first >&2; echo it broke >&2; exit 3")),
            "Connection closed; it said: it broke",
        ),
        (Command("/bin/sh", ("-c", "echo no JSON; cat")), "does not start"),
        (Address("http://127.0.0.1:1/mcp"), "All connection attempts failed"),
        (Address("nonsense"), "does not start"),
    ],
)
def test_what_does_not_start_is_one_line(place: Command | Address, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_servers, "START_SECONDS", 10.0 if "cat" not in str(place) else 1.0)
    before = children()
    with pytest.raises(ToolError) as error:
        Server("test", place)
    assert str(error.value).startswith("the MCP server test d")
    assert words in str(error.value) or "did not start in 1 seconds" in str(error.value)
    assert "\n" not in str(error.value)
    wait_until(lambda: children() <= before)


# The file


def written(folder: Path, value: Any) -> Path:
    path = folder / "tools.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return path


def test_the_file_becomes_a_toolbox(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREETING", "good day")
    (tmp_path / "mine.py").write_text("def twice(n: int) -> int:\n    return 2 * n\n", encoding="utf-8")
    environment = {"PYTHONPATH": str(HERE), "SAID": "${GREETING}!"}
    value = {
        "functions": [{"from": str(tmp_path / "mine.py"), "timeout": 5}],
        "servers": {
            "local": {"command": sys.executable, "args": ["-m", "tests.mcp_server"], "env": environment},
            "far": {"url": url, "headers": {"Authorization": "Bearer ${GREETING}"}, "output_limit": 10},
            "lost": {"command": "/nowhere/server"},
        },
        "policy": {"local_*": "allow", "far_long": "allow", "*": "deny"},
        "timeout": 7.5,
    }
    said: list[str] = []
    with open_toolbox(read(written(tmp_path, value)), said.append) as toolbox:
        assert said == ["the MCP server lost does not start: /nowhere/server: No such file or directory"]
        assert [tool.name for tool in toolbox.tools][:2] == ["twice", "local_add"]
        assert len(toolbox.tools) == 15
        assert (toolbox.policy("twice"), toolbox.policy("local_add"), toolbox.policy("far_add")) == (
            *("deny", "allow", "deny"),
        )
        assert toolbox.limits("twice") == Limits(5.0, 20_000)
        assert toolbox.limits("local_add") == Limits(7.5, 20_000)
        calls = [
            ToolCall("1", "local_environment", '{"name": "SAID"}'),
            ToolCall("2", "far_long", '{"n": 99}'),
            ToolCall("3", "far_add", '{"a": 1, "b": 2}'),
        ]
        found = dict(toolbox.run(calls, None, threading.Event()))
        assert [found[i].text for i in range(3)] == [
            "good day!",
            "xxxxxxxxxx\n[cut here: 89 of 99 characters are left out]",
            "the user does not allow this tool",
        ]


def test_no_file_names_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "none.yaml") == Config()
    assert read(written(tmp_path, "")) == Config()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "the file: ['a'] is found where names with values is wanted"),
        (
            {"tools": {}},
            "the file: 'tools' is not known here; known: functions, servers, policy, timeout, output_limit",
        ),
        ({"functions": "a.py"}, "functions: 'a.py' is found where a list of files or modules is wanted"),
        ({"functions": [3]}, "functions[0]: 3 is found where a file, a module, or {from: …} is wanted"),
        ({"functions": [{"form": "a"}]}, "functions[0]: 'form' is not known here"),
        ({"servers": {"a b": {"command": "x"}}}, "servers.a b: letters, digits and - are for names"),
        ({"servers": {"a": {}}}, "servers.a: either a command or a url is wanted"),
        ({"servers": {"a": {"command": "x", "url": "y"}}}, "servers.a: either a command or a url is wanted"),
        ({"servers": {"a": {"command": "x", "headers": {}}}}, "servers.a.headers: goes with a url"),
        ({"servers": {"a": {"url": "x", "args": []}}}, "servers.a.args: goes with a command"),
        ({"servers": {"a": {"command": ["x"]}}}, "servers.a.command: ['x'] is found where text is wanted"),
        ({"servers": {"a": {"command": "x", "args": "y"}}}, "servers.a.args: 'y' is found where a list of texts"),
        (
            {"servers": {"a": {"command": "x", "env": {"T": "${NOT_THERE_AT_ALL}"}}}},
            "servers.a.env.T: there is no environment variable NOT_THERE_AT_ALL; set it",
        ),
        ({"policy": {"*": "sometimes"}}, "policy.*: 'sometimes' is found where ask, allow or deny is wanted"),
        ({"timeout": 0}, "timeout: 0 is found where a number of seconds is wanted"),
        ({"timeout": True}, "timeout: True is found where a number of seconds is wanted"),
        ({"servers": {"a": {"command": "x", "output_limit": 1.5}}}, "servers.a.output_limit: 1.5 is found where"),
    ],
)
def test_what_is_wrong_in_the_file_is_told_with_its_place(value: Any, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, value)
    with pytest.raises(ToolError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_verb_lists_tools_and_tells_problems(tmp_path: Path) -> None:
    (tmp_path / "bise").mkdir()
    (tmp_path / "mine.py").write_text('def twice(n: int) -> int:\n    """Twice\x1b[31m."""\n', encoding="utf-8")
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}

    def listed(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [BISE, "tools", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    run = listed()
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"no tools are named in {tmp_path}/bise/tools.yaml")
    written(tmp_path / "bise", {"functions": [f"{tmp_path}/mine.py"], "policy": {"twice": "allow"}})
    run = listed()
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "twice  allow  Twice[31m.\n"
    written(tmp_path / "bise", {"functions": [f"{tmp_path}/mine.py", "/nowhere.py"]})
    run = listed("--json")
    assert run.returncode == 1
    told = json.loads(run.stdout)
    assert [(tool["name"], tool["policy"], tool["parameters"]["required"]) for tool in told["tools"]] == [
        ("twice", "ask", ["n"])
    ]
    assert told["problems"] == ["/nowhere.py: no such file"]
    assert listed().stdout.splitlines()[-1] == "PROBLEM: /nowhere.py: no such file"
    written(tmp_path / "bise", "functions: {")
    run = listed()
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"bise: {tmp_path}/bise/tools.yaml: not valid YAML")


def test_opening_does_not_wait_for_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier that four servers must reach together is a folder: each leaves a file and waits for the others'."""
    script = f"touch {tmp_path}/$0; while [ $(ls {tmp_path} | wc -l) -lt 4 ]; do sleep 0.05; done; exit 1"
    monkeypatch.setattr(tool_servers, "START_SECONDS", 20.0)
    value = {"servers": {f"s{i}": {"command": "/bin/sh", "args": ["-c", script, f"f{i}"]} for i in range(4)}}
    said: list[str] = []
    began = time.monotonic()
    open_toolbox(read(written(tmp_path / "..", value)), said.append).close()
    assert len(said) == 4
    assert all("Connection closed" in line for line in said), (said, time.monotonic() - began)
