"""Importance matrices in use: the blocks and types they lead to, and what is said of them, against llama-quantize.

tests/reference/demo-imatrix.gguf and .dat are llama-imatrix's own; demo-imatrix.json says what llama-quantize made of
the demo with each.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import safetensors
from numpy.typing import NDArray

from quant.blocks import SCALES, UnusableImportanceError, encode
from quant.header import Value, ValueType
from quant.imatrix import ImportanceMatrix, check_fits, imatrix_metadata, read_imatrix, without_entry
from quant.imatrix_file import ImatrixError
from quant.naming import hugging_face_name
from quant.recipes import TensorSpec, tensors, types
from runtime import ggml
from runtime.ggml import GgmlType
from runtime.levels import LEVELS, Shape
from tests.checkpoints import DEMO, DEMO_SHAPE, MISTRAL_LARGE_2, TINY
from tests.conversions import tensor_data
from tests.imatrices import (
    random_importance,
    random_model,
    widened,
    write_imatrix,
    write_model,
)
from tests.llama_quantize import llama_quantize, llama_quantize_status

REFERENCE_FOLDER = Path(__file__).parent / "reference"
REFERENCE = json.loads((REFERENCE_FOLDER / "demo-imatrix.json").read_text())["files"]

LAYERS = Shape(n_layers=8, n_embd=256, n_ff=256, n_heads=4, n_heads_kv=2, head_dim=8, n_vocab=64)
"""Deep enough for the rules that count layers; rows that 256 divides, and rows that it does not (attn_output)."""


def _matrix(values: Mapping[str, NDArray[np.float32]], datasets: tuple[str, ...] = (), n: int = 0) -> ImportanceMatrix:
    return ImportanceMatrix(Path("folder/some.gguf"), values, datasets, n, "0")


def _ones(n: int) -> NDArray[np.float32]:
    return np.ones(n, np.float32)


# Files of llama.cpp's own tools


@pytest.mark.parametrize("name", REFERENCE)
def test_a_file_of_llama_imatrix_makes_the_blocks_that_llama_quantize_made_with_it(name: str) -> None:
    matrix = read_imatrix(REFERENCE_FOLDER / name)
    check_fits(matrix, tensors(DEMO_SHAPE))
    stored: dict[str, Any] = {}
    for path in DEMO.glob("*.safetensors"):
        stored |= safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    specs = {spec.name: spec for spec in tensors(DEMO_SHAPE)}
    for level, made in REFERENCE[name]["levels"].items():
        for kind in ("attn_v", "attn_output", "ffn_down"):  # rows of the others are in another order
            spec = specs[f"blk.3.{kind}.weight"]
            bits = np.frombuffer(stored[hugging_face_name(spec.name)]["data"], np.uint16).reshape(spec.shape)
            blocks = encode(widened(bits), types(DEMO_SHAPE, level)[spec.name], matrix.of(spec))
            assert hashlib.sha256(blocks.tobytes()).hexdigest() == made["tensors"][spec.name], (level, kind)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_metadata_are_those_llama_quantize_wrote(name: str) -> None:
    ours = imatrix_metadata(read_imatrix(REFERENCE_FOLDER / name))
    theirs = {key: Value(ValueType[type_], data) for key, (type_, data) in REFERENCE[name]["metadata"].items()}
    assert list(ours.items()) == list(theirs.items())


def test_a_matrix_tells_its_file_texts_and_chunks() -> None:
    for name in REFERENCE:
        matrix = read_imatrix(REFERENCE_FOLDER / name)
        assert (matrix.path, matrix.sha256) == (REFERENCE_FOLDER / name, REFERENCE[name]["sha256"])
        assert (matrix.datasets, matrix.n_chunks, len(matrix.values)) == (("prose.txt",), 20, 56)
        assert without_entry(matrix, tensors(DEMO_SHAPE)) == ("output.weight", "token_embd.weight")
        with pytest.raises(ValueError, match="read-only"):
            next(iter(matrix.values.values()))[0] = 1


def test_means_are_given_where_the_file_has_them_and_the_tensor_uses_the_matrix(tmp_path: Path) -> None:
    names = ("blk.0.ffn_up.weight", "blk.0.ffn_down.weight", "token_embd.weight")
    up, down, embedding = (TensorSpec(name, (8, 4)) for name in names)
    norm = TensorSpec("blk.0.attn_norm.weight", (4,))
    some = np.array([-2, 0, 1, 2], np.float32)
    squares = {up.name: 2 * _ones(4), down.name: _ones(4), norm.name: 2 * _ones(4), embedding.name: _ones(3)}
    totals = {up.name: some, norm.name: some, embedding.name: _ones(3)}
    path = write_imatrix(tmp_path / "some.gguf", squares, {name: [2] for name in squares}, totals=totals)
    matrix = read_imatrix(path)
    check_fits(matrix, [up, down, embedding, norm])
    mean = matrix.mean_of(up)
    assert mean is not None
    assert mean.dtype == np.float32
    assert mean.tolist() == [-1, 0, 0.5, 1]
    assert [matrix.mean_of(spec) for spec in (down, embedding, norm)] == [None, None, None]
    with pytest.raises(ValueError, match="read-only"):
        mean[0] = 1
    for name in REFERENCE:
        assert read_imatrix(REFERENCE_FOLDER / name).means == {}


# Blocks and types, against llama_model_quantize


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[TensorSpec, Any], Any, Path]:
    """A random model, importance for it with what the rules are about, and llama.cpp's levels with and without it."""
    folder = tmp_path_factory.mktemp("levels")
    model, importance = random_model(LAYERS), random_importance(LAYERS)
    source = write_model(folder / "source.gguf", LAYERS, model)
    del importance["blk.1.attn_v.weight"]
    importance["output.weight"] = np.geomspace(1e-3, 1e3, LAYERS.n_embd, dtype=np.float32)
    importance["token_embd.weight"] = _ones(3)
    importance["blk.0.attn_norm.weight"] = _ones(LAYERS.n_embd)
    importance["blk.99.ffn_up.weight"] = _ones(3)
    for level in LEVELS:
        llama_quantize(source, folder / f"{level}-with.gguf", level, importance)
        llama_quantize(source, folder / f"{level}-without.gguf", level)
    return model, importance, folder


