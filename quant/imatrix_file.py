"""An importance matrix file → what it says: llama.cpp's GGUF files, and the `.dat` files before them. And back: GGUF.

A matrix file comes from elsewhere, so nothing in it is believed: every length is held against the bytes that are left
before anything is made of it, and a fault is an ImatrixError. What llama-quantize takes is taken, and gives the same
values, except where it reads on without a word: sizes that do not divide, values that are negative, names that stand
twice. Knows nothing of models.

A third tensor a weight, `NAME.in_sum`, holds plain sums beside those of squares, for means. llama.cpp's loader passes
over it; its pull request 14891 proposes it under the same name, in the same shape and place.

Source: common/imatrix-loader.cpp, `load_imatrix` of tools/quantize/quantize.cpp, and `save_imatrix` of
tools/imatrix/imatrix.cpp of llama.cpp, commit 0c1e57098.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quant.header import MAGIC, Metadata, Value, ValueType, header, padded
from quant.reading.gguf_file import MAX_NAME_BYTES, GgufHeader, TensorInfo, quoted, read_gguf_header
from quant.recipes import TensorSpec
from runtime.errors import ModelFileError, UserError
from runtime.ggml import GgmlType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_ENTRIES = 1 << 16
"""The largest dense models have 2,000 tensors."""

MAX_COUNT = 1 << 63
"""Tokens; llama.cpp's counts have 64 bits."""

SUMS, COUNTS, TOTALS = ".in_sum2", ".counts", ".in_sum"
SLACK = 0.01
"""What rounding may add to a ratio that is 1 at most: of a constant, added up in float32 200,000 times."""

LEAST_NORMAL = 2.0**-126
"""Of float32. Smaller squares are less exact, or 0."""

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


class ImatrixError(UserError):
    """An importance matrix that is missing, damaged, or of another model."""


