"""The chat template that a GGUF carries, rendered to token ids.

A template is a Jinja program that writes one text, in which control tokens and the words of the conversation look the
same. Here they cannot be confused: before rendering, every character of a message but whitespace is replaced by a
private-use character that stands for it and occurs nowhere else. What the template does with them (joining, trimming,
slicing) cannot turn them into a control token, and afterwards the text that spells a token is known to be the
template's. `_Content` answers a template's questions (`'</think>' in content`) about the text as the user wrote it.
One limit: what a template puts inside a message by `replace` counts as message.

The ids equal llama_tokenize(whole text, parse_special) wherever messages spell no special token (llama.cpp 0c1e57098,
src/llama-vocab.cpp, `tokenizer_st_partition` and `tokenize`): control and user-defined tokens are cut out of the
template's text, longest first, and each run of text between them is tokenized as a whole, template and message
together, because merges cross the border and SentencePiece starts a run with a dummy space.

llama.cpp finds *user-defined* tokens in plain text too: for most models they are words, such as runs of spaces, and so
they stay. But some templates mark turns with them (DeepSeek's `<｜User｜>`). A user-defined token that the template
itself writes is therefore treated as structure: spelled in a message, it stays letters.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import EngineError, ModelFileError
from runtime.messages import Message
from runtime.prompts import Transcript, Vocabulary, settled, texts, with_parsed_arguments

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # planes 15 and 16: 131,068 characters
_C_WHITESPACE = " \t\n\v\f\r"  # isspace() in the C locale


class TemplatePrompter:
    """A GGUF's chat template over its vocabulary."""

    def __init__(self, vocabulary: Vocabulary, template: str | None) -> None:
        if not template:
            raise ModelFileError("the GGUF has no chat template; name the model's prompt format in models.yaml")
        try:
            self._template = _environment().from_string(template)
        except TemplateSyntaxError as error:
            raise ModelFileError(
                f"the GGUF's chat template cannot be read: line {error.lineno}: {_one_line(error)}; "
                "name the model's prompt format in models.yaml"
            ) from error
        self._vocabulary = vocabulary
        self._controls = set(filter(vocabulary.is_control, range(vocabulary.n_tokens)))
        self._user_defined = set(filter(vocabulary.is_user_defined, range(vocabulary.n_tokens))) - self._controls
        self._ids = {text: i for i in self._controls | self._user_defined if (text := vocabulary.text(i))}
        self._special = re.compile(f"({_any_of(self._ids)})")
        self._structure = {text for text in self._ids if text in template and self._marks_turns(text)}
        self._reserved = set(template).union(*self._ids)
        """Characters that no mark may be."""
        self._coded_spaces = {c for i in self._controls for c in vocabulary.text(i) if c.isspace()}
        self._strips: dict[str, tuple[bool, bool]] = {}

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt. Neighbouring messages of one role are joined by a blank line: most templates refuse them.

        A last message of the assistant's is cut right behind its text, so that the model goes on. Raises EngineError
        when the template refuses the conversation or fails.
        """
        told = _merged(settled(messages))
        marks = _Marks(self._reserved.union(*(message.content for message in told)), self._coded_spaces)
        continued = told[-1].role == "assistant"
        turns: list[dict[str, Any]] = [
            {"role": message.role, "content": _Content.of(message.content, marks)} for message in told
        ]
        if continued:
            turns[-1]["content"] = _Content.of(told[-1].content + marks.end, marks)
        rendered = self._render(turns, add_generation_prompt=not continued)
        if continued:
            rendered, found, _ = rendered.rpartition(marks.end)
            if not found:
                raise EngineError("the chat template leaves out the last reply, so it cannot be continued; ask again")
        return self._tokenize(rendered, marks)

    def transcribe(self, transcript: Transcript) -> list[int]:
        """Ids of a whole conversation, as the template writes it: some drop tools, and some refuse them (EngineError).

        The arguments of a call are given to it as a mapping, as most templates expect, or else as the JSON they are.
        """
        try:
            return self._transcribe(with_parsed_arguments(transcript))
        except EngineError:
            return self._transcribe(transcript)

    def _transcribe(self, transcript: Transcript) -> list[int]:
        found = list(texts([transcript.messages, transcript.tools]))
        for text, is_key in found:
            if is_key and self._special.search(text):
                raise EngineError(f"the key {text!r} of a tool would be read as a control token; rename it")
        marks = _Marks(self._reserved.union(*(text for text, _ in found)), self._coded_spaces)
        turns = [
            {
                **_hidden(message, marks),
                "role": message["role"],
                "content": _hidden(message.get("content") or "", marks),
            }
            for message in transcript.messages
        ]
        tools = _hidden(transcript.tools, marks)
        return self._tokenize(self._render(turns, tools=tools or None, add_generation_prompt=False), marks)

    def _render(
        self,
        turns: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        vocabulary = self._vocabulary
        try:
            return self._template.render(
                messages=turns,
                add_generation_prompt=add_generation_prompt,
                bos_token=vocabulary.text(vocabulary.bos) if vocabulary.bos >= 0 else "",
                eos_token=vocabulary.text(vocabulary.eos) if vocabulary.eos >= 0 else "",
                tools=tools,
                documents=None,
            )
        except EngineError:
            raise
        except TemplateError as error:
            raise EngineError(f"the chat template refuses this conversation: {_one_line(error)}") from error
        except Exception as error:  # a template is a program from a file: it can raise anything
            raise EngineError(
                f"the chat template fails: {type(error).__name__}: {_one_line(error)}; "
                "name another prompt format in models.yaml"
            ) from error

    def _tokenize(self, rendered: str, marks: "_Marks") -> list[int]:
        """Ids of what the template wrote, with the BOS that the model wants."""
        pieces = self._special.split(rendered)  # run, token, run, …, run
        structure = self._structure.union(filter(self._marks_turns, pieces[1::2]))
        ids: list[int] = []
        for i, run in enumerate(pieces[::2]):
            if i > 0:
                before = pieces[2 * i - 1]
                ids.append(self._ids[before])
                if self._strips_of(before)[1]:
                    run = run.lstrip(_C_WHITESPACE)
            if 2 * i + 1 < len(pieces) and self._strips_of(pieces[2 * i + 1])[0]:
                run = run.rstrip(_C_WHITESPACE)
            ids.extend(self._plain(marks.shown(run), structure))
        bos = self._vocabulary.bos
        if self._vocabulary.adds_bos and bos >= 0 and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def _plain(self, text: str, structure: set[str]) -> list[int]:
        """Ids of a run of text, no control token among them. What spells a token of `structure` stays letters."""
        # Cut behind its first character, no part spells it.
        cuts = [match.start() + 1 for match in re.finditer(f"(?={_any_of(structure)})", text)]
        first, *rest = (text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
        ids = [*self._vocabulary.tokenize(first), *chain.from_iterable(map(self._continuation, rest))]
        # llama.cpp's SentencePiece merges by text alone, so that "<" and "s>" would give `<s>`.
        merged = {self._vocabulary.text(token) for token in self._controls.intersection(ids)}
        if not merged:
            return ids
        if merged <= structure:
            raise EngineError(
                f"this model's vocabulary cannot spell {min(merged)!r} as plain text; leave it out of the conversation"
            )
        return self._plain(text, structure | merged)

    def _continuation(self, text: str) -> list[int]:
        """Ids of text in the middle of a run: behind a newline, SentencePiece puts no dummy space in front of it."""
        newline = self._vocabulary.tokenize("\n")
        ids = self._vocabulary.tokenize("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._vocabulary.tokenize(text)

    def _marks_turns(self, token: str) -> bool:
        """Whether a token that the template writes is a user-defined one with a meaning, more than a letter."""
        return self._ids[token] in self._user_defined and len(token) > 1

    def _strips_of(self, token: str) -> tuple[bool, bool]:
        """Whether llama.cpp drops whitespace before and behind a token, as it does for Phi-3. Not in its API: asked."""
        if token not in self._strips:

            def same(spaced: str, close: str) -> bool:
                return self._vocabulary.tokenize(spaced, special=True) == self._vocabulary.tokenize(close, special=True)

            self._strips[token] = same(f"a {token}", f"a{token}"), same(f"{token} a", f"{token}a")
        return self._strips[token]


class _Marks(dict[int, int]):
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


class _Content(str):
    """A message as the template sees it: made of marks, but its methods work on the text that they stand for."""

    _marks: _Marks

    @classmethod
    def of(cls, text: str, marks: _Marks) -> "_Content":
        content = cls(marks.hidden(text))
        content._marks = marks
        return content

    def __str__(self) -> str:
        return self  # `str()` in filters keeps the methods


def _on_shown_text(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(content: _Content, *args: Any, **kwargs: Any) -> Any:
        marks = content._marks

        def shown(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(shown, value))
            return marks.shown(value) if isinstance(value, str) else value

        def hidden(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(hidden, value))
            return _Content.of(value, marks) if isinstance(value, str) else value

        return hidden(method(shown(content), *map(shown, args), **kwargs))

    return call


for _name in (
    "__contains__",
    "__eq__",
    "__getitem__",
    "__hash__",
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
    setattr(_Content, _name, _on_shown_text(_name))


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks replies for training in transformers; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates (utils/chat_template_utils.py), in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter. What a mark stands for is escaped, and marked again."""

    def escaped(part: Any) -> Any:
        match part:
            case _Content():
                return part._marks.hidden(json.dumps(part._marks.shown(part), ensure_ascii=ensure_ascii)[1:-1])
            case dict():
                return {key: escaped(item) for key, item in part.items()}
            case list() | tuple():
                return [escaped(item) for item in part]
        return part

    return json.dumps(escaped(value), ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of these texts; one that matches nothing if there are none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _hidden(value: Any, marks: _Marks) -> Any:
    """The value with each of its texts, but not its keys, replaced by marks."""
    match value:
        case str():
            return _Content.of(value, marks)
        case Mapping():
            return {key: _hidden(item, marks) for key, item in value.items()}
        case list() | tuple():
            return [_hidden(item, marks) for item in value]
    return value


def _merged(messages: Sequence[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            merged[-1] = replace(message, content=f"{merged[-1].content}\n\n{message.content}")
        else:
            merged.append(message)
    return merged
