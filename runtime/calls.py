"""An answer, token by token → its text, and the calls of tools that it makes.

Three forms are read:

- Mistral's v3 and v7: the token `[TOOL_CALLS]`, and a JSON list of all calls,
  `[{"name": …, "arguments": {…}, "id": …}]`, in which ids may lack (mistral-common 1.13,
  tokens/tokenizers/instruct.py, InstructTokenizerV3).
- Mistral's v11 and v13, for each call: `[TOOL_CALLS]`, the name, `[CALL_ID]` and an id in v11, `[ARGS]`, the arguments
  (InstructTokenizerV11 and V13).
- That of Hermes, which Qwen and others took over, for each call: `<tool_call>`, an object of `name` and `arguments`,
  `</tool_call>` (Hermes-Function-Calling, README).

Where the opening is one token it is known by its id alone: text that spells it stays text.

Text and arguments are given on as they come, in time linear in the answer. Whatever comes is taken: what is wrong with
a call is kept in words for the model. Knows nothing of schemas (tool_arguments.py) or of how tokens are drawn.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from typing import Literal

from runtime.call_text import CallText, after_space
from runtime.events import CallPiece
from runtime.messages import ToolCall

_ID = re.compile(r"[a-zA-Z0-9]{9}")
_BROKEN_OFF = "the call broke off before its end; write it again, and shorter if it was too long"


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a model writes calls."""

    opening: str
    """What stands before all calls, or before each."""
    token: int | None
    """The opening as one token, by whose id alone it is known; None: it is text."""
    is_list: bool = False
    """Behind the opening comes a JSON list of all calls, and not an object."""
    closing: str = ""
    """The text behind each call; empty also where it is a control token, which is no text."""
    closing_token: int | None = None
    """That control token."""
    arguments_token: int | None = None
    """Behind the opening comes the name as text, and behind this control token the arguments."""
    id_token: int | None = None
    """The control token between such a name and an id."""


Place = Literal["text", "calls", "behind"]
"""In text before all calls, in a call or a list of them, or behind a call where the next may follow."""


def made_up_ids(salt: str) -> Iterator[str]:
    """Call ids without end, all different: nine letters and digits each. The same salt gives the same."""
    seen = set[str]()
    for n in count():
        id_ = sha256(f"{salt} {n}".encode()).hexdigest()[:9]
        if id_ not in seen:
            seen.add(id_)
            yield id_


@dataclass(slots=True)
class _Call:
    index: int
    text: CallText
    id: str
    told: bool = False
    """Id and name are."""


