"""Answers under a JSON schema are valid: by jsonschema, on random logits and on models; and what is refused."""

import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.engine import Engine
from runtime.errors import GrammarError
from runtime.events import EngineSettings, Finished, Load, Piece
from runtime.grammar import Grammar
from runtime.json_schema import grammar_of
from runtime.messages import Message
from runtime.native_sampling import Sampler
from runtime.sampling import Sampling
from runtime.session import Session
from tests.checkpoints import DEMO

Schema = dict[str, Any]

PERSON: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["friend", "foe", None, 3, {"a": [1.5, 'x"y\\']}]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}}},
}

SCHEMAS: list[Schema] = [
    PERSON,
    {"type": "string", "maxLength": 8},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "integer"},
    {"type": "number"},
    {"type": "number", "minimum": 0},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 12},
    {"minimum": 10.5, "maximum": 20},
    {"type": ["boolean", "null", "integer"], "maximum": 5},
    {"const": {"a b": [None, True, -1.5e3], "é\u2028": "\n\t\x7f"}},
    {"enum": [1, 2.0, 2.5, "3", True], "type": "integer"},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "maxItems": 1},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "minItems": 4, "maxItems": 6},
    {"type": "array", "prefixItems": [{"const": 1}], "items": False},
    {"type": "array", "prefixItems": [{"const": 1}], "minItems": 2},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 40},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 0},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 1},
    {"properties": {name: {"const": name} for name in string.ascii_lowercase[:6]}, "required": ["b", "e"]},
    {"properties": {name: {"const": name} for name in string.ascii_lowercase[:6]}},
    {"properties": {"a": False, "b": True and {"const": 1}}, "required": ["c"], "additionalProperties": {"const": 2}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "properties": {"": {"const": 0}, 'a"b\\c\n': {"const": 1}, "é~/": {"const": 2}}},
    {"$ref": "#/definitions/a~1b~0c", "definitions": {"a/b~0c": {}, "a/b~c": {"type": "boolean"}}},
    {"anyOf": [{"const": 7}, {"$ref": "#/anyOf/0"}]},
    {"allOf": [{"type": "boolean"}], "description": "one"},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}]},
    {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}, "v": {"type": "integer"}}},
]

DATES = ("date", "time", "date-time", "uuid")


@pytest.fixture(scope="module")
def engine(demo: Path) -> Iterator[Engine]:
    engine = Engine(demo, EngineSettings(n_ctx=64, n_batch=64, n_ubatch=32, n_threads=1))
    yield engine
    engine.close()


def spoken(engine: Engine, grammar: Grammar, seed: int) -> str | None:
    """What is drawn from random logits until the grammar ends; None if it goes on for long.

    Closing marks are likelier than the rest, or random texts would hardly ever end.
    """
    one = Sampler(Sampling(temperature=1.0, top_p=1.0), seed, engine.vocabulary, n_ctx=64, grammar=grammar)
    rng = np.random.default_rng(seed)
    closing = [t for t in range(engine.vocabulary.n_tokens) if engine.vocabulary.piece(t) in (b'"', b"}", b"]", b"\\n")]
    said = b""
    try:
        for _ in range(200):
            logits = rng.normal(0, 2, engine.vocabulary.n_tokens).astype(np.float32)
            logits[closing] += 6
            logits[engine.vocabulary.eos] += 12
            token = one.draw(logits)
            if engine.vocabulary.ends_answer(token):
                return said.decode()
            said += engine.vocabulary.piece(token)
    finally:
        one.close()
    return None


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:50])
def test_whatever_the_logits_the_text_is_valid(schema: Schema, engine: Engine) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    grammar = grammar_of(schema)
    texts = [text for seed in range(6) if (text := spoken(engine, grammar, seed)) is not None]
    assert len(texts) >= 2
    for text in texts:
        assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize("format_", DATES)
