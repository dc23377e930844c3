"""One loaded model: its logits against llama.cpp's own high-level class, its KV cache against fresh reads."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.engine import Engine
from runtime.errors import EngineError
from runtime.events import EngineSettings, Sampling
from runtime.native_context import AbortedError
from runtime.scoring import ScoringEngine
from tests.checkpoints import DEMO

SETTINGS = EngineSettings(n_ctx=256, n_batch=64, n_ubatch=32, n_threads=1)

PROSE = (DEMO.parent / "eval" / "prose.txt").read_text(encoding="utf-8")[:10_000]
TEXT = PROSE[:600]

# ggml rounds activations to BF16 to multiply them by BF16 weights, so batches of other shapes move logits of about 10
# by some hundredths. One token more or less in the context moves them by whole numbers.
TOLERANCE = 0.1


def ignore(*_: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def reference(demo: Path) -> Iterator[llama_cpp.Llama]:
    """llama-cpp-python's own class, with the engine's settings."""
    llama = llama_cpp.Llama(
        str(demo),
        n_ctx=256,
        n_batch=64,
        n_ubatch=32,
        n_threads=1,
        n_threads_batch=1,
        flash_attn=True,
        logits_all=True,
        verbose=False,
    )
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def engine(demo: Path) -> Iterator[Engine]:
    engine = Engine(demo, SETTINGS)
    yield engine
    engine.close()


@pytest.fixture
def opened(demo: Path) -> Iterator[Callable[..., Engine]]:
    """Opens engines on the demo with some settings, and closes them."""
    engines: list[Engine] = []

    def open_engine(path: Path = demo, **settings: object) -> Engine:
        engines.append(Engine(path, replace(SETTINGS, **settings)))  # type: ignore[arg-type]
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


@pytest.fixture
def ids(reference: llama_cpp.Llama) -> list[int]:
    """The text's first 120 ids, BOS in front."""
    return reference.tokenize(TEXT.encode())[:120]


def fresh(engine: Engine, ids: list[int]) -> NDArray[np.float32]:
    """Logits after the ids, read with nothing kept."""
    engine.read([ids[0] + 1, *ids[1:]], ignore)
    assert engine.read(ids, ignore) == 0
    return engine.logits().copy()


# Logits


def test_the_logits_are_llama_cpps(engine: Engine, reference: llama_cpp.Llama, ids: list[int]) -> None:
    assert engine.vocabulary.tokenize(TEXT, bos=True)[:120] == ids
    reference.reset()  # type: ignore[no-untyped-call]
    reference.eval(ids)
    # The same batches: only the last product, of one row instead of all, sums in another order.
    np.testing.assert_allclose(fresh(engine, ids), reference.scores[len(ids) - 1], atol=1e-4)


def test_the_logits_of_chunks_are_llama_cpps(demo: Path, reference: llama_cpp.Llama, ids: list[int]) -> None:
    n_ctx, first = 32, 20
    scoring = ScoringEngine(demo, replace(SETTINGS, n_ctx=n_ctx))
    chunks = np.array([ids[:n_ctx], ids[n_ctx : 2 * n_ctx]], np.int32)
    logits = scoring.logits(chunks, first)
    assert logits.shape == (2, n_ctx - first, scoring.n_vocab)
    for chunk, rows in zip(chunks, logits, strict=True):
        reference.reset()  # type: ignore[no-untyped-call]
        reference.eval(chunk.tolist())
        np.testing.assert_allclose(rows, reference.scores[first:n_ctx], atol=TOLERANCE)
    np.testing.assert_allclose(scoring.logits(chunks[1:], first)[0], reference.scores[first:n_ctx], atol=TOLERANCE)
    scoring.close()


