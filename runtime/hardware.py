"""Devices and their memory, as ggml sees them, and the host's own.

Takes nothing or a wish such as `80GiB,80GiB`, gives `Device` values in bytes. Asking ggml loads its backends (on a CUDA
build, the driver too). Knows nothing of models.
"""

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from runtime.catalogue import parse_bytes
from runtime.errors import CatalogueError, EngineError

_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}  # enum ggml_backend_dev_type, ggml-backend.h


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


def devices() -> tuple[Device, ...]:
    """Every device of the installed build, the CPU among them. Raises EngineError without llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EngineError("llama-cpp-python is not installed; run `make setup`")
    folder = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"))
    ggml = ctypes.CDLL(str(folder / "libggml.so"))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(base, name).restype = ctypes.c_char_p
        getattr(base, name).argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    base.ggml_backend_dev_memory.restype = None
    found = []
    for i in range(ggml.ggml_backend_dev_count()):
        pointer = ggml.ggml_backend_dev_get(i)
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        base.ggml_backend_dev_memory(pointer, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                name=base.ggml_backend_dev_name(pointer).decode(),
                description=base.ggml_backend_dev_description(pointer).decode(),
                kind=_KINDS.get(base.ggml_backend_dev_type(pointer), "other"),
                memory_free=free.value,
                memory_total=total.value,
            )
        )
    return tuple(found)


def parse_devices(text: str) -> tuple[int, ...]:
    """`80GiB,80GiB` → bytes of each device. Raises CatalogueError."""
    sizes = tuple(parse_bytes(part) for part in text.split(",") if part.strip())
    if not sizes or min(sizes) <= 0:
        raise CatalogueError(f"{text!r} names no devices; write their sizes, such as 80GiB,80GiB")
    return sizes


def host_memory() -> tuple[int, int]:
    """Bytes of RAM (available, total)."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        return available, total  # not Linux: the pages that are free now
    return available, total


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
