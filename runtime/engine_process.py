"""What the engine's process runs: commands in, events out, over a socket its owner holds the other end of.

Started by worker.py as `python -m runtime.engine_process DESCRIPTOR OWNER`. It never outlives its owner: the kernel
kills it when the owner's process ends, stopped or hanging as it may be, and the end of the socket tells it so too. All
it and llama.cpp write goes to its stderr, which is a log file.
"""

import contextlib
import faulthandler
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from runtime.ending import die_first, end_with
from runtime.engine_log import NativeLines
from runtime.errors import EngineError, UserError
from runtime.events import Command, Event, Failed, Heartbeat, Load, Quit, Reply, Stop

HEARTBEAT_SECONDS = 1.0


class _Outbox:
    """Events, sent whole from any thread; while work is done, a sign of life every second."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._working = threading.Event()
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def send(self, event: Event) -> None:
        with self._sending:
            self._connection.send(event)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self._working.set()
        try:
            yield
        finally:
            self._working.clear()

    def _beat(self) -> None:
        pause = threading.Event()
        with contextlib.suppress(OSError):  # the owner is gone
            while True:
                self._working.wait()
                self.send(Heartbeat())
                pause.wait(HEARTBEAT_SECONDS)


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


def main(descriptor: int, owner: int) -> None:
    """Carry out the commands that arrive on a socket until it says quit or closes. `owner` is the parent process."""
    end_with(owner)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the owner decides what it means
    faulthandler.enable()
    die_first()
    connection = Connection(descriptor)
    outbox, inbox = _Outbox(connection), _Inbox(connection)
    with outbox.at_work():
        from runtime.answering import Answerer  # loads the shared libraries
        from runtime.native import LOG

    LOG.listener = NativeLines().write

    answerer: Answerer | None = None
    for command in inbox:
        try:
            with outbox.at_work():
                if isinstance(command, Load):
                    if answerer is not None:
                        inbox.hand_stops_to(None)
                        answerer.close()
                        answerer = None
                    answerer = Answerer.load(command, outbox.send, inbox.stopped.is_set)
                    inbox.hand_stops_to(answerer.stop)
                elif answerer is None:
                    raise EngineError("no model is loaded")
                else:
                    answerer.reply(command, outbox.send)
        except UserError as error:
            outbox.send(Failed(str(error)))
        except MemoryError:
            if not isinstance(command, Load):  # what the KV cache holds is not certain any more
                raise
            outbox.send(Failed(f"{command.path.name}: not enough memory to load it; `bise plan` says which level fits"))
    if answerer is not None:
        inbox.hand_stops_to(None)
        answerer.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