@pytest.mark.parametrize("level", LEVELS)
def test_every_tensor_of_every_level_has_the_bytes_of_llama_quantize(level: str, made: Any) -> None:
    model, importance, folder = made
    matrix = _matrix(importance)
    check_fits(matrix, list(model))
    theirs, chosen = tensor_data(folder / f"{level}-with.gguf"), types(LAYERS, level)
    matrices = [spec for spec in model if not spec.is_vector]
    assert [spec for spec in model if spec.is_vector and matrix.of(spec) is not None] == []
    ours = {spec.name: encode(widened(model[spec]), chosen[spec.name], matrix.of(spec)) for spec in matrices}
    assert [name for name, blocks in ours.items() if blocks.tobytes() != theirs[name]] == []
    without = tensor_data(folder / f"{level}-without.gguf")
    same = {spec.name for spec in matrices if without[spec.name] == theirs[spec.name]}
    blind = {name for name, type_ in chosen.items() if type_ is GgmlType.Q8_0}
    assert same == {*without_entry(matrix, matrices)} | blind


@pytest.mark.parametrize("level", LEVELS)
def test_no_level_chooses_other_types_with_a_matrix(level: str, made: Any) -> None:
    # src/llama-quant.cpp asks has_imatrix at IQ3_XXS, IQ4_NL, IQ4_XS, Q4_0 and Q5_0 only (lines 575, 631, 654, 661)
    paths = [made[2] / f"{level}-{which}.gguf" for which in ("with", "without")]
    found = [{tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} for path in paths]
    assert found[0] == found[1] == {name: type_.name for name, type_ in types(LAYERS, level).items()}


def test_the_embedding_of_a_tied_model_uses_its_entry(tmp_path: Path) -> None:
    shape = Shape(1, 64, 64, 2, 1, 32, 96, tied=True)
    model = random_model(shape)
    matrix = _matrix({"token_embd.weight": np.geomspace(1, 1e4, 64, dtype=np.float32)})
    check_fits(matrix, list(model))
    spec = next(spec for spec in model if spec.name == "token_embd.weight")
    source = write_model(tmp_path / "source.gguf", shape, model)
    theirs = gguf.GGUFReader(llama_quantize(source, tmp_path / "made.gguf", "Q4_K_M", matrix.values)).tensors
    found = {tensor.name: tensor for tensor in theirs}[spec.name]
    type_ = GgmlType[found.tensor_type.name]
    assert encode(widened(model[spec]), type_, matrix.of(spec)).tobytes() == found.data.tobytes()


@cache
def _ggml() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return library


def test_no_type_of_bise_requires_a_matrix() -> None:
    assert not any(_ggml().ggml_quantize_requires_imatrix(type_) for type_ in GgmlType)
    assert _ggml().ggml_quantize_requires_imatrix(gguf.GGMLQuantizationType.IQ2_XS)


# Importance too large for sums over a block


