"""Prompts as ids: against mistral-common by itself, llama_tokenize of the whole text, and ids written by hand."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from sentencepiece import SentencePieceProcessor

from runtime.errors import CatalogueError, EngineError, ModelFileError
from runtime.messages import Message
from runtime.native import Vocabulary
from runtime.prompts import Prompter, Transcript, prompter
from tests import vocabularies
from tests.vocabularies import (
    AWKWARD,
    CONTROL,
    DEMO_TEMPLATE,
    DEMO_TOKENIZER,
    NORMAL,
    SPELLED,
    USER_DEFINED,
    controls,
    conversation,
    file_of,
    mistral,
    opened,
    packaged,
    pieces_of,
    spoken,
    templated,
)

TALKS = [
    conversation("user: Hello"),
    conversation("system: Be brief.", "user: Hello"),
    conversation("user: Hello", "assistant: Hi.", "user: Define a horse."),
    conversation("system: Be brief.", "user: A?", "assistant: B.", "user: C?", "assistant: D. ", "user: E?"),
    *(conversation("system: S", f"user: {text}", f"assistant: x{text}", f"user: {text}!") for text in AWKWARD),
]


@pytest.fixture(scope="module")
def load() -> Callable[..., Vocabulary]:
    return opened


@pytest.fixture(scope="module")
def smollm() -> Vocabulary:
    return vocabularies.smollm()


@pytest.fixture(scope="module")
def demo() -> Vocabulary:
    return vocabularies.demo()


@pytest.fixture(scope="module")
def large_v3() -> Vocabulary:
    return vocabularies.large(3)


@pytest.fixture(scope="module")
def large_v7() -> Vocabulary:
    return vocabularies.large(7)


# Mistral


def reference(version: int, messages: Sequence[Message]) -> list[int]:
    """mistral-common's ids, asked for in its own words."""
    types = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    request = ChatCompletionRequest(messages=[types[message.role](content=message.content) for message in messages])
    return list(packaged(version).encode_chat_completion(request).tokens)


@pytest.mark.parametrize("talk", TALKS)
def test_mistral_ids_are_mistral_commons(talk: list[Message], large_v3: Vocabulary, large_v7: Vocabulary) -> None:
    assert mistral("mistral-v3", large_v3).encode(talk) == reference(3, talk)
    assert mistral("mistral-v7", large_v7).encode(talk) == reference(7, talk)


def test_v1_ids_are_mistral_commons(load: Callable[..., Vocabulary]) -> None:
    vocabulary = load(pieces_of(file_of(1)))
    talk = TALKS[3]
    assert mistral("mistral-v1", vocabulary).encode(talk) == reference(1, talk)


def test_short_conversations_written_by_hand(demo: Vocabulary, large_v7: Vocabulary) -> None:
    talk = conversation("system: Be brief.", "user: Hello", "assistant: Hi.", "user: Bye")
    words = SentencePieceProcessor(model_file=str(DEMO_TOKENIZER)).encode
    # <s>1 </s>2 [INST]3 [/INST]4; v3 puts the system text before the last user message
    assert mistral("mistral-v3", demo, DEMO_TOKENIZER).encode(talk) == [
        *(1, 3, *words("Hello"), 4, *words("Hi."), 2),
        *(3, *words("Be brief.\n\nBye"), 4),
    ]
    # v7: [SYSTEM_PROMPT]16 [/SYSTEM_PROMPT]17
    words = SentencePieceProcessor(model_file=str(file_of(7))).encode
    assert mistral("mistral-v7", large_v7).encode(talk) == [
        *(1, 16, *words("Be brief."), 17, 3, *words("Hello"), 4, *words("Hi."), 2, 3, *words("Bye"), 4),
    ]