class AnswerReader:
    """One answer. `ids` are for calls that have no good id of their own before their arguments: endless, all different.

    `opened`: the opening stands in front of the answer already. Without a form all is text.
    """

    def __init__(self, form: CallForm | None, ids: Iterable[str], *, opened: bool = False) -> None:
        self._form, self._ids = form, iter(ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
        self._state: Callable[[str, int], int] = self._text
        self._held = ""  # may be the beginning of an opening or a closing
        self._calls: list[_Call] = []
        self._n_before = 0  # calls before the last opening
        self._head: list[list[str]] = []  # of a call whose arguments come behind a token: name and id
        self._used = set[str]()
        self._parts: list[str | CallPiece] = []
        self._n_tokens = 0
        self.behind_opening = ""
        """Text behind the last opening that came with it in one token."""
        if opened:
            self._open("")

    @property
    def place(self) -> Place:
        """Where the next token will stand. Behind a list of calls nothing is to come; it counts as the list's."""
        if self._state == self._text:
            return "behind" if self._calls else "text"
        is_list = self._form is not None and self._form.is_list
        return "behind" if self._state == self._between and not is_list else "calls"

    def read(self, token: int, piece: bytes, n_tokens: int) -> list[str | CallPiece]:
        """What the next token, the `n_tokens`th, adds: text of whole characters, and pieces of calls."""
        self._parts, self._n_tokens = [], n_tokens
        opens = self._form is not None and token == self._form.token and self._state != self._call
        self._feed(self._decoder.decode(b"" if opens else piece, final=opens))
        if opens:
            self._open("")
        elif self._form is not None and self._state == self._name:
            if token == self._form.id_token:
                self._head.append([])
            elif token == self._form.arguments_token:
                self._end_name()
                self._calls[-1].text.begin_arguments()
                self._state = self._call
        return self._parts

    def finish(self, n_tokens: int) -> list[str | CallPiece]:
        """The rest, when the answer has ended, for whatever reason."""
        self._parts, self._n_tokens = [], n_tokens
        self._feed(self._decoder.decode(b"", final=True))
        if self._state == self._text:
            self._say(self._held)
        self._end_name()
        if self._state in (self._list, self._object, self._item) and len(self._calls) == self._n_before:
            self._begin()
        for call in self._calls:
            if not call.text.whole and call.text.fault is None:
                call.text.fault = _BROKEN_OFF
            if not call.told:
                call.text.name = call.text.name or ""
                self._tell(call, 0)
        return self._parts

    def calls(self, check: Callable[[str, str], str | None]) -> tuple[ToolCall, ...]:
        """The calls of an answer that is finished. `check` says what is wrong with a name and arguments, any text."""
        found = []
        for call in self._calls:
            name, arguments = call.text.name or "", "".join(call.text.arguments)
            found.append(ToolCall(call.id, name, arguments, call.text.fault or check(name, arguments)))
        return tuple(found)

    def _feed(self, text: str) -> None:
        at = 0
        while at < len(text):
            at = self._state(text, at)

    # States. Each takes text from a place on, and gives the place up to which it took it.

    def _text(self, text: str, at: int) -> int:
        tag = self._form.opening if self._form is not None and self._form.token is None else ""
        end = self._find(tag, text, at, self._say)
        if end is None:
            return len(text)
        self._open(text[end:])
        return end

    def _list(self, text: str, at: int) -> int:
        return self._expect(text, at, {"[": self._item})

    def _item(self, text: str, at: int) -> int:
        n = len(self._calls) - self._n_before
        return self._expect(text, at, {"{": self._call} | ({"]": self._between} if n else {}))

    def _object(self, text: str, at: int) -> int:
        return self._expect(text, at, {"{": self._call})

    def _name(self, text: str, at: int) -> int:
        """The name, or the id behind its token."""
        self._head[-1].append(text[at:])
        return len(text)

    def _call(self, text: str, at: int) -> int:
        assert self._form is not None
        call = self._calls[-1]
        n_told = len(call.text.arguments) if call.told else 0
        at = call.text.read(text, at)
        ended = call.text.whole or call.text.fault is not None
        if call.text.name is not None and (call.text.has_arguments or ended):
            self._tell(call, n_told)
        if call.text.fault is not None:
            self._state = self._lost
        elif call.text.whole:
            self._state = self._next if self._form.is_list or self._form.closing else self._between
        return at

    def _next(self, text: str, at: int) -> int:
        """Behind an object."""
        assert self._form is not None
        if self._form.is_list:
            return self._expect(text, at, {",": self._item, "]": self._between})
        if not self._held:
            at = after_space(text, at)
        seen = self._held + text[at : at + len(self._form.closing) - len(self._held)]
        if self._form.closing.startswith(seen) and seen != self._form.closing:
            self._held = seen
            return len(text)
        self._state = self._between
        if seen == self._form.closing:
            at += len(seen) - len(self._held)
        self._held = ""
        return at

    def _between(self, text: str, at: int) -> int:
        """Behind calls: nothing is to follow a list; behind an object, text or the next."""
        assert self._form is not None
        at = after_space(text, at)
        if at < len(text):
            if self._form.is_list:
                self._fail("text stands behind the list of calls, where it is not read; write it before the list")
            else:
                self._state = self._text
        return at

    def _lost(self, text: str, at: int) -> int:
        """Behind a fault: all up to the closing, or the next opening, stands for arguments if there are none."""
        assert self._form is not None
        end = self._find(self._form.closing, text, at, self._keep)
        if end is None:
            return len(text)
        self._state = self._between
        return end

    # What states do.

    def _open(self, behind: str) -> None:
        """Calls begin."""
        assert self._form is not None
        self._end_name()
        self.behind_opening, self._held, self._n_before = behind, "", len(self._calls)
        self._state = self._list if self._form.is_list else self._object
        if self._form.arguments_token is not None:
            self._begin()
            self._head, self._state = [[]], self._name

    def _end_name(self) -> None:
        if self._state == self._name:
            call = self._calls[-1].text
            name, *ids = ("".join(parts).strip() for parts in self._head)
            call.name, call.id = name, ids[0] if ids else None

    def _begin(self) -> CallText:
        id_ = next(id_ for id_ in self._ids if id_ not in self._used)
        self._calls.append(_Call(len(self._calls), CallText(), id_))
        return self._calls[-1].text

    def _fail(self, fault: str) -> None:
        """What comes is no call: it is told as a faulty one."""
        self._begin().fault = fault
        self._state = self._lost

    def _expect(self, text: str, at: int, then: Mapping[str, Callable[[str, int], int]]) -> int:
        """Skip space and go on by the character that comes."""
        at = after_space(text, at)
        if at < len(text):
            if text[at] not in then:
                self._fail(f"this is not how calls are written: expected {' or '.join(then)}, not {text[at]!r}")
                return at
            self._state = then[text[at]]
            if self._state == self._call:
                self._begin()
            at += 1
        return at

    def _find(self, tag: str, text: str, at: int, say: Callable[[str], None]) -> int | None:
        """The place behind the next `tag`, if it comes; what stands before it is said, what may be it is held."""
        shown = self._held + text[at:]
        found = shown.find(tag) if tag else -1
        if found < 0:
            n = next((n for n in range(min(len(tag) - 1, len(shown)), 0, -1) if shown.endswith(tag[:n])), 0)
            self._held = shown[len(shown) - n :]
            say(shown[: len(shown) - n])
            return None
        say(shown[:found])
        at += found + len(tag) - len(self._held)
        self._held = ""
        return at

    def _say(self, text: str) -> None:
        if text:
            self._parts.append(text)

    def _keep(self, text: str) -> None:
        """Behind a fault."""
        call = self._calls[-1]
        if text and not call.text.has_arguments:
            call.text.arguments.append(text)
            if call.told:
                self._tell(call, len(call.text.arguments) - 1)

    def _tell(self, call: _Call, n_told: int) -> None:
        """What is new of a call: its id and name, or its arguments from the `n_told`th piece on."""
        assert call.text.name is not None
        fresh = "".join(call.text.arguments[n_told:])
        if call.told:
            if fresh:
                self._parts.append(CallPiece(call.index, self._n_tokens, arguments=fresh))
            return
        if call.text.id is not None and _ID.fullmatch(call.text.id) and call.text.id not in self._used:
            call.id = call.text.id
        self._used.add(call.id)
        call.told = True
        self._parts.append(CallPiece(call.index, self._n_tokens, call.id, call.text.name, fresh))
