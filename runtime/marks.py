"""Text in marks: given to a template, it can neither be taken for the template's own text nor become it.

Every character of a text but whitespace is replaced by a private-use character that stands for it and occurs nowhere
else. What a template does with them (joining, trimming, slicing, sorting) cannot turn them into something else, and it
is shown again afterwards. `Content` answers a template's questions (`'</think>' in content`) about the text as it was
written. One limit: what a template puts inside such a text by `replace` counts as part of it.

Knows nothing of templates or tokens.
"""

import json
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from runtime.errors import EngineError

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # planes 15 and 16: 131,068 characters


class Marks(dict[int, int]):
    """A reversible code for one conversation: code point of a character → of the private-use character in its place.

    No mark is one of the characters `taken`. Whitespace stands for itself, so that templates can trim; but not
    `coded_spaces`, which spell control tokens.
    """

    def __init__(self, taken: set[str], coded_spaces: set[str]) -> None:
        self._coded_spaces = coded_spaces
        self._free = (code for code in chain(*_PRIVATE_USE) if chr(code) not in taken)
        self._shown: dict[int, int] = {}
        self.end = chr(next(self._free))
        """Stands behind the text of a reply that is to be continued; it is its own mark."""
        self[ord(self.end)] = ord(self.end)

    def __missing__(self, code: int) -> int:
        character = chr(code)
        if character.isspace() and character not in self._coded_spaces:
            return code
        mark = next(self._free, None)
        if mark is None:
            raise EngineError("the conversation has more than 130,000 different characters; shorten it")
        self[code] = mark
        self._shown[mark] = code
        return mark

    def hidden(self, text: str) -> str:
        return text.translate(self)

    def shown(self, text: str) -> str:
        return text.translate(self._shown)


class Content(str):
    """A message as the template sees it: made of marks, but its methods work on the text that they stand for."""

    _marks: Marks

    @classmethod
    def of(cls, text: str, marks: Marks) -> "Content":
        content = cls(marks.hidden(text))
        content._marks = marks
        return content

    def __str__(self) -> str:
        return self  # `str()` in filters keeps the methods


def _on_shown_text(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(content: Content, *args: Any, **kwargs: Any) -> Any:
        marks = content._marks

        def shown(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(shown, value))
            return marks.shown(value) if isinstance(value, str) else value

        def hidden(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(hidden, value))
            return Content.of(value, marks) if isinstance(value, str) else value

        return hidden(method(shown(content), *map(shown, args), **kwargs))

    return call


for _name in (
    "__contains__",
    "__eq__",
    "__ge__",
    "__getitem__",
    "__gt__",
    "__hash__",
    "__le__",
    "__lt__",
    "__ne__",
    "__repr__",
    "capitalize",
    "count",
    "endswith",
    "find",
    "index",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "title",
    "upper",
):
    setattr(Content, _name, _on_shown_text(_name))


def in_marks(value: Any, marks: Marks) -> Any:
    """The value with each of its texts, keys included, replaced by marks. A key is still found by its plain text."""
    match value:
        case str():
            return Content.of(value, marks)
        case Mapping():
            return {in_marks(key, marks): in_marks(item, marks) for key, item in value.items()}
        case list() | tuple():
            return [in_marks(item, marks) for item in value]
    return value


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter. What a mark stands for is escaped, and marked again."""

    def escaped(part: Any) -> Any:
        match part:
            case Content():
                return part._marks.hidden(json.dumps(part._marks.shown(part), ensure_ascii=ensure_ascii)[1:-1])
            case dict():
                items = sorted(part.items(), key=lambda item: item[0]) if sort_keys else part.items()
                return {escaped(key): escaped(item) for key, item in items}
            case list() | tuple():
                return [escaped(item) for item in part]
        return part

    return json.dumps(escaped(value), ensure_ascii=False, indent=indent, separators=separators)
