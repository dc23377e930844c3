"""User → calls → results → answer: a model that may call tools, until it answers without.

The rounds are bounded: after the last the model
is asked once more and may not call, so that it says what it has.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from runtime.events import Finished, Piece, ReplyEvent
from runtime.messages import Message, Tool, ToolCall, ToolChoice
from runtime.tools import Approve, Result, Toolbox

MAX_ROUNDS = 10
"""Of calls, for one question."""

NOT_DONE = "the answer ended before this call was carried out"
"""What the model is told of a call that has no result."""


Ask = Callable[[Sequence[Message], Sequence[Tool], ToolChoice], Iterator[ReplyEvent]]
"""Has a model reply to a conversation, as `Session.reply` does."""


@dataclass(frozen=True, slots=True)
class Calling:
    """The model's calls of this round are now approved and carried out. Comes behind the `Finished` that has them."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class Called:
    """One of these calls was carried out, or not: its result. In the order in which they are done."""

    call: ToolCall
    result: Result


@dataclass(frozen=True, slots=True)
class Told:
    """The results of a round as messages, in the order of the calls; they follow the answer that made them."""

    messages: tuple[Message, ...]


LoopEvent = ReplyEvent | Calling | Called | Told


def loop(
    ask: Ask,
    messages: Sequence[Message],
    toolbox: Toolbox,
    approve: Approve | None,
    stopped: threading.Event,
    *,
    tool_choice: ToolChoice = "auto",
    max_rounds: int = MAX_ROUNDS,
) -> Generator[LoopEvent, None, None]:
    """Answer the conversation: events of one reply after the other, and of the calls between. Raises as `ask` does.

    `tool_choice` is for the first reply; later ones are free to call or to answer. An answer that was stopped or cut
    off ends it, and its calls get results that say so, since no format takes a call without one; so does `stopped`,
    which ends the calls at work too. Every `Finished` with calls is followed by `Told`.
    """
    told = list(messages)
    for n_rounds in range(max_rounds + 1):
        choice: ToolChoice = "none" if n_rounds == max_rounds else tool_choice if not n_rounds else "auto"
        text, finished = "", None
        with closing(_generator(ask(told, toolbox.tools, choice))) as reply:
            for event in reply:
                if isinstance(event, Piece):
                    text += event.text
                elif isinstance(event, Finished):
                    finished = event
                yield event
        if finished is None or not finished.calls:
            return
        calls = finished.calls
        told.append(Message("assistant", text, calls))
        if finished.reason != "calls" or stopped.is_set():
            yield Told(tuple(Message("tool", call.error or NOT_DONE, call_id=call.id) for call in calls))
            return
        yield Calling(calls)
        results: dict[int, Result] = {}
        with closing(toolbox.run(calls, approve, stopped)) as running:
            for i, result in running:
                results[i] = result
                yield Called(calls[i], result)
        answers = tuple(Message("tool", results[i].text, call_id=call.id) for i, call in enumerate(calls))
        told.extend(answers)
        yield Told(answers)
        if stopped.is_set():
            return


def _generator(events: Iterator[ReplyEvent]) -> Generator[ReplyEvent, None, None]:
    """Whatever gives events, as something that can be closed."""
    try:
        yield from events
    finally:
        if isinstance(events, Generator):
            events.close()
