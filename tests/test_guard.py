"""Verbs that compute in their own process: how their death is told, and that all else is as without a guard."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rpc import free_ports, wait_until_it_answers, worker_process
from tests.terminal import Terminal

BISE = str(Path(sys.executable).parent / "bise")


@contextmanager
def measuring(models: Path, out: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """`bise perplexity` on a file, with the model loaded, in a group of its own as from a shell."""
    command = [
        BISE,
        "perplexity",
        str(models),
        "--threads",
        "1",
        "--texts",
        "prose,code",
        "--out",
        str(out),
        *arguments,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_until(lambda: has_loaded(process, models))
        yield process


def has_loaded(process: "subprocess.Popen[str]", model: Path) -> bool:
    assert process.poll() is None, process.communicate()
    try:
        return model.name in Path(f"/proc/{child_of(process)}/maps").read_text(encoding="utf-8")
    except (OSError, ValueError):  # there is no child yet
        return False


def wait_until(met: Callable[[], bool]) -> None:
    for _ in range(6000):
        if met():
            return
        time.sleep(0.01)
    raise AssertionError("still not so after a minute")


def child_of(process: "subprocess.Popen[str]") -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii"))


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        ("SIGSEGV", "a fault inside llama.cpp"),
        ("SIGABRT", "llama.cpp gave up"),
        ("SIGKILL", "killed by another program"),
    ],
)
def test_a_death_is_one_line_and_the_same_command_goes_on(
    number: str, cause: str, demo_levels: dict[str, Path], tmp_path: Path
) -> None:
    with measuring(demo_levels["Q2_K"], tmp_path) as process:
        os.kill(child_of(process), signal.Signals[number])
        said, faults = process.communicate()
    assert (process.returncode, said) == (1, "")
    assert re.fullmatch(
        rf"(measuring .+\n)*bise: the process that computes ended by {number} \({cause}.*\); the same command goes on "
        r"where it stopped.* \(log: .+\)\n",
        faults,
    )


def test_an_rpc_server_that_dies_is_named(demo_levels: dict[str, Path], tmp_path: Path) -> None:
    server = f"127.0.0.1:{free_ports(1)[0]}"
    with worker_process(server) as worker:
        wait_until_it_answers(server, worker)
        with measuring(demo_levels["Q2_K"], tmp_path, "--rpc", server) as process:
            worker.kill()
            _, faults = process.communicate()
    assert process.returncode == 1
    assert "ended by SIGABRT (an RPC server failed): Remote RPC server crashed or" in faults
    assert "start `bise worker` there again, or leave it out of --rpc; the same command goes on" in faults
    assert "GGML" not in faults
    assert faults.count("bise: ") == 1


def test_ctrl_c_by_a_program_reaches_the_verb(demo_levels: dict[str, Path], tmp_path: Path) -> None:
    with measuring(demo_levels["Q2_K"], tmp_path) as process:
        child = child_of(process)
        process.send_signal(signal.SIGINT)
        said, faults = process.communicate()
    assert (process.returncode, said, faults) == (130, "", "bise: interrupted\n")
    assert not Path(f"/proc/{child}").exists()


def test_ctrl_c_in_a_terminal_reaches_the_verb(demo_levels: dict[str, Path], tmp_path: Path) -> None:
    command = [BISE, "perplexity", str(demo_levels["Q2_K"]), "--threads", "1", "--out", str(tmp_path)]
    with Terminal(command, os.environ) as terminal:
        terminal.wait_for("tokens/s")
        terminal.type("\x03")
        assert terminal.wait_for_end() == 130
        assert terminal.text.replace("^C", "").strip() == "bise: interrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_who_is_asked_to_end_ends_as_asked(number: int, demo_levels: dict[str, Path], tmp_path: Path) -> None:
    with measuring(demo_levels["Q2_K"], tmp_path) as process:
        child = child_of(process)
        process.send_signal(number)
        process.communicate()
        wait_until(lambda: not Path(f"/proc/{child}").exists())
    assert process.returncode == -number


def test_faults_of_the_user_and_codes_pass(tmp_path: Path) -> None:
    run = subprocess.run(
        [BISE, "perplexity", "nothing.gguf"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert run.returncode == 1
    assert run.stderr.startswith("bise: ")
    assert run.stderr.count("\n") == 1
    usage = subprocess.run([BISE, "perplexity", "--nothing"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