@pytest.mark.parametrize("type_", [type_ for type_ in GgmlType if type_.is_quantized and type_ is not GgmlType.Q8_0])
def test_the_scales_of_a_block_lie_where_ggml_looks_for_faults(type_: GgmlType) -> None:
    n_bytes = ggml.block_bytes(type_)
    faulty = set()
    for at in range(0, n_bytes - 1, 2):
        block = np.zeros(n_bytes, np.uint8)
        block[at : at + 2] = 0x00, 0x7C  # an infinite float16
        if not _ggml().ggml_validate_row_data(type_, block.ctypes.data, n_bytes):
            faulty.add(at)
    assert faulty == set(SCALES[type_])


@pytest.mark.parametrize("level", ["Q2_K", "Q4_K_M", "Q5_K_S"])
def test_importance_that_overflows_is_refused_as_llama_quantize_refuses_it(level: str, tmp_path: Path) -> None:
    spec = TensorSpec("blk.0.ffn_up.weight", (256, 256))
    model = random_model(Shape(1, 256, 256, 4, 2, 8, 64))
    importance = {spec.name: np.full(256, 3e38, np.float32)}
    source = write_model(tmp_path / "source.gguf", Shape(1, 256, 256, 4, 2, 8, 64), model)
    assert llama_quantize_status(source, tmp_path / "made.gguf", level, importance) == 1
    type_ = types(Shape(1, 256, 256, 4, 2, 8, 64), level)[spec.name]
    with pytest.raises(
        UnusableImportanceError, match=rf"^blk\.0\.ffn_up\.weight cannot be {type_.name} .* up to 3e\+38, .*; make the"
    ):
        encode(widened(model[spec]), type_, importance[spec.name], spec.name)


# Whether it fits a model


def test_a_matrix_of_another_width_is_refused_with_the_tensor_and_both_sizes() -> None:
    importance = random_importance(TINY)
    importance["blk.1.ffn_down.weight"] = _ones(64)
    with pytest.raises(
        ImatrixError,
        match=r"^folder/some\.gguf: 64 values for blk\.1\.ffn_down\.weight, whose rows have 96 weights; name the ",
    ):
        check_fits(_matrix(importance), tensors(TINY))


def test_a_matrix_of_nothing_in_the_model_is_refused() -> None:
    others = {f"blk.{i}.attn_qkv.weight": _ones(64) for i in range(2)} | {"blk.0.attn_norm.weight": _ones(64)}
    with pytest.raises(ImatrixError, match=r"none of its 3 entries is of a tensor of this model .* 'blk\.0\.attn_norm"):
        check_fits(_matrix(others), tensors(TINY))


def test_a_tensor_of_which_nothing_matters_is_refused() -> None:
    importance = random_importance(TINY)
    importance["blk.1.attn_q.weight"] *= 0
    with pytest.raises(ImatrixError, match=r"all values for blk\.1\.attn_q\.weight are 0, and would make it 0; "):
        check_fits(_matrix(importance), tensors(TINY))
    importance["blk.1.attn_q.weight"][7] = 1e-30
    check_fits(_matrix(importance), tensors(TINY))


def test_tensors_without_entry_are_named() -> None:
    importance = random_importance(MISTRAL_LARGE_2)
    matrix = _matrix(importance | {"blk.88.ffn_up.weight": _ones(1)})
    check_fits(matrix, tensors(MISTRAL_LARGE_2))
    assert without_entry(matrix, tensors(MISTRAL_LARGE_2)) == ("output.weight", "token_embd.weight")
    del importance["blk.7.attn_k.weight"]
    assert "blk.7.attn_k.weight" in without_entry(_matrix(importance), tensors(MISTRAL_LARGE_2))


# What a GGUF file made with it says


def test_what_the_matrix_does_not_say_is_left_out_of_the_metadata() -> None:
    assert imatrix_metadata(_matrix({"a": _ones(1), "b": _ones(1)})) == {
        "quantize.imatrix.file": Value(ValueType.STRING, "some.gguf"),
        "quantize.imatrix.entries_count": Value(ValueType.UINT32, 2),
    }


def test_texts_are_cut_as_llama_quantize_cuts_them_but_never_within_a_character() -> None:
    matrix = ImportanceMatrix(Path("ä" * 100 + ".gguf"), {}, ("d" * 200, "second"), 5, "0")
    values = imatrix_metadata(matrix)
    assert values["quantize.imatrix.file"].data == "ä" * 63
    assert values["quantize.imatrix.dataset"].data == "d" * 127
    odd = ImportanceMatrix(Path(os.fsdecode(b"\xff.dat")), {}, (), 0, "0")
    assert imatrix_metadata(odd)["quantize.imatrix.file"].data == "\ufffd.dat"
