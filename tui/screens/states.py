"""What a talker is doing, and the words the chat has for it."""

from enum import Enum

from runtime.events import LoadProgress, PromptProgress
from tui.units import duration, gigabytes

CALLING = "calling tools"
RELOAD = "F5 loads the model again"


class State(Enum):
    """What the talker is doing, in the word the title line shows."""

    LOADING = "loading"
    READY = "ready"
    ANSWERING = "answering"
    STOPPING = "stopping"
    DOWN = "not loaded"


NOT_NOW = {
    State.LOADING: "The model is still loading.",
    State.ANSWERING: "Escape stops the answer first.",
    State.STOPPING: "It is being stopped.",
    State.DOWN: f"{RELOAD}.",
}
"""Why a message cannot be sent."""


def silence(seconds: float) -> str:
    """Where the engine gives no sign of life."""
    return f"no sign of the engine for {seconds:.0f} s; Escape ends it"


def load_figures(progress: LoadProgress) -> str:
    """Share, rate and time left of a load."""
    rate = f"{gigabytes(progress.bytes_per_second)}/s" if progress.bytes_per_second is not None else ""
    return "  ".join(filter(None, [f"{progress.fraction:4.0%}", rate, _left(progress.seconds_left)]))


def prompt_figures(progress: PromptProgress) -> str:
    """How far the prompt is read."""
    rate = f"{progress.tokens_per_second:,.0f}/s" if progress.tokens_per_second is not None else ""
    read = f"reading {progress.done:,}/{progress.total:,} tokens"
    return ", ".join(filter(None, [read, f"{progress.reused:,} reused", rate, _left(progress.seconds_left)]))


def _left(seconds: float | None) -> str:
    return f"{duration(seconds)} left" if seconds is not None else ""
