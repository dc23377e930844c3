"""GBNF, llama.cpp's notation for grammars, checked: only a `Grammar` reaches native code.

llama.cpp gives NULL for some faulty grammars and takes time and memory without end on others, such as `x{3,2}` or a
rule that comes back to itself through an empty one. Here every fault is a GrammarError with its line and column. Also
refused is what llama.cpp takes and what cannot be meant: a rule defined twice, a repetition without end of what may be
empty, a rule without an end. Knows nothing of models: whether `<token>` names one is seen when it is loaded.

Notation: llama.cpp 0c1e57098, src/llama-grammar.cpp, `llama_grammar_parser`.
"""

import difflib
import graphlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from runtime.errors import GrammarError

MAX_REPETITIONS = 2000
"""llama.cpp takes a higher limit for none (MAX_REPETITION_THRESHOLD)."""

_MAX_CHARS = 1_000_000
_MAX_RULES = 10_000
_MAX_DEPTH = 64  # llama.cpp parses brackets by recursion
_MAX_ELEMENTS = 1_000_000  # it writes repetitions out
_MAX_BEGINNINGS = 1_000_000  # it tries every way to begin, with no memory of what it has tried

_NAME = re.compile(r"[a-zA-Z0-9-]+")
_COMMENT = re.compile(r"#[^\r\n]*")
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that holds an answer to what its rule `root` describes. Raises GrammarError."""

    text: str
    names_tokens: bool = field(init=False)
    """Whether it names tokens, `<…>`, which need not be text."""

    def __post_init__(self) -> None:
        parser = _Parser(self.text)
        _check(parser.rules())
        object.__setattr__(self, "names_tokens", parser.names_tokens)


@dataclass(frozen=True, slots=True)
class _Terminal:
    n_chars: int
    """0 for an empty literal."""


@dataclass(frozen=True, slots=True)
class _Reference:
    name: str
    at: int


@dataclass(frozen=True, slots=True)
class _Group:
    alternatives: "tuple[_Sequence, ...]"


@dataclass(frozen=True, slots=True)
class _Repetition:
    item: "_Item"
    least: int
    most: int | None
    """None: without end."""
    at: int


_Item = _Terminal | _Reference | _Group | _Repetition
_Sequence = tuple[_Item, ...]


@dataclass(frozen=True, slots=True)
class _Rules:
    text: str
    bodies: dict[str, _Group] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)

    def fail(self, at: int, why: str) -> NoReturn:
        line = self.text.count("\n", 0, at) + 1
        column = at - (self.text.rfind("\n", 0, at) + 1) + 1
        raise GrammarError(f"line {line}, column {column}: {why}")


class _Parser:
    """Text → rules, as llama.cpp reads them."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0
        self._rules = _Rules(text)
        self.names_tokens = False
        self._named: set[str] = set()
        self._n_written = 0  # rules llama.cpp will have written for brackets and repetitions

    def rules(self) -> _Rules:
        text, rules = self._text, self._rules
        if len(text) > _MAX_CHARS:
            raise GrammarError(f"the grammar has {len(text):,} characters; at most {_MAX_CHARS:,} are taken")
        for bad in re.finditer("[\0\ud800-\udfff]", text):
            rules.fail(bad.start(), f"{bad[0]!r} cannot stand in a grammar")
        self._space(newlines=True)
        while self._at < len(text):
            at = self._at
            name = self._name("the name of a rule")
            if name in rules.bodies:
                rules.fail(at, f"rule {name!r} is defined twice")
            self._space()
            if not text.startswith("::=", self._at):
                rules.fail(self._at, f"expected '::=' after the name {name!r}")
            self._at += 3
            self._space(newlines=True)
            rules.places[name] = at
            rules.bodies[name] = self._alternatives(nested=False)
            if self._at < len(text) and text[self._at] not in "\r\n":
                rules.fail(self._at, f"expected the end of the line, not {text[self._at]!r}")
            self._space(newlines=True)
        if len(rules.bodies) > _MAX_RULES:
            raise GrammarError(f"the grammar has {len(rules.bodies):,} rules; at most {_MAX_RULES:,} are taken")
        return rules

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _space(self, *, newlines: bool = False) -> None:
        while (char := self._peek()) and char in (" \t\r\n#" if newlines else " \t#"):
            comment = _COMMENT.match(self._text, self._at)
            self._at = comment.end() if comment else self._at + 1

    def _name(self, wanted: str) -> str:
        match = _NAME.match(self._text, self._at)
        if match is None:
            self._rules.fail(self._at, f"expected {wanted}, not {self._peek()!r}")
        self._at = match.end()
        self._named.add(match[0])
        return match[0]

    def _n_rules(self) -> int:
        return len(self._named) + self._n_written

    def _alternatives(self, *, nested: bool) -> _Group:
        found = [self._sequence(nested)]
        while self._peek() == "|":
            self._at += 1
            self._space(newlines=True)
            found.append(self._sequence(nested))
        return _Group(tuple(found))

    def _sequence(self, nested: bool) -> _Sequence:
        items: list[_Item] = []
        n_before = 0
        while char := self._peek():
            at = self._at
            if char in "*+?{":
                least, most = self._times()
                if not items or (isinstance(items[-1], _Terminal) and items[-1].n_chars == 0):
                    self._rules.fail(at, f"nothing stands before {char!r} to be repeated")
                if isinstance(items[-1], _Repetition):
                    self._rules.fail(at, "two repetitions in a row; put the first into brackets")
                n_rules = self._n_rules() - n_before if isinstance(items[-1], _Group) else 1
                if (n := n_rules * (most or least or 1)) > MAX_REPETITIONS:
                    self._rules.fail(at, f"this makes {n:,} rules, and llama.cpp {MAX_REPETITIONS:,} at most")
                self._n_written += 1 if most is None else most - least
                items[-1] = _Repetition(items[-1], least, most, at)
            else:
                n_before = self._n_rules()
                if (item := self._item(char, at)) is None:
                    break
                items.append(item)
            self._space(newlines=nested)
        return tuple(items)

    def _item(self, char: str, at: int) -> _Item | None:
        if char == '"':
            return _Terminal(self._literal())
        if char == "[":
            self._character_class()
            return _Terminal(1)
        if char == ".":
            self._at += 1
            return _Terminal(1)
        if char in "<!":
            match = re.compile(r"!?<(?:\[\d{1,9}\]|[^\[>][^>]*)>").match(self._text, at)
            if match is None:
                self._rules.fail(at, "expected a token, such as <[123]> or <name>")
            self._at = match.end()
            self.names_tokens = True
            return _Terminal(1)
        if char == "(":
            if self._depth == _MAX_DEPTH:
                self._rules.fail(at, f"more than {_MAX_DEPTH} brackets inside each other")
            self._at += 1
            self._depth += 1
            self._n_written += 1
            self._space(newlines=True)
            group = self._alternatives(nested=True)
            if self._peek() != ")":
                self._rules.fail(at, "this bracket is not closed")
            self._at += 1
            self._depth -= 1
            return group
        return _Reference(self._name("a rule"), at) if _NAME.match(char) else None

    def _literal(self) -> int:
        at, n = self._at, 0
        self._at += 1
        while self._peek() != '"':
            start = self._at
            if self._char(at, "this text has no closing quote") == "\0":
                self._rules.fail(start, "a text cannot have a character 0")
            n += 1
        self._at += 1
        return n

    def _character_class(self) -> None:
        at = self._at
        unclosed = "this '[' has no ']'"
        self._at += 2 if self._text.startswith("[^", at) else 1
        if self._peek() == "]":
            self._rules.fail(at, "no character stands between '[' and ']'")
        while self._peek() != "]":
            start = self._at
            low = self._char(at, unclosed)
            if self._peek() == "-" and not self._text.startswith("-]", self._at):
                self._at += 1
                if self._char(at, unclosed) < low:
                    self._rules.fail(start, f"the range {self._text[start : self._at]!r} ends before it begins")
        self._at += 1

    def _char(self, opened: int, unclosed: str) -> str:
        text, at = self._text, self._at
        if not (char := self._peek()):
            self._rules.fail(opened, unclosed)
        self._at += 1
        if char != "\\":
            return char
        kind = self._peek()
        self._at += 1
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        digits = text[self._at : self._at + _HEX_DIGITS.get(kind, 0)]
        if len(digits) != _HEX_DIGITS.get(kind) or not re.fullmatch("[0-9a-fA-F]+", digits):
            self._rules.fail(
                at,
                f"{text[at : self._at + len(digits)]!r} is not an escape; known: \\xNN \\uNNNN \\UNNNNNNNN "
                + " ".join("\\" + name for name in _ESCAPES),
            )
        self._at += len(digits)
        code = int(digits, 16)
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            self._rules.fail(at, f"{text[at : self._at]} is not a character")
        return chr(code)

    def _times(self) -> tuple[int, int | None]:
        at = self._at
        char = self._peek()
        self._at += 1
        if char != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        match = re.compile(r"[ \t]*(\d{1,9})[ \t]*(?:(,)[ \t]*(\d{1,9})?[ \t]*)?\}").match(self._text, self._at)
        if match is None:
            self._rules.fail(at, "expected {N}, {N,} or {N,M}")
        self._at = match.end()
        least = int(match[1])
        most = least if match[2] is None else int(match[3]) if match[3] else None
        if most is not None and most < least:
            self._rules.fail(at, f"at most {most} is less than at least {least}")
        if max(least, most or 0) > MAX_REPETITIONS:
            self._rules.fail(
                at, f"llama.cpp counts to {MAX_REPETITIONS:,} repetitions, not to {max(least, most or 0):,}"
            )
        return least, most


