"""A model in use: load it, ask it, stop it, start it again after it died.

The chat, `bise ask` and tests share this one way to a model. `load` and `reply` are blocking generators of events for
one thread at a time; `stop` and `close` may be called from any thread. The conversation itself belongs to the caller:
every reply gets all its messages, and the worker's engine keeps the prefix it has already read.
"""

import contextlib
import threading
from collections.abc import Generator, Iterator, Sequence

from runtime.errors import EngineError, WorkerDiedError
from runtime.events import (
    Event,
    Failed,
    Finished,
    Load,
    Loaded,
    LoadEvent,
    LoadProgress,
    Message,
    Piece,
    PromptProgress,
    Reply,
    ReplyEvent,
    Sampling,
    Stop,
)
from runtime.worker import Worker


class Session:
    """One model, to be loaded as `load` says."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._worker: Worker | None = None
        self._closed = False
        self._changing = threading.Lock()

    def load(self) -> Iterator[LoadEvent]:
        """Start the engine's process, if need be, and load the model: `LoadProgress`…, `Loaded`. Raises UserError.

        A caller that leaves early cancels the load.
        """
        with contextlib.closing(self._events(self._start(), self._load)) as events:
            for event in events:
                assert isinstance(event, LoadProgress | Loaded), event
                yield event

    def reply(
        self, messages: Sequence[Message], sampling: Sampling, *, logprobs: int | None = None
    ) -> Iterator[ReplyEvent]:
        """Answer the conversation: `PromptProgress`…, `Piece`…, `Finished`. Raises UserError.

        `logprobs`: pieces carry their tokens' log-probabilities, and of as many likeliest ones.
        A caller that leaves early stops the answer; the next reply starts clean.
        """
        worker = self._worker
        if worker is None:
            raise EngineError("no model is loaded")
        with contextlib.closing(self._events(worker, Reply(tuple(messages), sampling, logprobs))) as events:
            for event in events:
                assert isinstance(event, PromptProgress | Piece | Finished), event
                yield event

    def stop(self) -> None:
        """End the reply or the load in progress. Returns at once; nothing happens where nothing is in progress."""
        worker = self._worker
        if worker is not None:
            with contextlib.suppress(WorkerDiedError):  # whoever waits for its events hears of the death
                worker.send(Stop())

    def close(self) -> None:
        """End the engine's process. The session cannot be used again."""
        with self._changing:
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _events(self, worker: Worker, command: Load | Reply) -> Generator[Event, None, None]:
        """What the worker says to a command. Leaving early stops it, and none of its events are left for the next."""
        worker.send(command)
        done = False
        try:
            while not done:
                event = worker.receive()
                done = isinstance(event, Loaded | Finished | Failed)
                if isinstance(event, Failed):
                    raise EngineError(event.message)
                yield event
        finally:
            with contextlib.suppress(WorkerDiedError):  # told where it was found, or by the next command
                if not done:
                    worker.send(Stop())
                while not done:
                    done = isinstance(worker.receive(), Loaded | Finished | Failed)

    def _start(self) -> Worker:
        with self._changing:
            if self._closed:
                raise EngineError("the session is closed")
            if self._worker is not None and not self._worker.is_alive():
                self._worker.close()
                self._worker = None
            if self._worker is None:
                self._worker = Worker()
            return self._worker
