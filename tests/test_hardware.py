"""Sizes of wished devices, and what the kernel says of this host."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import CatalogueError
from runtime.hardware import cpu_model, host_memory, parse_devices
from tests.control_groups import control_group


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("80GiB,80GiB", (85_899_345_920, 85_899_345_920)),
        ("24GB", (24_000_000_000,)),
        ("80GiB, 512MiB,", (85_899_345_920, 536_870_912)),
    ],
)
def test_devices_are_sizes(text: str, devices: tuple[int, ...]) -> None:
    assert parse_devices(text) == devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' names no devices; write their sizes"),
        (",", "',' names no devices"),
        ("80GiB,0GiB", "'80GiB,0GiB' names no devices"),
        ("80GiB,two", "'two' is not a size; write one such as 80GiB or 24GB"),
    ],
)
def test_what_is_no_device_is_refused(text: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        parse_devices(text)


def test_the_hosts_memory_is_the_kernels() -> None:
    pages, page = (
        int(subprocess.run(["getconf", name], capture_output=True, check=True).stdout)
        for name in ("_PHYS_PAGES", "PAGE_SIZE")
    )
    available, total = host_memory()
    assert total == pages * page
    assert 0 < available <= total


def test_a_control_group_leaves_less_of_the_hosts_memory(tmp_path: Path) -> None:
    """Of 400 MiB, 100 taken: files that are cached do not count."""
    program = (
        "import os, sys; input(); held = bytearray(100 << 20); file = open(sys.argv[1], 'wb')\n"
        "for _ in range(64): file.write(bytes(1 << 20))\n"
        "os.fsync(file.fileno())\n"
        "from runtime.hardware import host_memory; print(*host_memory())"
    )
    with control_group(400 << 20) as members:
        process = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "cached"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        members.write_text(str(process.pid))
        available, total = map(int, process.communicate("\n", timeout=60)[0].split())
    assert 250 << 20 < available < 300 << 20
    assert total == host_memory()[1]


def test_the_processor_has_a_name() -> None:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        assert cpu_model() in file.read()
    assert cpu_model().strip()