def _check(rules: _Rules) -> None:
    """Whether the rules can be followed from one character to the next, and to an end."""
    bodies = rules.bodies
    for item in (item for body in bodies.values() for item in _within(body)):
        if isinstance(item, _Reference) and item.name not in bodies:
            near = difflib.get_close_matches(item.name, bodies, n=1)
            rules.fail(item.at, f"there is no rule {item.name!r}{f', did you mean {near[0]!r}?' if near else ''}")
    if "root" not in bodies:
        raise GrammarError("there is no rule 'root', with which an answer begins")
    if (n := sum(_n_elements(body) for body in bodies.values())) > _MAX_ELEMENTS:
        raise GrammarError(f"the grammar has {n:,} elements with its repetitions; at most {_MAX_ELEMENTS:,} are taken")
    empty = _passable(bodies, lambda terminal: terminal.n_chars == 0)
    for item in (item for body in bodies.values() for item in _within(body)):
        if isinstance(item, _Repetition) and item.most is None and _is_empty(item.item, empty):
            rules.fail(item.at, "what is repeated here may be empty, so it could be repeated for ever")
    beginnings = {name: list(_begins_with(body, empty)) for name, body in bodies.items()}
    try:
        order = list(graphlib.TopologicalSorter(beginnings).static_order())
    except graphlib.CycleError as error:
        cycle = list(reversed(error.args[1]))
        way = " → ".join(cycle)
        rules.fail(
            rules.places[cycle[0]], f"rule {cycle[0]!r} can begin with itself ({way}); let it recur further right"
        )
    n_ways: dict[str, int] = {}
    for name in order:
        n_ways[name] = 1 + sum(n_ways[other] for other in beginnings[name])
        if n_ways[name] > _MAX_BEGINNINGS:
            rules.fail(rules.places[name], f"rule {name!r} can begin in more than {_MAX_BEGINNINGS:,} ways")
    ending = _passable(bodies, lambda _: True)
    reached, todo = set[str](), ["root"]
    while todo:
        if (name := todo.pop()) not in reached:
            reached.add(name)
            if name not in ending:
                rules.fail(rules.places[name], f"rule {name!r} has no end: every way through it leads back into it")
            todo += [item.name for item in _within(bodies[name]) if isinstance(item, _Reference)]