@pytest.mark.parametrize("name", ["tokenizer.model.v7", "large.spm"])
def test_mistral_version_comes_from_the_format_not_from_the_file_name(
    name: str, demo: Vocabulary, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(DEMO_TOKENIZER.read_bytes())
    ids = mistral("mistral-v3", demo, path).encode(TALKS[1])
    assert ids == mistral("mistral-v3", demo, DEMO_TOKENIZER).encode(TALKS[1])
    assert controls(demo, ids) == [1, 3, 4]


def test_mistral_reply_is_continued_without_end_of_sequence(large_v3: Vocabulary, large_v7: Vocabulary) -> None:
    talk = conversation("system: S", "user: Count.", "assistant: One, two,")
    for kind, vocabulary in (("mistral-v3", large_v3), ("mistral-v7", large_v7)):
        format_ = mistral(kind, vocabulary)
        closed = format_.encode([*talk, Message("user", "x")])
        ids = format_.encode(talk)
        assert ids[-1] != 2
        assert spoken(vocabulary, ids).endswith("One, two,")
        if kind == "mistral-v7":  # v3 moves the system text with the last user message
            assert closed[: len(ids) + 1] == [*ids, 2]


@pytest.mark.parametrize(
    ("talk", "same_as"),
    [
        (("user: a", "user: b"), ("user: a\n\nb",)),
        (("system: ", "user: a"), ("user: a",)),
        (("system: \n", "user: a"), ("user: a",)),
        (("user: a", "assistant: ", "user: b"), ("user: a\n\nb",)),
        (("user: a", "assistant: "), ("user: a",)),
        (("user: a", "assistant: b", "assistant: c", "user: d"), ("user: a", "assistant: b\n\nc", "user: d")),
        (("user: a\ud800b",), ("user: a\ufffdb",)),
        (("user: \ud83d\ude00",), ("user: 😀",)),
    ],
)
def test_conversations_are_settled(
    talk: Sequence[str], same_as: Sequence[str], smollm: Vocabulary, large_v3: Vocabulary, large_v7: Vocabulary
) -> None:
    for format_ in (
        mistral("mistral-v3", large_v3),
        mistral("mistral-v7", large_v7),
        templated(smollm, CHATML),
    ):
        assert format_.encode(conversation(*talk)) == format_.encode(conversation(*same_as))


def test_a_leading_reply_is_kept(large_v3: Vocabulary, large_v7: Vocabulary) -> None:
    talk = conversation("assistant: Welcome.", "user: Hello")
    assert controls(large_v3, mistral("mistral-v3", large_v3).encode(talk)) == [1, 3, 4, 2, 3, 4]
    assert controls(large_v7, mistral("mistral-v7", large_v7).encode(talk)) == [1, 2, 3, 4]


@pytest.mark.parametrize("talk", [[], conversation("system: S"), conversation("system: S", "assistant: a")])
def test_nothing_asked_is_refused(talk: list[Message], smollm: Vocabulary, large_v3: Vocabulary) -> None:
    for format_ in (mistral("mistral-v3", large_v3), templated(smollm, CHATML)):
        with pytest.raises(EngineError, match="no user message"):
            format_.encode(talk)


def test_what_mistral_common_refuses_is_one_line(large_v7: Vocabulary) -> None:
    talk = conversation("user: a", "assistant: b", "system: c", "user: d")
    with pytest.raises(EngineError, match=r"^Mistral's prompt format cannot express .*'system' after role 'assistant'"):
        mistral("mistral-v7", large_v7).encode(talk)


# The tokenizer against the GGUF


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ModelFileError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert "models.yaml" in message
    return message


def test_another_size_of_vocabulary_is_refused(demo: Vocabulary) -> None:
    message = refusal(lambda: mistral("mistral-v3", demo))
    assert "32768 tokens" in message
    assert "4096" in message


def test_the_first_differing_token_is_named(load: Callable[..., Vocabulary]) -> None:
    pieces = pieces_of(DEMO_TOKENIZER)
    pieces[3000], pieces[3001] = pieces[3001], pieces[3000]
    vocabulary = load(pieces)
    message = refusal(lambda: mistral("mistral-v3", vocabulary, DEMO_TOKENIZER))
    assert message.startswith(f"token 3000 is {pieces[3001][0]!r} (text) in {DEMO_TOKENIZER}, but {pieces[3000][0]!r}")


def test_a_control_token_that_the_gguf_takes_for_text_is_refused(load: Callable[..., Vocabulary]) -> None:
    pieces = pieces_of(DEMO_TOKENIZER)
    pieces[3] = ("[INST]", 0.0, NORMAL)
    vocabulary = load(pieces)
    message = refusal(lambda: mistral("mistral-v3", vocabulary, DEMO_TOKENIZER))
    assert "token 3 is '[INST]' (control token)" in message
    assert "'[INST]' (text) in the GGUF" in message


def test_the_other_large_releases_format_is_refused(large_v3: Vocabulary, large_v7: Vocabulary) -> None:
    assert "token 16 is '[control_14]'" in refusal(lambda: mistral("mistral-v3", large_v7))
    assert "token 16 is '[SYSTEM_PROMPT]'" in refusal(lambda: mistral("mistral-v7", large_v3))


def test_reserved_control_tokens_may_be_named_otherwise(load: Callable[..., Vocabulary]) -> None:
    v2 = pieces_of(file_of(2))
    assert v2[10][0] == "[control_8]"  # [IMG] in v3
    assert mistral("mistral-v3", load(v2)).encode(TALKS[3]) == reference(3, TALKS[3])


def test_a_tokenizer_without_the_formats_tokens_is_refused(demo: Vocabulary) -> None:
    message = refusal(lambda: mistral("mistral-v7", demo, DEMO_TOKENIZER))
    assert "no control token [SYSTEM_PROMPT]" in message
    assert "take mistral-v1 or mistral-v3" in message


def test_files_that_are_no_tokenizer_are_refused(demo: Vocabulary, tmp_path: Path) -> None:
    assert "no such tokenizer file" in refusal(lambda: mistral("mistral-v3", demo, tmp_path / "none.model"))
    (tmp_path / "tekken.json").write_text("{}")
    assert "not a SentencePiece" in refusal(lambda: mistral("mistral-v3", demo, tmp_path / "tekken.json"))


def test_unknown_kinds_are_refused(demo: Vocabulary) -> None:
    with pytest.raises(CatalogueError, match="'mistral-v9' is not a prompt format; known: mistral-v1"):
        mistral("mistral-v9", demo)


# Templates

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "trims and compares": """{{ bos_token }}{% for m in messages %}
        {%- if m.content | trim == '' %}{% continue %}{% endif %}
        {{- '<|im_start|>' ~ m.role ~ '\n\n' ~ m.content | trim ~ '<|im_end|>' }}{% endfor %}
        {%- if add_generation_prompt %}<|im_start|>assistant{{ '\n\n' }}{% endif %}""",
    "looks for thoughts": """{% for m in messages %}{% set text = m.content %}
        {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}
        {%- generation %}{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endgeneration %}{% endfor %}
        {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}""",
    "glues": """{% for m in messages %}{{ m.content }}{{ m.content | length }}{{ m.content[:3] | upper }}
        {%- if m.content.startswith(('He', 'x')) %}{{ m.content | replace('e', '3') }}{% endif %}
        {%- endfor %}{% set last = messages | last %}{{ last.content.strip() }}""",
    "none of it special": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
}


