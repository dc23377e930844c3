"""An engine in a process of its own: its owner's handle.

llama.cpp ends the process on some errors (failed assertions, most CUDA errors), so the engine never lives in the
process that holds the screen and the conversation. Commands and events (events.py) are pickled over a socket pair that
no other process can open. When the process dies, `receive` raises `WorkerDiedError` with the cause in one line; a new
one can then be started. No process is left behind: it ends with its owner (engine_process.py), and is waited for.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from time import monotonic

from runtime.engine_log import EngineLog
from runtime.errors import WorkerDiedError
from runtime.events import Command, Event, Heartbeat, Load, Quit, Silent
from runtime.memory_watch import OomKills
from runtime.obituary import Death, obituary
from runtime.rpc_address import unanswered

# -P: a folder called `runtime` in the user's working directory must not be imported instead of ours.
COMMAND = (sys.executable, "-P", "-m", "runtime.engine_process")

SILENT_SECONDS = 10.0
"""Ten heartbeats: a machine that is merely busy does not miss as many."""

_QUIT_SECONDS = 3.0
_POLL_SECONDS = 0.5

_Started = subprocess.Popen[bytes] | OSError
_Jobs = queue.SimpleQueue[tuple[list[str], int, int, queue.SimpleQueue[_Started]]]


class Worker:
    """A process that runs engine_process.py. `send` and `end` are for any thread, `receive` for one at a time."""

    def __init__(self, command: Sequence[str] = COMMAND, *, silent_seconds: float = SILENT_SECONDS) -> None:
        """`command` gets the number of its socket and the owner's process id as further arguments."""
        self._silent_seconds = silent_seconds
        self._log = EngineLog()
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [*command, str(theirs.fileno()), str(os.getpid())]
            self._process = _SPAWNER.start(arguments, theirs.fileno(), self._log.descriptor)
        self._connection = Connection(ours.detach())
        self._outbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._writer = threading.Thread(
            target=_write, args=(self._connection, self._outbox), name="to the engine", daemon=True
        )
        self._writer.start()
        weakref.finalize(self, self._outbox.put, None)  # dropped unclosed, it lets go of the socket: the process ends
        self._oom_kills = OomKills.seen_by(self.pid)
        self._rpc_servers: tuple[str, ...] = ()
        self._receiving = threading.Lock()
        self._last_sign = monotonic()
        self._silent = False
        self._ended_for: str | None = None
        self._closed = False
        self._death: WorkerDiedError | None = None
        self._dying = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Hand over a command, at once, also where the process is too busy to read. Raises WorkerDiedError."""
        if not self.is_alive():
            raise self._died()
        self._oom_kills = OomKills.seen_by(self.pid)
        if isinstance(command, Load):
            self._rpc_servers = command.settings.rpc_servers
        self._outbox.put(command)

    def receive(self) -> Event:
        """Wait for the next event; `Silent` now and then where none can be expected. Raises WorkerDiedError.

        A KeyboardInterrupt while it waits leaves everything as it was; within a message it ends the process.
        """
        with self._receiving:
            while True:
                if (silent := self._wait()) is not None:
                    return silent
                event = self._next()
                self._last_sign, self._silent = monotonic(), False
                if not isinstance(event, Heartbeat):
                    return event

    def is_silent(self) -> bool:
        """Whether `receive` has heard nothing for so long that the process must be thought to hang."""
        return self._silent

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self, reason: str) -> None:
        """End the process by force; `receive` then says that it "`reason` and was ended"."""
        self._ended_for = self._ended_for or reason
        self._process.kill()

    def close(self) -> None:
        """End the process: politely, then by force. A `receive` in another thread raises WorkerDiedError."""
        if self._closed:
            return
        alive = self.is_alive()
        if alive:
            self._ended_for = ""
            self._outbox.put(Quit())
            try:
                self._process.wait(0 if self._silent else _QUIT_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._outbox.put(None)
        self._writer.join()
        with self._receiving, self._dying:  # who waited has seen the end by now
            self._closed = True
            self._connection.close()
            self._log.close(keep=not alive and self._ended_for is None)

    def _wait(self) -> Silent | None:
        """Wait for something to read; the process's silence where that lasts too long."""
        waited = 0.0
        while True:
            began = monotonic()
            with self._telling_deaths():
                if self._connection.poll(_POLL_SECONDS):
                    return None
            if monotonic() - began < 4 * _POLL_SECONDS:  # else this process was stopped itself, perhaps both were
                waited += _POLL_SECONDS
            if waited >= self._silent_seconds:
                self._silent = True
                return Silent(monotonic() - self._last_sign)

    def _next(self) -> Event:
        try:
            with self._telling_deaths():
                event: Event = self._connection.recv()
        except WorkerDiedError:
            raise
        except BaseException:  # KeyboardInterrupt, which Python raises between any two reads of one message
            self.end("was interrupted")
            raise
        return event

    @contextlib.contextmanager
    def _telling_deaths(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            raise self._died() from None

    def _died(self) -> WorkerDiedError:
        """The end of the process as an error, the same each time it is asked for."""
        with self._dying:
            if self._death is None:
                self._death = self._find_death()
            return WorkerDiedError(str(self._death), self._death.signal)

    def _find_death(self) -> WorkerDiedError:
        if self._closed or self._ended_for == "":
            return WorkerDiedError("the engine was closed")
        try:
            code = self._process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its socket but lives: nothing more can come from it
            self._process.kill()
            code = self._process.wait()
        if self._ended_for == "":
            return WorkerDiedError("the engine was closed")
        if self._ended_for is not None:
            return WorkerDiedError(f"the engine's process {self._ended_for} and was ended; it can be started again")
        gone = unanswered(self._rpc_servers) if code == -signal.SIGABRT else ()
        death = Death(code, self._log.tail(), self._oom_kills.verdict(), self._log.path, gone)
        return WorkerDiedError(obituary(death), -code if code < 0 else None)


def _write(connection: Connection, outbox: "queue.SimpleQueue[Command | None]") -> None:
    """The writing thread: a command to a process that does not read would block."""
    with contextlib.suppress(OSError):
        while (command := outbox.get()) is not None:
            connection.send(command)


class _Spawner:
    """Starts processes from one thread that never ends, and waits for their ends.

    The kernel's death signal (engine_process.py) comes when the *thread* that started a process ends, and the threads
    that ask for workers come and go.
    """

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._owner: int | None = None
        self._jobs: _Jobs

    def start(self, arguments: list[str], descriptor: int, log: int) -> "subprocess.Popen[bytes]":
        """A process that holds `descriptor` and writes to `log`. Raises OSError."""
        with self._starting:
            if self._owner != os.getpid():  # the first, or after a fork, which copies no threads
                self._owner, self._jobs = os.getpid(), queue.SimpleQueue()
                threading.Thread(target=self._run, args=(self._jobs,), name="spawner", daemon=True).start()
        started: queue.SimpleQueue[_Started] = queue.SimpleQueue()
        self._jobs.put((arguments, descriptor, log, started))
        process = started.get()
        if isinstance(process, OSError):
            raise process
        return process

    @staticmethod
    def _run(jobs: _Jobs) -> None:
        while True:
            arguments, descriptor, log, started = jobs.get()
            try:
                process = subprocess.Popen(
                    arguments,
                    pass_fds=[descriptor],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # on a failed assertion ggml would start gdb
                )
            except OSError as error:
                started.put(error)
                continue
            threading.Thread(target=_reap, args=(process,), name="reaper", daemon=True).start()
            started.put(process)


_SPAWNER = _Spawner()


def _reap(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a process's end, so that it is no zombie until somebody asks after it."""
    with contextlib.suppress(ChildProcessError):  # somebody did
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.wait()
