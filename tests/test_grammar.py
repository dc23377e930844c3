"""Grammars: what is refused and where, beside llama.cpp's own parser; and answers that keep to their grammar."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import Engine
from runtime.errors import EngineError, GrammarError
from runtime.events import EngineSettings, Event, Finished, Piece, Reply
from runtime.grammar import Grammar
from runtime.messages import Message, Tool
from runtime.native import Model, lib
from runtime.native_sampling import Sampler
from runtime.sampling import Sampling
from tests.work import function_calls

FREE = Sampling(temperature=1.0, top_p=1.0)

GOOD = [
    'root ::= "yes" | "no"',
    'root ::= "a"',
    "root ::= [a-z]+ [^0-9\\]\\\\]* .",
    'root ::= "x"{2,3} "y"{4} "z"{1,}',
    'root ::= ("a" | b)* "."\nb ::= "b"? "c"',
    '# a list\nroot   ::= item ("," item)* # and its end\n\nitem ::= "\\x41" "\\u00e9" "\\U0001F642" "\\n\\t\\""',
    'root ::= (\n  "a" |\n  "b"\n)\r\n',
    'root ::= expr\nexpr ::= term ([-+*/] term)*\nterm ::= [0-9]+ | "(" expr ")"',
    'root ::= "" | "a" root',
    'root ::= ws "a" ws\nws ::= [ \\t]*',
    "root ::= <[5]> !<[6]>",
    'root ::= "ab" unused-1\nunused-1 ::= "c"',
    "root ::= [a-]",
    'root ::= "é🙂" [à-ü]',
    'root ::= "a"{0} "b"{2000}',
    'root ::=\n "a"',
    'root ::= both*\nboth ::= a b\na ::= "x"?\nb ::= "y"',
]

BOTH_REFUSE = [
    ('start ::= "a"', "there is no rule 'root', with which an answer begins"),
    ("root = a", "line 1, column 6: expected '::=' after the name 'root'"),
    ('root ::= "a', "line 1, column 10: this text has no closing quote"),
    ('root ::= "a"\nother ::= [a-z', "line 2, column 11: this '[' has no ']'"),
    ('root ::= ("a" | "b"', "line 1, column 10: this bracket is not closed"),
    ('root ::= "a" )', "line 1, column 14: expected the end of the line, not ')'"),
    ('root ::= "a"\n  | "b"', "line 2, column 3: expected the name of a rule, not '|'"),
    ("root ::= itm\nitem ::= [a]", "line 1, column 10: there is no rule 'itm', did you mean 'item'?"),
    ("root ::= * [a]", "line 1, column 10: nothing stands before '*' to be repeated"),
    ('root ::= ""+', "line 1, column 12: nothing stands before '+' to be repeated"),
    ('root ::= "a"{x}', "line 1, column 13: expected {N}, {N,} or {N,M}"),
    ('root ::= "a"{2001}', "line 1, column 13: llama.cpp counts to 2,000 repetitions, not to 2,001"),
    ('root ::= ("a" ("b" | "c")){1001}', "line 1, column 27: this makes 2,002 rules, and llama.cpp 2,000 at most"),
    ('root ::= ("a"{0,500} "b"){4}', "line 1, column 26: this makes 2,004 rules, and llama.cpp 2,000 at most"),
    ('root ::= "\\q"', r"line 1, column 11: '\\q' is not an escape"),
    ('root ::= "\\x4"', "is not an escape; known: "),
    ('root ::= root "a" | "b"', "line 1, column 1: rule 'root' can begin with itself (root → root)"),
    ('root ::= a\na ::= b "x"\nb ::= "y" | a', "can begin with itself ("),
    ('root ::= ("" | "b") root', "line 1, column 1: rule 'root' can begin with itself"),
    ("root ::= <[5>", "line 1, column 10: expected a token, such as"),
]

WE_REFUSE = [
    ("", "there is no rule 'root', with which an answer begins"),
    ('root ::= "a"{3,2}', "line 1, column 13: at most 2 is less than at least 3"),
    ('root ::= "a"{1,5000}', "line 1, column 13: llama.cpp counts to 2,000 repetitions, not to 5,000"),
    ('root ::= e root "x" | "y"\ne ::= f\nf ::= "" | "z"', "line 1, column 1: rule 'root' can begin with itself"),
    ('root ::= (a?)* "b"\na ::= "a"', "line 1, column 14: what is repeated here may be empty"),
    ('root ::= "a"\nroot ::= "b"', "line 2, column 1: rule 'root' is defined twice"),
    ('root ::= "a" root', "line 1, column 1: rule 'root' has no end: every way through it leads back into it"),
    ('root ::= "a" | b\nb ::= "(" b ")"', "line 2, column 1: rule 'b' has no end"),
    ("root ::= [z-a]", "line 1, column 11: the range 'z-a' ends before it begins"),
    ("root ::= [] [a]", "line 1, column 10: no character stands between '[' and ']'"),
    ('root ::= "a"+*', "line 1, column 14: two repetitions in a row"),
    ('root ::= "\\x00"', "line 1, column 11: a text cannot have a character 0"),
    ('root ::= "a\0"', r"line 1, column 12: '\x00' cannot stand in a grammar"),
    ('root ::= "\ud800"', r"line 1, column 11: '\ud800' cannot stand in a grammar"),
    ('root ::= "\\uD800"', r"line 1, column 11: \uD800 is not a character"),
    ("root ::= " + "(" * 65 + '"a"' + ")" * 65, "line 1, column 74: more than 64 brackets inside each other"),
    ("root ::= " + "a" * 1_000_001, "the grammar has 1,000,010 characters; at most 1,000,000 are taken"),
    ("root ::= r0\n" + "".join(f'r{i} ::= "a"\n' for i in range(10_000)), "the grammar has 10,001 rules"),
    (
        "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1} | r{i + 1} "x"\n' for i in range(40)) + 'r40 ::= "a"',
        "rule 'r21' can begin in more than 1,000,000 ways",
    ),
    ('root ::= "' + "ab" * 500 + '"{2000}', "the grammar has 2,002,001 elements with its repetitions"),
]


@pytest.fixture(scope="module")
def engine(demo: Path) -> Iterator[Engine]:
    engine = Engine(demo, EngineSettings(n_ctx=512, n_batch=64, n_ubatch=32, n_threads=1))
    yield engine
    engine.close()


@pytest.fixture
def sampler(engine: Engine) -> Iterator[Callable[..., Sampler]]:
    samplers: list[Sampler] = []

    def build(grammar: str, sampling: Sampling = FREE, seed: int = 1) -> Sampler:
        samplers.append(Sampler(sampling, seed, engine.vocabulary, n_ctx=512, grammar=Grammar(grammar)))
        return samplers[-1]

    yield build
    for one in samplers:
        one.close()


def llama_cpp_takes(engine: Engine, text: str) -> bool:
    made = lib.llama_sampler_init_grammar(engine.vocabulary.pointer, text.encode(), b"root")
    if made:
        lib.llama_sampler_free(made)
    return bool(made)


@pytest.mark.parametrize("text", GOOD)
def test_a_grammar_that_llama_cpp_takes_is_taken(text: str, engine: Engine) -> None:
    assert Grammar(text).text == text
    assert llama_cpp_takes(engine, text)


@pytest.mark.parametrize(("text", "message"), BOTH_REFUSE)
def test_what_llama_cpp_refuses_is_refused_with_its_place(text: str, message: str, engine: Engine) -> None:
    refused(text, message)
    assert not llama_cpp_takes(engine, text)


@pytest.mark.parametrize(("text", "message"), WE_REFUSE, ids=lambda value: ascii(value[:40]))
def test_what_llama_cpp_would_take_wrongly_is_refused(text: str, message: str) -> None:
    """Some of these hang it, fill the memory or can never be answered."""
    refused(text, message)


def refused(text: str, message: str) -> None:
    with pytest.raises(GrammarError) as error:
        Grammar(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("order", [1, -1])
def test_checking_takes_time_linear_in_the_rules(order: int) -> None:
    def n_calls(n: int) -> int:
        rules = [f'x{i} ::= "a"? x{i + 1}' for i in range(n)][::order]
        return function_calls(lambda: Grammar("\n".join(["root ::= x0", *rules, f'x{n} ::= "b"'])))

    assert n_calls(2000) < 4.4 * n_calls(500)


PARTS = [
    '"a"',
    '"',
    "[a-c]",
    "[",
    "]",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{1,2}",
    "{2",
    "}",
    "root",
    "x",
    " ::= ",
    "\n",
    '""',
    ".",
]


@given(st.lists(st.sampled_from(PARTS), max_size=14), st.lists(st.sampled_from(PARTS), max_size=8))
@settings(max_examples=400, deadline=None)
def test_llama_cpp_takes_every_grammar_that_is_taken(demo: Path, first: list[str], second: list[str]) -> None:
    text = "root ::= " + " ".join(first) + "\nx ::= " + " ".join(second)
    try:
        Grammar(text)
    except GrammarError:
        return
    made = lib.llama_sampler_init_grammar(_vocabulary(demo), text.encode(), b"root")
    assert made
    lib.llama_sampler_free(made)


_MODELS: dict[Path, Model] = {}


def _vocabulary(path: Path) -> object:
    if path not in _MODELS:
        _MODELS[path] = Model(path, EngineSettings(n_ctx=32), vocab_only=True)
    return _MODELS[path].vocabulary.pointer


# Answers


def spoken(one: Sampler, engine: Engine, seed: int) -> str:
    """What is drawn from random logits until the grammar ends."""
    rng = np.random.default_rng(seed)
    said = b""
    for _ in range(300):
        token = one.draw(rng.normal(0, 3, engine.vocabulary.n_tokens).astype(np.float32))
        if engine.vocabulary.ends_answer(token):
            return said.decode()
        said += engine.vocabulary.piece(token)
    raise AssertionError(f"no end: {said!r}")


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        ('root ::= "yes" | "no"', {"yes", "no"}),
        ('root ::= "a"{2,3} "é"?', {"aa", "aaa", "aaé", "aaaé"}),
        ('root ::= "(" root ")" | "x" | " y"', None),
        ("root ::= [1-3]", {"1", "2", "3"}),
    ],
)
def test_any_logits_give_texts_of_the_grammar(
    grammar: str, texts: set[str] | None, engine: Engine, sampler: Callable[..., Sampler]
) -> None:
    said = {spoken(sampler(grammar, seed=seed), engine, seed) for seed in range(30)}
    if texts is not None:
        assert said == texts
    else:
        assert all(text.count("(") == text.count(")") and text.strip("()") in ("x", " y") for text in said)


def test_what_is_left_keeps_its_proportions(engine: Engine, sampler: Callable[..., Sampler]) -> None:
    """The grammar rules tokens out before any other sampler, and changes nothing else."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, engine.vocabulary.n_tokens).astype(np.float32)
    pieces = [engine.vocabulary.piece(token) for token in range(len(logits))]
    allowed = np.array([piece in (b"a", b"b", b"c") for piece in pieces])
    tokens, _ = sampler("root ::= [a-c]").candidates(logits)
    left = np.zeros(len(logits))
    left[tokens["id"]] = tokens["p"]
    shares = np.where(allowed, np.exp(logits.astype(np.float64)), 0)
    np.testing.assert_allclose(left, shares / shares.sum(), rtol=1e-5)


