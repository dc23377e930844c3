"""An importance matrix: how much each column of each tensor matters, as llama-imatrix measured it on some text.

Reads a file, says whether it fits a model, and gives what the GGUF files made with it say of it, as llama-quantize
does (tools/quantize/quantize.cpp and src/llama-quant.cpp of llama.cpp, commit 0c1e57098). No type of Bise requires a
matrix; a tensor without an entry is quantized without. Makes no matrix (importance/).
"""

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quant.header import Value, ValueType
from quant.imatrix_file import Contents, ImatrixError, parse
from quant.recipes import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BYTES = 1 << 28
"""Of a matrix file. That of Mistral Large 2 has 36 MB, that of Llama 3.1 405B 77 MB; with means twice as much."""

MAX_TEXT_BYTES = 127
"""llama.cpp hands texts of its command line to the metadata in 128 bytes, with a zero at the end."""

EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """What one file says. `sha256` stands for the values in comparisons."""

    path: Path
    values: "Mapping[str, NDArray[np.float32]]" = field(compare=False, repr=False)
    """GGUF tensor name → (row_length,), finite and not negative. Also entries of tensors that a model lacks."""
    datasets: tuple[str, ...]
    """The texts it was computed on, as whoever made it named them."""
    n_chunks: int
    """Chunks of these texts; 0 where the file does not say."""
    sha256: str
    """Of the file, as hexadecimal digits."""
    means: "Mapping[str, NDArray[np.float32]]" = field(default_factory=dict, compare=False, repr=False)
    """As `values`, of either sign, for those whose means the file has: none in a file of llama.cpp."""

    def of(self, spec: TensorSpec) -> "NDArray[np.float32] | None":
        """The importance of each column of a tensor, (row_length,), or None where it is made without.

        After `check_fits` only an entry for the embedding can be of another length, and llama-quantize ignores that.
        """
        values = None if spec.is_vector else self.values.get(spec.name)
        return None if values is None or values.size != spec.row_length else values

    def mean_of(self, spec: TensorSpec) -> "NDArray[np.float32] | None":
        """The mean of what each column of a tensor is multiplied with, (row_length,), where the file has it.

        None also where `of` is. A mean's square exceeds what `of` says of the column by rounding at most.
        """
        return None if self.of(spec) is None else self.means.get(spec.name)


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read a file of llama-imatrix, of either of its formats. Raises ImatrixError."""
    contents, sha256 = read_contents(path)
    return importance_matrix(path, contents, sha256)


def read_contents(path: Path) -> tuple[Contents, str]:
    """All that a file says, and its SHA-256. Raises ImatrixError."""
    data = _read(path)
    contents = parse(path, data)
    if not contents.values:
        raise ImatrixError(f"{path}: an importance matrix without entries; make it again with llama-imatrix")
    return contents, hashlib.sha256(data).hexdigest()


def importance_matrix(path: Path, contents: Contents, sha256: str) -> ImportanceMatrix:
    """What a file says that quantizing needs."""
    for values in (*contents.values.values(), *contents.means.values()):
        values.flags.writeable = False
    return ImportanceMatrix(path, contents.values, contents.datasets, contents.n_chunks, sha256, contents.means)


def _read(path: Path) -> bytes:
    """The bytes of a file that can be a matrix."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImatrixError(f"{path}: not a file; name the file that llama-imatrix made")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1) if status.st_size <= MAX_BYTES else b""
    except FileNotFoundError:
        raise ImatrixError(f"{path}: no such file; name the file that llama-imatrix made") from None
    except (OSError, ValueError) as error:
        raise ImatrixError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    n_bytes = max(status.st_size, len(data))
    if n_bytes > MAX_BYTES:
        raise ImatrixError(
            f"{path}: {n_bytes:,} bytes, and an importance matrix has at most {MAX_BYTES:,}; "
            "name the file that llama-imatrix made, not the model"
        )
    return data


def check_fits(matrix: ImportanceMatrix, specs: Sequence[TensorSpec]) -> None:
    """Raise ImatrixError if the matrix was not computed on a model of these tensors.

    Entries of tensors that the model lacks are no fault, but one of the model's must be there, each must have a value
    for each column, and some value above 0: a tensor of which nothing matters would become 0.
    """
    matrices = {spec.name: spec for spec in specs if not spec.is_vector}
    found = matrices.keys() & matrix.values.keys()
    if not found:
        raise ImatrixError(
            f"{matrix.path}: none of its {len(matrix.values):,} entries is of a tensor of this model (the first is "
            f"{min(matrix.values)!r}); name the matrix of this model"
        )
    for spec in matrices.values():
        if spec.name not in found:
            continue
        values = matrix.values[spec.name]
        if values.size != spec.row_length and spec.name != EMBEDDING:
            raise ImatrixError(
                f"{matrix.path}: {values.size:,} values for {spec.name}, whose rows have {spec.row_length:,} weights; "
                "name the matrix of this model"
            )
        if not values.any():
            raise ImatrixError(
                f"{matrix.path}: all values for {spec.name} are 0, and would make it 0; make the matrix again, on "
                "more text"
            )


def without_entry(matrix: ImportanceMatrix, specs: Sequence[TensorSpec]) -> tuple[str, ...]:
    """Names of the tensors that are quantized without the matrix, because it has nothing for them.

    llama-imatrix measures neither the embedding nor, unless asked to, the output.
    """
    return tuple(spec.name for spec in specs if not spec.is_vector and matrix.of(spec) is None)


def imatrix_metadata(matrix: ImportanceMatrix) -> dict[str, Value]:
    """What llama-quantize adds to the metadata, in its order and types.

    Of the path only the file's name: a folder of the machine it was made on is nobody's business. The dataset is
    named as in the matrix.
    """
    values = {"quantize.imatrix.file": _text(os.fsencode(matrix.path.name))}
    if matrix.datasets:
        values["quantize.imatrix.dataset"] = _text(matrix.datasets[0].encode())
    values["quantize.imatrix.entries_count"] = Value(ValueType.UINT32, len(matrix.values))
    if matrix.n_chunks:
        values["quantize.imatrix.chunks_count"] = Value(ValueType.UINT32, matrix.n_chunks)
    return values


def _text(encoded: bytes) -> Value:
    """A text as llama.cpp cuts it off, but never within a character."""
    text = encoded.decode("utf-8", "replace").encode()[:MAX_TEXT_BYTES]
    return Value(ValueType.STRING, text.decode("utf-8", "ignore"))
