"""One call of a tool as its text comes: `{"name": …, "arguments": {…}, "id": …}` → its parts, the arguments as written.

Finds where the object ends without holding its text, in time linear in it. Keys may stand in any order, and others
beside them; whether a value is JSON is not looked at, but for the name's and the id's. Raises nothing: what cannot be
gone on with is a `fault`, in words for the model.
"""

import json
import re
from collections.abc import Callable, Mapping

_SPACE = re.compile(r"[ \t\n\r]*")
_IN_STRING = re.compile(r'[^"\\]*')
_IN_CONTAINER = re.compile(r'[^"{}\[\]]*')
_IN_SCALAR = re.compile(r'[^"{}\[\], \t\n\r]*')


class CallText:
    """A call, from behind its `{`, or from the beginning of its arguments."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.id: str | None = None
        """As the model wrote it before the arguments, which may be anything."""
        self.arguments: list[str] = []
        """Their text so far, in pieces."""
        self.has_arguments = False
        self.whole = False
        """Its `}` was read."""
        self.fault: str | None = None
        self._state: Callable[[str, int], int] = self._member
        self._key: str | None = None  # None: a key is read
        self._value: list[str] = []
        self._depth, self._in_string, self._escaped = 0, False, False
        self._alone = False  # the arguments are all

    def begin_arguments(self) -> None:
        """Name and id stood before: what is read is no object of them, but the arguments alone."""
        self._alone = True
        self._key, self._state = "arguments", self._begin_value

    def read(self, text: str, at: int) -> int:
        """Go on with the text from a place on, as far as the object goes, or to a fault: the place behind."""
        while at < len(text) and not self.whole and self.fault is None:
            at = self._state(text, at)
        return at

    # States. Each takes text from a place on, and gives the place up to which it took it.

    def _member(self, text: str, at: int) -> int:
        return self._expect(text, at, {'"': self._begin_key, "}": None})

    def _begin_key(self, _: str, at: int) -> int:
        self._key, self._value, self._in_string = None, ['"'], True
        self._state = self._scan
        return at

    def _colon(self, text: str, at: int) -> int:
        return self._expect(text, at, {":": self._begin_value})

    def _begin_value(self, text: str, at: int) -> int:
        at = after_space(text, at)
        if at < len(text):
            self._value = []
            self._state = self._scan
            if self._key == "arguments":
                if self.has_arguments:
                    self.fault = 'the call has "arguments" twice'
                self.has_arguments = True
        return at

    def _scan(self, text: str, at: int) -> int:
        """A key or a value."""
        start, ended = at, False
        while at < len(text) and not ended:
            at, ended = self._step(text, at)
        if self._key == "arguments":
            self.arguments.append(text[start:at])
        elif self._key in (None, "name", "id"):
            self._value.append(text[start:at])
        if ended:
            self._taken()
        return at

    def _step(self, text: str, at: int) -> tuple[int, bool]:
        """Up to behind the next character that opens or closes something, and whether the value ends there."""
        if self._escaped:
            self._escaped = False
            return at + 1, False
        run = _IN_STRING if self._in_string else _IN_CONTAINER if self._depth else _IN_SCALAR
        at = _end(run, text, at)
        if at == len(text):
            return at, False
        char = text[at]
        if self._in_string:
            self._escaped, self._in_string = char == "\\", char != '"'
            return at + 1, not self._in_string and not self._depth
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif not self._depth:  # behind a number or a word
            return at, True
        else:
            self._depth -= 1
            return at + 1, not self._depth
        return at + 1, False

    def _more(self, text: str, at: int) -> int:
        return self._expect(text, at, {",": self._member, "}": None})

    def _expect(self, text: str, at: int, then: Mapping[str, Callable[[str, int], int] | None]) -> int:
        """Skip space and go on by the character that comes; None: it is the last."""
        at = after_space(text, at)
        if at < len(text):
            if text[at] not in then:
                self.fault = f"the call is not JSON: expected {' or '.join(then)}, not {text[at]!r}"
                return at
            state = then[text[at]]
            self._state, self.whole = state or self._state, state is None
            at += 1
        return at

    def _taken(self) -> None:
        """A key or value is whole."""
        key, self._state, self.whole = self._key, self._more, self._alone
        if key not in (None, "name", "id"):
            return
        try:
            value = json.loads("".join(self._value))
        except (ValueError, RecursionError):
            value = None
        if key is None:
            self._key, self._state = value, self._colon
            if value is None:
                self.fault = "the call is not JSON: it has a key that is none"
        elif key == "name":
            if not isinstance(value, str) or self.name is not None:
                self.fault = 'the call\'s "name" must be a text, once'
            else:
                self.name = value
        elif isinstance(value, str) and self.id is None and not self.has_arguments:
            self.id = value


def after_space(text: str, at: int) -> int:
    """The place behind white space, as JSON has it."""
    return _end(_SPACE, text, at)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None
    return match.end()