def test_formats_are_those_of_the_calendar(format_: str, engine: Engine) -> None:
    from datetime import date, datetime, time
    from uuid import UUID

    reads = {"date": date.fromisoformat, "time": time.fromisoformat, "date-time": datetime.fromisoformat, "uuid": UUID}
    for seed in range(8):
        text = spoken(engine, grammar_of({"type": "string", "format": format_}), seed)
        assert text is not None
        assert str(reads[format_](json.loads(text)))


def test_one_rule_admits_every_day_of_a_year_without_a_leap() -> None:
    """The grammar's alternatives read as a regular expression."""
    from datetime import date, timedelta

    pattern = _as_regular_expression(_body(grammar_of({"format": "date"}), "date"))
    days = {str(date(1999, 1, 1) + timedelta(n)) for n in range(365)}
    tried = {f"1999-{month:02}-{day:02}" for month in range(14) for day in range(33)}
    assert {day for day in tried if re.fullmatch(pattern, day)} == days


def _body(grammar: Grammar, name: str) -> str:
    return next(line for line in grammar.text.splitlines() if line.startswith(f"{name} ::= ")).partition(" ::= ")[2]


def _as_regular_expression(body: str) -> str:
    return body.replace('"', "").replace(" ", "")


BOUNDS = st.integers(1 - 10**15, 10**15 - 1) | st.integers(-200, 200)


