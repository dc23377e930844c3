"""Arguments against schemas from anywhere, and the grammar of calls: by jsonschema, on random logits."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from runtime import tool_arguments
from runtime.call_grammar import call_grammar, unheld
from runtime.calls import AnswerReader, CallForm, made_up_ids
from runtime.events import EngineSettings
from runtime.json_schema import grammar_of
from runtime.messages import Tool
from runtime.native import Model, Vocabulary
from runtime.native_grammar import NativeGrammar
from runtime.native_sampling import Sampler
from runtime.sampling import Sampling
from runtime.tool_arguments import ArgumentCheck, call_fault

LIST = CallForm("[TOOL_CALLS]", 5, is_list=True)
TAGS = CallForm("<tool_call>", None, closing="</tool_call>")


def check(**schema: Any) -> ArgumentCheck:
    return ArgumentCheck(json.dumps(schema))


# Checks


@pytest.mark.parametrize(
    ("schema", "arguments", "fault"),
    [
        ({}, "{}", None),
        ({}, "", "not JSON"),
        ({}, '{"a": NaN}', "NaN is not JSON"),
        ({}, "[1]", "not a JSON object"),
        ({}, '"{}"', "not a JSON object"),
        ({}, '{"a": ' + "9" * 5000 + "}", "not JSON"),
        ({}, '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ({"properties": {"n": {"type": "integer"}}}, '{"n": 5}', None),
        ({"properties": {"n": {"type": "integer"}}}, '{"n": "5"}', "$.n: '5' is not of type 'integer'"),
        ({"required": ["n"]}, "{}", "$: 'n' is a required property"),
        ({"properties": {"n": {"pattern": "^a+$"}}}, '{"n": "ab"}', "$.n: 'ab' does not match '^a+$'"),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, '{"a": 1, "b": 2}', "is valid under each of"),
        ({"properties": {"n": {"$ref": "#"}}}, '{"n":' * 300 + "{}" + "}" * 300, "too long, or nested too deeply"),
        ({"$ref": "#"}, "{}", "too long, or nested too deeply"),
        ({"$ref": "https://example.org/x"}, "{}", None),
        ({"$ref": "#/$defs/none"}, "{}", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_with_arguments_is_told(schema: dict[str, Any], arguments: str, fault: str | None) -> None:
    told = check(**schema).fault(arguments)
    assert (told is None) == (fault is None), told
    assert (fault or "") in (told or "")
    assert len(told or "") <= 300


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonschema's, before it reads
def test_nothing_that_a_schema_names_is_read(tmp_path: Path) -> None:
    other = tmp_path / "schema.json"
    other.write_text('{"required": ["a"]}', encoding="utf-8")
    assert check(**{"$ref": other.as_uri()}).fault("{}") is None


def test_what_is_told_is_cut() -> None:
    told = check(properties={"n": {"type": "integer"}}).fault(json.dumps({"n": "x" * 10_000}))
    assert told is not None
    assert len(told) == 300


@pytest.mark.parametrize(
    "parameters",
    ["5", "[", '{"type": "strng"}', '{"properties": {"a": {"pattern": "("}}}', '{"a":' * 5000 + "1" + "}" * 5000],
    ids=lambda text: text[:30],
)
def test_a_faulty_schema_checks_for_an_object_alone(parameters: str) -> None:
    faulty = ArgumentCheck(parameters)
    assert faulty.faulty
    assert faulty.fault('{"any": 1}') is None
    assert faulty.fault("1") == "the arguments are not a JSON object"


def test_a_check_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_arguments, "MOST_SECONDS", 0.2)
    slow = check(properties={"a": {"pattern": "^(a|a)*$"}})
    assert slow.fault(json.dumps({"a": "a" * 60 + "!"})) is not None
    doubled = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)} | {"d60": {}}
    many = ArgumentCheck(json.dumps({"$defs": doubled, "$ref": "#/$defs/d0"}))
    assert many.faulty is None
    assert "cannot be checked" in (many.fault("{}") or "")
    assert slow.fault('{"a": "aa"}') is None


def test_other_threads_check_as_well() -> None:
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(check(required=["a"]).fault("{}")))
    thread.start()
    thread.join()
    assert "required" in str(found[0])


def test_a_tool_that_there_is_not_is_told_with_those_that_there_are() -> None:
    checks = {"find": check(), "add": check(required=["x"])}
    assert call_fault(checks, "fnd", "{}") == "there is no tool 'fnd'; there are: find, add"
    assert call_fault(checks, "find", "{}") is None
    assert "'x' is a required" in (call_fault(checks, "add", "{}") or "")


# Grammars


SCHEMAS: dict[str, dict[str, Any]] = {
    "add": {
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": -3, "maximum": 99}, "y": {"enum": ["a", None, {"b": 1}]}},
        "required": ["x"],
        "additionalProperties": False,
    },
    "ref-2": {
        "properties": {"left": {"$ref": "#/$defs/d"}, "right": {"anyOf": [{"$ref": "#/$defs/d"}, {"type": "null"}]}},
        "required": ["left"],
        "$defs": {"d": {"type": "string", "format": "date"}},
    },
    "none": {"type": "object", "additionalProperties": False},
    "any": {},
    "pattern": {"type": "object", "properties": {"s": {"type": "string", "pattern": "^a+$"}}},
    "faulty": {"type": "strng"},
}
TOOLS = [Tool(name, "", json.dumps(schema)) for name, schema in SCHEMAS.items()]


@pytest.fixture(scope="module")
def vocabulary(demo: Path) -> Iterator[Vocabulary]:
    model = Model(demo, EngineSettings(n_ctx=64), vocab_only=True)
    yield model.vocabulary
    model.close()


def spoken(vocabulary: Vocabulary, form: CallForm, tools: list[Tool], ids: list[str], seed: int) -> bytes | None:
    """What is drawn from random logits until the grammar ends, its end being likely; None where it goes on for long."""
    one = Sampler(Sampling(temperature=1.0, top_p=1.0), seed, vocabulary, n_ctx=64)
    one.hold_to(call_grammar(form, tools, ids))
    rng = np.random.default_rng(seed)
    closing = [t for t in range(vocabulary.n_tokens) if vocabulary.piece(t) in (b'"', b"}", b"]", b"\\n")]
    said = b""
    try:
        for _ in range(250):
            logits = rng.normal(0, 2, vocabulary.n_tokens).astype(np.float32)
            logits[closing] += 6
            logits[vocabulary.eos] += 12
            token = one.draw(logits)
            if vocabulary.ends_answer(token):
                return said
            said += vocabulary.piece(token)
    finally:
        one.close()
    return None


@pytest.mark.parametrize("form", [LIST, TAGS])
@pytest.mark.parametrize("names", [["add"], ["ref-2", "none"], ["any", "add"], ["pattern", "faulty"]])
def test_whatever_the_logits_calls_are_valid(form: CallForm, names: list[str], vocabulary: Vocabulary) -> None:
    tools = [tool for tool in TOOLS if tool.name in names]
    found = 0
    for seed in range(6):
        ids = [f"{seed}-abcdef{i}".replace("-", "x") for i in range(3)]
        if (said := spoken(vocabulary, form, tools, ids, seed)) is None:
            continue
        reader = AnswerReader(form, iter([*ids, *(f"{i:09}" for i in range(9))]), opened=True)
        assert not [part for part in [*reader.read(9, said, 1), *reader.finish(1)] if isinstance(part, str)]
        calls = reader.calls(lambda *_: None)
        assert 1 <= len(calls) <= (3 if form.is_list else 1)
        for call in calls:
            assert call.error is None
            assert call.name in names
            arguments = json.loads(call.arguments)
            assert isinstance(arguments, dict)
            if call.name not in ("pattern", "faulty"):
                jsonschema.validate(arguments, SCHEMAS[call.name])
        if form.is_list:
            written = json.loads(said)
            assert [one.get("id", id_) for one, id_ in zip(written, ids, strict=False)] == [call.id for call in calls]
        found += 1
    assert found >= 3


def test_a_list_has_as_many_calls_as_there_are_ids(vocabulary: Vocabulary) -> None:
    call = '{"name": "none", "arguments": {}}'
    for n in range(1, 5):
        grammar = NativeGrammar(call_grammar(LIST, TOOLS, ["a", "b", "c"]), vocabulary)
        assert grammar.accept_text(f"[{', '.join([call] * n)}]") == (n <= 3)
        grammar.close()


def test_only_what_no_grammar_holds_is_left_to_the_check() -> None:
    assert [name for name, tool in zip(SCHEMAS, TOOLS, strict=True) if unheld(tool)] == ["pattern", "faulty"]
    assert "'pattern' is not a keyword that a grammar can hold" in (unheld(TOOLS[4]) or "")
    text = call_grammar(LIST, TOOLS, ["abcdefghi"]).text
    assert text.count('"\\"arguments\\":" ws object') == 3
    assert "t0-root" in text


def test_tools_that_are_too_much_together_are_left_to_the_check() -> None:
    schema = {"type": "object", "properties": {"a": {"const": "a" * 49_000}}}
    tools = [Tool(f"tool{i}", "", json.dumps(schema)) for i in range(21)]
    assert grammar_of(schema)
    assert not unheld(tools[0])
    text = call_grammar(LIST, tools, ["abcdefghi"]).text
    assert text.count('"\\"arguments\\":" ws object') == 21
    assert "-root" in call_grammar(LIST, tools[:2], ["abcdefghi"]).text


def test_a_schema_that_is_too_long_is_left_to_the_check() -> None:
    long = Tool("long", "", json.dumps({"enum": [f"value {i}" for i in range(5000)]}))
    assert (
        unheld(long) == f"its schema has {len(long.parameters):,} characters, and a grammar is made of 50,000 at most"
    )


def test_a_grammar_goes_on_behind_what_has_begun(vocabulary: Vocabulary) -> None:
    grammar = call_grammar(TAGS, TOOLS[:1], ["abcdefghi"])
    logits = np.zeros(vocabulary.n_tokens, np.float32)
    pieces = [vocabulary.piece(token) for token in range(vocabulary.n_tokens)]
    one = Sampler(Sampling(temperature=0.0), 0, vocabulary, n_ctx=64)
    one.hold_to(grammar, '\n{"name": "a')
    assert pieces[one.draw(logits)][:1] == b"d"
    logits[pieces.index(b"x")] = 1
    one.hold_to(grammar, "\n[")  # which no call begins with
    assert pieces[one.draw(logits)] == b"x"
    one.hold_to(grammar)
    assert pieces[one.draw(logits)] != b"x"
    one.hold_to(None)
    assert pieces[one.draw(logits)] == b"x"
    one.close()


def test_ids_that_are_made_up_are_words_of_nine() -> None:
    ids = made_up_ids("x")
    assert all(len(next(ids)) == 9 for _ in range(3))
