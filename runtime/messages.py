"""What a conversation is made of: turns, tools, calls. Frozen values, picklable, without behaviour.

Knows nothing of how a model is given them (prompts.py) or of who carries a call out (tools.py).
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, as the model wrote it."""

    id: str
    """Joins the call and its result."""
    name: str
    arguments: str
    """JSON, as a rule of an object; of a malformed call whatever stands in its place."""
    error: str | None = None
    """Why the call cannot be carried out, in words for the model: malformed, or of a tool that there is not."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, as plain text. Text that spells a control token stays text."""

    role: Role
    content: str
    calls: tuple[ToolCall, ...] = ()
    """Of the assistant: what it calls, behind its text."""
    call_id: str | None = None
    """Of a tool: the call that `content` is the result of."""


@dataclass(frozen=True, slots=True)
class Tool:
    """What the model is told of a tool."""

    name: str
    """Letters, digits, `_` and `-`, at most 64."""
    description: str
    parameters: str
    """JSON schema of the arguments, an object; as JSON text."""


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The choice of this tool: the answer is a call of it."""

    name: str


ToolChoice = Literal["auto", "none", "any"] | NamedTool
"""Whether the model may call tools, may not, or must, any or this one."""
