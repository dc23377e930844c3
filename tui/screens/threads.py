"""The talker's blocking generators, run in threads; what they give is posted to a screen."""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from textual.message import Message as Posted
from textual.screen import Screen

from runtime.errors import UserError
from runtime.events import Finished, Loaded, LoadEvent, Notice, ReplyEvent, Sampling
from runtime.messages import Message, Tool, ToolCall, ToolChoice
from runtime.tool_loop import LoopEvent, loop
from runtime.tools import Approval, Toolbox
from tui.talker import Talker

_POLL_SECONDS = 0.1

_NO_CALLS = "this model's prompt format has no calls of tools that Bise can read, so it answers without tools"


@dataclass
class LoadNews(Posted):
    """The load came to `event`, or ended in an error."""

    event: LoadEvent | UserError


@dataclass
class ReplyNews(Posted):
    """The reply came to `event`, or ended in an error."""

    event: LoopEvent | UserError


@dataclass
class ReplyEnded(Posted):
    """Nothing more of the reply will come."""


@dataclass
class ApprovalWanted(Posted):
    """A call waits for an `Approval` in `answer`."""

    call: ToolCall
    answer: "queue.SimpleQueue[Approval]"


class TalkerThreads:
    """Posts `LoadNews` and `ReplyNews` to `screen`, which asks for one thing at a time."""

    def __init__(self, talker: Talker, screen: Screen[None], toolbox: Toolbox | None, max_rounds: int) -> None:
        self._talker = talker
        self._screen = screen
        self._toolbox, self._max_rounds = toolbox, max_rounds
        self._has_calls = True
        self._stopped = threading.Event()

    def load(self) -> None:
        """Load the model; the last news is `Loaded` or an error."""
        self._stopped.clear()
        self._screen.run_worker(self._load, thread=True)

    def reply(self, messages: Sequence[Message], sampling: Sampling) -> None:
        """Answer `messages`, by way of tools; the last news is `ReplyEnded`."""
        self._stopped.clear()
        self._screen.run_worker(lambda: self._reply(messages, sampling), thread=True)

    def stop(self) -> None:
        """End the reply or the load early."""
        self._stopped.set()
        self._talker.stop()

    def _load(self) -> None:
        try:
            for event in self._talker.load():
                if self._stopped.is_set() and not isinstance(event, Loaded):
                    # A stop that came before the engine had started had no effect; one that hangs has to be told twice.
                    self._talker.stop()
                if isinstance(event, Loaded):
                    self._has_calls = event.has_calls
                    if self._toolbox is not None and not event.has_calls:
                        self._screen.post_message(LoadNews(Notice(_NO_CALLS)))
                self._screen.post_message(LoadNews(event))
        except UserError as error:
            self._screen.post_message(LoadNews(error))

    def _reply(self, messages: Sequence[Message], sampling: Sampling) -> None:
        try:
            for event in self._events(messages, sampling):
                if self._stopped.is_set() and not isinstance(event, Finished):
                    # A stop that came before the reply had begun had no effect.
                    self._talker.stop()
                self._screen.post_message(ReplyNews(event))
        except UserError as error:
            self._screen.post_message(ReplyNews(error))
        self._screen.post_message(ReplyEnded())

    def _events(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[LoopEvent]:
        if self._toolbox is None or not self._has_calls:
            return self._talker.reply(messages, sampling)

        def ask(told: Sequence[Message], tools: Sequence[Tool], choice: ToolChoice) -> Iterator[ReplyEvent]:
            return self._talker.reply(told, sampling, tools=tools, tool_choice=choice)

        return loop(ask, messages, self._toolbox, self._approve, self._stopped, max_rounds=self._max_rounds)

    def _approve(self, call: ToolCall) -> Approval:
        """Have the screen ask, and wait for the answer; no where the reply is stopped meanwhile."""
        answer: queue.SimpleQueue[Approval] = queue.SimpleQueue()
        self._screen.post_message(ApprovalWanted(call, answer))
        while not self._stopped.is_set():
            try:
                return answer.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        return "no"
