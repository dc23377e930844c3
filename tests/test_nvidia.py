"""NVIDIA GPUs that are here and not used: on copies of the kernel's files, and on a stand-in for NVML."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.nvidia import Card, Findings, look, read_cards, why_unusable

VERSION = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN_VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build  (archlinux-builder@)\n"
)


def machine(root: Path, *, version: str | None = VERSION, nodes: int = 2) -> Path:
    """The files of a machine with two GPUs, their sound devices, and a network card."""
    for bus, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030200"),
        ("0000:01:00.1", "0x10de", "0x040300"),
        ("0000:41:00.0", "0x10de", "0x030000"),
        ("0000:03:00.0", "0x15b3", "0x020000"),
        ("0000:04:00.0", "0x1a03", "0x030000"),
    ):
        folder = root / "sys/bus/pci/devices" / bus
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")
    (root / "dev/nvidia-caps").mkdir(parents=True)
    for name in (f"nvidia{i}" for i in range(nodes)):
        (root / "dev" / name).touch()
    if nodes:
        (root / "dev/nvidiactl").touch()
    if version is not None:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(version)
    return root


def test_a_machine_without_gpus_has_none_and_no_fault(tmp_path: Path) -> None:
    found = look(tmp_path, {})
    assert found == Findings((), (), (), None, None)
    assert why_unusable(found, cuda_build=False, n_cuda=0) is None


@pytest.mark.parametrize(("text", "version"), [(VERSION, "550.54.15"), (OPEN_VERSION, "575.57.08")])
def test_the_kernels_files_tell_of_cards_and_driver(text: str, version: str, tmp_path: Path) -> None:
    found = look(machine(tmp_path, version=text), {"CUDA_VISIBLE_DEVICES": "1"})
    assert found.gpus == ("0000:01:00.0", "0000:41:00.0"), "neither sound, network nor another maker's card"
    assert [Path(node).name for node in found.nodes] == ["nvidia0", "nvidia1"]
    assert (found.driver, found.visible) == (version, "1")


def test_where_the_bus_cannot_be_seen_device_files_tell_of_cards(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    found = look(tmp_path, {})
    assert found.gpus == found.nodes == (str(tmp_path / "dev/nvidia0"),)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_device_files_that_may_not_be_opened_are_told(tmp_path: Path) -> None:
    node = machine(tmp_path) / "dev/nvidia1"
    node.chmod(0o400)
    assert look(tmp_path, {}).closed == (str(node),)


WELL = Findings(("0000:01:00.0", "0000:41:00.0"), ("/dev/nvidia0", "/dev/nvidia1"), (), "550.54.15", None)


@pytest.mark.parametrize(
    ("found", "cuda_build", "n_cuda", "line"),
    [
        (
            replace(WELL, nodes=(), driver=None),
            True,
            0,
            "2 NVIDIA GPUs are here (0000:01:00.0, 0000:41:00.0), but the NVIDIA driver is not loaded; install it, or "
            "load it with `sudo modprobe nvidia`, until `nvidia-smi` lists the GPU",
        ),
        (
            replace(WELL, nodes=()),
            False,
            0,
            "2 NVIDIA GPUs are here and driver 550.54.15 is loaded, but there is no /dev/nvidia0; run `sudo "
            "nvidia-modprobe -u -c 0`, or start the container with `--gpus all`",
        ),
        (
            replace(WELL, closed=("/dev/nvidia0",)),
            True,
            0,
            "2 NVIDIA GPUs are here, but this user may not open /dev/nvidia0; `ls -l /dev/nvidia*` names the group "
            "that may: `sudo usermod -aG GROUP $USER`, then log in again",
        ),
        (
            replace(WELL, gpus=WELL.gpus[:1]),
            False,
            0,
            "an NVIDIA GPU is here, but llama-cpp-python was built without CUDA; rebuild it with `make setup CUDA=1`",
        ),
        (
            replace(WELL, visible="1"),
            True,
            1,
            "2 NVIDIA GPUs are here, but llama.cpp sees 1 of the 2: CUDA_VISIBLE_DEVICES is '1'; unset it, or name "
            "all of them in it",
        ),
        (
            WELL,
            True,
            0,
            "2 NVIDIA GPUs are here, but llama.cpp sees none of the 2 (ggml_cuda_init: failed to initialize CUDA: "
            "CUDA driver version is insufficient for CUDA runtime version); `nvidia-smi` must list every GPU, with a "
            "driver (now 550.54.15) no older than the CUDA toolkit of the build",
        ),
    ],
)
def test_each_cause_is_one_line_with_a_remedy(found: Findings, cuda_build: bool, n_cuda: int, line: str) -> None:
    log = ["ggml_cuda_init: failed to initialize CUDA: CUDA driver version is insufficient for CUDA runtime version"]
    assert why_unusable(found, cuda_build=cuda_build, n_cuda=n_cuda, errors=log) == line


def test_gpus_that_are_used_are_no_fault() -> None:
    assert why_unusable(WELL, cuda_build=True, n_cuda=2) is None


class UnsupportedError(Exception):
    """What NVML's package raises."""


class Nvml:
    """NVML with an A100 80GB PCIe, figures of its data sheet, and a card that says little."""

    NVMLError = UnsupportedError
    NVML_CLOCK_MEM, NVML_NVLINK_MAX_LINKS, NVML_FEATURE_ENABLED = 2, 18, 1

    def __init__(self, *, fails: bool = False) -> None:
        self.fails, self.is_open = fails, False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.fails:
            raise UnsupportedError("Driver Not Loaded")
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:  # noqa: N802
        if handle or link >= 12:
            raise UnsupportedError("Not Supported")
        return 1

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetName": b"NVIDIA A100 80GB PCIe",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=85_899_345_920, free=85_000_000_000),
            "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:01:00.0"),
            "nvmlDeviceGetMaxPcieLinkGeneration": 4,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetEnforcedPowerLimit": 300_000,
            "nvmlDeviceGetMaxClockInfo": 1512,
            "nvmlDeviceGetMemoryBusWidth": 5120,
        }

        def answer(handle: int, *_: int) -> object:
            if handle:
                raise UnsupportedError("Not Supported")
            return answers[name]

        return answer


def test_nvmls_answers_become_values() -> None:
    nvml = Nvml()
    a100, silent = read_cards(nvml)
    assert a100 == Card(
        name="NVIDIA A100 80GB PCIe",
        bus="00000000:01:00.0",
        memory_total=85_899_345_920,
        memory_free=85_000_000_000,
        pcie="4.0 x16",
        nvlinks=12,
        power_limit=300.0,
        bandwidth=1_935_360_000_000,  # the data sheet says 1,935 GB/s
    )
    assert silent == Card("unknown", None, None, None, None, 0, None, None)
    assert not nvml.is_open


def test_nvml_without_a_driver_knows_no_card() -> None:
    assert read_cards(Nvml(fails=True)) == ()
