"""Control groups with a limit of memory, for processes to join."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def control_group(limit_bytes: int) -> Iterator[Path]:
    """A control group with that much memory: the file to write a process's id into, so that it joins."""
    for parent, limit in [
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ]:
        group = parent / f"bise-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(limit_bytes))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        try:
            yield group / "cgroup.procs"
        finally:
            _wait_until_empty(group / "cgroup.procs")
            group.rmdir()
        return
    pytest.skip("no right to make a control group")


def _wait_until_empty(file: Path) -> None:
    for _ in range(6000):
        if not file.read_text().strip():
            return
        time.sleep(0.01)
    raise AssertionError("a process stayed in the control group for a minute")
