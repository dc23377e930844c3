"""What the kernel says of a process's memory: how much it holds and may take, and whether memory ran out.

Linux only; elsewhere everything is unknown (None). The counters: `oom_kill` in a cgroup's memory.events (version 2) or
memory.oom_control (version 1), and in /proc/vmstat for the whole machine.
"""

import os
from collections.abc import Iterator
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


def cgroup_room() -> int | None:
    """Bytes that this process's cgroup can still take, its files in the page cache given up; None without a limit."""
    rooms = [room for folder, *names in _groups() if (room := _room(folder, *names)) is not None]
    return min(rooms, default=None)


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Folders of this process's cgroup and those around it; names of their limit, their use, their cached files."""
    for controllers, path in _memberships("self"):
        if controllers == "":
            top, names = _CGROUPS, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top, names = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield group, *names


def _room(folder: Path, limit: str, use: str, prefix: str) -> int | None:
    try:
        most, taken = (folder / limit).read_text(encoding="ascii"), int((folder / use).read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    if not most.strip().isdecimal():  # "max"
        return None
    found = dict(line.split(" ", 1) for line in lines if " " in line)
    cached = sum(int(found.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, int(most) - taken + cached)


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
    found = []
    for controllers, path in _memberships(pid):
        if controllers == "":
            found += [_CGROUPS / path.lstrip("/") / "memory.events", _CGROUPS / "memory.events"]
        elif "memory" in controllers.split(","):
            found += [_CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control"]
    return found


def _memberships(pid: int | str) -> list[tuple[str, str]]:
    """Controllers and path of every cgroup that a process is in; no controllers in version 2."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [(controllers, path) for _, controllers, path in (line.split(":", 2) for line in lines)]


def _read(path: Path) -> int | None:
    """The number after `oom_kill` in a file of names and numbers."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
