"""What a reply's tools and the choice of them mean for its answer: how it is read, and what it is held to.

- `none`: the tools are told of, and the opening of calls is forbidden where it is one token; else it stays text.
- `auto`: text, until the model writes the opening; from there on the grammar of the calls holds, up to their end.
- `any` and a named tool: the opening is put behind the prompt, and the grammar holds from the first token on. A named
  tool is called once.

Behind a call only further calls may come, or the end: text there would be a guess at its result.

Pure; engine.py carries it out, one token after the other.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import chain, islice

from runtime.call_grammar import behind_grammar, call_grammar, unheld
from runtime.calls import AnswerReader, CallForm, Place, made_up_ids
from runtime.errors import EngineError
from runtime.events import Reply
from runtime.grammar import Grammar
from runtime.messages import NamedTool, Tool
from runtime.prompts import Vocabulary
from runtime.tool_arguments import argument_check, call_fault

MOST_CALLS = 64
"""In one list."""


@dataclass(frozen=True, slots=True)
class Calling:
    """How one answer is read and drawn."""

    reader: AnswerReader
    grammars: Mapping[Place, Grammar] = field(default_factory=dict)
    """What holds while the reader is there; nowhere else."""
    opening: tuple[int, ...] = ()
    """Tokens that stand behind the prompt, so that the answer begins with calls."""
    forbidden: tuple[int, ...] = ()
    """Tokens that are not drawn."""
    check: Callable[[str, str], str | None] = field(default=lambda *_: None)
    """What is wrong with a call of that name, with those arguments."""
    notices: tuple[str, ...] = ()
    """What the user should know of the tools."""


def calling(reply: Reply, form: CallForm | None, ids: Sequence[int], vocabulary: Vocabulary) -> Calling:
    """What the tools of a reply mean whose prompt is `ids`, where calls are written as `form` says.

    Raises EngineError for a choice that cannot be kept to.
    """
    tools, choice = reply.tools, reply.tool_choice
    if not tools:
        if choice in ("auto", "none"):
            return Calling(AnswerReader(None, ()))
        raise EngineError("a call of a tool is wanted, but there are no tools; name some, or leave the choice `auto`")
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise EngineError(f"two tools have the name {twice!r}; rename one")
    if form is None:
        raise EngineError(
            "calls of tools cannot be read out of answers in this model's prompt format; ask without tools"
        )
    if choice == "none":
        return Calling(AnswerReader(None, ()), forbidden=() if form.token is None else (form.token,))
    if reply.grammar is not None:
        raise EngineError("a grammar is for answers without calls; leave it out, or choose `none` of the tools")
    if isinstance(choice, NamedTool) and choice.name not in names:
        raise EngineError(f"there is no tool {choice.name!r} to be called; there are: {', '.join(names)}")
    named = [tool for tool in tools if not isinstance(choice, NamedTool) or tool.name == choice.name]
    once = isinstance(choice, NamedTool)
    # A seed repeats the ids too. With the prompt in them, other turns of a conversation have others all the same.
    seed = reply.sampling.seed
    made_up = made_up_ids(secrets.token_hex() if seed is None else sha256(f"{seed} {list(ids)}".encode()).hexdigest())
    opening = (form.token,) if form.token is not None else tuple(vocabulary.tokenize(form.opening))
    first = list(islice(made_up, 1 if once else MOST_CALLS))
    grammars: dict[Place, Grammar] = {"calls": call_grammar(form, named, first)}
    if not form.is_list:
        grammars["behind"] = behind_grammar(form, more=not once)
    return Calling(
        AnswerReader(form, chain(first, made_up), opened=choice != "auto"),
        grammars,
        () if choice == "auto" else opening,
        check=partial(call_fault, {tool.name: argument_check(tool.parameters) for tool in tools}),
        notices=tuple(notice for tool in tools if (notice := _notice(tool))),
    )


def _notice(tool: Tool) -> str | None:
    if faulty := argument_check(tool.parameters).faulty:
        return f"the schema of the tool {tool.name!r} is faulty, so its arguments are not checked: {faulty}"
    if reason := unheld(tool):
        return f"arguments of the tool {tool.name!r} are checked only when they are written: {reason}"
    return None
