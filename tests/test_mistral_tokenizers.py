"""Mistral's tokenizers beside the vocabularies that gguf-py writes of them and llama.cpp reads."""

import json
import shutil
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from runtime.errors import ModelFileError
from runtime.messages import Message, Tool, ToolCall
from runtime.native import Vocabulary
from runtime.prompts import KINDS, packaged_vocabulary, prompter
from tests.vocabularies import (
    file_of,
    large,
    mistral_format,
    opened,
    tekken,
    tekken_file,
    write_tekken_vocabulary,
)

TEKKEN = {"mistral-v3-tekken": "v3", "mistral-v7-tekken": "v7", "mistral-v11": "v11", "mistral-v13": "v13"}


def same_vocabulary(kind: str, tokenizer: Path | None, gguf: Vocabulary) -> None:
    own = packaged_vocabulary(kind, tokenizer)
    assert (own.n_tokens, own.bos, own.eos, own.adds_bos) == (gguf.n_tokens, gguf.bos, gguf.eos, gguf.adds_bos)
    for token in range(1, own.n_tokens):  # 0 is <unk>, which SentencePiece's GGUFs have as a type of its own
        told = own.text(token), own.piece(token), own.is_control(token)
        assert told == (gguf.text(token), gguf.piece(token), gguf.is_control(token)), token
    for text in ("Où? 東京\n👩‍👩‍👧  1234", "[INST]</s>"):
        assert own.tokenize(text, bos=True) == gguf.tokenize(text, bos=True)
        assert b"".join(map(own.piece, own.tokenize(text))).decode().strip() == text
    with pytest.raises(NotImplementedError):
        own.tokenize("</s>", special=True)


@pytest.mark.parametrize("version", [1, 3, 7])
def test_sentencepiece_is_told_as_its_gguf(version: int) -> None:
    same_vocabulary(f"mistral-v{version}", None, large(version))


@pytest.mark.parametrize("kind", TEKKEN)
def test_tekken_is_told_as_its_gguf(kind: str) -> None:
    same_vocabulary(kind, tekken_file(TEKKEN[kind]), tekken(TEKKEN[kind]))


@pytest.mark.slow
def test_the_whole_tekken_that_mistral_common_has(tmp_path: Path) -> None:
    shutil.copy(file_of(3).parent / "tekken_240718.json", tmp_path / "tekken.json")
    write_tekken_vocabulary(tmp_path / "whole.gguf", tmp_path / "tekken.json")
    vocabulary = opened(tmp_path / "whole.gguf")
    same_vocabulary("mistral-v3-tekken", None, vocabulary)
    request = [Message("user", "Où? 東京")]
    ids = prompter("mistral-v3-tekken", vocabulary, template=None, tokenizer=None).encode(request)
    pieces = MistralTokenizer.v3(is_tekken=True).instruct_tokenizer.tokenizer
    assert ids == [1, 3, *pieces.encode("Où? 東京", bos=False, eos=False), 4]


def test_what_v11_and_v13_write_by_hand() -> None:
    """v11 names a call's id, v13 does not; v13 puts the tools before the first question."""

    def text(kind: str) -> str:
        form, vocabulary, _ = mistral_format(kind)
        calls = (ToolCall("abcdefgh1", "f", '{"a":1}'), ToolCall("abcdefgh2", "g", "{}"))
        results = [Message("tool", "2", call_id="abcdefgh2"), Message("tool", "1", call_id="abcdefgh1")]
        talk = [Message("user", "A"), Message("assistant", "B", calls), *results, Message("user", "C")]
        ids = form.encode(talk, [Tool("f", "", "{}")])
        return "".join(vocabulary.text(token) for token in ids).replace("Ġ", " ")

    tools = (
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]'
        "[/AVAILABLE_TOOLS]"
    )
    assert text("mistral-v11") == (
        '<s>[INST]A[/INST]B[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abcdefgh2[ARGS]{}</s>'
        "[TOOL_RESULTS]abcdefgh1[TOOL_CONTENT]1[/TOOL_RESULTS][TOOL_RESULTS]abcdefgh2[TOOL_CONTENT]2[/TOOL_RESULTS]"
        f"{tools}[INST]C[/INST]"
    )
    assert text("mistral-v13") == (
        f'<s>{tools}[INST]A[/INST]B[TOOL_CALLS]f[ARGS]{{"a": 1}}[TOOL_CALLS]g[ARGS]{{}}</s>'
        "[TOOL_RESULTS]1[/TOOL_RESULTS][TOOL_RESULTS]2[/TOOL_RESULTS][INST]C[/INST]"
    )