@dataclass(frozen=True, slots=True)
class Sum:
    """What was added up for one tensor."""

    squares: "NDArray[np.float64]"
    """(n, row_length); n is 1, or the number of experts."""
    counts: "NDArray[np.int64]"
    """(n,): how many rows were added. In a `.dat` file, how many chunks of them."""
    totals: "NDArray[np.float64] | None" = None
    """(n, row_length), plain sums; None where they are not known, as of files of llama.cpp."""

    def __add__(self, other: "Sum") -> "Sum":
        """Both together, of one shape. Totals that one of them lacks are lost."""
        totals = None
        if self.totals is not None and other.totals is not None:
            totals = self.totals + other.totals
        return Sum(self.squares + other.squares, self.counts + other.counts, totals)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a matrix file says."""

    values: "dict[str, NDArray[np.float32]]"
    """Tensor name → mean square of what each column is multiplied with, (row_length,)."""
    datasets: tuple[str, ...]
    """The texts it was computed on, as whoever made it named them."""
    n_chunks: int
    """Chunks of these texts; 0 where the file does not say."""
    sums: dict[str, Sum]
    """What `values` and `means` are the means of."""
    chunk_size: int
    """Tokens in a chunk; 0 for a `.dat` file, which does not say."""
    metadata: Metadata
    """All that the file says besides; empty for a `.dat` file."""
    means: "dict[str, NDArray[np.float32]]" = field(default_factory=dict)
    """Tensor name → mean of what each column is multiplied with, (row_length,), where the file has totals."""


def serialize(
    sums: Mapping[str, Sum], datasets: Sequence[str], n_chunks: int, chunk_size: int, notes: Metadata
) -> bytes:
    """A file as llama-imatrix writes it, with `notes` behind its own keys, and totals where they are known."""
    import numpy as np

    metadata = {
        "general.type": Value(ValueType.STRING, "imatrix"),
        DATASETS: Value(ValueType.STRING, tuple(datasets)),
        CHUNK_COUNT: Value(ValueType.UINT32, n_chunks),
        CHUNK_SIZE: Value(ValueType.UINT32, chunk_size),
        **notes,
    }
    tensors: list[TensorSpec] = []
    parts: list[bytes] = []
    for name in sorted(sums):
        added = sums[name]
        for suffix, values in ((SUMS, added.squares), (COUNTS, added.counts[:, None]), (TOTALS, added.totals)):
            if values is None:
                continue
            shape = values.shape if len(values) > 1 else values.shape[1:]  # ggml drops a dimension of 1
            tensors.append(TensorSpec(name + suffix, shape))
            data = np.ascontiguousarray(values, "<f4").tobytes()
            parts += [data, bytes(padded(len(data)) - len(data))]
    return b"".join([header(metadata, [(spec, GgmlType.F32) for spec in tensors]).data, *parts])


def parse(path: Path, data: bytes) -> Contents:
    """What a matrix file says, of which `data` is all. Raises ImatrixError."""
    return _parse_gguf(path, data) if data.startswith(MAGIC) else _parse_legacy(_Cursor(path, data))


def _damaged(path: Path, fault: str) -> ImatrixError:
    return ImatrixError(
        f"{path}: not a whole importance matrix: {fault}; copy it again, or make it again with llama-imatrix"
    )


def _parse_gguf(path: Path, data: bytes) -> Contents:
    try:
        header = read_gguf_header(path)
    except ModelFileError as error:  # what it says to do at its end is meant for a model
        fault = str(error).removeprefix(f"{path}: ").rpartition("; ")[0]
        raise _damaged(path, fault) from None
    if header.n_bytes != len(data):
        raise _damaged(path, f"it had {len(data):,} bytes and then {header.n_bytes:,}")
    end = max((header.start(info) + info.n_bytes for info in header.tensors), default=0)
    padded = header.data_start + -(-(end - header.data_start) // header.alignment) * header.alignment
    if header.tensors and padded > len(data):
        raise _damaged(path, f"it must have {padded:,} bytes, and has {len(data):,}")
    general_type = header.metadata.get("general.type", Value(ValueType.STRING, "imatrix")).data
    if general_type != "imatrix":
        raise ImatrixError(
            f"{path}: not an importance matrix, but a GGUF file of type {quoted(str(general_type))}; name the file "
            "that llama-imatrix made"
        )
    datasets = _key(header, DATASETS)
    texts = datasets.data if isinstance(datasets.data, tuple) and datasets.type is ValueType.STRING else ()
    n_chunks, chunk_size = _number(header, CHUNK_COUNT), _number(header, CHUNK_SIZE)
    values, means, sums = _means(header, data)
    return Contents(
        values=values,
        datasets=tuple(str(text).partition("\0")[0] for text in texts),  # llama.cpp's strings end there
        n_chunks=n_chunks if n_chunks < 1 << 31 else 0,  # llama.cpp keeps it as an int, and writes it if positive
        sums=sums,
        chunk_size=chunk_size,
        metadata=header.metadata,
        means=means,
    )


def _key(header: GgufHeader, key: str) -> Value:
    if key not in header.metadata:
        raise _damaged(header.path, f"the key {key} is missing")
    return header.metadata[key]


def _number(header: GgufHeader, key: str) -> int:
    value = _key(header, key)
    if value.type is not ValueType.UINT32 or not isinstance(value.data, int):
        raise _damaged(header.path, f"the value of {key} is not an unsigned 32-bit number")
    return value.data


_Values = dict[str, "NDArray[np.float32]"]


def _means(header: GgufHeader, data: bytes) -> tuple[_Values, _Values, dict[str, Sum]]:
    """Sums over their counts, in float32: of squares, and plain ones where they are known; and the sums.

    Each expert has a count; one of 0 weighs all columns alike, and has a mean of 0.
    """
    import numpy as np

    found = {info.name: info for info in header.tensors}
    suffixes = (SUMS, COUNTS, TOTALS)
    names = {name.removesuffix(suffix) for name in found for suffix in suffixes if name.endswith(suffix)}
    values: _Values = {}
    means: _Values = {}
    added: dict[str, Sum] = {}
    for name in sorted(names):
        if not {name + SUMS, name + COUNTS} <= found.keys():
            raise _damaged(header.path, f"{quoted(name)} lacks {SUMS} or {COUNTS}")
        sums, counts = (_elements(header, found[name + suffix], data) for suffix in (SUMS, COUNTS))
        if sums.size % counts.size or counts.max() >= MAX_COUNT:
            fault = f"{quoted(name)} has {sums.size:,} sums and {counts.size:,} counts of up to {counts.max():.3g}"
            raise _damaged(header.path, fault)
        rounded = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)[:, None]  # halves away from zero
        rows = sums.reshape(counts.size, -1)
        values[name] = np.divide(rows, rounded, out=np.ones_like(rows), where=rounded > 0).reshape(-1)
        added[name] = Sum(rows.astype(np.float64), rounded[:, 0].astype(np.int64))
        if name + TOTALS in found:
            totals = _elements(header, found[name + TOTALS], data, signed=True)
            if totals.size != sums.size:
                fault = f"{quoted(name)} has {sums.size:,} values of {SUMS} and {totals.size:,} of {TOTALS}"
                raise _damaged(header.path, fault)
            totals = totals.reshape(rows.shape)
            added[name] = replace(added[name], totals=totals.astype(np.float64))
            _check_possible(header.path, name, added[name])
            means[name] = np.divide(totals, rounded, out=np.zeros_like(rows), where=rounded > 0).reshape(-1)
    return values, means, added


def _check_possible(path: Path, name: str, added: Sum) -> None:
    """Numbers of a given sum of squares cannot have any sum: its square is at most their count times that."""
    import numpy as np

    assert added.totals is not None
    counts = added.counts.astype(np.float64)[:, None]
    most = np.sqrt(counts * (added.squares * (1 + SLACK) + counts * LEAST_NORMAL))
    possible = np.abs(added.totals) <= most
    if not possible.all():
        expert, column = (int(index) for index in np.argwhere(~possible)[0])
        total, limit = added.totals[expert, column], most[expert, column]
        fault = f"{quoted(name + TOTALS)} holds {total:.3g} in column {column:,}, and {SUMS} allows {limit:.3g} at most"
        raise _damaged(path, fault)


def _elements(header: GgufHeader, info: TensorInfo, data: bytes, *, signed: bool = False) -> "NDArray[np.float32]":
    """The numbers of a tensor, flat."""
    if info.type.name != "F32":
        raise _damaged(header.path, f"{quoted(info.name)} is {info.type.name}, and must be F32")
    start = header.start(info)
    return _floats(header.path, data[start : start + info.n_bytes], quoted(info.name), signed=signed)


def _floats(path: Path, data: bytes, shown: str, *, signed: bool = False) -> "NDArray[np.float32]":
    """Float32 numbers, none of them NaN, infinite or, unless they are signed, negative."""
    import numpy as np

    values = np.frombuffer(data, "<f4").astype(np.float32)
    usable = (values > -np.inf if signed else values >= 0) & (values < np.inf)  # false for NaN
    if not usable.all():
        index = int(np.argmin(usable))
        must = "finite" if signed else "finite and not negative"
        fault = f"{shown} holds {float(values[index]):.3g} at index {index:,}, and all must be {must}"
        raise _damaged(path, fault)
    return values


class _Cursor:
    """A place in the bytes of a `.dat` file. Whatever is taken there is there, or an ImatrixError says what is not."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self._data = data
        self._at = 0

    @property
    def n_left(self) -> int:
        return len(self._data) - self._at

    def take(self, n_bytes: int, what: str) -> bytes:
        if n_bytes > self.n_left:
            fault = f"{what} needs {n_bytes:,} bytes at byte {self._at:,}, and {self.n_left:,} are left"
            raise _damaged(self.path, fault)
        self._at += n_bytes
        return self._data[self._at - n_bytes : self._at]

    def number(self, what: str, least: int, most: int) -> int:
        """A signed 32-bit number."""
        value: int = struct.unpack("<i", self.take(4, what))[0]
        if not least <= value <= most:
            raise _damaged(self.path, f"{what} is {value:,}, and {least:,} to {most:,} are possible")
        return value


