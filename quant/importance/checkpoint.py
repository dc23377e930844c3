"""What a run that is not done yet has on disk, to go on from: sums so far, and what they are of.

One file beside the matrix to be, replaced at once, so that it is whole at any moment. The sums are kept in float64, as
they are added, so that a run that goes on ends with the same bits as one that was never stopped.
"""

import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.imatrix_file import ImatrixError, Sum
from quant.importance.identity import Identity
from quant.importance.sums import Sums
from runtime.errors import OutputError

_HEAD = "head"
_SQUARES, _COUNTS, _TOTALS = ".squares", ".counts", ".totals"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run so far."""

    identity: Identity
    """A run goes on only where all of it is the same."""
    tokens_sha256: str
    """Of all chunks' ids: tokenizers and prompt formats have versions too."""
    n_chunks: int
    """Chunks that are in the sums."""
    sums: Sums


def checkpoint_path(out: Path) -> Path:
    """Where the run that makes the matrix `out` keeps its sums."""
    return out.with_name(f".{out.name}.partial")


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Raises OutputError."""
    head = json.dumps(
        {"identity": checkpoint.identity, "tokens": checkpoint.tokens_sha256, "n_chunks": checkpoint.n_chunks}
    )
    arrays: dict[str, Any] = {_HEAD: np.array(head)}
    for name, added in checkpoint.sums.items():
        arrays[name + _SQUARES], arrays[name + _COUNTS] = added.squares, added.counts
        if added.totals is not None:
            arrays[name + _TOTALS] = added.totals
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path) -> Checkpoint | None:
    """What is there, or None. Raises ImatrixError for a file that is damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        head = json.loads(str(arrays.pop(_HEAD)))
        names = [name.removesuffix(_SQUARES) for name in arrays if name.endswith(_SQUARES)]
        sums = {
            name: Sum(arrays[name + _SQUARES], arrays[name + _COUNTS], arrays.get(name + _TOTALS)) for name in names
        }
        return Checkpoint(head["identity"], str(head["tokens"]), int(head["n_chunks"]), sums)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ImatrixError(
            f"{path}: damaged, so that no run can go on from it ({error}); begin anew with --force"
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it. Raises OutputError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def check_writable(out: Path) -> None:
    """Raise OutputError now where writing would fail in hours."""
    if out.is_dir():
        raise OutputError(f"{out}: a folder; name the file to write, such as {out / 'imatrix.gguf'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out.parent}: cannot be made: {error.strerror}; name another file with --out") from None
    probe = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from None