# What is refused


def refusal(kind: str, tokenizer: Path | None, vocabulary: Vocabulary) -> str:
    with pytest.raises(ModelFileError) as caught:
        prompter(kind, vocabulary, template=None, tokenizer=tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    assert "models.yaml" in message
    return message


def test_a_format_whose_tokenizer_comes_with_the_model_needs_its_file() -> None:
    for kind in ("mistral-v7-tekken", "mistral-v11", "mistral-v13"):
        assert refusal(kind, None, tekken("v11")).startswith(f"{kind} needs the model's own tekken.json")


def test_a_tekken_file_of_another_version_is_refused() -> None:
    for kind, version in TEKKEN.items():
        others = [other for other in TEKKEN.items() if other[0] != kind]
        for right, other in others:
            message = refusal(kind, tekken_file(other), tekken(version))
            assert f"a tokenizer of {other}, not {version}; take {right} as `prompt`" in message


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "template"])
def test_files_that_are_no_tokenizer_are_refused(kind: str, tmp_path: Path) -> None:
    assert "no such tokenizer file" in refusal(kind, tmp_path / "none", large(3))
    wanted = "not a tekken.json" if kind in TEKKEN else "not a tokenizer.model of SentencePiece"
    whole = json.loads(tekken_file("v11").read_text())
    broken = {**whole, "vocab": [{**whole["vocab"][0], "token_bytes": "?"}, *whole["vocab"][1:]]}
    other = file_of(3) if kind in TEKKEN else tekken_file("v11")
    assert wanted in refusal(kind, other, large(3))
    for content in (
        "",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({"config": {"version": "v11"}}),
        json.dumps(broken),
    ):
        (tmp_path / "tekken.json").write_text(content)
        assert wanted in refusal(kind, tmp_path / "tekken.json", large(3))


def test_the_first_differing_token_is_named(tmp_path: Path) -> None:
    whole = json.loads(tekken_file("v11").read_text())
    tokens = [
        {**token, "rank": i} for i, token in enumerate((*whole["vocab"][:2000], *reversed(whole["vocab"][2000:])))
    ]
    (tmp_path / "tekken.json").write_text(json.dumps({**whole, "vocab": tokens}))
    message = refusal("mistral-v11", tmp_path / "tekken.json", tekken("v11"))
    assert message.startswith(f"token 3000 is {tekken('v11').text(3999)!r} (text) in {tmp_path}")
    assert f"but {tekken('v11').text(3000)!r} (text) in the GGUF" in message
    assert "131072 tokens, the GGUF 4000" in refusal("mistral-v3-tekken", None, tekken("v3"))
    assert "token 20 is '[ARGS]'" in refusal("mistral-v11", tekken_file("v11"), tekken("v7"))


def test_reserved_tokens_may_be_named_otherwise(tmp_path: Path) -> None:
    whole = json.loads(tekken_file("v13").read_text())
    without_thoughts = {**whole, "special_tokens": whole["special_tokens"][:22]}
    (tmp_path / "tekken.json").write_text(json.dumps(without_thoughts))
    prompter("mistral-v13", tekken("v13"), template=None, tokenizer=tmp_path / "tekken.json")
    without_calls = {**whole, "special_tokens": whole["special_tokens"][:20]}
    (tmp_path / "tekken.json").write_text(json.dumps(without_calls))
    assert "has no control token [ARGS]" in refusal("mistral-v13", tmp_path / "tekken.json", tekken("v13"))
    assert refusal("mistral-v7-tekken", tekken_file("v7"), tekken("v11")).startswith("token 20 is '<SPECIAL_20>'")
