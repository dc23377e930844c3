"""Several engines side by side, each with the whole model: questions in, answers out as they come.

One engine answers one question at a time. Where each has a GPU of its own, as many are answered in the time of one.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from runtime.errors import EngineError, UserError, WorkerDiedError
from runtime.events import EngineSettings, Finished, Load, LoadEvent, Notice, Piece, ReplyEvent, Silent
from runtime.messages import Message, Tool
from runtime.session import Session

_PROBE_SECONDS = 60
_MOST_GIVEN_UP = 2
"""Questions in a row that an engine may die of, twice each, before it is thought to die of any."""
_MOST_LOADS = 3
_PAUSE_SECONDS = 5.0
"""Between loads: a `bise worker` that fell with the engine is started again meanwhile."""


@dataclass(frozen=True, slots=True)
class Question:
    """What one engine is to answer."""

    number: int
    """Joins question and answer."""
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of it: a text, or why there is none."""

    number: int
    text: str = ""
    finished: Finished | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Gone:
    """An engine takes no more questions: there are none, or it could not be started again."""

    why: str | None = None


class _Todo:
    """Questions for whichever engine is free. For any thread."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = deque(questions)
        self._n_taken = 0
        self._changed = threading.Condition()

    @property
    def is_left(self) -> bool:
        """Whether there are questions that nobody has taken."""
        return bool(self._questions)

    def take(self) -> Question | None:
        """The next one; None where no more will come. One that another engine has may yet be given back."""
        with self._changed:
            self._changed.wait_for(lambda: self._questions or not self._n_taken)
            if not self._questions:
                return None
            self._n_taken += 1
            return self._questions.popleft()

    def done(self) -> None:
        with self._changed:
            self._n_taken -= 1
            self._changed.notify_all()

    def give_back(self, question: Question) -> None:
        with self._changed:
            self._questions.appendleft(question)
            self._n_taken -= 1
            self._changed.notify_all()

    def clear(self) -> None:
        with self._changed:
            self._questions.clear()


Ask = Callable[[Session, Question], Iterator[ReplyEvent]]


def one_per_gpu(settings: EngineSettings) -> tuple[EngineSettings, ...]:
    """Settings of an engine for each RPC server and each GPU of this machine. Raises EngineError where there is none.

    Of a server with several devices the first is used: a client has a server for itself.
    """
    far = [replace(settings, rpc_servers=(server,), main_gpu=0) for server in settings.rpc_servers]
    here = [replace(settings, rpc_servers=(), main_gpu=gpu) for gpu in range(_n_gpus())]
    if not far and not here:
        raise EngineError("llama.cpp sees no GPU here, so --workers wants a number; `bise doctor` says why")
    return (*far, *here)


def side_by_side(settings: EngineSettings, n: int) -> tuple[EngineSettings, ...]:
    """Settings of `n` engines that share this machine's cores, if they need them: see `opening.n_threads`.

    Raises EngineError where they cannot share a device.
    """
    if settings.rpc_servers and n > 1:
        raise EngineError("an RPC server serves one engine at a time; take --workers per-gpu, for one on each")
    if n > 1 and settings.n_threads is None and not (settings.n_gpu_layers and _n_gpus()):
        settings = replace(settings, n_threads=max(1, len(os.sched_getaffinity(0)) // n))
    return (settings,) * n


class Pool:
    """Engines, loaded one after the other, each as its settings say. `close` it."""

    def __init__(
        self,
        loads: Sequence[Load],
        start: Callable[[Load], Session] = Session,
        *,
        pause_seconds: float = _PAUSE_SECONDS,
    ) -> None:
        self._sessions = tuple(start(load) for load in loads)
        self._pause_seconds = pause_seconds
        self._stopping = threading.Event()

    def load(self) -> Iterator[tuple[int, LoadEvent]]:
        """Load them: events with the number of the engine they are of. Raises UserError."""
        for i, session in enumerate(self._sessions):
            for event in session.load():
                yield i, event

    def answers(self, questions: Sequence[Question], ask: Ask) -> Generator[Answer | Notice, None, None]:
        """Have every question answered once, by `ask`, which is called in other threads.

        Answers come as they are done. An engine that dies is started again and asked once more; one that goes on
        dying, or cannot be started, takes no more questions. Leaving early drops what is being answered. Raises
        EngineError where no engine is left.
        """
        todo = _Todo(questions)
        told: queue.SimpleQueue[Answer | Notice | _Gone] = queue.SimpleQueue()
        threads = [threading.Thread(target=self._work, args=(each, ask, todo, told)) for each in self._sessions]
        for thread in threads:
            thread.start()
        n_left, why = len(threads), None
        try:
            while n_left:
                event = told.get()
                if isinstance(event, _Gone):
                    n_left, why = n_left - 1, event.why or why
                    if event.why is not None and n_left:
                        yield Notice(f"an engine takes no more questions: {why}")
                else:
                    yield event
            if todo.is_left:
                raise EngineError(f"no engine is left to answer: {why}")
        finally:
            self._stopping.set()
            todo.clear()
            while any(thread.is_alive() for thread in threads):
                for session in self._sessions:  # again and again: a question may just have been taken
                    session.stop()
                for thread in threads:
                    thread.join(0.1)

    def close(self) -> None:
        for session in self._sessions:
            session.close()

    def _work(
        self,
        session: Session,
        ask: Ask,
        todo: "_Todo",
        told: "queue.SimpleQueue[Answer | Notice | _Gone]",
    ) -> None:
        """One engine's thread."""
        n_given_up = 0
        while (question := todo.take()) is not None:
            try:
                answer, died = self._answer(session, ask, question, told.put)
            except UserError as error:  # it died, and cannot be started again
                todo.give_back(question)
                told.put(_Gone(str(error)))
                return
            if not self._stopping.is_set():
                told.put(answer)
            todo.done()
            n_given_up = n_given_up + 1 if died else 0
            if n_given_up == _MOST_GIVEN_UP:
                told.put(_Gone(f"it died of {n_given_up} questions in a row, twice of each: {answer.error}"))
                return
        told.put(_Gone())

    def _answer(
        self, session: Session, ask: Ask, question: Question, tell: Callable[[Notice], None]
    ) -> tuple[Answer, bool]:
        """The answer, and whether the engine died of the question, twice.

        Raises UserError where it died and cannot be started again.
        """
        for is_last in (False, True):
            text, finished = "", None
            try:
                for event in ask(session, question):
                    if isinstance(event, Piece):
                        text += event.text
                    elif isinstance(event, Finished):
                        finished = event
                    elif isinstance(event, Notice):
                        tell(event)
                    elif isinstance(event, Silent):
                        tell(Notice(f"no sign of an engine for {event.seconds:.0f} s; Ctrl-C ends it"))
            except WorkerDiedError as death:
                if self._stopping.is_set():
                    break
                tell(Notice(f"{death}; it is started again"))
                self._load_again(session)
                if is_last:
                    return Answer(question.number, error=str(death)), True
            except UserError as error:
                return Answer(question.number, error=str(error)), False
            else:
                return Answer(question.number, text, finished), False
        return Answer(question.number), False

    def _load_again(self, session: Session) -> None:
        """Load, and try again where that fails. Raises UserError."""
        for n_left in reversed(range(_MOST_LOADS)):
            try:
                for _ in session.load():
                    pass
                return
            except UserError:
                if not n_left or self._stopping.wait(self._pause_seconds):
                    raise


def _n_gpus() -> int:
    """GPUs of this machine, counted in a process of its own: a CUDA context would take memory of each."""
    command = [sys.executable, "-P", "-m", "runtime.selftest"]
    with contextlib.suppress(subprocess.SubprocessError, ValueError, KeyError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True).stdout
        return sum(device["kind"] == "gpu" for device in json.loads(said.splitlines()[0])["devices"])
    return 0
