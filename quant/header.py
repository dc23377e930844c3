"""Metadata and tensor list → the bytes that open a GGUF file. Pure: nothing is read or written here.

gguf's own `GGUFWriter` can only write to a file that it holds open; a plan needs the bytes, and every tensor's offset,
before any file exists. Little-endian, GGUF version 3. Knows nothing of models.

Source: ggml/include/gguf.h of llama.cpp, commit 0c1e57098.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from quant.recipes import TensorSpec
from runtime.ggml import GgmlType

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
"""Bytes; the data section and every tensor in it start on a multiple of it."""


class ValueType(IntEnum):
    """`enum gguf_type`: only those that Bise writes."""

    UINT16 = 2
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9


NUMBER_FORMATS = {
    ValueType.UINT16: "<H",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<?",
}

Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value. An array is a tuple, and `type` is then the type of its items."""

    type: ValueType
    data: Scalar | tuple[Scalar, ...]


Metadata = Mapping[str, Value]
"""Key → value, in the order of the file."""


@dataclass(frozen=True, slots=True)
class Header:
    """The start of a GGUF file, up to and including the padding before the first tensor."""

    data: bytes
    offsets: tuple[int, ...]
    """Where each tensor starts, in bytes from the start of the file."""
    file_bytes: int
    """Size of the whole file. The last tensor is padded too, as llama.cpp does."""


def header(metadata: Metadata, tensors: Sequence[tuple[TensorSpec, GgmlType]]) -> Header:
    """Serialize a file's metadata and tensor list, and place its tensors one after the other."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    starts = []
    position = 0
    for spec, type_ in tensors:
        dims = tuple(reversed(spec.shape))  # ggml counts dimensions from the contiguous one
        parts += [_string(spec.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, position)]
        starts.append(position)
        position = padded(position + spec.n_bytes(type_))
    data = b"".join(parts)
    data += bytes(padded(len(data)) - len(data))
    return Header(data, tuple(len(data) + start for start in starts), len(data) + position)


def padded(n_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    if isinstance(value.data, tuple):
        items = b"".join(_scalar(value.type, item) for item in value.data)
        return struct.pack("<IIQ", ValueType.ARRAY, value.type, len(value.data)) + items
    return struct.pack("<I", value.type) + _scalar(value.type, value.data)


def _scalar(type_: ValueType, data: Scalar) -> bytes:
    return _string(data) if isinstance(data, str) else struct.pack(NUMBER_FORMATS[type_], data)
