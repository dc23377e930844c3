"""Tools, calls and results through templates: rendered by Jinja alone, and templates that mistral-common writes."""

import json
from typing import Any

import pytest
from jinja2 import Environment
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

from runtime.errors import EngineError
from runtime.messages import Message, Tool, ToolCall
from tests import test_mistral_ids as mistrals
from tests.test_mistral_ids import reference, said, told
from tests.test_prompt_tools import ASKED, BOTH, CALLING, CALLS, COLD, FUNCTIONS, RESULTS, TOOLS, USER, VALS, WARM
from tests.vocabularies import mistral_format, smollm, spoken, templated


def rendered_plainly(template: str, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(messages=turns, tools=tools, add_generation_prompt=True)


def test_a_template_is_given_openais_form() -> None:
    turns: list[dict[str, Any]] = json.loads(json.dumps([ASKED, BOTH, *RESULTS]))
    turns[1]["content"] = ""
    for call in turns[1]["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    for turn in turns[2:]:
        turn["name"] = "weather"
    expected = smollm().tokenize(rendered_plainly(CALLING, turns, FUNCTIONS), special=True)
    assert templated(smollm(), CALLING).encode([USER, CALLS, WARM, COLD], TOOLS) == expected


def test_templates_may_sort_and_look_up_keys() -> None:
    template = """{% for tool in tools %}{% set f = tool['function'] %}{{ f.name }}: {{ f.parameters.type }}
    {%- for name, schema in f.parameters.properties | dictsort %}, {{ name }}{% if schema.type == 'string' %} text
    {%- endif %}{% if name in f.parameters.required %}!{% endif %}{% endfor %}
    {{- f.parameters.properties.city is defined }}{{ f | tojson(sort_keys=true) }}{% endfor %}"""
    parameters = {
        "type": "object",
        "properties": {"z": {}, "city": {"type": "string"}, "B": {}, 'a "b"': {}},
        "required": ["city"],
    }
    said = spoken(smollm(), templated(smollm(), template).encode([USER], [Tool("f", "", json.dumps(parameters))]))
    function = {"name": "f", "description": "", "parameters": parameters}
    assert said == 'f: object, a "b", B, city text!, z' + "True" + json.dumps(function, sort_keys=True)


def test_a_template_that_walks_through_arguments_is_given_an_object() -> None:
    template = """{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}
    {%- for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}{% endfor %}
    {%- endfor %}"""
    calls = (VALS, ToolCall("2", "f", "[1"), ToolCall("3", "g", "[2]"))
    results = [WARM, Message("tool", "", call_id="2"), Message("tool", "", call_id="3")]
    said = spoken(smollm(), templated(smollm(), template).encode([USER, Message("assistant", "", calls), *results]))
    assert said == 'Warm in Vals?weather city=Valsf arguments=[1g arguments=[2]{"celsius": 20}'


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content if m.role == 'user' else raise_exception('who?') }}{% endfor %}",
        "{% if tools %}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'tool' %}{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_leaves_out_tools_or_calls_is_refused(template: str) -> None:
    format_ = templated(smollm(), template)
    format_.encode([USER])
    for talk, tools in (([USER], TOOLS), ([USER, CALLS, WARM, COLD], ())):
        with pytest.raises(EngineError, match="the chat template of this model has no tools, or leaves them out"):
            format_.encode(talk, tools)


def test_a_template_that_wants_a_users_message_first_is_given_one() -> None:
    strict = """{% for m in messages %}{% if loop.first and m.role == 'assistant' %}
    {{- raise_exception('begin with user') }}{% endif %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"""
    talk = [Message("assistant", "Welcome."), USER]
    assert spoken(smollm(), templated(smollm(), strict).encode(talk)) == "<user><assistant>Welcome.<user>Warm in Vals?"
    lax = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    assert spoken(smollm(), templated(smollm(), lax).encode(talk)) == "<assistant>Welcome.<user>Warm in Vals?"


# Templates that mistral-common writes

THEIRS: dict[str, tuple[str, ...]] = {
    "mistral-v3-tekken": ("a system prompt behind the first question", "a result in JSON", "an empty result"),
    "mistral-v7-tekken": ("two system prompts", "a reply first"),
    "mistral-v11": ("two system prompts", "a reply first"),
    "mistral-v13": ("two system prompts", "a reply first"),
}
"""Formats, and where their templates give others than mistral-common's own ids."""


@pytest.mark.parametrize("kind", THEIRS)
def test_mistrals_templates_give_the_ids_of_mistrals_formats(kind: str) -> None:
    """Not where text ends in spaces, or arguments are no JSON: the templates leave them as they are."""
    form, vocabulary, tokenizer = mistral_format(kind)
    file = tokenizer.instruct_tokenizer.tokenizer.file_path
    template = templated(vocabulary, convert_tokenizer_to_chat_template(file, plain_thinking_support=False))
    for name, turns in {**mistrals.TALKS, **mistrals.CALLING}.items():
        for tools in (None, mistrals.TOOLS):
            same = template.encode(*told(turns, tools)) == form.encode(*told(turns, tools))
            assert same == (name not in {*THEIRS[kind], "spaces at the ends", "arguments that are no JSON"}), name
    asked = [*mistrals.CALLING["parallel calls"], said("assistant", "So")]
    expected = reference(kind, asked, mistrals.TOOLS, continued=True)
    assert template.encode(*told(asked, mistrals.TOOLS)) == expected