def test_draws_come_as_often_as_they_are_likely(engine: Engine, sampler: Callable[..., Sampler]) -> None:
    """Drawn without the grammar first, and again where it refuses: as if all others had not been there."""
    pieces = [engine.vocabulary.piece(token) for token in range(engine.vocabulary.n_tokens)]
    logits = np.full(len(pieces), -5.0, np.float32)
    for piece, logit in ((b"a", 1.0), (b"b", 0.0), (b"c", 2.0), (b"x", 3.0)):
        logits[pieces.index(piece)] = logit
    n = 600
    drawn = [pieces[sampler("root ::= [a-c]", seed=seed).draw(logits)] for seed in range(n)]
    for piece, logit in ((b"a", 1.0), (b"b", 0.0), (b"c", 2.0)):
        share = np.exp(logit) / np.exp([1.0, 0.0, 2.0]).sum()
        assert abs(drawn.count(piece) - n * share) < 5 * np.sqrt(n * share * (1 - share))
    assert set(drawn) == {b"a", b"b", b"c"}


@pytest.mark.parametrize(
    "change", [{"mirostat": 1}, {"mirostat": 2}, {"typical_p": 0.5}, {"temperature": 0.0}, {"xtc_probability": 1.0}]
)
def test_every_sampler_keeps_to_the_grammar(
    change: dict[str, float], engine: Engine, sampler: Callable[..., Sampler]
) -> None:
    sampling = Sampling(**{"temperature": 1.0, **change})  # type: ignore[arg-type]
    for seed in range(8):
        assert spoken(sampler('root ::= [a-d] ("-" [0-9]){2}', sampling, seed), engine, seed)[1::2] == "--"


