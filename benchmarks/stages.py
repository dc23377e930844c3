"""Where the threads of a conversion spend their time: reading, making float32, checking, encoding, hashing, writing.

The converter itself runs, with a clock around the functions that make up its stages; they are named in `PLACES`, and
one that is gone is an AttributeError. A stage's time is its own: what it calls that is a stage too is taken off. Wall
time that is not CPU time is waiting: for a core that something else had, which Linux counts for each thread
(/proc/thread-self/schedstat), or for a disk or another thread.
"""

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from quant import work
from quant.digest import FileDigest
from quant.source import WeightReader

PLACES: tuple[tuple[Any, str, str], ...] = (
    (WeightReader, "rows", "read and put in order"),
    (work.Job, "note", "hash the source"),
    (work, "to_float32", "make float32"),
    (work, "check_weights", "check"),
    (work, "encode", "encode"),
    (FileDigest, "feed", "hash the files (SHA-256)"),
    (zlib, "crc32", "hash the files (CRC-32)"),
    (os, "pwrite", "write"),
    (os, "fdatasync", "sync"),
    (os, "fsync", "sync"),
)
"""Where a function is looked up, its name there, and the stage it is."""


@dataclass(slots=True)
class Time:
    """Of one stage, all threads together."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    queued_seconds: float = 0.0
    """Ready to run, but no core was free."""
    calls: int = 0


@dataclass(slots=True)
class Stages:
    """Stage → its time. Threads may share it."""

    times: dict[str, Time] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: threading.local = field(default_factory=threading.local)

    def clocked(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The same function, with its time counted to a stage. Encoding is a stage for each type."""

        def run(*arguments: Any, **options: Any) -> Any:
            outer: list[Time] = self._open.__dict__.setdefault("stack", [])
            within = Time()
            outer.append(within)
            queued, cpu, began = self._queued_seconds(), time.thread_time(), time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds, cpu_seconds = time.perf_counter() - began, time.thread_time() - cpu
                queued_seconds = self._queued_seconds() - queued
                outer.pop()
                if outer:
                    outer[-1].seconds += seconds
                    outer[-1].cpu_seconds += cpu_seconds
                    outer[-1].queued_seconds += queued_seconds
                name = f"{stage} {arguments[1].name}" if stage == "encode" else stage
                with self._lock:
                    total = self.times.setdefault(name, Time())
                    total.seconds += seconds - within.seconds
                    total.cpu_seconds += cpu_seconds - within.cpu_seconds
                    total.queued_seconds += queued_seconds - within.queued_seconds
                    total.calls += 1

        return run

    def as_json(self) -> dict[str, dict[str, float]]:
        """Stage → seconds, cpu_seconds, queued_seconds, calls."""
        return {stage: asdict(found) for stage, found in self.times.items()}

    def _queued_seconds(self) -> float:
        """Of this thread, since it began; 0 where Linux does not count them. Its file stays open."""
        own = self._open.__dict__
        if "schedule" not in own:
            path = "/proc/thread-self/schedstat"
            own["schedule"] = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if os.path.exists(path) else None
        if own["schedule"] is None:
            return 0.0
        return int(os.pread(own["schedule"], 100, 0).split()[1]) / 1e9


@contextmanager
def watched(stages: Stages) -> Iterator[None]:
    """Clocks around every stage, for the process that measures and ends."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in PLACES]
    for owner, name, stage in PLACES:
        setattr(owner, name, stages.clocked(getattr(owner, name), stage))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
