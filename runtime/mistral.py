"""Mistral's own prompt formats, built as ids by mistral-common, Mistral's reference library.

Each piece of text is encoded by SentencePiece alone, which never gives a control token; the control tokens are put
between by id. What reaches the model is the text as written, with these exceptions, all mistral-common's own:

- Neighbouring messages of one role are joined by a blank line. In v7 each system message is a block of its own.
- v1 puts the system text in front of the first user message, v3 in front of the last, a blank line between.
- v3 and v7 drop the spaces at the end of a reply, also of one that is to be continued.
- v1 and v3 put an empty user message in front of a conversation that begins with a reply.
- v1 has no control tokens but `<s>` and `</s>`: there `[INST]` is plain text, and a user can write it.

SentencePiece puts a dummy space in front of each piece of text. A reply that was stopped is closed by `</s>` as in
training. Importing this module takes half a second.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import Tokenized, TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV3, InstructTokenizerV7
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from runtime.errors import EngineError, ModelFileError
from runtime.messages import Message
from runtime.prompts import Transcript, Vocabulary, settled

_TOOLS = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_V1 = ("<s>", "</s>")
_V3 = (*_V1, "[INST]", "[/INST]", *_TOOLS)
_V7 = (*_V3, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")

_Tokenizer: TypeAlias = MistralTokenizer[UserMessage, AssistantMessage, ToolMessage, SystemMessage, Tokenized]
_Turn: TypeAlias = SystemMessage | UserMessage | AssistantMessage | ToolMessage

_CONTROLS = {"mistral-v1": _V1, "mistral-v3": _V3, "mistral-v7": _V7}
"""The control tokens that each format's files must have."""


class MistralPrompter:
    """A Mistral prompt format over one tokenizer file, which has been found equal to the GGUF's vocabulary."""

    def __init__(self, kind: str, vocabulary: Vocabulary, tokenizer: Path | None) -> None:
        self._tokenizer = _packaged(kind) if tokenizer is None else _from_file(kind, tokenizer)
        pieces = self._tokenizer.instruct_tokenizer.tokenizer
        assert isinstance(pieces, SentencePieceTokenizer)
        name = f"mistral-common's tokenizer for {kind}" if tokenizer is None else str(tokenizer)
        self._whole: _Tokenizer = MistralTokenizer(
            self._tokenizer.instruct_tokenizer,
            validator=get_validator(_version(kind), mode=ValidationMode.agnostic),  # the last message may be a reply
            request_normalizer=get_normalizer(_version(kind), None),
        )
        _check_controls(kind, pieces, name)
        _check_vocabulary(pieces, vocabulary, name)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt, as mistral-common gives them. Raises EngineError for what it refuses."""
        told = settled(messages)
        turns: list[_Turn] = [_turn(message) for message in told]
        if isinstance(turns[-1], AssistantMessage):
            turns[-1].prefix = True  # no </s>: the model goes on
        try:
            return list(self._tokenizer.encode_chat_completion(ChatCompletionRequest(messages=turns)).tokens)
        except MistralCommonException as error:
            raise _refusal(error) from error

    def transcribe(self, transcript: Transcript) -> list[int]:
        """Ids of a whole conversation, as mistral-common gives them: tools stand before the last user message.

        Raises EngineError for what it refuses; v1 has no tools.
        """
        messages = [_with_short_ids(message) for message in transcript.messages]
        try:
            request = ChatCompletionRequest.from_openai(messages, tools=list(map(dict, transcript.tools)) or None)
            return list(self._whole.encode_chat_completion(request).tokens)
        except (MistralCommonException, ValueError) as error:  # a ValueError of pydantic's, which checks the fields
            raise _refusal(error) from error


def _refusal(error: Exception) -> EngineError:
    return EngineError(
        f"Mistral's prompt format cannot express this conversation: {' '.join(str(error).split())}; "
        "remove or reorder messages"
    )


def _with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with call ids as Mistral's formats want them: nine letters and digits."""
    told = dict(message)
    if "tool_call_id" in told:
        told["tool_call_id"] = _short_id(told["tool_call_id"])
    if told.get("tool_calls"):
        told["tool_calls"] = [{**call, "id": _short_id(call.get("id", ""))} for call in told["tool_calls"]]
    return told


def _short_id(id_: str) -> str:
    return id_ if re.fullmatch(r"[a-zA-Z0-9]{9}", id_) else hashlib.sha256(id_.encode()).hexdigest()[:9]


def _turn(message: Message) -> _Turn:
    match message.role:
        case "system":
            return SystemMessage(content=message.content)
        case "user":
            return UserMessage(content=message.content)
        case "assistant":
            calls = [
                ToolCall(id=_short_id(call.id), function=FunctionCall(name=call.name, arguments=call.arguments))
                for call in message.calls
            ]
            return AssistantMessage(content=message.content or None, tool_calls=calls or None)
        case "tool":
            return ToolMessage(content=message.content, tool_call_id=_short_id(message.call_id or ""))


def _version(kind: str) -> TokenizerVersion:
    return TokenizerVersion(kind.removeprefix("mistral-"))


def _packaged(kind: str) -> _Tokenizer:
    match kind:
        case "mistral-v1":
            return MistralTokenizer.v1()
        case "mistral-v3":
            return MistralTokenizer.v3()
        case _:
            return MistralTokenizer.v7()


def _from_file(kind: str, path: Path) -> _Tokenizer:
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
    instruct = {
        TokenizerVersion.v1: InstructTokenizerV1,
        TokenizerVersion.v3: InstructTokenizerV3,
        TokenizerVersion.v7: InstructTokenizerV7,
    }[version]
    return MistralTokenizer(
        instruct(pieces),
        validator=get_validator(version, mode=ValidationMode.test),
        request_normalizer=get_normalizer(version, None),
    )


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
