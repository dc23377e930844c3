"""An engine in a process of its own: `Worker` is its owner's handle, `main` what the process runs.

llama.cpp ends the process on some errors (failed assertions, most CUDA errors), so the engine never lives in the
process that holds the screen and the conversation. Commands and events (events.py) are pickled over a socket pair that
no other process can open. When the process dies, `receive` raises `WorkerDiedError` with the signal and its last words;
the handle can then be started again.
"""

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import IO

from runtime.errors import EngineError, UserError, WorkerDiedError
from runtime.events import Command, Event, Failed, Load, Quit, Reply, Stop

_QUIT_SECONDS = 3.0
_LAST_WORDS_BYTES = 4096

_ABORT = re.compile(r"^\S*\.(?:c|cpp|cu|h):\d+: ")  # ggml_abort's prefix: the source file and line

_LOGGED = "llama.cpp: "  # in front of the error lines of llama.cpp's log, in the process's stderr

_CAUSES = {
    signal.SIGKILL: "killed from outside, or the machine ran out of memory",
    signal.SIGILL: "the wheel holds instructions this CPU does not have, or was built without Bise's flags",
    signal.SIGABRT: "llama.cpp gave up",
    signal.SIGSEGV: "a fault inside llama.cpp",
}


class Worker:
    """A process that runs `main`. `send` may be called from any thread, `receive` from one at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        with theirs:
            # -P: a folder called `runtime` in the user's working directory must not be imported instead of ours.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "runtime.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # on a failed assertion ggml would start gdb
            )
        self._connection = Connection(ours.detach())
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._closing = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Hand over a command. Raises WorkerDiedError if the process has ended."""
        with self._sending, self._whole_messages():
            self._connection.send(command)

    def receive(self) -> Event:
        """Wait for the next event. Raises WorkerDiedError. A KeyboardInterrupt meanwhile ends the process."""
        with self._receiving, self._whole_messages():
            event: Event = self._connection.recv()
        return event

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the process: politely, then by force. A `receive` in another thread raises WorkerDiedError."""
        self._closing = True
        with contextlib.suppress(WorkerDiedError):
            self.send(Quit())
        try:
            self._process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._sending, self._receiving:  # who waited on the other side has seen the end by now
            self._connection.close()
            self._stderr.close()

    @contextlib.contextmanager
    def _whole_messages(self) -> Iterator[None]:
        """Give up the process where a message breaks off: what follows could not be told from its rest."""
        try:
            yield
        except (EOFError, OSError):
            raise self._death() from None
        except BaseException:  # KeyboardInterrupt, which Python raises between any two reads of one message
            self._process.kill()
            raise

    def _death(self) -> WorkerDiedError:
        try:
            code = self._process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its socket but lives: nothing more can come from it
            self._process.kill()
            code = self._process.wait()
        if self._closing:
            return WorkerDiedError("the engine was closed")
        if code < 0:
            name = signal.Signals(-code).name
            cause = f"ended by {name}"
            if reason := _CAUSES.get(signal.Signals(-code)):
                cause += f" ({reason})"
        else:
            cause = f"ended with exit code {code}"
        words = last_words(self._said())
        return WorkerDiedError(
            f"the engine's process {cause}{f': {words}' if words else ''}; it can be started again, "
            "and `bise doctor` tests the engine"
        )

    def _said(self) -> str:
        """The end of what the process wrote to its stderr."""
        descriptor = self._stderr.fileno()
        start = max(0, os.fstat(descriptor).st_size - _LAST_WORDS_BYTES)
        return os.pread(descriptor, _LAST_WORDS_BYTES, start).decode("utf-8", "replace")


def last_words(stderr: str) -> str:
    """Why a process ended, in one line: llama.cpp's failed assertion, else the last line, such as a traceback's end.

    Where llama.cpp gives up on a device, the assertion says `CUDA error` alone; the cause stands in the log before it.
    Other lines of the log are of errors the process survived.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if _ABORT.match(line):
            words = _ABORT.sub("", line)
            logged = (other.removeprefix(_LOGGED) for other in reversed(lines[:i]) if other.startswith(_LOGGED + words))
            return next(logged, words)
    return next((line for line in reversed(lines) if not line.startswith(_LOGGED)), "")


class _Inbox:
    """Commands as they arrive, read by a thread of their own so that a stop is heard during a decode."""

    def __init__(self, connection: Connection) -> None:
        self.stopped = threading.Event()
        """Set by the last command if it was a stop or a quit."""
        self._connection = connection
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._marking = threading.Lock()
        self._on_stop: Callable[[bool], None] | None = None
        threading.Thread(target=self._listen, name="commands", daemon=True).start()

    def hand_stops_to(self, on_stop: Callable[[bool], None] | None) -> None:
        """Also call `on_stop(True)` for a stop, `on_stop(False)` for any other command, from the listening thread."""
        with self._marking:
            self._on_stop = on_stop
            if on_stop is not None:
                on_stop(self.stopped.is_set())

    def __iter__(self) -> Iterator[Load | Reply]:
        while not isinstance(command := self._commands.get(), Quit):
            assert not isinstance(command, Stop)
            yield command

    def _listen(self) -> None:
        while True:
            try:
                command: Command = self._connection.recv()
            except (EOFError, OSError):  # the owner is gone, perhaps killed: nothing is left to do
                os._exit(0)
            self._mark(isinstance(command, Stop | Quit))
            if not isinstance(command, Stop):
                self._commands.put(command)

    def _mark(self, stopped: bool) -> None:
        """Here, and not where commands are carried out: a stop sent right behind a reply must reach that reply."""
        with self._marking:
            if stopped:
                self.stopped.set()
            else:
                self.stopped.clear()
            if self._on_stop is not None:
                self._on_stop(stopped)


def main(descriptor: int) -> None:
    """Carry out the commands that arrive on a socket until it says quit or closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the owner decides what it means
    connection = Connection(descriptor)
    inbox = _Inbox(connection)
    from runtime.answering import Answerer  # loads the shared libraries
    from runtime.native import LOG

    LOG.on_error = lambda line: print(_LOGGED + line, file=sys.stderr)  # noqa: T201 - to be its last words

    answerer: Answerer | None = None
    for command in inbox:
        try:
            if isinstance(command, Load):
                if answerer is not None:
                    inbox.hand_stops_to(None)
                    answerer.close()
                    answerer = None
                answerer = Answerer.load(command, connection.send, inbox.stopped.is_set)
                inbox.hand_stops_to(answerer.stop)
            elif answerer is None:
                raise EngineError("no model is loaded")
            else:
                answerer.reply(command, connection.send)
        except UserError as error:
            connection.send(Failed(str(error)))
    if answerer is not None:
        inbox.hand_stops_to(None)
        answerer.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