@pytest.mark.parametrize("n_ctx", [48, 96])
def test_a_chunk_need_not_divide_the_batch(n_ctx: int, demo: Path, reference: llama_cpp.Llama, ids: list[int]) -> None:
    """48 of a batch of 64: one chunk a batch. 96: a chunk takes two batches, and the first gives no row."""
    first = 70 if n_ctx == 96 else 20
    scoring = ScoringEngine(demo, replace(SETTINGS, n_ctx=n_ctx))
    assert scoring.n_seq == 1
    for start in (0, 7):
        chunk = np.array(ids[start : start + n_ctx], np.int32)
        reference.reset()  # type: ignore[no-untyped-call]
        reference.eval(chunk.tolist())
        rows = scoring.logits(chunk[None], first)[0]
        np.testing.assert_allclose(rows, reference.scores[first:n_ctx], atol=TOLERANCE)
    scoring.close()


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0", "bf16"])
def test_every_kv_type_answers_nearly_the_same(
    kv_type: str, opened: Callable[..., Engine], engine: Engine, ids: list[int]
) -> None:
    exact, rounded = fresh(engine, ids), fresh(opened(kv_type=kv_type), ids)
    assert np.corrcoef(exact, rounded)[0, 1] > 0.99
    assert not np.array_equal(exact, rounded)


def test_an_unknown_kv_type_is_told_with_the_known(opened: Callable[..., Engine]) -> None:
    with pytest.raises(EngineError, match="'q7_0' is not a KV cache type; known: f16, q8_0, q4_0, bf16"):
        opened(kv_type="q7_0")


# Answers


def answer(engine: Engine, ids: list[int], n: int, sampling: Sampling) -> list[int]:
    engine.read(ids, ignore)
    engine.start_sampling(sampling)
    drawn = []
    for _ in range(n):
        drawn.append(engine.next())
        engine.extend(drawn[-1])
    return drawn


def test_the_greedy_answer_is_llama_cpps(engine: Engine, reference: llama_cpp.Llama, ids: list[int]) -> None:
    reference.reset()  # type: ignore[no-untyped-call]
    theirs = list(itertools.islice(reference.generate(ids, temp=0.0, repeat_penalty=1.0), 40))
    assert answer(engine, ids, 40, Sampling(temperature=0.0)) == theirs