_INT_MIN, _INT_MAX = -(1 << 31), (1 << 31) - 1


def _parse_legacy(cursor: _Cursor) -> Contents:
    import numpy as np

    values: dict[str, NDArray[np.float32]] = {}
    added: dict[str, Sum] = {}
    for _ in range(cursor.number("the number of entries", 1, MAX_ENTRIES)):
        text = cursor.take(cursor.number("the length of a name", 0, MAX_NAME_BYTES), "a name")
        shown = quoted(text.decode("utf-8", "replace"))
        try:
            name = text.decode()
        except UnicodeDecodeError:
            raise _damaged(cursor.path, f"the name {shown} is not UTF-8") from None
        if name in values or "\0" in name:
            raise _damaged(cursor.path, f"{shown} is there twice, or no name")
        n_calls = cursor.number(f"the number of calls of {shown}", _INT_MIN, _INT_MAX)
        n_values = cursor.number(f"the number of values of {shown}", 1, _INT_MAX)
        sums = _floats(cursor.path, cursor.take(4 * n_values, shown), shown)
        values[name] = sums / np.float32(max(n_calls, 1))
        added[name] = Sum(sums.astype(np.float64)[None], np.array([max(n_calls, 1)]))
    if cursor.n_left == 0:
        return Contents(values, (), 0, added, 0, {})
    n_chunks = max(cursor.number("the number of chunks", _INT_MIN, _INT_MAX), 0)
    length = cursor.number("the length of the dataset's name", _INT_MIN, _INT_MAX) if cursor.n_left else 0
    dataset = cursor.take(max(length, 0), "the dataset's name").decode("utf-8", "replace")
    datasets = (dataset.partition("\0")[0],) if length > 0 else ()
    return Contents(values, datasets, n_chunks, added, 0, {})
