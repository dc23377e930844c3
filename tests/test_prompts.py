"""Mistral's prompts as ids: against mistral-common by itself and ids written by hand; tokenizers against GGUFs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from sentencepiece import SentencePieceProcessor

from runtime.errors import CatalogueError, EngineError, ModelFileError
from runtime.messages import Message
from runtime.native import Vocabulary
from tests import vocabularies
from tests.vocabularies import (
    CHATML,
    DEMO_TOKENIZER,
    NORMAL,
    TALKS,
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
    assert "take mistral-v1 or mistral-v3 as `prompt`" in message


def test_unknown_kinds_are_refused(demo: Vocabulary) -> None:
    with pytest.raises(CatalogueError, match="'mistral-v9' is not a prompt format; known: mistral-v1"):
        mistral("mistral-v9", demo)
