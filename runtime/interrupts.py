"""Ctrl-C while native code runs that calls Python: held back until it has returned.

Python raises KeyboardInterrupt wherever it is. In a callback, a log line's too, ctypes prints it and it is lost, and C
takes an answer that was never given.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Those that came while they were held."""

    def __init__(self, on_interrupt: Callable[[], None] = lambda: None) -> None:
        """`on_interrupt` is called when one comes, to end the native code soon."""
        self._on_interrupt = on_interrupt
        self._came: list[tuple[int, FrameType | None]] = []

    @property
    def came(self) -> bool:
        """Whether one came since they were last held."""
        return bool(self._came)

    @contextmanager
    def held(self) -> Iterator[None]:
        """To call native code in. At its end Ctrl-C does what it does elsewhere; in other threads nothing changes."""
        self._came = []
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler) or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
            if self._came:
                handler(*self._came[0])

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._came.append((number, frame))
        self._on_interrupt()
