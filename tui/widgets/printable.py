"""Text made safe to show: nothing in it can steer the terminal.

Models and users write what they like, escape sequences included. All text that comes in from outside goes through
`printable` before a widget shows it. Markup is no concern here: widgets take `Content` or `markup=False`.
"""

import re
from typing import Final

_LINE_END: Final = re.compile("\r\n?|[\u2028\u2029]")
# C0 but newline and tab, DEL, C1, and lone surrogates, which no terminal encoding has.
_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without control characters, its lines ended by newlines."""
    return _CONTROL.sub("", _LINE_END.sub("\n", text))


def counted(n: int, noun: str) -> str:
    """ "1 token", "1,234 tokens"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def one_line(text: str) -> str:
    """`text` as one printable line: every run of blanks becomes a space."""
    return " ".join(printable(text).split())
