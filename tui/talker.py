"""What the chat needs of a model: the one boundary between the screens and inference.

`runtime.session.Session` is one such talker, the `FakeEngine` of the tests another. The generators block, so the chat
runs them in threads; it never runs two at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.events import LoadEvent, ReplyEvent, Sampling
from runtime.messages import Message, Tool, ToolChoice
from runtime.tool_loop import NOT_DONE
from tui.history import Turn


@dataclass(frozen=True, slots=True)
class Speaker:
    """The model that answers, as people and the history name it."""

    title: str
    model: str
    """Its key, saved with each answer."""
    level: str | None = None


class Talker(Protocol):
    """Loads a model and answers conversations."""

    def load(self) -> Iterator[LoadEvent]:
        """Load the model: `LoadProgress`…, then `Loaded`; a `Notice` or `Silent` may come before.

        Called again after the engine died, starts a new one.

        Raises `UserError`; no model is loaded then.
        """
        ...

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
    ) -> Iterator[ReplyEvent]:
        """Answer the last message: `PromptProgress`…, `Piece` and `CallPiece`…, then `Finished`.

        `Notice` and `Silent` as in `load`.

        Raises `UserError`. After a `WorkerDiedError` the model must be loaded again, after others it need not.
        """
        ...

    def stop(self) -> None:
        """End the reply in progress, which then ends with `Finished("stopped")`, or the load, with an error.

        Returns at once; for any thread.
        """
        ...

    def close(self) -> None:
        """End the engine and whatever generator is in progress. For any thread, any number of times."""
        ...


def messages_for(system: str | None, turns: Iterable[Turn]) -> list[Message]:
    """What is said to the talker: the system prompt, if any, then users and answers in alternation.

    An answer that was stopped before its first word leaves two messages of the user's in a row. Most chat templates
    refuse that, so they become one, with an empty line between. Calls are followed by their results.
    """
    messages = [Message("system", system)] if system else []
    for turn in turns:
        before = messages[-1] if messages else None
        if before is not None and before.role == turn.role:
            text = f"{before.content}\n\n{turn.content}"
            messages[-1] = Message(turn.role, text, tuple(each.call for each in turn.calls))
        else:
            messages.append(Message(turn.role, turn.content, tuple(each.call for each in turn.calls)))
        for each in turn.calls:
            result = each.result.text if each.result is not None else NOT_DONE
            messages.append(Message("tool", result, call_id=each.call.id))
    return messages
