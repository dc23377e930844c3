"""The converted demo model's tokenizer, as llama.cpp reads it, against SentencePiece on the file it was made from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from quant.convert import make_levels
from runtime.events import EngineSettings
from runtime.messages import Message
from runtime.native import Model
from runtime.prompts import prompter

DEMO = Path(__file__).parents[1] / "quant" / "demo"
TOKENIZER = DEMO / "model" / "tokenizer.model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The demo model's GGUF, its vocabulary only."""
    made = make_levels(DEMO / "model", "demo", ("Q8_0",), tmp_path_factory.mktemp("levels"), threads=2)
    model = Model(made["Q8_0"], EngineSettings(n_ctx=64), vocab_only=True)
    yield model
    model.close()


@pytest.fixture(scope="module")
def pieces() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(TOKENIZER))


@pytest.mark.parametrize("name", ["prose", "code", "definitions"])
def test_llama_cpp_tokenizes_as_sentencepiece_does(name: str, model: Model, pieces: SentencePieceProcessor) -> None:
    text = (DEMO / "eval" / f"{name}.txt").read_text(encoding="utf-8")
    ids = model.vocabulary.tokenize(text)
    assert len(ids) > 40_000
    assert ids == pieces.encode(text)


def test_texts_that_spell_tokens_are_only_text(model: Model, pieces: SentencePieceProcessor) -> None:
    text = "<s>[INST] a [/INST]</s> <unk><0x0A> \n\n  \t é東👩‍👩‍👧 \0"
    ids = model.vocabulary.tokenize(text)
    assert ids == pieces.encode(text)
    assert not any(map(model.vocabulary.is_control, ids))


def test_the_converted_vocabulary_fits_its_tokenizer(model: Model, pieces: SentencePieceProcessor) -> None:
    format_ = prompter("mistral-v3", model.vocabulary, template=None, tokenizer=TOKENIZER)
    assert format_.encode([Message("user", "Hello")]) == [1, 3, *pieces.encode("Hello"), 4]


def test_the_converted_template_gives_llama_cpps_ids(model: Model, pieces: SentencePieceProcessor) -> None:
    """Its spaces come on top of SentencePiece's dummy space, which mistral-common's prompt leaves at one."""
    talk = [Message("user", "Define a horse."), Message("assistant", "An animal."), Message("user", "Why?")]
    format_ = prompter("template", model.vocabulary, template=model.chat_template(), tokenizer=None)
    text = "<s>[INST] Define a horse.[/INST] An animal.</s>[INST] Why?[/INST]"
    assert format_.encode(talk) == model.vocabulary.tokenize(text, special=True)
    assert format_.encode(talk) == [
        *(1, 3, *pieces.encode(" Define a horse."), 4, *pieces.encode(" An animal."), 2, 3, *pieces.encode(" Why?"), 4),
    ]
