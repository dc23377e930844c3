"""What a talker is doing, and the words the chat has for it."""

from enum import Enum

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
