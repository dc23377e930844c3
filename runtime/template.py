"""The chat template that a GGUF carries, rendered to token ids.

A template is a Jinja program that writes one text, in which control tokens and the words of the conversation look the
same. Here they cannot be confused: whatever is said in a message, a call or a tool is given to the template in marks
(marks.py), so that afterwards the text that spells a token is known to be the template's.

The ids equal llama_tokenize(whole text, parse_special) wherever messages spell no special token (llama.cpp 0c1e57098,
src/llama-vocab.cpp, `tokenizer_st_partition` and `tokenize`): control and user-defined tokens are cut out of the
template's text, longest first, and each run of text between them is tokenized as a whole, template and message
together, because merges cross the border and SentencePiece starts a run with a dummy space.

llama.cpp finds *user-defined* tokens in plain text too: for most models they are words, such as runs of spaces, and so
they stay. But some templates mark turns with them (DeepSeek's `<｜User｜>`). A user-defined token that the template
itself writes is therefore treated as structure: spelled in a message, it stays letters.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any, Literal, NoReturn, TypeAlias

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.calls import CallForm
from runtime.conversation import functions, in_openai_form, settled, texts, with_parsed_arguments
from runtime.errors import EngineError, ModelFileError
from runtime.marks import Content, Marks, in_marks, tojson
from runtime.messages import Message, Tool
from runtime.prompts import Transcript, Vocabulary

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_C_WHITESPACE = " \t\n\v\f\r"  # isspace() in the C locale
_Turn: TypeAlias = Mapping[str, Any]
_Last: TypeAlias = Literal["asks", "goes on", "is closed"]


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
        self._knows_tools = "tool" in template
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
        self.calls: CallForm | None = None
        """Those of Hermes, as JSON; some templates write the same tags around calls in XML."""
        if _OPENING in template and "<function=" not in template:
            closing = self._ids.get(_CLOSING) if self._ids.get(_CLOSING) in self._controls else None
            text = _CLOSING if closing is None else ""
            self.calls = CallForm(_OPENING, self._ids.get(_OPENING), closing=text, closing_token=closing)

    @property
    def marks_turns_by_text(self) -> bool:
        """Whether the template writes no special token around a message, but perhaps BOS."""
        try:
            ids = self.encode([Message("user", "x")])
        except EngineError:  # a template that refuses even this is told of when it is used
            return False
        return not set(self._ids.values()).intersection(ids) - {self._vocabulary.bos}

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Ids of the prompt.

        Neighbouring system messages are joined by a blank line, and where the template refuses a conversation that
        begins with a reply, an empty message of the user's is put in front. A last message of the assistant's is cut
        right behind its text, so that the model goes on. Raises EngineError when the template refuses the conversation
        or fails, and when it leaves out the tools or the calls.
        """
        told = settled(messages)
        called = [call.name for message in told for call in message.calls]
        turns = _with_one_system(in_openai_form(told))
        names = [tool.name for tool in tools] + called[-1:]
        if names and not self._knows_tools:
            raise _no_tools()
        return self._ids_of(turns, functions(tools), names, last="goes on" if told[-1].role == "assistant" else "asks")

    def transcribe(self, transcript: Transcript) -> list[int]:
        """Ids of a whole conversation, as the template writes it: some drop tools, some refuse them (EngineError)."""
        return self._ids_of(transcript.messages, transcript.tools, (), last="is closed")

    def _ids_of(
        self, turns: Sequence[_Turn], tools: Sequence[_Turn], names: Iterable[str], *, last: _Last
    ) -> list[int]:
        """Ids of turns and tools in OpenAI's form. `names` are the tools that must be seen.

        The arguments of a call are given to the template as a mapping, as most expect. To one that fails with that they
        are given as JSON text; and what the model wrote instead of an object, as one with the key `arguments`.
        """
        forms = [with_parsed_arguments(turns), list(turns), with_parsed_arguments(turns, as_mappings=True)]
        leading = next((turn["role"] for turn in turns if turn["role"] != "system"), "user")
        if leading == "assistant" and last != "is closed":
            n_system = sum(turn["role"] == "system" for turn in turns[:1])
            forms += [[*form[:n_system], {"role": "user", "content": ""}, *form[n_system:]] for form in forms]
        refused: EngineError | None = None
        for i, form in enumerate(forms):
            if form not in forms[:i]:
                try:
                    return self._ids_of_form(form, tools, names, last)
                except EngineError as error:
                    refused = refused or error
        assert refused is not None
        raise refused

    def _ids_of_form(
        self, form: Sequence[_Turn], tools: Sequence[_Turn], names: Iterable[str], last: _Last
    ) -> list[int]:
        marks = Marks(self._reserved.union(*texts([form, tools])), self._coded_spaces)
        turns = [
            {
                **{key: in_marks(value, marks) for key, value in turn.items()},
                "role": turn["role"],
                "content": Content.of(turn.get("content") or "", marks),
            }
            for turn in form
        ]
        if last == "goes on":
            turns[-1]["content"] = Content.of(form[-1]["content"] + marks.end, marks)
        rendered = self._render(turns, tools=in_marks(tools, marks) or None, add_generation_prompt=last == "asks")
        if not all(marks.hidden(name) in rendered for name in names):
            raise _no_tools()
        if last == "goes on":
            rendered, found, _ = rendered.rpartition(marks.end)
            if not found:
                raise EngineError("the chat template leaves out the last reply, so it cannot be continued; ask again")
        return self._tokenize(rendered, marks)

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

    def _tokenize(self, rendered: str, marks: Marks) -> list[int]:
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
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of these texts; one that matches nothing if there are none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _no_tools() -> EngineError:
    return EngineError("the chat template of this model has no tools, or leaves them out; ask without tools and calls")


def _with_one_system(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with neighbouring system messages joined: most templates refuse more than one."""
    joined: list[dict[str, Any]] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"] == "system":
            joined[-1] = {**turn, "content": f"{joined[-1]['content']}\n\n{turn['content']}"}
        else:
            joined.append(turn)
    return joined
