"""The base model's log-probabilities on disk, in llama-perplexity's own format, written and read a chunk at a time.

    "_logits_" | int32 n_ctx, n_vocab, n_chunks | int32 tokens (n_chunks · n_ctx) | n_chunks × n_scored rows
    row: float32 scale, float32 low | uint16 steps (n_vocab, made even)        ln p = scale · steps + low

Little-endian; of each row the 16 nats below its likeliest token are kept, in 65,535 steps. `llama-perplexity
--kl-divergence-base` reads what is written here, and the other way round (llama.cpp 0c1e57098,
tools/perplexity/perplexity.cpp:77, :457, :516). Where it only logs that a file belongs to another run, this raises.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quant.quality.scores import BaseRows, blocks, normalizers
from quant.quality.texts import n_scored
from runtime.errors import OutputError, UserError

_MAGIC = b"_logits_"
_DEPTH = np.float32(16)
_STEPS = np.float32(65535)


class BaseLogError(UserError):
    """A file of base log-probabilities that is cut off, foreign, or of other tokens."""


def row_type(n_vocab: int) -> np.dtype[np.void]:
    """One row of the file."""
    return np.dtype([("scale", "<f4"), ("low", "<f4"), ("steps", "<u2", (n_vocab + n_vocab % 2,))])


def file_bytes(n_ctx: int, n_vocab: int, n_chunks: int) -> int:
    """Size of a whole file."""
    return 20 + 4 * n_ctx * n_chunks + n_chunks * n_scored(n_ctx) * row_type(n_vocab).itemsize


def encode(logits: NDArray[np.float32]) -> NDArray[np.void]:
    """Logits (T, V) → rows (T,). Rounded to the nearest step, ties to even."""
    n_vocab = logits.shape[1]
    top, log_sum = normalizers(logits)
    low = np.maximum(logits.min(axis=1), top - _DEPTH)
    rows = np.zeros(len(logits), row_type(n_vocab))
    scale = (top - low) / _STEPS
    rows["scale"] = scale
    rows["low"] = low - top - log_sum.astype(np.float32)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    for part in blocks(logits):
        steps = np.maximum(logits[part] - low[part, None], 0)
        steps *= inverse[part, None]
        rows["steps"][part, :n_vocab] = np.rint(steps, out=steps)
    return rows


class BaseLogWriter:
    """Writes a file under a temporary name; it appears under its own once every chunk is in it.

    Use as a context manager: leaving it early leaves nothing behind. Raises OutputError when the disk refuses.
    """

    def __init__(self, path: Path, n_vocab: int, chunks: NDArray[np.int32]) -> None:
        """`chunks` (C, n_ctx) are the text's own tokens, without BOS in the place of each first."""
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._n_vocab = n_vocab
        self._chunks = chunks
        self._n_written = 0

    def append(self, logits: NDArray[np.float32]) -> None:
        """The next chunk's rows, (n_scored, V)."""
        assert self._n_written < len(self._chunks), "more chunks than announced"
        self._write(encode(logits).view(np.uint8).data)
        self._n_written += 1

    def __enter__(self) -> Self:
        n_chunks, n_ctx = self._chunks.shape
        needed = file_bytes(n_ctx, self._n_vocab, n_chunks)
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise OutputError(
                    f"{folder}: the base log-probabilities need {needed:,} bytes and {free:,} are free; name another "
                    "folder or take fewer chunks"
                )
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise self._refused(error) from None
        try:
            self._write(_MAGIC + np.array([n_ctx, self._n_vocab, n_chunks], "<i4").tobytes())
            self._write(np.ascontiguousarray(self._chunks, "<i4").data)
        except OutputError:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        try:
            if kind is None:
                assert self._n_written == len(self._chunks), (self._n_written, len(self._chunks))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._temporary.replace(self._path)
        except OSError as error:
            raise self._refused(error) from None
        finally:
            self._close()

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._refused(error) from None

    def _close(self) -> None:
        with suppress(OSError):  # what could not be written is tried again here, and has been told of
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path}: cannot be written: {error.strerror}; free some space or name another folder")


class BaseLog:
    """A file opened for reading, its header read and its size checked. Raises BaseLogError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise BaseLogError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        start = self._file.read(20)
        if start[:8] != _MAGIC or len(start) < 20:
            raise BaseLogError(
                f"{self.path}: not a file of base log-probabilities (starts with {start[:8]!r}, not {_MAGIC!r})"
            )
        self.n_ctx, self.n_vocab, self.n_chunks = np.frombuffer(start, "<i4", offset=8).tolist()
        actual = os.fstat(self._file.fileno()).st_size
        if min(self.n_ctx, self.n_vocab, self.n_chunks) < 1:
            raise BaseLogError(
                f"{self.path}: damaged: context {self.n_ctx}, vocabulary {self.n_vocab}, {self.n_chunks} chunks"
            )
        expected = file_bytes(self.n_ctx, self.n_vocab, self.n_chunks)
        if actual != expected:
            raise BaseLogError(
                f"{self.path}: {actual:,} bytes, but {self.n_chunks} chunks take {expected:,}; it is cut off or "
                "damaged: delete it and run again"
            )
        tokens = np.frombuffer(self._file.read(4 * self.n_ctx * self.n_chunks), "<i4")
        self.chunks = tokens.astype(np.int32).reshape(self.n_chunks, self.n_ctx)
        """The text's tokens, (C, n_ctx)."""
        self._rows = np.empty(n_scored(self.n_ctx), row_type(self.n_vocab))

    def check(self, n_vocab: int, chunks: NDArray[np.int32]) -> None:
        """Raise BaseLogError unless the file was made from exactly these chunks (C, n_ctx) and this vocabulary."""
        n_chunks, n_ctx = chunks.shape
        for what, ours, theirs in (
            ("a context of", n_ctx, self.n_ctx),
            ("a vocabulary of", n_vocab, self.n_vocab),
            ("a number of chunks of", n_chunks, self.n_chunks),
        ):
            if ours != theirs:
                raise BaseLogError(
                    f"{self.path}: made with {what} {theirs}, and this run has {ours}; delete it and run again"
                )
        different = np.flatnonzero(self.chunks.reshape(-1) != chunks.reshape(-1))
        if len(different):
            at = int(different[0])
            raise BaseLogError(
                f"{self.path}: {len(different)} of {chunks.size} tokens differ from this text's, the first at {at} "
                f"({self.chunks.flat[at]} there, {chunks.flat[at]} here); it is of another text or tokenizer"
            )

    def read(self) -> BaseRows:
        """The next chunk's rows, (n_scored, V): views that the next call overwrites."""
        buffer = self._rows.view(np.uint8)
        if self._file.readinto(buffer.data) != buffer.nbytes:
            raise BaseLogError(f"{self.path}: ended early; something else changed it: delete it and run again")
        return BaseRows(self._rows["scale"], self._rows["low"], self._rows["steps"][:, : self.n_vocab])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
