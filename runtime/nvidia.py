"""NVIDIA GPUs as the kernel and the driver tell of them, and why llama.cpp cannot use them.

Takes sysfs, /dev and /proc, and NVML through the optional package nvidia-ml-py; gives plain values. Knows nothing of
models. Tested on copies of those files and on a stand-in for NVML; run once, beside one H200.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VENDOR = "0x10de"
_DISPLAY = "0x03"  # PCI class of graphics cards and of 3D controllers, which is what servers' GPUs are
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Findings:
    """What the operating system knows of NVIDIA GPUs."""

    gpus: tuple[str, ...]
    """PCI addresses; where the bus cannot be seen, as in some containers, the device files."""
    nodes: tuple[str, ...]
    """Device files, such as /dev/nvidia0."""
    closed: tuple[str, ...]
    """Those of the driver's device files that this process may not open."""
    driver: str | None
    """Version of the kernel's driver, if it is loaded."""
    visible: str | None
    """CUDA_VISIBLE_DEVICES, if it is set."""


@dataclass(frozen=True, slots=True)
class Card:
    """What NVML says of one GPU; None where it does not say."""

    name: str
    bus: str | None
    memory_total: int | None
    memory_free: int | None
    pcie: str | None
    """Fastest link of card and slot, such as `4.0 x16`."""
    nvlinks: int
    """Links that are up."""
    power_limit: float | None
    """Watts."""
    bandwidth: int | None
    """Bytes a second the memory can give at most: its highest clock × 2 × the width of its bus."""


def look(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Findings:
    """What sysfs, /dev and /proc below `root` say. Never raises for what is not there."""
    buses = sorted((root / "sys/bus/pci/devices").glob("*"))
    gpus = [bus.name for bus in buses if _text(bus / "vendor") == _VENDOR and _text(bus / "class").startswith(_DISPLAY)]
    nodes = sorted(node for node in (root / "dev").glob("nvidia*") if node.name.removeprefix("nvidia").isdecimal())
    control = root / "dev/nvidiactl"
    needed = [*nodes, *([control] if control.exists() else [])]
    version = [line for line in _text(root / "proc/driver/nvidia/version").splitlines() if line.startswith("NVRM")]
    words = version[0].split() if version else []
    return Findings(
        gpus=tuple(gpus or map(str, nodes)),
        nodes=tuple(map(str, nodes)),
        closed=tuple(str(node) for node in needed if not os.access(node, os.R_OK | os.W_OK)),
        driver=next((word for word in words if word[0].isdecimal() and "." in word), "unknown") if words else None,
        visible=environment.get(_VISIBLE),
    )


def why_unusable(found: Findings, *, cuda_build: bool, n_cuda: int, errors: Sequence[str] = ()) -> str | None:
    """Why llama.cpp does not use every GPU there is, and what to do, in one line; None where it does or there is none.

    `n_cuda` is the number of its CUDA devices, `errors` the error lines of its log.
    """
    n = len(found.gpus)
    if n_cuda >= n:
        return None
    here = "an NVIDIA GPU is here" if n == 1 else f"{n} NVIDIA GPUs are here"
    if found.driver is None and not found.nodes:
        return (
            f"{here} ({', '.join(found.gpus)}), but the NVIDIA driver is not loaded; install it, or load it with "
            "`sudo modprobe nvidia`, until `nvidia-smi` lists the GPU"
        )
    if not found.nodes:
        return (
            f"{here} and driver {found.driver} is loaded, but there is no /dev/nvidia0; run `sudo nvidia-modprobe -u "
            "-c 0`, or start the container with `--gpus all`"
        )
    if found.closed:
        return (
            f"{here}, but this user may not open {', '.join(found.closed)}; `ls -l /dev/nvidia*` names the group that "
            "may: `sudo usermod -aG GROUP $USER`, then log in again"
        )
    if not cuda_build:
        return f"{here}, but llama-cpp-python was built without CUDA; rebuild it with `make setup CUDA=1`"
    sees = f"llama.cpp sees {n_cuda or 'none'} of {'it' if n == 1 else f'the {n}'}"
    if found.visible is not None:
        return f"{here}, but {sees}: {_VISIBLE} is {found.visible!r}; unset it, or name all of them in it"
    cause = f" ({errors[0]})" if errors else ""
    return (
        f"{here}, but {sees}{cause}; `nvidia-smi` must list every GPU, with a driver (now {found.driver}) no older "
        "than the CUDA toolkit of the build"
    )


def cards() -> tuple[Card, ...]:
    """What NVML says of each GPU; () without nvidia-ml-py, without a driver, or where NVML fails."""
    try:
        import pynvml
    except ImportError:
        return ()
    return read_cards(pynvml)


def read_cards(nvml: Any) -> tuple[Card, ...]:
    """The same, by the given module."""
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return ()

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except nvml.NVMLError:  # not supported by this card or driver
            return None

    def card(handle: Any) -> Card:
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        pci = ask(nvml.nvmlDeviceGetPciInfo, handle)
        generation = ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
        lanes = ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
        milliwatts = ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        megahertz = ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM)
        bits = ask(nvml.nvmlDeviceGetMemoryBusWidth, handle)
        links = range(nvml.NVML_NVLINK_MAX_LINKS)
        return Card(
            name=_plain(ask(nvml.nvmlDeviceGetName, handle)) or "unknown",
            bus=_plain(pci.busId) if pci is not None else None,
            memory_total=int(memory.total) if memory is not None else None,
            memory_free=int(memory.free) if memory is not None else None,
            pcie=f"{generation}.0 x{lanes}" if generation and lanes else None,
            nvlinks=sum(ask(nvml.nvmlDeviceGetNvLinkState, handle, i) == nvml.NVML_FEATURE_ENABLED for i in links),
            power_limit=milliwatts / 1000 if milliwatts else None,
            bandwidth=megahertz * 10**6 * 2 * bits // 8 if megahertz and bits else None,
        )

    try:
        return tuple(map(card, handles))
    finally:
        ask(nvml.nvmlShutdown)


def _plain(text: str | bytes | None) -> str | None:
    """NVML's strings are bytes in older versions of its package."""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
