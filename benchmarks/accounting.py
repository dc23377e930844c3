"""What a step costs: its own process's time, memory and traffic, read where Linux counts them.

`Meter` runs in the process that does the work, around the work alone: starting Python and importing are left out, for
both sides. `run_step` starts that process and watches it. Bytes:

- *asked*: what read and write calls moved (rchar, wchar of /proc/self/io). Pages of a mapped file are not in it.
- *from disk*: what the process made the disk read (read_bytes), mapped files too; 0 for what was in memory already.
- *resident*: the highest memory of the process (VmHWM), shared libraries and mapped files included. It is taken from
  the process itself, for `ru_maxrss` of a child begins with what its parent held when it was started.
- *anonymous*: the same without files (RssAnon), the memory that cannot be dropped. Linux keeps no highest value of it;
  it is sampled fifty times a second.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.errors import UserError

ROOT = Path(__file__).parent.parent

SAMPLING_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one step, in bytes and seconds."""

    seconds: float
    cpu_seconds: float
    """User and system time of the process."""
    asked_read_bytes: int
    asked_write_bytes: int
    disk_read_bytes: int
    disk_write_bytes: int
    """What it left for the disk to write."""
    peak_resident_bytes: int
    peak_anonymous_bytes: int
    flush_seconds: float
    """What `sync` took afterwards: what the step had not written to the disk itself."""
    other_cores: float
    """Cores that everything else on this machine used meanwhile, on average; writing to disk is in it."""


class Meter:
    """Measures this process between `with` and its end."""

    def __enter__(self) -> Self:
        self._io = _traffic()
        self._cpu = _cpu_seconds(resource.RUSAGE_SELF)
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._began
        self.cpu_seconds = _cpu_seconds(resource.RUSAGE_SELF) - self._cpu
        self.traffic = {key: value - self._io[key] for key, value in _traffic().items()}
        self.peak_resident_bytes = status_bytes("self", "VmHWM")

    def as_json(self) -> dict[str, Any]:
        """What `run_step` reads."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "asked_read_bytes": self.traffic["rchar"],
            "asked_write_bytes": self.traffic["wchar"],
            "disk_read_bytes": self.traffic["read_bytes"],
            "disk_write_bytes": self.traffic["write_bytes"],
            "peak_resident_bytes": self.peak_resident_bytes,
        }


def run_step(task: Mapping[str, Any], cold: Iterable[Path] = ()) -> tuple[Cost, dict[str, Any]]:
    """Do a task of step.py in a process of its own; give its cost, and what else it says.

    The files `cold` are dropped from memory before. Everything waiting to be written is written before and after, so
    that no step pays for another. Raises UserError if it fails.
    """
    os.sync()
    for path in cold:
        _drop(path)
    busy, began = _busy_seconds(), time.perf_counter()
    cpu = _cpu_seconds(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.step", json.dumps(task)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    anonymous = 0
    try:
        while process.poll() is None:
            anonymous = max(anonymous, status_bytes(str(process.pid), "RssAnon"))
            time.sleep(SAMPLING_SECONDS)
        said, _ = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise UserError(f"the step {task['kind']} failed with exit code {process.returncode}; its error is above")
    passed = time.perf_counter() - began
    others = _busy_seconds() - busy - (_cpu_seconds(resource.RUSAGE_CHILDREN) - cpu)
    began = time.perf_counter()
    os.sync()
    flush_seconds = time.perf_counter() - began
    found = json.loads(said)
    cost = Cost(
        **found.pop("cost"),
        peak_anonymous_bytes=anonymous,
        flush_seconds=flush_seconds,
        other_cores=max(others / passed, 0.0),
    )
    return cost, found


def _drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _traffic() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}


def status_bytes(process: str, key: str) -> int:
    """Bytes of one line of /proc/PID/status; 0 where there is no such line any more."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _cpu_seconds(whose: int) -> float:
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def _busy_seconds() -> float:
    """Of all cores since boot: all that /proc/stat counts but idling and waiting for disks."""
    fields = [int(text) for text in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
