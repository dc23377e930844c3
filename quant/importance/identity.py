"""What decides every bit of a matrix, as values that can be kept and compared: model, texts, settings, versions."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quant.provenance import SMALL_BYTES
from quant.quality.results import hash_file
from runtime import library
from runtime.events import EngineSettings

Identity = dict[str, Any]
"""Names of what decides, and its values in JSON's types."""

ModelFile = tuple[str, int, str | int]
"""Name, bytes and SHA-256; where that would take long, the time of the last change instead."""


def model_files(path: Path, on_share: Callable[[float], None]) -> tuple[ModelFile, ...]:
    """The files of a model. Up to SMALL_BYTES are read for their SHA-256; `on_share` is told how far that is."""
    paths = tuple(library.shards(library.first_shard(path)))
    total = sum(shard.stat().st_size for shard in paths)
    files: list[ModelFile] = []
    for shard in paths:
        sha256 = _noted_sha256(shard)
        if sha256 is None and total <= SMALL_BYTES:
            before = sum(n_bytes for _, n_bytes, _ in files)

            def on_bytes(n_bytes: int, before: int = before) -> None:
                on_share((before + n_bytes) / total)

            sha256 = hash_file(shard, on_bytes).sha256
        status = shard.stat()
        files.append((shard.name, status.st_size, sha256 or status.st_mtime_ns))
    return tuple(files)


def _noted_sha256(path: Path) -> str | None:
    """What a `.sha256` file beside a model's file says of it, if it is not older than that."""
    changed = path.stat().st_mtime_ns
    for notes in sorted(path.parent.glob("*.sha256")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if notes.stat().st_mtime_ns >= changed:
                for line in notes.read_text("utf-8").splitlines():
                    sha256, _, name = line.partition("  ")
                    if name == path.name:
                        return sha256
    return None


def settings_identity(settings: EngineSettings) -> Identity:
    """Every setting; of RPC servers their number, since their addresses change nothing."""
    n_threads = settings.n_threads or len(os.sched_getaffinity(0))
    return {**asdict(settings), "n_threads": n_threads, "rpc_servers": len(settings.rpc_servers)}


def as_kept(identity: Identity) -> Identity:
    """The identity as it is when it comes back from a file."""
    kept: Identity = json.loads(json.dumps(identity))
    return kept


def fingerprint(identity: Identity) -> str:
    """Its SHA-256: two that differ in anything have others."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def difference(before: Identity, now: Identity) -> tuple[str, str, str] | None:
    """What differs first, what it was and what it is, as words; None where nothing does."""
    for what in [*before, *(what for what in now if what not in before)]:
        old, new = before.get(what), now.get(what)
        if isinstance(old, dict) and isinstance(new, dict):
            if (inner := difference(old, new)) is not None:
                return inner
        elif old != new:
            return what, _shown(old), _shown(new)
    return None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)
