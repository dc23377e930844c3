"""A JSON schema → the grammar of JSON texts that are valid under it.

Takes a schema as Python values, gives a `Grammar`. Every text of the grammar is valid under the schema; not every valid
text is in the grammar: properties come in the schema's order, none that it does not name, and numbers and white space
have a bounded length. What a grammar cannot promise (`pattern`, `oneOf`, `multipleOf`, …) is a GrammarError that names
the place, and never left out in silence. Keywords: JSON Schema 2020-12.

Written here, and not taken from llama-cpp-python's port of llama.cpp's converter, because that one passes over keywords
that it does not know, such as `minimum`, and answers would then not be valid.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from runtime.errors import GrammarError
from runtime.grammar import MAX_REPETITIONS, Grammar
from runtime.whole_numbers import whole_numbers

_ANNOTATIONS = (
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$schema", "$id", "$defs", "definitions"),
)
_RANGE = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_OF_TYPE: Mapping[str, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "format"),
    "integer": _RANGE,
    "number": _RANGE,
    "boolean": (),
    "null": (),
}
_ALONE = ("$ref", "anyOf", "allOf", "enum", "const")
_KNOWN = (*_ALONE, "type", *(key for keys in _OF_TYPE.values() for key in keys), *_ANNOTATIONS)

_MAX_DEPTH = 64
_MOST_DIGITS = 15  # of a whole number; float64 holds as many

_DAYS = r'"0" [1-9] | "1" [0-9] | "2" [0-8]'
_CLOCK = r'( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9]'

_PRIMITIVES: Mapping[str, str] = {
    "ws": r'( " " | "\n" [ \t]{0,16} )?',
    "hex": r"[0-9A-Fa-f]",
    # An escaped half of a surrogate pair would make the length of a text uncertain.
    "char": r'[^"\\\x00-\x1f\x7f] | "\\" ( ["\\/bfnrt] | "u" ( [0-9A-CE-Fa-ce-f] hex{3} | [Dd] [0-7] hex{2} ) )',
    "string": r'"\"" char* "\""',
    "integer": rf'"-"? ( "0" | [1-9] [0-9]{{0,{_MOST_DIGITS - 1}}} )',
    "amount": rf'( "0" | [1-9] [0-9]{{0,{_MOST_DIGITS - 1}}} ) fraction',
    "number": '"-"? amount',
    "fraction": rf'( "." [0-9]{{1,{_MOST_DIGITS}}} )? ( [eE] [-+]? [0-9]{{1,2}} )?',
    "boolean": r'"true" | "false"',
    "null": r'"null"',
    "value": r"object | array | string | number | boolean | null",
    "object": r'"{" ws ( string ":" ws value ( "," ws string ":" ws value )* ws )? "}"',
    "array": r'"[" ws ( value ( "," ws value )* ws )? "]"',
    "date": rf'[12] [0-9]{{3}} "-" ( ( "0" [13578] | "1" [02] ) "-" ( {_DAYS} | "29" | "30" | "31" )'
    rf' | ( "0" [469] | "11" ) "-" ( {_DAYS} | "29" | "30" ) | "02-" ( {_DAYS} ) )',
    "time": rf'{_CLOCK} ":" [0-5] [0-9] ( "." [0-9]{{1,6}} )? ( "Z" | [-+] {_CLOCK} )',
    "uuid": r'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
}
"""Rules by name, for those who need them."""

_FORMATS = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}


def grammar_of(schema: object) -> Grammar:
    """The grammar of a schema as `json.loads` gives it. Raises GrammarError that says where it cannot be held to."""
    text = with_primitives(rules_of(schema))
    try:
        return Grammar(text)
    except GrammarError as error:
        raise GrammarError(f"no grammar can be made of the schema: {error}") from None


def rules_of(schema: object, name: str = "root", prefix: str = "") -> dict[str, str]:
    """The rules of a schema, to be one part of a grammar: name → body. Raises GrammarError.

    The schema's own is `name`, the names of all others begin with `prefix`; primitives are not among them.
    """
    writer = _Writer(schema, prefix)
    return {name: writer.root(), **writer.rules}


def with_primitives(rules: Mapping[str, str]) -> str:
    """The text of a grammar of these rules, and of the primitives that they use: `ws`, `string`, `object`, …"""
    lines = dict(rules)
    todo = list(lines.values())
    while todo:
        for word in re.findall(r"[a-z]+", todo.pop()):
            if word in _PRIMITIVES and word not in lines:
                lines[word] = _PRIMITIVES[word]
                todo.append(_PRIMITIVES[word])
    return "".join(f"{name} ::= {body}\n" for name, body in lines.items())


class _Writer:
    """Visits a schema, and collects rules on the way. A visit gives one item of GBNF, mostly the name of a rule."""

    def __init__(self, schema: object, prefix: str) -> None:
        self._schema, self._prefix = schema, prefix
        self.rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # body → name, so that equal parts are one rule
        self._references: dict[str, str] = {}  # $ref → name

    def root(self) -> str:
        return self._visit(self._schema, "#", 0)

    def _rule(self, body: str) -> str:
        if body not in self._names:
            self._names[body] = f"{self._prefix}r{len(self.rules)}"
            self.rules[self._names[body]] = body
        return self._names[body]

    def _visit(self, schema: object, place: str, depth: int) -> str:
        if depth > _MAX_DEPTH:
            _fail(place, f"more than {_MAX_DEPTH} schemas inside each other")
        if schema is True:
            return "value"
        if schema is False:
            _fail(place, "nothing is valid under `false`")
        if not isinstance(schema, dict):
            _fail(place, f"a schema must be an object, true or false, not {_shown(schema)}")
        keys = [key for key in schema if key not in _ANNOTATIONS]
        for key in keys:
            if key not in _KNOWN:
                near = difflib.get_close_matches(key, _KNOWN, n=1)
                _fail(
                    place,
                    f"{key!r} is not a keyword that a grammar can hold{f', did you mean {near[0]!r}?' if near else ''}",
                )
        if not keys:
            return "value"
        for key in _ALONE:
            if key in keys:
                beside = [other for other in keys if other != key and (other != "type" or key not in ("enum", "const"))]
                if beside:
                    _fail(place, f"{beside[0]!r} cannot stand beside {key!r} here")
                return self._alone(key, schema, place, depth)
        return self._typed(schema, keys, place, depth)

    def _alone(self, key: str, schema: dict[str, Any], place: str, depth: int) -> str:
        value, place = schema[key], f"{place}/{key}"
        if key == "$ref":
            return self._reference(value, place, depth)
        if key in ("enum", "const"):
            values = [value] if key == "const" else value
            if not isinstance(values, list) or not values:
                _fail(place, f"must be a list of values, not {_shown(values)}")
            types = _types(schema, place)
            fitting = [one for one in values if types is None or any(_is_of(one, type_) for type_ in types)]
            if not fitting:
                _fail(place, f"no value is of type {' or '.join(types or ())}")
            return self._rule(" | ".join(literal(_json(one, place)) for one in fitting))
        if not isinstance(value, list) or not value:
            _fail(place, f"must be a list of schemas, not {_shown(value)}")
        if key == "allOf" and len(value) != 1:
            _fail(place, "a grammar cannot hold to several schemas at once; merge them into one")
        return self._rule(" | ".join(self._visit(one, f"{place}/{i}", depth + 1) for i, one in enumerate(value)))

    def _reference(self, reference: object, place: str, depth: int) -> str:
        if not isinstance(reference, str) or not reference.startswith("#"):
            _fail(place, f"{_shown(reference)} is not in this schema; only '#' and '#/…' are followed")
        if reference not in self._references:
            target = self._schema
            for step in reference[1:].split("/")[1:]:
                key = step.replace("~1", "/").replace("~0", "~")
                if isinstance(target, dict) and key in target:
                    target = target[key]
                elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                    target = target[int(key)]
                else:
                    _fail(place, f"there is no {reference!r} in the schema")
            name = self._references[reference] = (
                f"{self._prefix}ref{len(self._references)}"  # before the visit: it may recur
            )
            self.rules[name] = ""
            self.rules[name] = self._visit(target, reference, depth + 1)
        return self._references[reference]

    def _typed(self, schema: dict[str, Any], keys: Sequence[str], place: str, depth: int) -> str:
        types = _types(schema, place)
        if types is None:  # those keywords say nothing of other types, so any one type is valid
            types = tuple(type_ for type_, known in _OF_TYPE.items() if set(keys) <= set(known))[:1]
            if not types:
                _fail(place, "the keywords are of several types; name the type")
        else:
            for key in keys:
                if key != "type" and not any(key in _OF_TYPE[type_] for type_ in types):
                    _fail(place, f"{key!r} cannot be held for type {' or '.join(types)}")
        write: Mapping[str, Callable[[dict[str, Any], str, int], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
        }
        parts = []
        for type_ in dict.fromkeys(types):
            own = {key: schema[key] for key in keys if key in _OF_TYPE[type_]}
            parts.append(write[type_](own, place, depth) if own else type_)
        return parts[0] if len(parts) == 1 else self._rule(" | ".join(parts))

    def _string(self, own: dict[str, Any], place: str, _: int) -> str:
        if "format" in own:
            if len(own) > 1:
                _fail(place, "'format' cannot be held beside a length")
            if not isinstance(format_ := own["format"], str) or format_ not in _FORMATS:
                _fail(
                    f"{place}/format", f"{_shown(format_)} is not one that Bise holds to; known: {', '.join(_FORMATS)}"
                )
            return self._rule(rf'"\"" {_FORMATS[format_]} "\""')
        return self._rule(rf'"\"" char{_times(own, "minLength", "maxLength", place)} "\""')

    def _integer(self, own: dict[str, Any], place: str, _: int) -> str:
        most = 10**_MOST_DIGITS - 1
        for key, value in own.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                _fail(f"{place}/{key}", f"must be a number, not {_shown(value)}")
        low = max(-most, math.ceil(own.get("minimum", -most)), math.floor(own.get("exclusiveMinimum", -most - 1)) + 1)
        high = min(most, math.floor(own.get("maximum", most)), math.ceil(own.get("exclusiveMaximum", most + 1)) - 1)
        if low > high:
            _fail(place, f"no whole number is at least {low} and at most {high}")
        parts = []
        if low < 0:
            parts.append(f'"-" ( {" | ".join(whole_numbers(max(1, -high), -low))} )')
        if high >= 0:
            parts += whole_numbers(max(0, low), high)
        return self._rule(" | ".join(parts))

    def _number(self, own: dict[str, Any], place: str, _: int) -> str:
        if own != {"minimum": 0}:
            key = next(key for key in own if own[key] != 0 or key != "minimum")
            _fail(f"{place}/{key}", "a grammar holds integers to a range, but numbers to 'minimum' 0 alone")
        return "amount"

    def _array(self, own: dict[str, Any], place: str, depth: int) -> str:
        first, rest = own.get("prefixItems", []), own.get("items", True)
        if not isinstance(first, list):
            _fail(f"{place}/prefixItems", f"must be a list of schemas, not {_shown(first)}")
        least, most = _bounds(own, "minItems", "maxItems", place)
        if rest is False:
            if least > len(first):
                _fail(place, f"minItems is {least}, but only {len(first)} items are allowed")
            most = len(first) if most is None else min(most, len(first))
        if first and "items" not in own:  # any value may follow, and none need
            most = max(least, len(first)) if most is None else min(most, max(least, len(first)))
        first = first[: len(first) if most is None else most]
        items = [self._visit(one, f"{place}/prefixItems/{i}", depth + 1) for i, one in enumerate(first)]
        more = None if most is None else most - len(items)
        needed = max(0, least - len(items))
        if more == 0:
            inside = ' "," ws '.join(items)
        else:
            item = self._visit(rest, f"{place}/items", depth + 1)
            if items:
                inside = ' "," ws '.join(items) + " " + self._rule(f'"," ws {item}') + _repeated(needed, more)
            else:
                after = _repeated(max(0, needed - 1), None if more is None else more - 1)
                inside = f"{item} " + self._rule(f'"," ws {item}') + after
                if needed == 0:
                    return self._rule(f'"[" ws ( {inside} ws )? "]"')
        return self._rule(f'"[" ws {inside} ws "]"' if inside else '"[" ws "]"')

    def _object(self, own: dict[str, Any], place: str, depth: int) -> str:
        properties, required = own.get("properties", {}), own.get("required", [])
        others = own.get("additionalProperties", True)
        if not isinstance(properties, dict):
            _fail(f"{place}/properties", f"must be an object of schemas, not {_shown(properties)}")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            _fail(f"{place}/required", f"must be a list of names, not {_shown(required)}")
        pairs = {}
        for name, schema in properties.items():
            if schema is not False:  # forbidden
                pairs[name] = self._pair(name, schema, f"{place}/properties/{name}", depth)
        for name in required:
            if name in properties and name not in pairs:
                _fail(place, f"{name!r} is required, and `false`")
            if name not in pairs:
                if others is False:
                    _fail(place, f"{name!r} is required, but not among the properties, and no others are allowed")
                pairs[name] = self._pair(name, others, f"{place}/additionalProperties", depth)
        if not properties and not pairs and others is not False:
            pair = f'string ":" ws {self._visit(others, f"{place}/additionalProperties", depth + 1)}'
            return self._rule(f'"{{" ws ( {pair} ( "," ws {pair} )* ws )? "}}"')
        return self._rule(f'"{{" ws {self._chosen(pairs, set(required))} ws "}}"' if pairs else '"{" ws "}"')

    def _pair(self, name: str, schema: object, place: str, depth: int) -> str:
        return f'{literal(_json(name, place))} ":" ws {self._visit(schema, place, depth + 1)}'

    def _chosen(self, pairs: Mapping[str, str], required: set[str]) -> str:
        """Pairs in their order, those that are not required or left out: rules from the last pair to the first.

        `begun` is the rest of an object in which a pair was written, `fresh` that of one in which none was.
        """
        begun, fresh = "", ""
        for name, pair in reversed(list(pairs.items())):
            if name in required:
                fresh = self._rule(f"{pair} {begun}".rstrip())
                begun = self._rule(f'"," ws {pair} {begun}'.rstrip())
            else:
                fresh = self._rule(f"{pair} {begun} | {fresh or literal('')}")
                begun = self._rule(f'( "," ws {pair} )? {begun}'.rstrip())
        return fresh


def _bounds(own: Mapping[str, Any], least_key: str, most_key: str, place: str) -> tuple[int, int | None]:
    least, most = own.get(least_key, 0), own.get(most_key)
    for key, value in ((least_key, least), (most_key, 0 if most is None else most)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            _fail(f"{place}/{key}", f"must be a whole number from 0, not {_shown(value)}")
        if value > MAX_REPETITIONS:
            _fail(f"{place}/{key}", f"llama.cpp counts to {MAX_REPETITIONS:,}, not to {value:,}")
    if most is not None and most < least:
        _fail(place, f"{most_key} is {most}, less than {least_key}, {least}")
    return least, most


def _times(own: Mapping[str, Any], least_key: str, most_key: str, place: str) -> str:
    return _repeated(*_bounds(own, least_key, most_key, place))


def _repeated(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _types(schema: Mapping[str, Any], place: str) -> tuple[str, ...] | None:
    if "type" not in schema:
        return None
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    for type_ in types:
        if not isinstance(type_, str) or type_ not in _OF_TYPE:
            _fail(f"{place}/type", f"{_shown(type_)} is not a type; known: {', '.join(_OF_TYPE)}")
    if not types:
        _fail(f"{place}/type", "names no type")
    return tuple(types)


def _is_of(value: object, type_: str) -> bool:
    if isinstance(value, bool) or value is None:
        return type_ == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return type_ == "number" or (type_ == "integer" and float(value).is_integer())
    return type_ == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def _json(value: object, place: str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if any("\ud800" <= char <= "\udfff" for char in text):
        _fail(place, f"{_shown(value)} has half of a surrogate pair")
    if not _is_finite(value):
        _fail(place, f"{_shown(value)} is not a number in JSON")
    return text


def _is_finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    inside: Iterable[object] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_is_finite(one) for one in inside)


def literal(text: str) -> str:
    """A text of printable characters as GBNF."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _fail(place: str, why: str) -> NoReturn:
    raise GrammarError(f"{place if place.isprintable() else ascii(place)}: {why}")
