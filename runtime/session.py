"""A model in use: load it, ask it, stop it, start it again after it died.

The chat, `bise ask` and tests share this one way to a model. `load` and `reply` are blocking generators of events for
one thread at a time; `stop` and `close` may be called from any thread. The conversation itself belongs to the caller:
every reply gets all its messages, and the worker's engine keeps the prefix it has already read.

An engine that dies of an instruction or a fault before it has ever answered is started once more without weight
repacking: that is how the AMX code dies that GCC 12 miscompiles, at the latest at the first prompt.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

from runtime.errors import EngineError, WorkerDiedError
from runtime.events import (
    CallPiece,
    Event,
    Failed,
    Finished,
    Load,
    Loaded,
    LoadEvent,
    LoadProgress,
    Notice,
    Piece,
    PromptProgress,
    Reply,
    ReplyEvent,
    Sampling,
    Silent,
    Stop,
)
from runtime.grammar import Grammar
from runtime.messages import Message, Tool, ToolChoice
from runtime.obituary import rebuild
from runtime.worker import Worker

_MISCOMPILED = (signal.SIGILL, signal.SIGSEGV)


class Session:
    """One model, to be loaded as `load` says, in processes that `start` gives."""

    def __init__(self, load: Load, start: Callable[[], Worker] = Worker) -> None:
        self._load, self._start_worker = load, start
        self._worker: Worker | None = None
        self._closed = False
        self._changing = threading.Lock()
        self._repacks = load.settings.use_extra_bufts
        self._proven = False  # the engine has computed something, and lived

    def load(self) -> Iterator[LoadEvent]:
        """Start the engine's process, if need be, and load the model: `LoadProgress`…, `Loaded`. Raises UserError.

        A caller that leaves early cancels the load.
        """
        self._repacks, self._proven = self._load.settings.use_extra_bufts, False
        try:
            yield from self._loading()
        except WorkerDiedError as death:
            if not self._may_retry(death):
                raise
            yield self._retry(death)
            yield from self._loading()

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
    ) -> Iterator[ReplyEvent]:
        """Answer the conversation: `PromptProgress`…, `Piece` and `CallPiece`…, `Finished`. Raises UserError.

        `logprobs`: pieces carry their tokens' log-probabilities, and of as many likeliest ones. The answer keeps to
        `grammar`.
        A caller that leaves early stops the answer; the next reply starts clean.
        """
        reply = Reply(tuple(messages), sampling, logprobs, grammar, tuple(tools), tool_choice)
        try:
            yield from self._replying(reply)
        except WorkerDiedError as death:
            if not self._may_retry(death):
                raise
            yield self._retry(death)
            try:
                with contextlib.closing(self._loading()) as loading:
                    for event in loading:
                        if isinstance(event, Notice | Silent):
                            yield event
            except EngineError as error:  # or cancelled: either way there is no model now
                raise WorkerDiedError(str(error)) from None
            yield from self._replying(reply)

    def stop(self) -> None:
        """End the reply or the load in progress. Returns at once; nothing happens where nothing is in progress.

        A process that gives no sign of life would not hear of it, and is ended.
        """
        worker = self._worker
        if worker is not None:
            _stop(worker)

    def close(self) -> None:
        """End the engine's process. The session cannot be used again."""
        with self._changing:
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _loading(self) -> Generator[LoadEvent, None, None]:
        settings = replace(self._load.settings, use_extra_bufts=self._repacks)
        with contextlib.closing(self._events(self._start(), replace(self._load, settings=settings))) as events:
            for event in events:
                assert isinstance(event, LoadProgress | Notice | Silent | Loaded), event
                yield event

    def _replying(self, reply: Reply) -> Generator[ReplyEvent, None, None]:
        worker = self._worker
        if worker is None:
            raise EngineError("no model is loaded")
        with contextlib.closing(self._events(worker, reply)) as events:
            for event in events:
                assert isinstance(event, PromptProgress | Piece | CallPiece | Notice | Silent | Finished), event
                if isinstance(event, Piece | CallPiece) or (
                    isinstance(event, PromptProgress) and event.done > event.reused
                ):
                    self._prove()
                yield event

    def _prove(self) -> None:
        """Remember that the engine computes well with the settings it has, also for later loads."""
        if not self._proven:
            self._proven = True
            settings = replace(self._load.settings, use_extra_bufts=self._repacks)
            self._load = replace(self._load, settings=settings)

    def _may_retry(self, death: WorkerDiedError) -> bool:
        return death.signal in _MISCOMPILED and self._repacks and not self._proven

    def _retry(self, death: WorkerDiedError) -> Notice:
        self._repacks = False
        name = signal.Signals(death.signal or 0).name
        return Notice(
            f"the engine's process ended by {name} and is started again without weight repacking, which is slower; if "
            f"that helps, the wheel does not suit this processor: `{rebuild()}` builds one that does"
        )

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
                    _stop(worker)
                while not done:
                    event = worker.receive()
                    done = isinstance(event, Loaded | Finished | Failed)
                    if isinstance(event, Silent):
                        _stop(worker)

    def _start(self) -> Worker:
        with self._changing:
            if self._closed:
                raise EngineError("the session is closed")
            if self._worker is not None and not self._worker.is_alive():
                self._worker.close()
                self._worker = None
            if self._worker is None:
                self._worker = self._start_worker()
            return self._worker


def _stop(worker: Worker) -> None:
    """Have a worker end what it does, by force if it cannot hear."""
    if worker.is_silent():
        worker.end("gave no sign of life")
        return
    with contextlib.suppress(WorkerDiedError):  # whoever waits for its events hears of the death
        worker.send(Stop())