@pytest.mark.parametrize("change", [{}, {"mirostat": 2}, {"temperature": 0.0}])
def test_bytes_that_are_no_text_are_never_drawn(
    change: dict[str, float], engine: Engine, sampler: Callable[..., Sampler]
) -> None:
    """llama.cpp takes any byte from F8 for the beginning of a character, and E0 9F for one."""
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, **change})  # type: ignore[arg-type]
    vocabulary = engine.vocabulary
    single = [t for t in range(vocabulary.n_tokens) if len(piece := vocabulary.piece(t)) == 1 and piece[0] >= 0x80]
    assert len(single) == 128
    for seed in range(10):
        one, rng, said = sampler("root ::= [^a]{12}", sampling, seed), np.random.default_rng(seed), b""
        while True:
            logits = rng.normal(0, 2, vocabulary.n_tokens).astype(np.float32)
            logits[single] += 12
            if vocabulary.ends_answer(token := one.draw(logits)):
                break
            said += vocabulary.piece(token)
        assert len(said.decode()) == 12
        assert len(said) > 12


def test_control_tokens_are_drawn_only_where_a_grammar_names_them(
    engine: Engine, sampler: Callable[..., Sampler]
) -> None:
    """llama.cpp takes a control token for the text that spells it; in the answer there would be nothing of it."""
    logits = np.zeros(engine.vocabulary.n_tokens, np.float32)
    control = next(t for t in range(len(logits)) if engine.vocabulary.text(t) == "[INST]")
    logits[control] = 50
    free = sampler("root ::= .{6}")
    assert control not in {free.draw(logits) for _ in range(2)}
    assert sampler("root ::= <[" + str(control) + "]>").draw(logits) == control
    named = sampler("root ::= <s> .{6}")
    logits[engine.vocabulary.bos] = 60
    assert named.draw(logits) == engine.vocabulary.bos
    assert named.draw(logits) not in (control, engine.vocabulary.bos)
    assert sampler("root ::= !<[5]>").draw(logits) not in (control, engine.vocabulary.bos)


