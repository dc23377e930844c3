"""Messages → token ids: the conversation as the model was trained to read it.

`prompter(kind, …)` gives an object whose `encode` takes messages and tools and gives the ids of the whole prompt, BOS
included, ready for the model's answer. The last message is the user's, a tool's, or the assistant's, which is then
continued. Control tokens come from the prompt format alone: text that spells one stays text, whoever wrote it. What is
mended before, and what is refused, conversation.py says.

`transcribe` takes a whole conversation instead, answers, tools and their calls included, as it would be trained on.

The `mistral-…` formats are built by mistral-common (mistral.py); `template` renders the Jinja template that the
GGUF carries (template.py). Knows nothing of sampling, of the KV cache, or of where an answer ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.calls import CallForm
from runtime.errors import CatalogueError
from runtime.messages import Message, Tool

KINDS = (
    *("mistral-v1", "mistral-v3", "mistral-v3-tekken", "mistral-v7", "mistral-v7-tekken", "mistral-v11", "mistral-v13"),
    "template",
)
"""The prompt formats, as models.yaml names them."""


class Vocabulary(Protocol):
    """What a prompt needs to know of the GGUF's tokens. native.py's vocabulary is one."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def bos(self) -> int:
        """Id of the beginning-of-sequence token, -1 if there is none."""

    @property
    def eos(self) -> int:
        """Id of the end-of-sequence token, -1 if there is none."""

    @property
    def adds_bos(self) -> bool:
        """Whether the model wants every text to begin with BOS."""

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of `text` as llama_tokenize gives them: `special` is parse_special, `bos` is add_special."""

    def text(self, token: int) -> str:
        """The token as the GGUF stores it, such as `▁the` or `[INST]`."""

    def piece(self, token: int) -> bytes:
        """The bytes of text that the token stands for, not always whole characters; none for a control token."""

    def is_control(self, token: int) -> bool:
        """Whether the token is of type control: never text."""

    def is_user_defined(self, token: int) -> bool:
        """Whether the token is of type user-defined: text that is one token wherever it stands."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A whole conversation in the form of OpenAI's chat API, which whoever makes one has checked.

    Each message has a `role` of `system`, `user`, `assistant` or `tool`, and a text as `content`, which may be empty or
    missing beside `tool_calls`. Each of these has a `function` with a `name` and `arguments`, as JSON or as a mapping.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Each with a `function` of `name`, `description` and `parameters`."""


class Prompter(Protocol):
    """One model's prompt format."""

    @property
    def marks_turns_by_text(self) -> bool:
        """Whether turns are told apart by plain text alone, as in mistral-v1: a message can pretend to be several."""

    @property
    def calls(self) -> CallForm | None:
        """How answers write calls of tools; None where none can be read out of them."""

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids of the prompt that asks for the answer to `messages`, which may be a call of one of `tools`.

        Raises EngineError for a conversation the format cannot express, and for tools where it has none.
        """

    def transcribe(self, transcript: Transcript) -> list[int]:
        """Ids of a whole conversation, each answer closed as in training. Raises EngineError as `encode` does."""


def prompter(kind: str, vocabulary: Vocabulary, *, template: str | None, tokenizer: Path | None) -> Prompter:
    """The prompt format `kind` (one of KINDS) for a model with this vocabulary.

    `template` is the GGUF's Jinja template, used by the kind `template`. `tokenizer` is the tokenizer's file for a
    `mistral-…` kind; None takes mistral-common's own, where it has one for that kind. Nothing is downloaded.

    Raises ModelFileError when the tokenizer does not fit the vocabulary, or the template is missing or unreadable.
    """
    # Either format brings heavy imports: mistral-common takes 0.5 s.
    if kind == "template":
        from runtime.template import TemplatePrompter

        return TemplatePrompter(vocabulary, template)
    if kind in KINDS:
        from runtime.mistral import MistralPrompter

        return MistralPrompter(kind, vocabulary, tokenizer)
    raise CatalogueError(f"{kind!r} is not a prompt format; known: {', '.join(KINDS)}")


def packaged_vocabulary(kind: str, tokenizer: Path | None) -> Vocabulary:
    """The vocabulary that `prompter` compares a GGUF's with: of a `mistral-…` kind, without any model.

    Raises ModelFileError for a file that is no tokenizer of that kind.
    """
    from runtime.mistral_tokenizers import opened

    return opened(kind, tokenizer)