def _within(item: _Item) -> Iterator[_Item]:
    """The item, and all in it."""
    yield item
    if isinstance(item, _Group):
        for sequence in item.alternatives:
            for inner in sequence:
                yield from _within(inner)
    elif isinstance(item, _Repetition):
        yield from _within(item.item)


def _passable(bodies: dict[str, _Group], terminal: Callable[[_Terminal], bool]) -> set[str]:
    """Names of the rules with a way through on which all terminals will do. In time linear in the rules."""
    items = [item for body in bodies.values() for item in _within(body)]
    groups: list[tuple[str | int, _Group]] = [(id(item), item) for item in items if isinstance(item, _Group)]
    ways = [(owner, way) for owner, group in (*bodies.items(), *groups) for way in group.alternatives]
    needs = [{need for item in way if (need := _needed(item, terminal)) is not None} for _, way in ways]
    n_missing = list(map(len, needs))
    waiting: dict[str | int, list[int]] = {}
    for index, needed in enumerate(needs):
        for need in needed:
            waiting.setdefault(need, []).append(index)
    todo = [owner for (owner, _), n in zip(ways, n_missing, strict=True) if n == 0]
    known: set[str | int] = set()
    while todo:
        if (owner := todo.pop()) not in known:
            known.add(owner)
            for index in waiting.get(owner, ()):
                n_missing[index] -= 1
                if n_missing[index] == 0:
                    todo.append(ways[index][0])
    return {name for name in bodies if name in known}


def _needed(item: _Item, terminal: Callable[[_Terminal], bool]) -> str | int | None:
    """What a way through the item needs: a rule, a group by its id, nothing, or what there is not."""
    while isinstance(item, _Repetition):
        if item.least == 0:
            return None
        item = item.item
    if isinstance(item, _Reference):
        return item.name
    return id(item) if isinstance(item, _Group) else None if terminal(item) else ""


def _is_empty(item: _Item, empty: set[str]) -> bool:
    """Whether the item may be empty, where `empty` are the rules that may."""
    if isinstance(item, _Terminal):
        return item.n_chars == 0
    if isinstance(item, _Reference):
        return item.name in empty
    if isinstance(item, _Repetition):
        return item.least == 0 or _is_empty(item.item, empty)
    return any(all(_is_empty(inner, empty) for inner in sequence) for sequence in item.alternatives)


def _begins_with(item: _Item, empty: set[str]) -> Iterator[str]:
    """Rules that the item can begin with, each as often as llama.cpp would try it."""
    if isinstance(item, _Reference):
        yield item.name
    elif isinstance(item, _Repetition):
        if item.most != 0:
            n = (item.most or 1) if _is_empty(item.item, empty) else 1
            yield from list(_begins_with(item.item, empty)) * n
    elif isinstance(item, _Group):
        for sequence in item.alternatives:
            for inner in sequence:
                yield from _begins_with(inner, empty)
                if not _is_empty(inner, empty):
                    break


def _n_elements(item: _Item) -> int:
    if isinstance(item, _Terminal):
        return max(1, item.n_chars)
    if isinstance(item, _Reference):
        return 1
    if isinstance(item, _Repetition):
        return (1 + _n_elements(item.item)) * max(1, item.least, item.most or 1)
    return 1 + sum(_n_elements(inner) for sequence in item.alternatives for inner in sequence)
