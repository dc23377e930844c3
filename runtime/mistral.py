"""Mistral's own prompt formats, built as ids by mistral-common, Mistral's reference library.

Each piece of text is encoded by SentencePiece or tekken alone, which never give a control token; the control tokens are
put between by id. What reaches the model is the text as written, with these exceptions, all mistral-common's own:

- Up to v3 system messages are joined by a blank line. From v7 on each is a block of its own.
- v1 puts the system text in front of the first user message, v3 in front of the last, a blank line between.
- From v3 on the spaces at the end of a reply are dropped, also of one that is to be continued.
- v1 and v3 put an empty user message in front of a conversation that begins with a reply.
- Up to v11 the tools stand before the last user message, in v13 before the first.
- v3 reads a tool's result as JSON, where it is some.
- v1 has no tools, and no control tokens but `<s>` and `</s>`: there `[INST]` is plain text, and a user can write it.

Ours are two: v3 has no reply with both text and calls, so the text is left out, as Mistral's own template does. And an
empty user message stands in front of a conversation that begins with calls, which mistral-common would not count.

SentencePiece puts a dummy space in front of each piece of text. A reply that was stopped is closed by `</s>` as in
training. Not here: v2 (of early 2024, with one result of a tool at most); v15, whose files hold settings that Bise does
not have; images, sound, and thoughts in tokens of their own. Importing this module takes half a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import Tokenized
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.utils.json_utils import validate_json_schema_by_draft7

from runtime.calls import CallForm
from runtime.conversation import as_json, functions, in_openai_form, settled, short_ids
from runtime.errors import EngineError
from runtime.messages import Message, Tool
from runtime.mistral_tokenizers import check_same, opened
from runtime.prompts import Transcript, Vocabulary

_CALLS = "[TOOL_CALLS]"
_V3 = ("mistral-v3", "mistral-v3-tekken")
_V7 = ("mistral-v7", "mistral-v7-tekken")

_Tokenizer: TypeAlias = MistralTokenizer[UserMessage, AssistantMessage, ToolMessage, SystemMessage, Tokenized]


class MistralPrompter:
    """A Mistral prompt format over one tokenizer file, which has been found equal to the GGUF's vocabulary."""

    def __init__(self, kind: str, vocabulary: Vocabulary, tokenizer: Path | None) -> None:
        self._kind = kind
        ours = opened(kind, tokenizer)
        check_same(ours, vocabulary)
        self._tokenizer: _Tokenizer = MistralTokenizer(
            ours.instruct,
            validator=get_validator(ours.version, mode=ValidationMode.agnostic),  # the last message may be a reply
            request_normalizer=get_normalizer(ours.version, None),
        )
        self.calls: CallForm | None = None
        """Behind a control token, up to v7 a list of calls. v1 has none."""
        token = ours.pieces.get_special_token
        if kind in (*_V3, *_V7):
            self.calls = CallForm(_CALLS, token(_CALLS), is_list=True)
        elif kind != "mistral-v1":
            id_token = token("[CALL_ID]") if kind == "mistral-v11" else None
            self.calls = CallForm(_CALLS, token(_CALLS), arguments_token=token("[ARGS]"), id_token=id_token)

    @property
    def marks_turns_by_text(self) -> bool:
        """Only in v1."""
        return self._kind == "mistral-v1"

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids of the prompt, as mistral-common gives them. Raises EngineError for what it refuses."""
        told = settled(messages)
        if self._kind == "mistral-v1" and (tools or any(message.calls for message in told)):
            raise EngineError("the prompt format mistral-v1 has no tools and no calls of them; ask without")
        if told[0].calls:
            told.insert(0, Message("user", ""))
        turns = in_openai_form(told)
        if self._kind in _V3:
            turns = list(map(_as_v3_takes_it, turns))
        defined = functions(tools)
        _check_schemas(defined)
        return self._ids(turns, defined, continued=told[-1].role == "assistant")

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
        # A ValueError is pydantic's, which checks the fields.
        except (MistralCommonException, ValueError, RecursionError) as error:
            raise _refusal(error) from error


def _refusal(error: Exception) -> EngineError:
    return EngineError(
        f"Mistral's prompt format cannot express this conversation: {_one_line(error)}; remove or reorder messages"
    )


def _check_schemas(tools: Sequence[Mapping[str, Any]]) -> None:
    """mistral-common checks them too, without a word on which tool it is."""
    for tool in tools:
        try:
            validate_json_schema_by_draft7(tool["function"]["parameters"])
        except (ValueError, RecursionError) as error:
            raise EngineError(
                f"the parameters of the tool {tool['function']['name']!r} are no JSON schema: {_one_line(error)}; "
                "correct them"
            ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"


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
