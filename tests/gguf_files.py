"""Small GGUF files for tests: models written by gguf's own writer, and ways to make damaged files."""

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from hypothesis import strategies as st

from quant.recipes import tensors, types
from runtime.levels import Shape

SMALL = Shape(n_layers=3, n_embd=256, n_ff=288, n_heads=4, n_heads_kv=2, head_dim=64, n_vocab=300)

Edit = Callable[[gguf.GGUFWriter], object]


def write_model(
    path: Path,
    shape: Shape = SMALL,
    dtype: str = "BF16",
    *,
    extra: Mapping[str, tuple[int, ...]] | None = None,
    without: str | None = None,
    types: Mapping[str, str] | None = None,
    edit: Edit = lambda _: None,
    drop: tuple[str, ...] = (),
    shard_tensors: int = 0,
) -> Path:
    """A model with random weights, its tensors in no particular order; gives the file, or the first shard.

    `extra` adds tensors (name → shape), `without` leaves one out, `types` stores some as another type, `edit` may add
    or replace metadata, and `drop` removes some.
    """
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=shard_tensors)
    writer.add_name("Small Model")
    writer.add_file_type(1)
    writer.add_quantization_version(2)
    add_shape(writer, shape)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"▁t{i}" for i in range(shape.n_vocab)])
    writer.add_token_scores([-float(i) for i in range(shape.n_vocab)])
    edit(writer)
    for key in drop:
        del writer.kv_data[0][key]
    rng = np.random.default_rng(3)
    shapes = {spec.name: spec.shape for spec in tensors(shape) if spec.name != without} | dict(extra or {})
    names = list(shapes)
    rng.shuffle(names)
    for name in names:
        values = (0.1 * rng.standard_normal(shapes[name])).astype(np.float32)
        add_tensor(writer, name, values, (types or {}).get(name, "F32" if len(shapes[name]) == 1 else dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-*.gguf")) if shard_tensors else path


def add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """The keys that llama.cpp asks for."""
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_heads_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)


@contextmanager
def bare_model(path: Path, shape: Shape, file_type: gguf.LlamaFileType) -> Iterator[gguf.GGUFWriter]:
    """gguf's own writer of a model without a tokenizer; what is added in the block is written at its end."""
    writer = gguf.GGUFWriter(path, "llama")
    add_shape(writer, shape)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(file_type)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_sparse(path: Path, shape: Shape, level: str, context: int) -> Path:
    """A model of any size without its weights, which are zeros: only the header takes room on the disk."""
    writer = gguf.GGUFWriter(path, "llama")
    add_shape(writer, shape)
    writer.add_context_length(context)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("no_vocab")
    chosen = types(shape, level)
    alignment, n_bytes = gguf.GGUF_DEFAULT_ALIGNMENT, 0
    for spec in tensors(shape):
        size = spec.n_bytes(chosen[spec.name])
        type_ = gguf.GGMLQuantizationType(int(chosen[spec.name]))
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), size, raw_dtype=type_)
        n_bytes += -(-size // alignment) * alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // alignment) * alignment + n_bytes)
    assert path.stat().st_blocks * 512 < 2**20
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, values: "np.ndarray[Any, Any]", dtype: str) -> None:
    """Store float32 values; BF16 is cut off, not rounded."""
    match dtype:
        case "F32":
            writer.add_tensor(name, values)
        case "F16":
            writer.add_tensor(name, values.astype(np.float16))
        case "BF16":
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        case _:
            type_ = gguf.GGMLQuantizationType[dtype]
            writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)


def string(text: str | bytes) -> bytes:
    """Length and bytes."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, type_: int, value: bytes) -> bytes:
    """One metadata entry."""
    return string(key) + struct.pack("<I", type_) + value


def array(type_: int, count: int, items: bytes = b"") -> bytes:
    """The value of an entry of type 9."""
    return struct.pack("<IQ", type_, count) + items


def tensor(name: str | bytes = "a", dims: tuple[int, ...] = (8,), type_: int = 0, offset: int = 0) -> bytes:
    """What a header says of a tensor."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, offset)


def gguf_bytes(
    *parts: bytes, n_metadata: int = 0, n_tensors: int = 0, data: int = 0, version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    """A file of these parts, padded to 32 bytes, with `data` zeros as weights."""
    start = magic + struct.pack("<IQQ", version, n_tensors, n_metadata) + b"".join(parts)
    return start + bytes(-len(start) % 32 + data)


Change = tuple[str, int, int]

OFFSETS = st.integers(0, 3000)
NUMBERS = st.sampled_from([0, 1, 7, 8, 9, 64, 255, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1])
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), OFFSETS, st.integers(1, 255)),
        st.tuples(st.just("number"), OFFSETS, NUMBERS),
        st.tuples(st.just("cut"), OFFSETS, st.integers(1, 64)),
        st.tuples(st.just("repeat"), OFFSETS, st.integers(1, 64)),
        st.tuples(st.just("end"), OFFSETS, st.just(0)),
    ),
    min_size=1,
    max_size=3,
)
"""What may happen to a file: kind, place, number."""


def changed(content: bytes, changes: list[Change]) -> bytes:
    """The file with these changes in its header, one after the other."""
    data = bytearray(content)
    for kind, offset, number in changes:
        at = offset % (len(data) or 1)
        match kind:
            case "flip" if data:
                data[at] ^= number
            case "number":
                width = 8 if number >> 32 else 4
                data[at : at + width] = number.to_bytes(width, "little")
            case "cut":
                del data[at : at + number]
            case "repeat":
                data[at:at] = data[at : at + number]
            case "end":
                del data[at:]
    return bytes(data)
