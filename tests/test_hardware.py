"""Sizes of wished devices, and what the kernel says of this host."""

import subprocess

import pytest

from runtime.errors import CatalogueError
from runtime.hardware import cpu_model, host_memory, parse_devices


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


def test_the_processor_has_a_name() -> None:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        assert cpu_model() in file.read()
    assert cpu_model().strip()
