"""The opening bytes of a GGUF file, against gguf's own writer."""

from pathlib import Path

import gguf
import numpy as np

from quant.header import Value, ValueType, header
from quant.recipes import TensorSpec
from runtime.ggml import GgmlType

METADATA = {
    "general.architecture": Value(ValueType.STRING, "llama"),
    "general.name": Value(ValueType.STRING, "Mistral — ünïcode"),
    "split.no": Value(ValueType.UINT16, 65_535),
    "llama.block_count": Value(ValueType.UINT32, 4_294_967_295),
    "split.tensors.count": Value(ValueType.INT32, -5),
    "llama.rope.freq_base": Value(ValueType.FLOAT32, 1e6),
    "tokenizer.ggml.add_bos_token": Value(ValueType.BOOL, True),
    "tokenizer.ggml.tokens": Value(ValueType.STRING, ("a", "▁bc", "")),
    "tokenizer.ggml.scores": Value(ValueType.FLOAT32, (-0.5, 1e-3)),
    "tokenizer.ggml.token_type": Value(ValueType.INT32, (1, 3, 6)),
}

TENSORS = [
    (TensorSpec("output.weight", (3, 256)), GgmlType.Q6_K),
    (TensorSpec("output_norm.weight", (9,)), GgmlType.F32),
    (TensorSpec("token_embd.weight", (5, 48)), GgmlType.F16),
    (TensorSpec("blk.0.attn_q.weight", (2, 32)), GgmlType.Q5_1),
]


def _written_by_gguf(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in METADATA.items():
        if isinstance(value.data, tuple):
            items = gguf.GGUFValueType(value.type)
            writer.add_key_value(key, value.data, gguf.GGUFValueType.ARRAY, items)
        elif key != "general.architecture":
            writer.add_key_value(key, value.data, gguf.GGUFValueType(value.type))
    for spec, type_ in TENSORS:
        theirs = gguf.GGMLQuantizationType(type_)
        if type_ is GgmlType.F32:
            writer.add_tensor(spec.name, np.zeros(spec.shape, np.float32))
        else:
            zeros = np.zeros((spec.rows, spec.n_bytes(type_) // spec.rows), np.uint8)
            writer.add_tensor(spec.name, zeros, raw_dtype=theirs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_the_bytes_are_those_of_gguf(tmp_path: Path) -> None:
    start = header(METADATA, TENSORS)
    theirs = _written_by_gguf(tmp_path / "theirs.gguf")
    assert theirs == start.data + bytes(start.file_bytes - len(start.data))


def test_offsets_are_where_gguf_finds_the_tensors(tmp_path: Path) -> None:
    start = header(METADATA, TENSORS)
    path = tmp_path / "ours.gguf"
    path.write_bytes(start.data + bytes(start.file_bytes - len(start.data)))
    found = gguf.GGUFReader(path).tensors
    assert [int(tensor.data_offset) for tensor in found] == list(start.offsets)
    assert [int(tensor.n_bytes) for tensor in found] == [spec.n_bytes(type_) for spec, type_ in TENSORS]