@given(st.lists(BOUNDS, min_size=2, max_size=2), st.lists(BOUNDS, min_size=5, max_size=5))
@settings(max_examples=50, deadline=None)
@example([0, 0], [0])
@example([-1, 1], [0, 2, -2])
@example([-100, 99], [-101, 100, -10, 10, 0])
def test_whole_numbers_are_held_to_their_range(bounds: list[int], numbers: list[int]) -> None:
    low, high = sorted(bounds)
    grammar = grammar_of({"type": "integer", "minimum": low, "maximum": high})
    pattern = _as_regular_expression(_body(grammar, "r0"))
    most = 10**15 - 1  # and no bound is beyond it
    for number in (*numbers, low - 1, low, low + 1, high - 1, high, high + 1, 0):
        within = max(low, -most) <= number <= min(high, most)
        assert bool(re.fullmatch(pattern, str(number))) == within, (number, pattern)
    assert not re.fullmatch(pattern, "00")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (5, "#: a schema must be an object, true or false, not 5"),
        (False, "#: nothing is valid under `false`"),
        ({"type": "text"}, "#/type: 'text' is not a type; known: object, array, string"),
        ({"type": []}, "#/type: names no type"),
        ({"type": [{}]}, "#/type: {} is not a type"),
        ({"propertys": {}}, "#: 'propertys' is not a keyword that a grammar can hold, did you mean 'properties'?"),
        ({"type": "string", "pattern": "a+"}, "#: 'pattern' is not a keyword that a grammar can hold"),
        ({"oneOf": [{}]}, "#: 'oneOf' is not a keyword that a grammar can hold"),
        ({"type": "string", "maxItems": 2}, "#: 'maxItems' cannot be held for type string"),
        ({"minLength": 2, "minItems": 2}, "#: the keywords are of several types; name the type"),
        ({"type": "number", "minimum": 1}, "#/minimum: a grammar holds integers to a range"),
        ({"type": ["integer", "number"], "maximum": 1}, "#/maximum: a grammar holds integers to a range"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "#: no whole number is at least 5 and at most 4"),
        ({"type": "integer", "minimum": "5"}, "#/minimum: must be a number, not '5'"),
        ({"type": "integer", "minimum": float("inf")}, "#/minimum: must be a number, not inf"),
        ({"type": "string", "format": "email"}, "#/format: 'email' is not one that Bise holds to; known: date, time"),
        ({"type": "string", "format": []}, "#/format: [] is not one that Bise holds to"),
        ({"type": "string", "format": "date", "maxLength": 3}, "#: 'format' cannot be held beside a length"),
        ({"type": "string", "maxLength": 2001}, "#/maxLength: llama.cpp counts to 2,000, not to 2,001"),
        ({"type": "string", "minLength": -1}, "#/minLength: must be a whole number from 0, not -1"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "#: maxLength is 2, less than minLength, 3"),
        ({"type": "array", "items": [{}]}, "#/items: a schema must be an object, true or false, not [{}]"),
        ({"prefixItems": {}}, "#/prefixItems: must be a list of schemas, not {}"),
        ({"items": False, "minItems": 1}, "#: minItems is 1, but only 0 items are allowed"),
        (
            {"properties": {"a": {"properties": {"b": {"not": {}}}}}},
            "#/properties/a/properties/b: 'not' is not a keyword",
        ),
        ({"properties": []}, "#/properties: must be an object of schemas, not []"),
        ({"required": "a"}, "#/required: must be a list of names, not 'a'"),
        ({"required": ["a"], "additionalProperties": False}, "#: 'a' is required, but not among the properties"),
        ({"properties": {"a": False}, "required": ["a"]}, "#: 'a' is required, and `false`"),
        ({"enum": []}, "#/enum: must be a list of values, not []"),
        ({"enum": [1], "type": "string"}, "#/enum: no value is of type string"),
        ({"const": float("nan")}, "#/const: nan is not a number in JSON"),
        ({"const": ["\ud800"]}, "#/const: ['\\ud800'] has half of a surrogate pair"),
        ({"enum": [1], "minimum": 0}, "#: 'minimum' cannot stand beside 'enum' here"),
        ({"anyOf": []}, "#/anyOf: must be a list of schemas, not []"),
        ({"allOf": [{}, {}]}, "#/allOf: a grammar cannot hold to several schemas at once; merge them into one"),
        ({"$ref": "https://example.org/x"}, "#/$ref: 'https://example.org/x' is not in this schema"),
        ({"$ref": "#/$defs/x"}, "#/$ref: there is no '#/$defs/x' in the schema"),
        ({"$ref": "#"}, "no grammar can be made of the schema: "),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no grammar can be made of the schema: "),
        (json.loads('{"items":' * 70 + "{}" + "}" * 70), "more than 64 schemas inside each other"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_cannot_be_held_is_refused_with_its_place(schema: object, message: str) -> None:
    with pytest.raises(GrammarError) as error:
        grammar_of(schema)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_large_schemas_make_grammars() -> None:
    many = {f"property-{i}": {"type": "string", "maxLength": 2000} for i in range(300)}
    assert grammar_of({"type": "object", "properties": many})
    assert grammar_of({"type": "array", "items": {"enum": [*range(500)]}, "minItems": 900, "maxItems": 2000})


# Models


@pytest.fixture(params=["demo", pytest.param("smollm2", marks=pytest.mark.slow)])
def session(request: pytest.FixtureRequest, demo: Path, smollm2: Path) -> Iterator[Session]:
    settings = EngineSettings(n_ctx=1024, n_batch=256)
    if request.param == "demo":
        session = Session(Load(demo, settings, "mistral-v3", DEMO / "tokenizer.model"))
    else:
        session = Session(Load(smollm2, settings, "template"))
    list(session.load())
    yield session
    session.close()


def test_models_answer_under_a_schema(session: Session) -> None:
    """The schema is bounded, so every answer ends by itself."""
    message = Message("user", "Describe Anna, a friend of 33, in JSON.")
    grammar = grammar_of(PERSON)
    answers = set()
    for sampling in (Sampling(0.0), Sampling(temperature=1.5, seed=1)):
        events = list(session.reply([message], sampling, grammar=grammar))
        text = "".join(event.text for event in events if isinstance(event, Piece))
        end = events[-1]
        assert isinstance(end, Finished)
        assert end.reason == "end"
        jsonschema.validate(json.loads(text), PERSON)
        answers.add(text)
    assert len(answers) > 1
