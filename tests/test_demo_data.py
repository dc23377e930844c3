"""The embedded model and texts are the ones that were trained and measured."""

import hashlib
import json
import re

from runtime.catalogue import Catalogue
from runtime.library import checkpoint_folder, shipped_catalogue
from tests.checkpoints import DEMO

FOLDER = DEMO.parent


def _sums() -> dict[str, str]:
    lines = (FOLDER / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    return {path: digest for digest, path in (line.split("  ") for line in lines)}


def test_every_file_is_the_one_that_was_summed() -> None:
    assert {path: hashlib.sha256((FOLDER / path).read_bytes()).hexdigest() for path in _sums()} == _sums()


def test_every_file_is_summed() -> None:
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == {*_sums(), "SHA256SUMS", "README.md"}


def test_the_catalogue_gives_the_shape_of_the_config() -> None:
    catalogue: Catalogue = shipped_catalogue()
    demo = catalogue.model("demo")
    assert checkpoint_folder(demo) == DEMO
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    shape = demo.shape
    assert shape is not None
    assert (shape.n_layers, shape.n_embd, shape.n_ff) == tuple(
        config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    assert (shape.n_heads, shape.n_heads_kv, shape.head_dim, shape.n_vocab, shape.tied) == tuple(
        config[key]
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings")
    )
    assert demo.context == config["max_position_embeddings"]


def test_every_training_text_has_its_licence() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (FOLDER / "licenses").iterdir()}
    assert "public domain" in texts.pop("King-James-Bible").lower()
    assert "public domain" in texts.pop("World-English-Bible").lower()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in texts.pop("Python-3.11.7")
    assert re.search(r"WordNet 3\.0.*Princeton University", texts.pop("WordNet-3.0"), re.DOTALL)
    assert texts == {}


def test_the_texts_to_measure_by_are_utf8_and_not_empty() -> None:
    for name in ("prose.txt", "code.txt", "definitions.txt"):
        assert len((FOLDER / "eval" / name).read_text(encoding="utf-8")) > 100_000
    lines = (FOLDER / "eval" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(len(json.loads(line)) == 2 for line in lines)
    assert lines
