"""Mistral's own prompt formats, built as ids by mistral-common, Mistral's reference library.

Each piece of text is encoded by SentencePiece alone, which never gives a control token; the control tokens are put
between by id. What reaches the model is the text as written, with these exceptions, all mistral-common's own:

- System messages are joined by a blank line. In v7 each is a block of its own.
- v1 puts the system text in front of the first user message, v3 in front of the last, a blank line between.
- v3 and v7 drop the spaces at the end of a reply, also of one that is to be continued.
- v1 and v3 put an empty user message in front of a conversation that begins with a reply.
- v3 and v7 put the tools before the last user message. v3 reads a tool's result as JSON, where it is some.
- v1 has no tools, and no control tokens but `<s>` and `</s>`: there `[INST]` is plain text, and a user can write it.

Ours is one: v3 has no reply with both text and calls, so the text is left out, as Mistral's own template does.

SentencePiece puts a dummy space in front of each piece of text. A reply that was stopped is closed by `</s>` as in
training. Importing this module takes half a second.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import InstructTokenizer, Tokenized, TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV3, InstructTokenizerV7
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from runtime.calls import CallForm
from runtime.conversation import as_json, functions, in_openai_form, settled, short_ids
from runtime.errors import EngineError, ModelFileError
from runtime.messages import Message, Tool
from runtime.prompts import Transcript, Vocabulary

_CALLS = "[TOOL_CALLS]"
_TOOLS = (_CALLS, "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_V1 = ("<s>", "</s>")
_V3 = (*_V1, "[INST]", "[/INST]", *_TOOLS)
_V7 = (*_V3, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")

_Tokenizer: TypeAlias = MistralTokenizer[UserMessage, AssistantMessage, ToolMessage, SystemMessage, Tokenized]
_Instruct: TypeAlias = InstructTokenizer[Any, Any, Tokenized]

_CONTROLS = {"mistral-v1": _V1, "mistral-v3": _V3, "mistral-v7": _V7}
"""The control tokens that each format's files must have."""


class MistralPrompter:
    """A Mistral prompt format over one tokenizer file, which has been found equal to the GGUF's vocabulary."""

    def __init__(self, kind: str, vocabulary: Vocabulary, tokenizer: Path | None) -> None:
        self._kind = kind
        instruct, pieces, name = _opened(kind, tokenizer)
        self._tokenizer: _Tokenizer = MistralTokenizer(
            instruct,
            validator=get_validator(_version(kind), mode=ValidationMode.agnostic),  # the last message may be a reply
            request_normalizer=get_normalizer(_version(kind), None),
        )
        _check_vocabulary(pieces, vocabulary, name)
        self.calls: CallForm | None = None
        """A list of calls behind its control token; v1 has none."""
        if _CALLS in _CONTROLS[kind]:
            self.calls = CallForm(_CALLS, pieces.get_special_token(_CALLS), is_list=True)

    @property
    def marks_turns_by_text(self) -> bool:
        """Only in v1."""
        return self._kind == "mistral-v1"

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids of the prompt, as mistral-common gives them. Raises EngineError for what it refuses."""
        told = settled(messages)
        if self._kind == "mistral-v1" and (tools or any(message.calls for message in told)):
            raise EngineError("the prompt format mistral-v1 has no tools and no calls of them; ask without")
        turns = in_openai_form(told)
        if self._kind == "mistral-v3":
            turns = list(map(_as_v3_takes_it, turns))
        return self._ids(turns, functions(tools), continued=told[-1].role == "assistant")

    def transcribe(self, transcript: Transcript) -> list[int]:
        """Ids of a whole conversation, as mistral-common gives them: tools stand before the last user message.

        Raises EngineError for what it refuses; v1 has no tools.
        """
        return self._ids(list(map(_with_short_ids, transcript.messages)), list(map(dict, transcript.tools)))

    def _ids(self, turns: list[dict[str, Any]], tools: list[dict[str, Any]], *, continued: bool = False) -> list[int]:
        """Ids of turns in OpenAI's form; `continued` leaves the last reply open, without `</s>`."""
        try:
            request = ChatCompletionRequest.from_openai(turns, tools=tools or None, continue_final_message=continued)
            return list(self._tokenizer.encode_chat_completion(request).tokens)
        # A ValueError of pydantic's, which checks the fields, or a schema of a tool that is nested too deeply.
        except (MistralCommonException, ValueError, RecursionError) as error:
            raise _refusal(error) from error


def own_vocabulary(kind: str, tokenizer: Path | None) -> "_OwnVocabulary":
    """The vocabulary of a format's tokenizer. Raises ModelFileError for a file that is none."""
    _, pieces, _ = _opened(kind, tokenizer)
    return _OwnVocabulary(pieces)


