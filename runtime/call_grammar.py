"""Tools → the grammar of their calls, from behind the opening on: calls of these tools, arguments under their schemas.

Keys stand in the order that the models were trained on: name, arguments, id. Of a tool whose schema no grammar can hold
to, the arguments are any object. The ids are given: the grammar lets the model write these and no others, or none.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from runtime.calls import CallForm
from runtime.errors import GrammarError
from runtime.grammar import Grammar
from runtime.json_schema import grammar_of, literal, rules_of, with_primitives
from runtime.messages import Tool
from runtime.tool_arguments import argument_check

_MOST_CHARS = 50_000
"""Of one schema. llama.cpp compares all ways to go on with each other: 10,000 values take it 0.1 s a character."""


def call_grammar(form: CallForm, tools: Sequence[Tool], ids: Sequence[str]) -> Grammar:
    """The grammar of a list of calls, from one to as many as there are ids; or of one call and its closing."""
    try:
        return _grammar(form, tools, ids, {tool.name: f"t{i}-" for i, tool in enumerate(tools) if not unheld(tool)})
    except GrammarError:  # together they are too much
        return _grammar(form, tools, ids, {})


def behind_grammar(form: CallForm, *, more: bool) -> Grammar:
    """The grammar of what may stand behind a call outside a list: white space, and the opening of `more`."""
    closing = "" if form.closing_token is None else f"<[{form.closing_token}]>? "
    opening = literal(form.opening) if form.token is None else f"<[{form.token}]>"
    return Grammar(f"root ::= {closing}[ \\n]{{0,3}}{f' {opening}?' if more else ''}")


def unheld(tool: Tool) -> str | None:
    """Why no grammar can hold to the tool's schema; None where one can."""
    return _unheld(tool.parameters)


@lru_cache(maxsize=256)
def _unheld(parameters: str) -> str | None:
    if len(parameters) > _MOST_CHARS:
        return f"its schema has {len(parameters):,} characters, and a grammar is made of {_MOST_CHARS:,} at most"
    check = argument_check(parameters)
    if check.faulty is not None:
        return check.faulty
    try:
        grammar_of(check.schema)
    except GrammarError as error:
        return str(error)
    return None


def _grammar(form: CallForm, tools: Sequence[Tool], ids: Sequence[str], held: Mapping[str, str]) -> Grammar:
    """`held`: the prefix of the rules of each tool whose schema is held to."""
    rules: dict[str, str] = {}
    heads = []
    for tool in tools:
        arguments = "object"
        if prefix := held.get(tool.name):
            own = rules_of(argument_check(tool.parameters).schema, f"{prefix}root", prefix)
            if own[f"{prefix}root"] != "value":  # which need not be an object
                arguments = f"{prefix}root"
                rules |= own
        if form.arguments_token is not None:
            id_ = "" if form.id_token is None else f"( <[{form.id_token}]> [a-zA-Z0-9]{{9}} )? "
            heads.append(f'{literal(tool.name)} {id_}<[{form.arguments_token}]> " "? {arguments}')
        else:
            heads.append(f'{_text(tool.name)} "," ws "\\"arguments\\":" ws {arguments}')
    if form.arguments_token is not None:
        return Grammar(with_primitives({"root": f'" "? ( {" | ".join(heads)} )', **rules}))
    rules["call"] = f'"\\"name\\":" ws ( {" | ".join(heads)} )'
    if not form.is_list:
        closing = f" ws {literal(form.closing)}" if form.closing else ""
        return Grammar(with_primitives({"root": f'[ \\n]{{0,3}} "{{" ws call ws "}}"{closing}', **rules}))
    for i, id_ in enumerate(ids):
        further = f' ( "," ws call{i + 1} )?' if i + 1 < len(ids) else ""
        rules[f"call{i}"] = f'"{{" ws call ( "," ws "\\"id\\":" ws {_text(id_)} )? ws "}}"{further}'
    return Grammar(with_primitives({"root": '" "? "[" ws call0 ws "]"', **rules}))


def _text(text: str) -> str:
    """A JSON string of plain characters."""
    return literal(f'"{text}"')
