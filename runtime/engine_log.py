"""The log of one engine process: a file that gets all it writes, and llama.cpp's own log.

The file lies in the user's state folder while the process lives, and stays where it died unasked: only then does
anybody want it. The last few are kept. Where the folder cannot be written, the log has no name and ends with the owner.
"""

import contextlib
import os
import tempfile
from pathlib import Path

from runtime.obituary import LOGGED

_TAIL_BYTES = 64 << 10
_KEPT = 10
_FULL_BYTES = 4 << 20
_LETTERS = {2: "I", 3: "W", 4: "E"}  # ggml.h, enum ggml_log_level; others are not written
_CONTINUED = 5


class EngineLog:
    """The owner's side: a file to hand to the process, whose end can be read."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is by default `log` in the user's state folder."""
        self.path: Path | None = None
        """None where it could not get a name."""
        try:
            folder = folder or _default_folder()
            folder.mkdir(parents=True, exist_ok=True)
            _remove_old(folder)
            self.descriptor, name = tempfile.mkstemp(prefix="engine-", suffix=".log", dir=folder)
            self.path = Path(name)
        except OSError:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        _append(self.descriptor)

    def tail(self) -> str:
        """The end of what was written, from the beginning of a line."""
        start = max(0, os.fstat(self.descriptor).st_size - _TAIL_BYTES)
        text = os.pread(self.descriptor, _TAIL_BYTES, start).decode("utf-8", "replace")
        return text.partition("\n")[2] if start else text

    def close(self, *, keep: bool) -> None:
        """Let go of the file; `keep` leaves it where it is."""
        os.close(self.descriptor)
        if self.path is not None and not keep:
            with contextlib.suppress(OSError):
                self.path.unlink()


class NativeLines:
    """The process's side: writes llama.cpp's log to its stderr, each line with its level before it."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._goes_on = False  # the last line has no end yet
        self._written = False  # whether that line is in the log

    def write(self, level: int, text: str) -> None:
        """Take one message; of level `_CONTINUED` it goes on where the last one ended."""
        if level == _CONTINUED:
            if not self._written:
                return
            line = text
        else:
            letter = _LETTERS.get(level)
            self._written = letter is not None
            if letter is None:
                return
            line = ("\n" if self._goes_on else "") + f"{LOGGED}{letter}: {text}"
        self._goes_on = not line.endswith("\n")
        with contextlib.suppress(OSError):  # a full disk must not end an answer
            if os.fstat(self._descriptor).st_size > _FULL_BYTES:
                os.ftruncate(self._descriptor, 0)
                line = f"(earlier lines were dropped)\n{line}"
            os.write(self._descriptor, line.encode())


def _default_folder() -> Path:
    import platformdirs

    return platformdirs.user_state_path("bise") / "log"


def _append(descriptor: int) -> None:
    """Every write goes to the end, also after the file was cut."""
    import fcntl

    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)


def _remove_old(folder: Path) -> None:
    """Make room for one more log. A living process's is among the newest as a rule; else it only loses its name."""
    logs = sorted(folder.glob("engine-*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in logs[_KEPT - 1 :]:
        path.unlink(missing_ok=True)
