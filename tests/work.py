"""How much work something is, without a clock."""

import sys
from collections.abc import Callable
from itertools import count


def function_calls(work: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, that the work takes."""
    counter = count()

    def step(_: object, event: str, __: object) -> None:
        if event in ("call", "c_call"):
            next(counter)

    sys.setprofile(step)
    try:
        work()
    finally:
        sys.setprofile(None)
    return next(counter)