class _OwnVocabulary:
    """A tokenizer's tokens, told as a GGUF's are."""

    adds_bos = True

    def __init__(self, pieces: SentencePieceTokenizer) -> None:
        self._pieces, self._texts = pieces, pieces.vocab()
        self.n_tokens, self.bos, self.eos = pieces.n_words, pieces.bos_id, pieces.eos_id

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        if special:
            raise NotImplementedError("SentencePiece reads no control tokens out of text")
        return self._pieces.encode(text, bos=bos, eos=False)

    def text(self, token: int) -> str:
        return self._texts[token]

    def piece(self, token: int) -> bytes:
        text = self._texts[token]
        if self.is_control(token):
            return b""
        byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()

    def is_control(self, token: int) -> bool:
        return self._pieces.is_special(token)

    def is_user_defined(self, token: int) -> bool:
        return not 0 <= token < self.n_tokens  # none of them is


def _refusal(error: Exception) -> EngineError:
    return EngineError(
        f"Mistral's prompt format cannot express this conversation: {' '.join(str(error).split())}; "
        "remove or reorder messages"
    )


def _as_v3_takes_it(turn: dict[str, Any]) -> dict[str, Any]:
    if turn["role"] == "tool":
        return {**turn, "content": as_json(turn["content"])}  # read as JSON there, and written anew
    return {**turn, "content": None} if turn.get("tool_calls") else turn


def _with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with call ids as Mistral's formats want them."""
    told = dict(message)
    if "tool_call_id" in told:
        (told["tool_call_id"],) = short_ids([told["tool_call_id"]])
    if told.get("tool_calls"):
        ids = short_ids(call.get("id", "") for call in told["tool_calls"])
        told["tool_calls"] = [{**call, "id": id_} for call, id_ in zip(told["tool_calls"], ids, strict=True)]
    return told


def _version(kind: str) -> TokenizerVersion:
    return TokenizerVersion(kind.removeprefix("mistral-"))


def _opened(kind: str, tokenizer: Path | None) -> tuple[_Instruct, SentencePieceTokenizer, str]:
    """The format over its tokenizer, the tokenizer, and what to call it."""
    instruct = _packaged(kind) if tokenizer is None else _from_file(kind, tokenizer)
    pieces = instruct.tokenizer
    assert isinstance(pieces, SentencePieceTokenizer)
    name = f"mistral-common's tokenizer for {kind}" if tokenizer is None else str(tokenizer)
    _check_controls(kind, pieces, name)
    return instruct, pieces, name


def _packaged(kind: str) -> _Instruct:
    match kind:
        case "mistral-v1":
            return MistralTokenizer.v1().instruct_tokenizer
        case "mistral-v3":
            return MistralTokenizer.v3().instruct_tokenizer
        case _:
            return MistralTokenizer.v7().instruct_tokenizer


def _from_file(kind: str, path: Path) -> _Instruct:
    """The format over a file of any name. mistral-common would guess the version from the name: `.model` as v1."""
    version = _version(kind)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such tokenizer file; correct `tokenizer` in models.yaml or leave it out")
    try:
        pieces = SentencePieceTokenizer(path, tokenizer_version=version)
    except (RuntimeError, OSError) as error:
        raise ModelFileError(
            f"{path}: not a SentencePiece tokenizer; name a tokenizer.model, or `prompt: template` in models.yaml"
        ) from error
    match kind:
        case "mistral-v1":
            return InstructTokenizerV1(pieces)
        case "mistral-v3":
            return InstructTokenizerV3(pieces)
        case _:
            return InstructTokenizerV7(pieces)


def _check_controls(kind: str, pieces: SentencePieceTokenizer, name: str) -> None:
    """SentencePiece gives `<unk>` for a piece it does not have, without a word: refuse such a file here."""
    missing = [control for control in _CONTROLS[kind] if not pieces.is_special(control)]
    if missing:
        fits = [other for other, controls in _CONTROLS.items() if all(map(pieces.is_special, controls))]
        raise ModelFileError(
            f"{name} has no control token {missing[0]}, which {kind} writes; "
            f"take {' or '.join(fits) or 'template'} as `prompt` in models.yaml"
        )


def _check_vocabulary(pieces: SentencePieceTokenizer, vocabulary: Vocabulary, name: str) -> None:
    """Raise ModelFileError unless every id means the same in the tokenizer and in the GGUF.

    Both store SentencePiece's own pieces: `▁` for a space, `<0x0A>` for a byte. Control tokens that no format writes
    may differ in name and type: Mistral gave reserved ids such as `[control_8]` new names from release to release.
    """
    advice = "set `tokenizer` or `prompt` in models.yaml to the model's own"
    if pieces.n_words != vocabulary.n_tokens:
        raise ModelFileError(f"{name} has {pieces.n_words} tokens, the GGUF {vocabulary.n_tokens}; {advice}")
    for token, ours in enumerate(pieces.vocab()):
        theirs = vocabulary.text(token)
        control = pieces.is_special(token), vocabulary.is_control(token)
        if ours == theirs and control[0] == control[1]:
            continue
        if any(control) and ours not in _V7 and theirs not in _V7:
            continue
        kinds = ["control token" if is_control else "text" for is_control in control]
        raise ModelFileError(
            f"token {token} is {ours!r} ({kinds[0]}) in {name}, but {theirs!r} ({kinds[1]}) in the GGUF; {advice}"
        )
