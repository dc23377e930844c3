"""Why the engine's process ended and what to do, in one line: from its exit status, its log and the kernel's counters.

Pure. What can be told apart: an instruction the processor does not have, a fault, a failed assertion of llama.cpp, a
model file that cannot be read any more, memory that ran out (by five different ways to die), a kill, an ordinary bug.
"""

import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime.wheel import installed_build

_ABORT = re.compile(r"^\S*\.(?:c|cpp|cu|h):\d+: ")  # ggml_abort's prefix: the source file and line

LOGGED = "llama.cpp "
"""In front of the lines of llama.cpp's log, in the process's log, with a letter for the level: `llama.cpp E: `."""

LOGGED_ERROR = f"{LOGGED}E: "

_TRACE = "Fatal Python error: "  # faulthandler's first words, after the last words of the process itself

_OUT_OF_MEMORY = (
    "MemoryError",
    "bad_alloc",
    "out of memory",
    "failed to allocate",
    "libgomp: Thread creation failed",
    "can't start new thread",
)

_RPC_FAILED = ("Remote RPC server", "Failed to connect to ")  # llama.cpp 0c1e57098, ggml-rpc.cpp

_AGAIN = "it can be started again"
_SMALLER = "take a smaller level, --context or --kv, or end other programs"
_DOCTOR = f"{_AGAIN}, and `bise doctor` tests the engine"

_CAUSES = {
    "SIGABRT": ("llama.cpp gave up", _DOCTOR),
    "SIGSEGV": ("a fault inside llama.cpp", _DOCTOR),
    "SIGFPE": ("a fault inside llama.cpp", _DOCTOR),
    "SIGBUS": (
        "the model file was cut off, or its disk failed, while it was in use",
        "check the file with `bise verify`",
    ),
    "SIGTERM": ("asked to end by another program", _AGAIN),
    "SIGHUP": ("asked to end by another program", _AGAIN),
    "SIGXCPU": ("it had used up its limit of processor time", "raise the limit (`ulimit -t`)"),
}


@dataclass(frozen=True, slots=True)
class Death:
    """How a process ended."""

    code: int
    """As subprocess has it: a negative number is a signal."""
    said: str
    """The end of its log."""
    oom: str | None
    """Where memory ran out meanwhile: `cgroup`, `machine`, or "" for neither; None where that cannot be known."""
    log: Path | None = None
    """The whole log."""
    gone: tuple[str, ...] = ()
    """RPC servers whose devices it used and that do not answer any more."""
    again: str = _AGAIN
    """What can be done where nothing needs to be changed."""


def obituary(death: Death, who: str = "the engine's process") -> str:
    """One line: how, why, the last words, what to do, and where the log is."""
    words = last_words(death.said)
    cause, remedy = _cause(death, words)
    end = f"ended by {_signal_name(-death.code)}" if death.code < 0 else f"ended with exit code {death.code}"
    if cause:
        end += f" ({cause})"
    if words:
        end += f": {words}"
    log = f" (log: {death.log})" if death.log is not None else ""
    return f"{who} {end}; {remedy.replace(_AGAIN, death.again)}{log}"


def rebuild() -> str:
    """The command that puts a wheel for this machine in the place of the one that is installed."""
    build = installed_build() or {}
    cuda = any("CUDA=" in argument for argument in build.get("cmake_args", ()))
    return f"{sys.executable} -m runtime.wheel{' --cuda' if cuda else ''}"


def last_words(said: str) -> str:
    """Why a process ended, in one line: llama.cpp's failed assertion, else the last line, such as a traceback's end.

    Where llama.cpp gives up on a device, the assertion says `CUDA error` alone; the cause stands in the log before it.
    Other lines of the log are of errors the process survived.
    """
    lines = [line.strip() for line in said.partition(_TRACE)[0].splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if _ABORT.match(line):
            words = _ABORT.sub("", line)
            logged = (
                other.removeprefix(LOGGED_ERROR) for other in reversed(lines[:i]) if other.startswith(LOGGED_ERROR)
            )
            return next((other for other in logged if other.startswith(words)), words)
    return next((line for line in reversed(lines) if not line.startswith(LOGGED)), "")


def _cause(death: Death, words: str) -> tuple[str, str]:
    """What lies behind the exit status ("" where nothing is known), and what to do."""
    if any(sign in words for sign in _OUT_OF_MEMORY):
        return "out of memory", _SMALLER
    if words.startswith(_RPC_FAILED):
        servers = ", ".join(death.gone) or "an RPC server"
        return f"{servers} failed", f"start `bise worker` there again, or leave it out of --rpc; {_AGAIN}"
    if death.code >= 0:
        return "", _DOCTOR
    name = _signal_name(-death.code)
    if name == "SIGKILL":
        match death.oom:
            case "cgroup":
                return "out of memory: the limit of its control group was reached", _SMALLER
            case "machine":
                return "the machine ran out of memory", _SMALLER
            case "":
                return "killed by another program or a user", _AGAIN
        return "killed from outside, or the machine ran out of memory", _AGAIN
    if name == "SIGILL":
        return (
            "the wheel holds instructions this processor does not have, or AMX code that GCC 12 miscompiled",
            f"`{rebuild()}` puts one built for this machine in its place",
        )
    return _CAUSES.get(name, ("", _AGAIN))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
