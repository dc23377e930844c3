"""Whole conversations as ids: against mistral-common by itself, and Jinja by itself."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from jinja2 import Environment
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from runtime.errors import EngineError
from runtime.native import Vocabulary
from runtime.prompts import Transcript
from tests.test_prompts import demo, large_v3, large_v7, load, smollm
from tests.vocabularies import (
    DEMO_TOKENIZER,
    SPELLED,
    controls,
    file_of,
    mistral,
    packaged,
    pieces_of,
    spoken,
    templated,
)

__all__ = ["demo", "large_v3", "large_v7", "load", "smollm"]


def weather(said: str = "", key: str = "city") -> Transcript:
    """A talk with a call of a tool; `said` is added to every text in it, `key` is a parameter's name."""
    parameters = {"type": "object", "properties": {key: {"type": "string", "description": f"Where?{said}"}}}
    tool = {"name": "weather", "description": f'"Now"{said}', "parameters": parameters}
    arguments = json.dumps({key: f'Vals "Les\nBains"{said}'})
    call = {"id": "call_of_more_than_nine", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return Transcript(
        (
            {"role": "system", "content": f"Be brief.{said}"},
            {"role": "user", "content": f"Warm?{said}"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "name": "weather", "content": f'{{"t": "20{said}"}}'},
            {"role": "assistant", "content": f"It is 20{said} degrees."},
            {"role": "user", "content": f"Thanks.{said}"},
            {"role": "assistant", "content": f"Welcome{said}!"},
        ),
        ({"type": "function", "function": tool},),
    )


TOOL_TEMPLATE = """{% for tool in tools or [] %}<|im_start|>tools
{{ tool.function | tojson }}<|im_end|>{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"""


@pytest.mark.parametrize("version", [3, 7])
def test_a_transcript_is_mistral_commons_prompt_and_the_closed_reply(
    version: int, large_v3: Vocabulary, large_v7: Vocabulary
) -> None:
    """mistral-common encodes a request up to the last reply; its ids and </s> follow."""
    vocabulary = {3: large_v3, 7: large_v7}[version]
    transcript = weather()
    short = json.loads(json.dumps(transcript.messages[:-1]).replace("call_of_more_than_nine", "abcdefgh1"))
    request: ChatCompletionRequest[Any] = ChatCompletionRequest.from_openai(
        short, tools=list(map(dict, transcript.tools))
    )
    asked = packaged(version).encode_chat_completion(request).tokens
    ids = mistral(f"mistral-v{version}", vocabulary).transcribe(transcript)
    expected = spoken(vocabulary, asked), [*vocabulary.tokenize("Welcome!"), vocabulary.eos]
    reply = len(expected[1])
    assert controls(vocabulary, ids[:-reply]) == controls(vocabulary, asked)
    assert re.sub(r"[0-9a-f]{9}", "abcdefgh1", spoken(vocabulary, ids[:-reply])) == expected[0]
    assert ids[-reply:] == expected[1]
    assert ids[0] == vocabulary.bos


def test_short_transcripts_written_by_hand(large_v7: Vocabulary) -> None:
    v7 = mistral("mistral-v7", large_v7)
    hello = Transcript(({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}))
    written = large_v7.tokenize("<s>[INST]", special=True)
    written += [*large_v7.tokenize("Hello"), *large_v7.tokenize("[/INST]", special=True), *large_v7.tokenize("Hi.")]
    assert v7.transcribe(hello) == [*written, large_v7.eos]


def test_v1_has_no_tools(load: Callable[..., Vocabulary]) -> None:
    v1 = mistral("mistral-v1", load(pieces_of(file_of(1))))
    with pytest.raises(EngineError, match="Tools not implemented for tokenizer V1; remove or reorder messages"):
        v1.transcribe(weather())


def test_a_transcript_is_what_the_template_writes(smollm: Vocabulary) -> None:
    """By Jinja alone, of plain texts, with transformers' `tojson`."""
    transcript = weather(" <b> naïve")
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    messages = json.loads(json.dumps(transcript.messages).replace('"content": null', '"content": ""'))
    function = messages[2]["tool_calls"][0]["function"]
    function["arguments"] = json.loads(function["arguments"])
    text = environment.from_string(TOOL_TEMPLATE).render(messages=messages, tools=transcript.tools)
    assert r"Vals \"Les\nBains\"" in text
    assert templated(smollm, TOOL_TEMPLATE).transcribe(transcript) == smollm.tokenize(text, special=True)


@pytest.mark.parametrize("arguments", ["no JSON", "[1]", "[" * 100_000, {"city": "Vals"}])
def test_arguments_that_are_no_mapping_stay_as_they_are(arguments: object, smollm: Vocabulary) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    talk = Transcript(({"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}))
    ids = templated(smollm, "{{ messages[1].tool_calls[0].function.arguments }}").transcribe(talk)
    assert spoken(smollm, ids) == str(arguments)


@pytest.mark.parametrize("spelled", SPELLED.replace("><", "> <").replace("][", "] [").split())
def test_no_text_of_a_transcript_becomes_a_control_token(
    spelled: str, smollm: Vocabulary, demo: Vocabulary, large_v3: Vocabulary, large_v7: Vocabulary
) -> None:
    for format_, vocabulary in (
        (mistral("mistral-v3", large_v3), large_v3),
        (mistral("mistral-v7", large_v7), large_v7),
        (mistral("mistral-v3", demo, DEMO_TOKENIZER), demo),
        (templated(smollm, TOOL_TEMPLATE), smollm),
    ):
        ids = format_.transcribe(weather(spelled))
        assert controls(vocabulary, ids) == controls(vocabulary, format_.transcribe(weather(" harmless ")))


def test_a_template_may_want_arguments_as_text(smollm: Vocabulary) -> None:
    template = "{{ 'calls ' + messages[1].tool_calls[0].function.arguments + '.' }}"
    call = {"function": {"name": "f", "arguments": '{"city": "Vals"}'}}
    talk = Transcript(({"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}))
    assert spoken(smollm, templated(smollm, template).transcribe(talk)) == 'calls {"city": "Vals"}.'


def test_a_key_that_spells_a_control_token_stays_letters(smollm: Vocabulary) -> None:
    format_ = templated(smollm, TOOL_TEMPLATE)
    ids = format_.transcribe(weather(key="<|im_end|>"))
    assert controls(smollm, ids) == controls(smollm, format_.transcribe(weather()))
    assert spoken(smollm, ids).count('"<|im_end|>": ') == 2


def test_a_template_that_refuses_tools_is_one_line(smollm: Vocabulary) -> None:
    refusing = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}"
    with pytest.raises(EngineError, match="the chat template refuses this conversation: no tools here"):
        templated(smollm, refusing).transcribe(weather())
