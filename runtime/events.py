"""What the engine's process and its owner say to each other: frozen values, picklable, without behaviour.

Commands go down (`Load`, `Reply`, `Stop`, `Quit`), events come up. A load ends with `Loaded` or `Failed`; a reply ends
with `Finished` or `Failed`. `Notice` and `Silent` may come in between. Knows nothing of how they travel (worker.py) or
of what a screen makes of them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.grammar import Grammar
from runtime.messages import Message, Tool, ToolCall, ToolChoice
from runtime.sampling import Sampling as Sampling  # part of every reply: named here too

Drafts = Literal["off", "auto", "always"]
"""When next tokens are guessed."""

StopReason = Literal["end", "calls", "length", "stopped", "context"]
"""Why a reply ended: the model ended it, with calls or without, `max_tokens`, the user stopped it, or the context is
full."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a model is loaded. The defaults suit a CPU and a small model."""

    n_ctx: int
    """Context in tokens."""
    n_batch: int = 2048
    """Most tokens in one decode call."""
    n_ubatch: int = 512
    """Most tokens computed at once."""
    n_threads: int | None = None
    """None: every core this process may use."""
    kv_type: str = "f16"
    """Type of the KV cache: f16, q8_0 or q4_0."""
    n_gpu_layers: int = -1
    """Layers off the CPU; -1 is all, 0 none."""
    tensor_split: tuple[float, ...] | None = None
    """Share of the layers per device; None levels the fill of the devices (fitting.py)."""
    split_mode: str = "layer"
    """Over several GPUs: `layer`, whole layers to each; `tensor`, of every tensor a part to each (experimental)."""
    main_gpu: int | None = None
    """The one GPU that holds the whole model, in the order of fitting.py; None is all of them."""
    rpc_servers: tuple[str, ...] = ()
    """host:port of llama.cpp RPC devices. The protocol has no authentication."""
    use_extra_bufts: bool = True
    """CPU weight repacking. False avoids the AMX code that GCC 12 miscompiles."""
    drafts: Drafts = "off"
    """Guess the next tokens by what followed before in the text, and compute several at once (speculation.py).

    `auto`: where the answer is drawn at random anyway, at a temperature above 0 without a seed; `always`: also at 0.
    Never with a seed: kernels round otherwise for several tokens than for one, and a seed is given to repeat an answer.
    """
    n_branches: int = 1
    """Conversations, or branches of one, that are kept: one in the KV cache, the others in the host's memory."""
    draft_model: Path | None = None
    """The GGUF file of a smaller model of the same vocabulary, which guesses where the text tells nothing."""
    kept_kv_bytes: int = 0
    """Room on the disk for KV caches of conversations (kv_store.py); 0 keeps none."""


@dataclass(frozen=True, slots=True)
class Load:
    """Open a model file. Answered by `LoadProgress`…, then `Loaded` or `Failed`."""

    path: Path
    """The GGUF file, or its first shard."""
    settings: EngineSettings
    prompt: str
    """How messages become ids: `mistral-v3`, `mistral-v7`, … or `template` for the GGUF's own Jinja template."""
    tokenizer: Path | None = None
    """The tokenizer file for a `mistral-…` prompt; None takes mistral-common's own for that version."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer a conversation. Answered by `PromptProgress`…, `Piece` and `CallPiece`…, then `Finished` or `Failed`."""

    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    """Tell each token's log-probability, and those of as many likeliest ones; None tells none."""
    grammar: Grammar | None = None
    """Holds the whole answer to its form; the answer ends where the grammar does. Refused beside tools that may be
    called, whose calls have a grammar of their own."""
    tools: tuple[Tool, ...] = ()
    """What the model is told that it may call."""
    tool_choice: ToolChoice = "auto"


@dataclass(frozen=True, slots=True)
class Stop:
    """End the reply or the load in progress; what was said so far stays."""


@dataclass(frozen=True, slots=True)
class Quit:
    """End the process."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """The share of the weights loaded, 0 to 1."""

    fraction: float
    bytes_per_second: float | None = None
    """None while it is too early to tell, as `seconds_left`."""
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model is ready."""

    description: str
    """llama.cpp's description, such as "llama 13B Q4_K - Medium"."""
    tensor_bytes: int
    n_params: int
    n_ctx: int
    n_ctx_train: int
    n_vocab: int
    seconds: float
    has_calls: bool
    """Whether calls of tools can be read out of its answers."""


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """Tokens of the prompt read so far; `reused` of them were still in the KV cache."""

    done: int
    total: int
    reused: int
    tokens_per_second: float | None = None
    """None while it is too early to tell, as `seconds_left`."""
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A token, and how likely the model found it in its place, before any sampler."""

    id: int
    text: bytes
    """What it stands for; not always whole characters."""
    logprob: float
    """Natural logarithm of the probability."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token of the answer, or the one that ended it, with the likeliest in its place."""

    token: Likelihood
    likeliest: tuple[Likelihood, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """The next piece of the answer: whole UTF-8 characters, possibly several tokens."""

    text: str
    n_tokens: int
    """Tokens of the answer so far."""
    drawn: tuple[Drawn, ...] = ()
    """Where log-probabilities are asked for, the tokens since the last piece. The text is then empty for an end."""


@dataclass(frozen=True, slots=True)
class CallPiece:
    """The next piece of a call that the model writes. The calls as a whole come with `Finished`."""

    index: int
    """Of the call among the answer's, from 0."""
    n_tokens: int
    """Tokens of the answer so far."""
    id: str = ""
    """Told once, as the name is, in the first piece of a call."""
    name: str = ""
    arguments: str = ""
    """What follows of their text."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete or was stopped."""

    reason: StopReason
    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int
    prompt_seconds: float
    answer_seconds: float
    context_used: int
    """Positions of the KV cache in use now."""
    n_ctx: int
    sampling: str = ""
    """How the tokens were drawn, in words, with the seed that repeats it."""
    first_token_seconds: float | None = None
    """From the question's arrival to the first token drawn; None where there was none."""
    memory_bytes: int | None = None
    """What the engine's process holds in the host's memory, weights mapped from the file included."""
    gpu_bytes: int | None = None
    """What is in use on all GPUs, by whatever program; None without one."""
    calls: tuple[ToolCall, ...] = ()
    """What the model calls."""
    drafted_tokens: int = 0
    """Guesses at next tokens that were computed."""
    accepted_tokens: int = 0
    """Of these, how many were drawn."""

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of reading what was not reused."""
        n_read = self.prompt_tokens - self.reused_tokens
        return n_read / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer, without the prompt."""
        return self.answer_tokens / self.answer_seconds if self.answer_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should know of, while the work goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Silent:
    """The engine's process lives but gives no sign of life: it is stopped, or hangs. A stop now ends the process."""

    seconds: float
    """Since its last sign."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The engine's process is at work. Heard by `Worker` alone."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A request failed; the process lives on."""

    message: str
    """One line: what is wrong and what to do."""


Command = Load | Reply | Stop | Quit
LoadEvent = LoadProgress | Notice | Silent | Loaded
ReplyEvent = PromptProgress | Piece | CallPiece | Notice | Silent | Finished
Event = LoadEvent | ReplyEvent | Heartbeat | Failed
