"""A module with a tool, for tests/test_tools.py."""


def double(n: int) -> int:
    """Twice as much."""
    return 2 * n
