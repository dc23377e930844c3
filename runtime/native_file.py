"""The header of a GGUF file, read by ggml's own parser: tensor sizes and a few numbers of the metadata.

The gguf package reads the same in seconds where a vocabulary is large; this takes milliseconds. Gives plain values; no
weights are read.
"""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import ModelFileError
from runtime.native import LOG, check_gguf, function

_UINT32, _STRING, _ARRAY = 4, 8, 9  # enum gguf_type, gguf.h


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself."""

    tensors: dict[str, int]
    """Name → bytes, in the order of the file."""
    numbers: dict[str, int]
    """The metadata that are unsigned 32-bit numbers."""
    texts: dict[str, str]
    lengths: dict[str, int]
    """The metadata that are arrays: how many elements they have."""


def read_header(path: Path) -> Header:
    """The header of one file (of shards, of that shard). Raises ModelFileError."""
    check_gguf(path)
    LOG.clear()
    init = function("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _InitParams)
    context = init(os.fsencode(path), _InitParams(no_alloc=True))
    if not context:
        cause = (LOG.errors() or ["unknown cause"])[-1]
        raise ModelFileError(
            f"{path}: its header is damaged ({cause}); copy it again or remake it with `bise quantize`"
        )
    try:
        return _read(context)
    finally:
        function("gguf_free", None, ctypes.c_void_p)(context)


def _read(context: int) -> Header:
    def by_index(name: str, result: Any) -> Any:
        return function(name, result, ctypes.c_void_p, ctypes.c_int64)

    n_tensors = function("gguf_get_n_tensors", ctypes.c_int64, ctypes.c_void_p)(context)
    tensor_name, tensor_size = (
        by_index("gguf_get_tensor_name", ctypes.c_char_p),
        by_index("gguf_get_tensor_size", ctypes.c_size_t),
    )
    tensors = {tensor_name(context, i).decode(): int(tensor_size(context, i)) for i in range(n_tensors)}
    key_of, type_of = by_index("gguf_get_key", ctypes.c_char_p), by_index("gguf_get_kv_type", ctypes.c_int)
    number, text = by_index("gguf_get_val_u32", ctypes.c_uint32), by_index("gguf_get_val_str", ctypes.c_char_p)
    length = by_index("gguf_get_arr_n", ctypes.c_size_t)
    header = Header(tensors, {}, {}, {})
    for i in range(function("gguf_get_n_kv", ctypes.c_int64, ctypes.c_void_p)(context)):
        key, type_ = key_of(context, i).decode(), type_of(context, i)
        if type_ == _UINT32:
            header.numbers[key] = int(number(context, i))
        elif type_ == _STRING:
            header.texts[key] = text(context, i).decode("utf-8", "replace")
        elif type_ == _ARRAY:
            header.lengths[key] = int(length(context, i))
    return header
