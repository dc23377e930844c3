"""The talker's blocking generators, run in threads; what they give is posted to a screen."""

from collections.abc import Sequence
from dataclasses import dataclass

from textual.message import Message as Posted
from textual.screen import Screen

from runtime.errors import UserError
from runtime.events import Finished, Loaded, LoadEvent, ReplyEvent, Sampling
from runtime.messages import Message
from tui.talker import Talker


@dataclass
class LoadNews(Posted):
    """The load came to `event`, or ended in an error."""

    event: LoadEvent | UserError


@dataclass
class ReplyNews(Posted):
    """The reply came to `event`, or ended in an error."""

    event: ReplyEvent | UserError


class TalkerThreads:
    """Posts `LoadNews` and `ReplyNews` to `screen`, which asks for one thing at a time."""

    def __init__(self, talker: Talker, screen: Screen[None]) -> None:
        self._talker = talker
        self._screen = screen
        self._stopping = False

    def load(self) -> None:
        """Load the model; the last news is `Loaded` or an error."""
        self._stopping = False
        self._screen.run_worker(self._load, thread=True)

    def reply(self, messages: Sequence[Message], sampling: Sampling) -> None:
        """Answer `messages`; the last news is `Finished` or an error."""
        self._stopping = False
        self._screen.run_worker(lambda: self._reply(messages, sampling), thread=True)

    def stop(self) -> None:
        """End the reply or the load early."""
        self._stopping = True
        self._talker.stop()

    def _load(self) -> None:
        try:
            for event in self._talker.load():
                if self._stopping and not isinstance(event, Loaded):
                    # A stop that came before the engine had started had no effect; one that hangs has to be told twice.
                    self._talker.stop()
                self._screen.post_message(LoadNews(event))
        except UserError as error:
            self._screen.post_message(LoadNews(error))

    def _reply(self, messages: Sequence[Message], sampling: Sampling) -> None:
        try:
            for event in self._talker.reply(messages, sampling):
                if self._stopping and not isinstance(event, Finished):
                    # A stop that came before the reply had begun had no effect.
                    self._talker.stop()
                self._screen.post_message(ReplyNews(event))
        except UserError as error:
            self._screen.post_message(ReplyNews(error))
