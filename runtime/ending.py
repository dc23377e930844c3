"""When a process that runs native code ends: with its owner, and before it where memory runs out."""

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OOM_SCORE = "500"  # of 1000


def end_with(owner: int) -> None:
    """Have the kernel kill this process when the owner's thread that started it ends, which is when the owner ends.

    Linux only. Elsewhere the end of the socket has to do.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it ended before
        os._exit(0)


def die_first() -> None:
    """When memory runs out, let the kernel kill this process and not the one that holds the conversation."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