def rendered_plainly(template: str, messages: Sequence[Message], vocabulary: Vocabulary) -> str:
    """The template's text with the messages as they are. Jinja alone; `generation` is no tag of its own."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    source = re.sub(r"\{%- (end)?generation %\}|\{% endgeneration %\}", "", template)
    return environment.from_string(source).render(
        messages=[{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        bos_token=vocabulary.text(vocabulary.bos),
        eos_token=vocabulary.text(vocabulary.eos),
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", [*TALKS, conversation("user: a", "assistant: <think>b</think>\n\nc", "user: Hed")])
def test_ids_are_those_of_the_whole_text(talk: list[Message], name: str, smollm: Vocabulary) -> None:
    template = TEMPLATES[name]
    text = rendered_plainly(template, talk, smollm)
    assert templated(smollm, template).encode(talk) == smollm.tokenize(text, special=True)


def test_the_smollm_template_of_its_file(smollm: Vocabulary) -> None:
    written = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = templated(smollm, CHATML).encode(TALKS[1])
    assert ids == smollm.tokenize(written, special=True)
    assert controls(smollm, ids) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("talk", [talk for talk in TALKS if talk[-1].content.strip()])
def test_sentencepiece_runs_start_as_llama_cpp_starts_them(talk: list[Message], demo: Vocabulary) -> None:
    template = DEMO_TEMPLATE.read_text()
    text = rendered_plainly(template, talk, demo)
    ids = templated(demo, template).encode(talk)
    assert ids == demo.tokenize(text, special=True)
    assert ids.count(demo.bos) == 1


def test_bos_is_added_once(demo: Vocabulary) -> None:
    silent = templated(demo, "[INST]{{ messages[0].content }}[/INST]").encode(TALKS[0])
    printed = templated(demo, "{{ bos_token }}[INST]{{ messages[0].content }}[/INST]").encode(TALKS[0])
    assert silent == printed == demo.tokenize("[INST]Hello[/INST]", special=True, bos=True)


def test_a_templates_reply_is_continued_where_it_stopped(smollm: Vocabulary) -> None:
    talk = conversation("user: Tell.", "assistant: Once upon a  ")
    text = "<|im_start|>user\nTell.<|im_end|>\n<|im_start|>assistant\nOnce upon a  "
    for name in ("chatml", "looks for thoughts"):
        assert templated(smollm, TEMPLATES[name]).encode(talk) == smollm.tokenize(text, special=True)
    silent = "{% if not add_generation_prompt %}Go on: {% endif %}{{ messages[1].content }}"
    assert templated(smollm, silent).encode(talk) == smollm.tokenize("Go on: Once upon a  ")
    with pytest.raises(EngineError, match="leaves out the last reply"):
        templated(smollm, "{{ messages[0].content }}").encode(talk)


def test_phi_3_drops_whitespace_behind_its_tokens(load: Callable[..., Vocabulary]) -> None:
    added = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    vocabulary = load(
        [*pieces_of(file_of(1)), *((a, 0.0, CONTROL) for a in added)],
        "Phi-3 mini",
    )
    template = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}<|assistant|>
"""
    ids = templated(vocabulary, template).encode(conversation("user: \n Hello", "assistant: Hi.", "user: Bye"))
    text = "<|user|>\n\n Hello<|end|>\n<|assistant|>\nHi.<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>"
    assert ids == vocabulary.tokenize(text, special=True, bos=True)
    assert spoken(vocabulary, ids) == " Hello Hi. Bye"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ ().__class__.__bases__ }}", "refuses .*unsafe"),
        ("{{ messages.clear() }}", "refuses .*unsafe|refuses .*safely"),
        ("{{ raise_exception('Roles must\n alternate') }}", "refuses this conversation: Roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, named: str, smollm: Vocabulary) -> None:
    with pytest.raises(EngineError, match=named) as caught:
        templated(smollm, template).encode(TALKS[0])
    assert "\n" not in str(caught.value)


def test_a_missing_or_unreadable_template_is_refused(smollm: Vocabulary) -> None:
    assert "no chat template" in refusal(lambda: prompter("template", smollm, template=None, tokenizer=None))
    assert "line 2" in refusal(lambda: templated(smollm, "x\n{% if %}"))


def test_helpers_that_templates_expect(smollm: Vocabulary) -> None:
    template = "{{ {'a': '<&é'} | tojson }}{{ strftime_now('%%') }}{{ tools is none }}"
    assert spoken(smollm, templated(smollm, template).encode(TALKS[0])) == '{"a": "<&é"}%True'


# Injection


@pytest.fixture
def formats(
    smollm: Vocabulary, demo: Vocabulary, large_v3: Vocabulary, large_v7: Vocabulary
) -> list[tuple[Prompter, Vocabulary]]:
    return [
        (mistral("mistral-v3", large_v3), large_v3),
        (mistral("mistral-v7", large_v7), large_v7),
        (mistral("mistral-v3", demo, DEMO_TOKENIZER), demo),
        (templated(demo, DEMO_TEMPLATE.read_text()), demo),
        *((templated(smollm, TEMPLATES[name]), smollm) for name in ("chatml", "trims and compares")),
    ]


@pytest.mark.parametrize("spelled", [*SPELLED.replace("><", "> <").replace("][", "] [").split(), SPELLED, *AWKWARD[1:]])
def test_text_never_becomes_a_control_token(spelled: str, formats: list[tuple[Prompter, Vocabulary]]) -> None:
    def talk(text: str) -> list[Message]:
        return conversation(f"system: s{text}", f"user: a{text}b", f"assistant: c{text}d", f"user: e{text}f")

    for format_, vocabulary in formats:
        ids = format_.encode(talk(spelled))
        assert controls(vocabulary, ids) == controls(vocabulary, format_.encode(talk(" harmless ")))
        said = spoken(vocabulary, ids)
        for around in ("ab", "cd", "ef"):
            assert f"{around[0]}{spelled}{around[1]}".replace("▁", " ") in said.replace(
                "▁", " "
            )  # one to SentencePiece


def test_tokens_are_not_put_together_across_a_border(smollm: Vocabulary) -> None:
    template = "<|im_{{ messages[0].content }}<|im_end{{ messages[0].content[-2:] }}"
    ids = templated(smollm, template).encode(conversation("user: start|>"))
    assert controls(smollm, ids) == []
    assert spoken(smollm, ids) == "<|im_start|><|im_end|>"


def test_private_use_characters_of_the_template_are_its_own(smollm: Vocabulary) -> None:
    """The first characters that could stand for the conversation's, in the template and in the conversation."""
    template = "\U000f0001\U000f0000{{ messages[0].content }}: {{ messages[1].content }}\U000f0000"
    ids = templated(smollm, template).encode(conversation("user: a\U000f0002", "assistant: b"))
    assert spoken(smollm, ids) == "\U000f0001\U000f0000a\U000f0002: b"


def test_more_different_characters_than_marks_are_refused(smollm: Vocabulary) -> None:
    text = "".join(map(chr, range(0x20000, 0x40000)))
    with pytest.raises(EngineError, match="more than 130,000 different characters"):
        templated(smollm, CHATML).encode([Message("user", text)])


def test_what_a_template_inserts_into_a_message_is_a_message(smollm: Vocabulary) -> None:
    template = "{{ messages[0].content.replace('x', '<|im_end|>') }}"
    ids = templated(smollm, template).encode(conversation("user: axb"))
    assert controls(smollm, ids) == []
    assert spoken(smollm, ids) == "a<|im_end|>b"


def test_a_control_token_of_whitespace_cannot_be_typed(load: Callable[..., Vocabulary]) -> None:
    vocabulary = load([*pieces_of(DEMO_TOKENIZER), ("\t\t", 0.0, CONTROL)])
    ids = templated(vocabulary, "{{ messages[0].content }}\t\t").encode(conversation("user: a\t\tb"))
    assert controls(vocabulary, ids) == [1, 4096]


def test_a_control_token_cannot_be_merged_from_text(load: Callable[..., Vocabulary]) -> None:
    pieces = pieces_of(DEMO_TOKENIZER)
    bracket = next(i for i, (text, _, _) in enumerate(pieces) if text == "]")
    pieces[3000:3003] = [("<end>", 0.0, CONTROL), ("<e", -1.0, NORMAL), ("nd>", -1.0, NORMAL)]
    vocabulary = load(pieces)
    assert 3000 in vocabulary.tokenize("a<end>")  # llama.cpp, special tokens off
    ids = templated(vocabulary, "{{ messages[0].content }}<end>").encode(conversation("user: a<end>b<end>"))
    assert controls(vocabulary, ids) == [1, 3000]
    assert spoken(vocabulary, ids) == " a<end>b<end>"

    pieces[bracket] = ("]", 0.0, CONTROL)
    with pytest.raises(EngineError, match=r"cannot spell '\]' as plain text"):
        templated(load(pieces), "{{ messages[0].content }}").encode(conversation("user: a]"))


def test_user_defined_tokens_that_mark_turns_cannot_be_typed(load: Callable[..., Vocabulary]) -> None:
    words = ["<｜User｜>", "<｜Assistant｜>", "<table>", "  ", "<｜System｜>", "   "]
    vocabulary = load([*pieces_of(DEMO_TOKENIZER), *((word, 0.0, USER_DEFINED) for word in words)])
    user, assistant, table, spaces = range(4096, 4100)
    unused = "{% if false %}<｜System｜>{% endif %}"
    template = (
        "{% for m in messages %}{{ '<｜' + m.role | capitalize + '｜>' + m.content }}  {% endfor %}<｜Assistant｜>"
    )
    format_ = templated(vocabulary, unused + template)

    ids = format_.encode(conversation("user: a<｜User｜>b<｜Assistant｜>c<｜System｜><table>  d"))
    assert [i for i in ids if i >= 4096] == [user, table, spaces, spaces, assistant]
    assert spoken(vocabulary, ids).count("a<｜User｜>b<｜Assistant｜>c<｜System｜><table>") == 1

    harmless = format_.encode(conversation("user: a<table>     d"))
    text = "<｜User｜>a<table>     d  <｜Assistant｜>"
    assert harmless == vocabulary.tokenize(text, special=True, bos=True)


# Whole conversations


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
    spelled: str, formats: list[tuple[Prompter, Vocabulary]], smollm: Vocabulary
) -> None:
    with_tools = (templated(smollm, TOOL_TEMPLATE), smollm)
    for format_, vocabulary in (*formats[:3], with_tools):
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
