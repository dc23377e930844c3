"""The chat as a user meets it: a real terminal, the real process, the real demo model."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.terminal import Terminal
from tui.history import History

BISE = str(Path(sys.executable).parent / "bise")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home of its own, so that no conversation or level of the user is touched."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    return {**kept, "HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "XDG_STATE_HOME": str(home / "state")}


def _children(parent: int) -> list[Path]:
    """The /proc folders of a process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(stat.parent)
    return found


def _is_engine(process: Path) -> bool:
    try:
        return b"runtime.engine_process" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_a_conversation_with_the_demo_a_stop_and_a_quit(environment: dict[str, str]) -> None:
    with Terminal([BISE, "chat", "demo", "--level", "Q4_K_M", "--temperature", "0"], environment) as terminal:
        terminal.wait_for("measuring model", "ready")
        terminal.type("Define a horse.\r")
        first = terminal.wait_for("Define a horse.", "tokens/s")
        assert "a person" in first or "animal" in first or "of a" in first, first
        assert "context" in first
        assert terminal.text.count("[INST]") == 0

        terminal.type("\x11")  # Ctrl+Q
        assert terminal.wait_for_end() == 0
    history = History(Path(environment["XDG_DATA_HOME"]) / "bise" / "conversations.sqlite")
    [conversation] = history.conversations()
    turns = history.messages(conversation.id)
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert turns[0].content == "Define a horse."
    assert turns[1].content in " ".join(first.split())
    history.close()


def test_stop_keeps_the_partial_answer(environment: dict[str, str]) -> None:
    with Terminal([BISE, "chat", "smollm2", "--temperature", "0"], environment) as terminal:
        terminal.wait_for("SmolLM2", "ready")
        terminal.type("Write a very long story about a dragon and a king.\r")
        terminal.wait_for("answering", "tokens")
        terminal.type("\x1b")
        stopped = terminal.wait_for("stopped", "ready")
        assert "tokens/s" in stopped
        engines = list(filter(_is_engine, _children(terminal.pid)))
        assert engines
        terminal.type("\x11")
        assert terminal.wait_for_end() == 0
        assert not any(map(_is_engine, engines)), "the engine's process outlived the chat"
        assert terminal.output.count(b"\x1b[?1049h") == terminal.output.count(b"\x1b[?1049l") == 1, "alternate screen"
    listed = subprocess.run([BISE, "chat", "--list"], env=environment, capture_output=True, text=True, check=True)
    assert "Write a very long story" in listed.stdout
