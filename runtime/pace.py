"""How fast a piece of work goes, how long it still takes, and how much of it to do at once.

Pure but for the clock, which tests replace. Work is counted in any unit: bytes of weights, tokens of a prompt.
"""

import time
from collections import deque
from collections.abc import Callable

_WINDOW_SECONDS = 10.0
_FIRST_SECONDS = 0.3  # before that a rate is chance
_QUICK_SECONDS, _SLOW_SECONDS = 0.5, 2.0


class Pace:
    """The rate over the last ten seconds: what lies in the page cache loads faster than what follows."""

    def __init__(self, total: float, done: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`done` of `total` was there before the work began, and is not credited to it."""
        self._total = total
        self._clock = clock
        self._steps = deque([(clock(), done)])

    def at(self, done: float) -> tuple[float | None, float | None]:
        """Units a second and seconds left, now that so much is done; None while it is too early to tell."""
        now = self._clock()
        self._steps.append((now, done))
        while len(self._steps) > 2 and self._steps[1][0] <= now - _WINDOW_SECONDS:
            self._steps.popleft()
        start, before = self._steps[0]
        seconds, gained = now - start, done - before
        if seconds < _FIRST_SECONDS or gained <= 0:
            return None, None
        return gained / seconds, max(0.0, self._total - done) * seconds / gained


class Stride:
    """How many tokens to read in one call: as many as take between half a second and two, in whole ubatches.

    Progress is told, and a rate known, after each; more in one call keeps several GPUs busy side by side.
    """

    def __init__(self, n_ubatch: int, n_batch: int) -> None:
        self._n_ubatch = n_ubatch
        self._most = max(1, n_batch // n_ubatch) * n_ubatch
        self.tokens = n_ubatch

    def took(self, seconds: float) -> None:
        """Learn how long the last stride took."""
        if seconds < _QUICK_SECONDS:
            self.tokens = min(2 * self.tokens, self._most)
        elif seconds > _SLOW_SECONDS:
            self.tokens = max(self.tokens // 2 // self._n_ubatch, 1) * self._n_ubatch
