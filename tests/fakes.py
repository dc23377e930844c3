"""Stand-ins for what is outside: a model that says what a test told it to."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from runtime.errors import EngineError, UserError, WorkerDiedError
from runtime.events import (
    Finished,
    Loaded,
    LoadEvent,
    LoadProgress,
    Piece,
    PromptProgress,
    ReplyEvent,
    Sampling,
    StopReason,
)
from runtime.messages import Message, Tool, ToolCall, ToolChoice

N_CTX = 1000


@dataclass(frozen=True)
class _Script:
    pieces: Sequence[str]
    holds: bool = False
    error: UserError | None = None
    context_used: int = 100
    events: Sequence[ReplyEvent] = ()
    calls: Sequence[ToolCall] = ()


@dataclass
class FakeEngine:
    """A `Talker` with a queue of answers. Like the real one it blocks, stops from any thread, and closes for good."""

    load_errors: list[UserError] = field(default_factory=list)
    """Raised by the next loads, one each."""
    holds_load: bool = False
    """Stay at half of the weights until `let_load` is called."""
    prompts: list[tuple[list[Message], Sampling]] = field(default_factory=list)
    """What was asked, one entry a reply."""
    offers: list[tuple[tuple[Tool, ...], ToolChoice]] = field(default_factory=list)
    """The tools, and the choice of them, of each reply."""
    load_events: list[LoadEvent] = field(default_factory=list)
    """Told by every load after half of the weights."""
    has_calls: bool = True
    """What is told of its answers."""
    n_loads: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        self._scripts: queue.SimpleQueue[_Script] = queue.SimpleQueue()
        self._may_load = threading.Event()
        self._cancelled = False
        self._stopped = threading.Event()

    def enqueue(
        self,
        pieces: Sequence[str],
        *,
        holds: bool = False,
        error: UserError | None = None,
        context_used: int = 100,
        events: Sequence[ReplyEvent] = (),
        calls: Sequence[ToolCall] = (),
    ) -> None:
        """Answer the next reply with `events`, `pieces` and `calls`; then fail with `error`.

        If it `holds`, it says no more until stopped.
        """
        self._scripts.put(_Script(pieces, holds, error, context_used, events, calls))

    def let_load(self) -> None:
        """Let a held load go on."""
        self._may_load.set()

    def load(self) -> Iterator[LoadEvent]:
        self.n_loads += 1
        yield LoadProgress(0.5)
        yield from self.load_events
        if self.holds_load:
            self._may_load.wait()
            self._may_load.clear()
        if self._cancelled:
            self._cancelled = False
            raise EngineError("loading was cancelled")
        if self.closed:
            raise WorkerDiedError("the engine was closed")
        if self.load_errors:
            raise self.load_errors.pop(0)
        yield LoadProgress(1.0)
        yield Loaded("fake", 1, 1, n_ctx=N_CTX, n_ctx_train=N_CTX, n_vocab=1, seconds=0.1, has_calls=self.has_calls)

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
    ) -> Iterator[ReplyEvent]:
        self._stopped.clear()
        self.prompts.append((list(messages), sampling))
        self.offers.append((tuple(tools), tool_choice))
        script = self._scripts.get_nowait()
        yield PromptProgress(7, 7, 3)
        yield from script.events
        for n_tokens, text in enumerate(script.pieces, start=1):
            yield Piece(text, n_tokens)
        if script.holds:
            self._stopped.wait()
        if self.closed:
            raise WorkerDiedError("the engine was closed")
        if script.error is not None:
            raise script.error
        reason: StopReason = "stopped" if script.holds else "calls" if script.calls else "end"
        yield Finished(
            reason, 7, 3, len(script.pieces), 0.1, 0.5, script.context_used, N_CTX, calls=tuple(script.calls)
        )

    def stop(self) -> None:
        self._stopped.set()
        if self.holds_load:
            self._cancelled = True
            self._may_load.set()

    def close(self) -> None:
        self.closed = True
        self._stopped.set()
        self._may_load.set()
