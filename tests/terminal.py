"""A real terminal for a real process: a pseudo-terminal, and pyte to read what stands on its screen."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping, Sequence

import pyte

_WAIT_SECONDS = 60.0


class Terminal:
    """A command in a terminal of its own. Use as a context manager: leaving it kills what still runs."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], columns: int = 100, lines: int = 30
    ) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.output = b""
        """Every byte the command wrote to the terminal."""
        self._status: int | None = None
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:  # the child: nothing but exec may happen here
            os.execvpe(command[0], list(command), {**environment, "TERM": "xterm-256color", "COLORTERM": "truecolor"})
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._descriptor)

    @property
    def text(self) -> str:
        """What stands on the screen now."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def type(self, text: str) -> None:
        """Send keys as a keyboard does."""
        os.write(self._descriptor, text.encode())

    def wait_for(self, *wanted: str, absent: Sequence[str] = ()) -> str:
        """Read until all of `wanted` and none of `absent` stand on the screen, and return the screen."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while not (all(text in self.text for text in wanted) and not any(text in self.text for text in absent)):
            assert time.monotonic() < deadline, f"waited for {wanted} without {absent}, saw:\n{self.text}"
            assert self._read(), f"ended while waiting for {wanted}:\n{self.text}"
        return self.text

    def wait_for_end(self) -> int:
        """Read until the command ends; its exit code."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while self._read():
            assert time.monotonic() < deadline, f"did not end:\n{self.text}"
        _, status = os.waitpid(self.pid, 0)
        self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def _read(self) -> bool:
        """Take in what was written in the next tenth of a second; False when the terminal is closed."""
        ready, _, _ = select.select([self._descriptor], [], [], 0.1)
        if not ready:
            return True
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        if data:
            self.output += data
            # pyte 0.8 does not know the private CSI sequences with > or = that newer terminals have; they draw nothing.
            self._stream.feed(_without_private_sequences(data))
        return bool(data)


def _without_private_sequences(data: bytes) -> bytes:
    return re.sub(rb"\x1b\[[<>=][0-9;]*[a-zA-Z]", b"", data)
