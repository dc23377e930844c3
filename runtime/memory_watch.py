"""What the kernel says of a process's memory: how much it holds, and whether memory ran out.

Linux only; elsewhere everything is unknown (None). The counters: `oom_kill` in a cgroup's memory.events (version 2) or
memory.oom_control (version 1), and in /proc/vmstat for the whole machine.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_VMSTAT = Path("/proc/vmstat")


def resident_bytes(pid: int | None = None) -> int | None:
    """Memory that a process, by default this one, holds: its own, and what it has mapped of files."""
    try:
        pages = Path(f"/proc/{pid or 'self'}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class OomKills:
    """How many processes the kernel has killed for want of memory."""

    cgroup: int | None
    """In the cgroup of the process that was watched."""
    machine: int | None
    counter: Path | None
    """Where `cgroup` was read: a process that has ended is in no cgroup any more."""

    @classmethod
    def seen_by(cls, pid: int) -> "OomKills":
        """The counters now, for a process that lives."""
        for path in _counters(pid):
            if (kills := _read(path)) is not None:
                return cls(kills, _read(_VMSTAT), path)
        return cls(None, _read(_VMSTAT), None)

    def verdict(self) -> str | None:
        """Where memory has run out since: `cgroup`, `machine`, or "" for neither; None where it cannot be known."""
        cgroup = _read(self.counter) if self.counter is not None else None
        machine = _read(_VMSTAT)
        if cgroup is not None and self.cgroup is not None and cgroup > self.cgroup:
            return "cgroup"
        if machine is None or self.machine is None:
            return None
        return "machine" if machine > self.machine else ""


def _counters(pid: int) -> list[Path]:
    """Files that may count the kills in a process's cgroup, the likeliest first."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += [_CGROUPS / path.lstrip("/") / "memory.events", _CGROUPS / "memory.events"]
        elif "memory" in controllers.split(","):
            found += [_CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control"]
    return found


def _read(path: Path) -> int | None:
    """The number after `oom_kill` in a file of names and numbers."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
