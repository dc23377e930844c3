"""KV caches of conversations on disk: what was read once is not read again, after a restart or a crash either.

Files of llama.cpp's own format for one sequence, which begins with its token ids, under a name that says of which model
and KV type they are, with a checksum. A file gets its name when it is whole, and has none while llama.cpp reads it: a
file that does not fit ends the process (seen), and must not end the next. All of them together stay within a quota, but
for one that takes the place of another; those not used for longest go first. Knows nothing of contexts: it is told how
to write and how large.
"""

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.events import EngineSettings
from runtime.library import kv_folder, shards
from runtime.wheel import VERSION

WORTH_TOKENS = 64
"""A prefix that is longer by less is not worth a file, nor its reading."""

_HEADER = struct.Struct("<III")  # llama.cpp 0c1e57098, src/llama-context.cpp, state_seq_save_file: magic, version, ids
_MAGIC, _VERSION = 0x67677371, 3
_HEAD_BYTES = 16 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


@dataclass(frozen=True, slots=True)
class Kept:
    """A file, and how many of the ids asked for it begins with."""

    path: Path
    n_common: int
    n_ids: int


class KvStore:
    """The files of one model in `folder`, which those of others may share. `quota` is in bytes, for all of them."""

    def __init__(self, folder: Path, model: str, quota: int) -> None:
        """`model` is a `fingerprint`. Raises OSError."""
        self._folder, self._model, self._quota = folder, model, quota
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.glob("*.part"):
            if not _lives(path):
                path.unlink(missing_ok=True)

    @classmethod
    def of(cls, path: Path, settings: EngineSettings) -> "KvStore":
        """The files of a model, in the user's cache folder. Raises EngineError."""
        try:
            return cls(kv_folder(), fingerprint(path, settings.kv_type), settings.kept_kv_bytes)
        except OSError as error:
            raise EngineError(
                f"{kv_folder()}: KV caches cannot be kept there ({error.strerror}); leave out --keep-kv"
            ) from None

    def best(self, ids: Sequence[int], most: int | None = None) -> Kept | None:
        """The file with the longest beginning of `ids`, if there is any, of those with at most `most` ids."""
        wanted = np.asarray(ids, np.int32)
        files = [(path, _ids(path)) for path in self._folder.glob(f"{self._model}-*.kv")]
        found = [
            Kept(path, n_common(held, wanted), len(held)) for path, held in files if most is None or len(held) <= most
        ]
        best = max(found, key=lambda kept: kept.n_common, default=None)
        return best if best is not None and best.n_common > 0 else None

    def read(self, path: Path, load: Callable[[Path], list[int] | None]) -> list[int] | None:
        """What `load` makes of a file, by another name; a damaged file, or one it gives None for, is removed."""
        part = self._part(path.stem)
        try:
            path.rename(part)
            if path.stem.rpartition("-")[2] != _checksum(part) or (loaded := load(part)) is None:
                part.unlink(missing_ok=True)
                return None
            os.utime(part)
            part.rename(path)
        except OSError:  # it was used by another process, or is gone
            return None
        return loaded

    def keep(self, ids: Sequence[int], n_bytes: int, write: Callable[[Path], bool]) -> bool:
        """Keep a cache of about `n_bytes`; `write` writes it to a path. False where it was not: no room, or no need.

        Files whose ids these go on from are replaced.
        """
        wanted = np.asarray(ids, np.int32)
        if n_bytes > self._quota or len(ids) < WORTH_TOKENS:
            return False
        known = self.best(ids)
        if known is not None and len(ids) - known.n_common < WORTH_TOKENS:
            with contextlib.suppress(OSError):
                os.utime(known.path)
            return False
        old = [path for path in self._folder.glob(f"{self._model}-*.kv") if _begins(_ids(path), wanted)]
        self._make_room(n_bytes, old)
        name = f"{self._model}-{hashlib.sha256(wanted.tobytes()).hexdigest()[:16]}"
        part = self._part(name)
        try:
            if not write(part):
                return False
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.chmod(0o600)
            part.rename(self._folder / f"{name}-{_checksum(part)}.kv")
        except OSError:
            return False
        finally:
            part.unlink(missing_ok=True)
        for path in old:
            path.unlink(missing_ok=True)
        return True

    def _part(self, name: str) -> Path:
        """The name of a file that this process is at work on."""
        return self._folder / f"{name}.{os.getpid()}.part"

    def _make_room(self, n_bytes: int, going: Sequence[Path]) -> None:
        """Remove the files not used for longest until `n_bytes` fit, counting `going` as gone."""
        files = []
        for path in self._folder.glob("*.kv"):
            with contextlib.suppress(OSError):
                if path not in going:
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        taken = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if taken + n_bytes <= self._quota:
                return
            path.unlink(missing_ok=True)
            taken -= size


def fingerprint(path: Path, kv_type: str) -> str:
    """Names a model and the form of its KV cache: from all files' sizes, headers and samples of their weights.

    Reading every byte would take minutes where the weights are large; another quantization changes nearly all of them.
    """
    digest = hashlib.sha256(f"{VERSION} {kv_type}".encode())
    for shard in shards(path):
        size = shard.stat().st_size
        with shard.open("rb") as file:
            digest.update(struct.pack("<Q", size))
            digest.update(file.read(_HEAD_BYTES))
            for i in range(_SAMPLES):
                file.seek(size * i // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def n_common(a: Sequence[int] | NDArray[np.int32], b: Sequence[int] | NDArray[np.int32]) -> int:
    """How many ids two sequences have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n


def _checksum(path: Path) -> str:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _begins(ids: NDArray[np.int32], wanted: NDArray[np.int32]) -> bool:
    return 0 < len(ids) == n_common(ids, wanted)


def _ids(path: Path) -> NDArray[np.int32]:
    """The ids a file begins with; none where it is not such a file, or gone by now."""
    try:
        with path.open("rb") as file:
            magic, version, n_ids = _HEADER.unpack(file.read(_HEADER.size))
            if (magic, version) != (_MAGIC, _VERSION) or 4 * n_ids > os.fstat(file.fileno()).st_size:
                return np.empty(0, np.int32)
            return np.frombuffer(file.read(4 * n_ids), np.int32)
    except (OSError, ValueError, struct.error):
        return np.empty(0, np.int32)


def _lives(part: Path) -> bool:
    """Whether the process that writes an unfinished file is still there."""
    try:
        os.kill(int(part.suffixes[-2][1:]), 0)
    except (OSError, ValueError, IndexError):
        return False
    return True
