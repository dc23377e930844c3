"""A verb whose native code may end the process, in a child: such an end becomes one line and exit code 1.

llama.cpp ends the process on some errors, so chats have their engine in a process of its own (worker.py). Verbs that
measure compute too much with what the engine shows for that, and run whole in a child that has the same terminal. What
native code writes to stderr goes to a log; what Python writes stays on the terminal.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable

from runtime.ending import die_first, end_with
from runtime.engine_log import EngineLog
from runtime.memory_watch import OomKills
from runtime.obituary import Death, obituary

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN = "the same command goes on where it stopped"


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`, which is called in a child; 1, and a line on stderr, where that is ended by a signal.

    To be called before there are threads. Ctrl-C is the child's to handle. A parent that is asked to end ends as it
    would have ended itself.
    """
    log, owner = EngineLog(), os.getpid()
    watched = {*_FORWARDED, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        end_with(owner)
        die_first()
        _log_native(log)
        return run()
    oom_kills = OomKills.seen_by(child)
    code, asked = _wait(child, watched)
    if code >= 0:
        log.close(keep=False)
        return code
    if -code == asked:
        log.close(keep=False)
        signal.signal(asked, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.kill(owner, asked)
    death = Death(code, log.tail(), oom_kills.verdict(), log.path, again=_AGAIN)
    log.close(keep=True)
    sys.stderr.write(f"{_line_end()}bise: {obituary(death, 'the process that computes')}\n")
    return 1


def _wait(child: int, watched: set[signal.Signals]) -> tuple[int, int]:
    """How the child ended, as subprocess has it, and the last signal that asked it to; 0 for none."""
    asked = 0
    while True:
        told = signal.sigwaitinfo(watched)
        if told.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), asked
            continue
        asked = told.si_signo
        if told.si_code <= 0:  # sent by a program; what comes from the terminal the child has got itself
            os.kill(child, asked)


def _log_native(log: EngineLog) -> None:
    """Lead what is written to descriptor 2 to the log, and Python's own stderr on to where it went."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # on a failed assertion ggml would start gdb
    terminal = os.dup(2)
    os.dup2(log.descriptor, 2)
    sys.stderr = open(terminal, "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)  # noqa: SIM115
    faulthandler.enable(file=2)


def _line_end() -> str:
    """A progress line that was cut short is cleared."""
    return "\r\x1b[K" if sys.stderr.isatty() else ""