def test_a_grammar_of_a_token_that_the_model_has_not_is_refused(sampler: Callable[..., Sampler]) -> None:
    with pytest.raises(EngineError, match=r"llama\.cpp refuses the grammar: it names a token that the model has not"):
        sampler("root ::= <no-such-token>")


def test_a_grammar_that_the_settings_leave_no_way_is_an_error(engine: Engine, sampler: Callable[..., Sampler]) -> None:
    logits = np.zeros(engine.vocabulary.n_tokens, np.float32)
    bans = tuple((t, -np.inf) for t in range(len(logits)) if engine.vocabulary.piece(t) in (b"a", b"b"))
    one = sampler("root ::= [ab]", Sampling(temperature=1.0, logit_bias=bans))
    with pytest.raises(EngineError, match="no token is left to draw"):
        one.draw(logits)
    logits[[token for token, _ in bans]] = -np.inf
    with pytest.raises(EngineError, match="the model has none with which the grammar could go on"):
        sampler("root ::= [ab]").draw(logits)


class OnePrompt:
    """A prompt format that knows one prompt."""

    def encode(self, messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> list[int]:
        return [1, 400, 500]


def test_an_answer_ends_where_its_grammar_does_and_keeps_its_first_space(engine: Engine) -> None:
    from typing import cast

    from runtime.answering import Answerer
    from runtime.prompts import Prompter

    answerer = Answerer(engine, cast(Prompter, OnePrompt()))
    events: list[Event] = []
    grammar = Grammar('root ::= " one" | " two, " [a-z]{3}')
    for seed in range(5):
        answerer.reply(Reply((Message("user", ""),), Sampling(2.0, seed=seed), grammar=grammar), events.append)
        text = "".join(event.text for event in events if isinstance(event, Piece))
        end = events[-1]
        assert isinstance(end, Finished)
        assert end.reason == "end"
        assert end.sampling.startswith("grammar → top-p 0.95 → temperature 2 → draw, seed")
        assert text == " one" or (text.startswith(" two, ") and len(text) == 9)
        events.clear()