def test_a_seed_repeats_an_answer_and_another_changes_it(engine: Engine, ids: list[int]) -> None:
    first, again, other = (answer(engine, ids, 30, Sampling(temperature=1.5, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other


def test_without_a_seed_answers_differ(engine: Engine, ids: list[int]) -> None:
    assert len({tuple(answer(engine, ids, 30, Sampling(temperature=1.5))) for _ in range(3)}) > 1


def test_a_penalty_keeps_the_last_tokens_from_coming_back(engine: Engine, ids: list[int]) -> None:
    plain = answer(engine, ids, 60, Sampling(temperature=0.0))
    varied = answer(engine, ids, 60, Sampling(temperature=0.0, repeat_penalty=5.0))
    assert len(set(varied)) > len(set(plain))


# The KV cache


@pytest.mark.parametrize("common", [1, 40, 63, 64, 65])
def test_a_new_prompt_keeps_exactly_the_common_prefix(
    common: int, engine: Engine, ids: list[int], opened: Callable[..., Engine]
) -> None:
    other = [*ids[:common], *([ids[common] + 1] * 20)]
    steps: list[tuple[int, int, int]] = []
    fresh(engine, ids)
    assert engine.read(other, lambda *step: steps.append(step)) == common
    assert steps[0] == (common, len(other), common)
    assert steps[-1] == (len(other), len(other), common)
    assert engine.context_used == len(other)
    np.testing.assert_allclose(engine.logits(), fresh(opened(), other), atol=TOLERANCE)


def test_a_longer_conversation_reads_only_what_is_new(engine: Engine, ids: list[int]) -> None:
    expected = fresh(engine, ids)
    fresh(engine, ids[:50])
    assert engine.read(ids, ignore) == 50
    np.testing.assert_allclose(engine.logits(), expected, atol=TOLERANCE)


def test_the_same_prompt_again_reads_its_last_token(engine: Engine, ids: list[int]) -> None:
    expected = fresh(engine, ids)
    assert engine.read(ids, ignore) == len(ids) - 1
    np.testing.assert_allclose(engine.logits(), expected, atol=TOLERANCE)
    assert engine.read(ids[:10], ignore) == 9
    assert engine.context_used == 10


def test_an_answer_is_kept_for_the_next_turn(engine: Engine, ids: list[int]) -> None:
    drawn = answer(engine, ids, 5, Sampling(temperature=0.0))
    assert engine.read([*ids, *drawn, 400], ignore) == len(ids) + 5


def test_progress_is_told_in_whole_ubatches(engine: Engine, ids: list[int]) -> None:
    steps: list[tuple[int, int, int]] = []
    engine.read([400], ignore)
    engine.read(ids, lambda *step: steps.append(step))
    n = len(ids)
    assert {step[1:] for step in steps} == {(n, 0)}
    reads = np.diff([done for done, _, _ in steps])
    assert steps[0][0] == 0
    assert steps[-1][0] == n
    assert all(read in (32, 64) for read in reads[:-1]), reads
    assert 0 < reads[-1] <= 64


def test_an_abort_keeps_what_was_read_and_going_on_gives_the_same(
    opened: Callable[..., Engine], ids: list[int], engine: Engine
) -> None:
    stopped = opened(n_batch=32)
    with pytest.raises(AbortedError):
        stopped.read(ids, lambda done, *_: stopped.abort(done >= 64))
    assert stopped.context_used == 64
    with pytest.raises(AbortedError):
        stopped.read(ids, ignore)
    stopped.abort(False)
    assert stopped.read(ids, ignore) == 64
    np.testing.assert_allclose(stopped.logits(), fresh(engine, ids), atol=TOLERANCE)


def test_an_abort_within_a_batch_keeps_the_positions_it_computed(opened: Callable[..., Engine]) -> None:
    """From another thread, at a time of chance: tried until it falls between two of the batch's ubatches."""
    stopped, unhurried = opened(n_ctx=2048, n_batch=2048), opened(n_ctx=2048, n_batch=2048)
    ids = stopped.vocabulary.tokenize(PROSE, bos=True)[:2000]
    n_read = 0
    for attempt in range(100):
        stopped.abort(False)
        stopped.read([400], ignore)
        timer = threading.Timer(0.01 * attempt, stopped.abort)
        timer.start()
        with contextlib.suppress(AbortedError):
            stopped.read(ids, ignore)
        timer.cancel()
        timer.join()
        n_read = stopped.context_used
        if 0 < n_read < len(ids):
            break
    assert 0 < n_read < len(ids)
    stopped.abort(False)
    assert stopped.read(ids[: n_read + 40], ignore) == n_read
    np.testing.assert_allclose(stopped.logits(), fresh(unhurried, ids[: n_read + 40]), atol=TOLERANCE)


def test_an_abort_before_the_next_token_keeps_the_answer(opened: Callable[..., Engine], ids: list[int]) -> None:
    stopped = opened()
    drawn = answer(stopped, ids, 3, Sampling(temperature=0.0))
    token = stopped.next()
    stopped.abort()
    with pytest.raises(AbortedError):
        stopped.extend(token)
    assert stopped.context_used == len(ids) + 3
    stopped.abort(False)
    assert stopped.read([*ids, *drawn, token], ignore) == len(ids) + 3


def test_the_context_can_be_filled_to_the_last_position(opened: Callable[..., Engine], ids: list[int]) -> None:
    small = opened(n_ctx=32)
    small.read(ids[:31], ignore)
    assert small.has_room()
    small.extend(ids[31])
    assert not small.has_room()
    assert small.context_used == 32
    assert np.isfinite(small.logits()).all()


def test_a_prompt_without_room_for_an_answer_is_refused_with_both_numbers(
    opened: Callable[..., Engine], ids: list[int]
) -> None:
    small = opened(n_ctx=32)
    with pytest.raises(EngineError) as error:
        small.read(ids[:32], ignore)
    assert str(error.value) == (
        "the conversation has 32 tokens and the context holds 32; start a new conversation or raise --context"
    )
    with pytest.raises(EngineError, match="the prompt is empty"):
        small.read([], ignore)
    assert small.read(ids[:31], ignore) == 0
