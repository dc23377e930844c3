"""Devices, the host's memory and processor, and wishes such as `80GiB,80GiB`.

Gives bytes and names. What ggml says of the devices that are here comes from native_devices.py.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from runtime.catalogue import parse_bytes
from runtime.errors import CatalogueError
from runtime.memory_watch import cgroup_room


@dataclass(frozen=True, slots=True)
class Device:
    """One place where layers and KV cache can lie."""

    name: str
    """ggml's name, such as CPU, CUDA0 or RPC0."""
    description: str
    kind: str
    """cpu, gpu, igpu or accel."""
    memory_free: int
    memory_total: int


def parse_devices(text: str) -> tuple[int, ...]:
    """`80GiB,80GiB` → bytes of each device. Raises CatalogueError."""
    sizes = tuple(parse_bytes(part) for part in text.split(",") if part.strip())
    if not sizes or min(sizes) <= 0:
        raise CatalogueError(f"{text!r} names no devices; write their sizes, such as 80GiB,80GiB")
    return sizes


def host_memory() -> tuple[int, int]:
    """Bytes of RAM: available to this process, whose cgroup may have a limit, and in total."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = os.sysconf("SC_AVPHYS_PAGES") * page
    with contextlib.suppress(OSError):  # not Linux: the pages that are free now
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    room = cgroup_room()
    return available if room is None else min(available, room), total


def cpu_model() -> str:
    """The processor's name as the kernel tells it."""
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()
