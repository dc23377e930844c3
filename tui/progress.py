"""One line of progress on stderr: share, rate, time left. On a terminal it is rewritten, elsewhere said now and then.

Takes numbers, writes text. Knows nothing of what is being done.
"""

import sys
import time
from typing import TextIO

from tui.units import duration

_TERMINAL_SECONDS = 0.1
_LOG_SECONDS = 10.0


class ProgressLine:
    """A line for one piece of work. Use as a context manager: leaving it clears or ends the line."""

    def __init__(self, what: str, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        """`quiet` writes nothing at all."""
        self._what = what
        self._quiet = quiet
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._last = time.monotonic() - (0 if not self._terminal else _TERMINAL_SECONDS)
        self._width = 0

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def show(self, share: float, rate: str = "", seconds_left: float | None = None, detail: str = "") -> None:
        """Say how far it is: `share` from 0 to 1. Called as often as one likes; seldom drawn."""
        now = time.monotonic()
        if self._quiet:
            return
        if now - self._last < (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
            return
        self._last = now
        left = f"{duration(seconds_left)} left" if seconds_left is not None else ""
        parts = [f"{self._what} {share:4.0%}", rate, left, detail]
        line = "  ".join(part for part in parts if part)
        if self._terminal:
            self._draw(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def say(self, line: str) -> None:
        """Write a line that stays, above the progress."""
        if self._quiet:
            return
        self._clear()
        self._stream.write(line + "\n")
        self._stream.flush()

    def _draw(self, line: str) -> None:
        import shutil

        line = line[: shutil.get_terminal_size().columns - 1]
        padded = line.ljust(self._width)
        self._width = len(padded)  # before it is written: Ctrl-C may come in between
        self._stream.write("\r" + padded)
        self._stream.flush()
        self._width = len(line)

    def _clear(self) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0
