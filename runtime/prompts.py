"""Messages → token ids: the conversation as the model was trained to read it.

`prompter(kind, …)` gives an object whose `encode` takes messages and gives the ids of the whole prompt, BOS included,
ready for the model's answer. The last message is the user's, or the assistant's, which is then continued. Control
tokens come from the prompt format alone: text that spells one stays text, whoever wrote it.

`transcribe` takes a whole conversation instead, answers, tools and their calls included, as it would be trained on.

`mistral-v1`, `-v3` and `-v7` are built by mistral-common (mistral.py); `template` renders the Jinja template that the
GGUF carries (template.py). Knows nothing of sampling, of the KV cache, or of where an answer ends.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import CatalogueError, EngineError
from runtime.messages import Message

KINDS = ("mistral-v1", "mistral-v3", "mistral-v7", "template")
"""The prompt formats, as models.yaml names them."""


class Vocabulary(Protocol):
    """What a prompt needs to know of the GGUF's tokens. native.py's vocabulary is one."""

    n_tokens: int
    bos: int
    """Id of the beginning-of-sequence token, -1 if there is none."""
    eos: int
    """Id of the end-of-sequence token, -1 if there is none."""
    adds_bos: bool
    """The model wants every text to begin with BOS."""

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of `text` as llama_tokenize gives them: `special` is parse_special, `bos` is add_special."""

    def text(self, token: int) -> str:
        """The token as the GGUF stores it, such as `▁the` or `[INST]`."""

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

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt that asks for the answer to `messages`.

        Raises EngineError for a conversation the format cannot express.
        """

    def transcribe(self, transcript: Transcript) -> list[int]:
        """Ids of a whole conversation, each answer closed as in training. Raises EngineError as `encode` does."""


def prompter(kind: str, vocabulary: Vocabulary, *, template: str | None, tokenizer: Path | None) -> Prompter:
    """The prompt format `kind` (one of KINDS) for a model with this vocabulary.

    `template` is the GGUF's Jinja template, used by the kind `template`. `tokenizer` is a SentencePiece file for a
    `mistral-…` kind; None takes mistral-common's own for that version. Nothing is downloaded.

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


def settled(messages: Sequence[Message]) -> list[Message]:
    """The messages that say something, as valid Unicode. Every format starts from these.

    A blank system prompt and a reply that was stopped before its first word are left out; a lone surrogate, which has
    no UTF-8, becomes U+FFFD. Raises EngineError when nothing is asked.
    """
    told = [
        replace(message, content=message.content.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        for message in messages
        if message.role in ("user", "tool") or message.content.strip() or message.calls
    ]
    if not any(message.role == "user" for message in told):
        raise EngineError("the conversation has no user message, so there is nothing to answer; write one")
    return told


def with_parsed_arguments(transcript: Transcript) -> Transcript:
    """The transcript with the arguments of its calls as mappings, where they are the JSON of one."""
    return replace(transcript, messages=tuple(map(_with_parsed_arguments, transcript.messages)))


def _with_parsed_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = [{**call, "function": _parsed(call["function"])} for call in message.get("tool_calls") or ()]
    return {**message, "tool_calls": calls} if calls else message


def _parsed(function: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return function
    return {**function, "arguments": parsed} if isinstance(parsed, dict) else function


def texts(value: Any) -> Iterator[tuple[str, bool]]:
    """Every text in a value made of JSON's types, and whether it is a key."""
    match value:
        case str():
            yield value, False
        case Mapping():
            for key, item in value.items():
                yield key, True
                yield from texts(item)
        case list() | tuple():
            for item in value:
                yield from texts(item)
