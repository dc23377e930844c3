"""Several conversations in one KV cache: what is kept, what goes first, and that it is never another's."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.drafting import Costs
from runtime.engine import Engine
from runtime.events import EngineSettings
from runtime.kv_cache import MOST_TURNS, WORTH_KEEPING
from runtime.kv_store import n_common
from runtime.native_context import AbortedError
from runtime.sampling import Sampling

SETTINGS = EngineSettings(n_ctx=512, n_batch=64, n_ubatch=32, n_threads=1, n_branches=3)
TOLERANCE = 0.15  # as in tests/test_engine.py, and guesses in batches
GREEDY = Sampling(temperature=0.0)


def ignore(*_: int) -> None:
    """Progress that nobody watches."""


def text(seed: int, n: int) -> list[int]:
    chance = random.Random(seed)
    return [1, *(chance.randrange(300, 4000) for _ in range(n - 1))]


def answer(engine: Engine, n: int) -> list[int]:
    engine.start_sampling(GREEDY)
    drawn = []
    for _ in range(n):
        drawn.append(engine.next())
        engine.extend(drawn[-1])
    return drawn


@pytest.fixture
def opened(demo: Path) -> Iterator[Callable[..., Engine]]:
    """Opens engines on the demo with some settings, and closes them."""
    engines: list[Engine] = []

    def open_engine(**settings: object) -> Engine:
        engines.append(Engine(demo, replace(SETTINGS, **settings)))  # type: ignore[arg-type]
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


def assert_as_fresh(engine: Engine, fresh: Engine, ids: list[int]) -> None:
    """The logits after `ids` are those of an engine that holds nothing else."""
    fresh.read([ids[0] + 1, 300], ignore)
    assert fresh.read(ids, ignore) == 0
    np.testing.assert_allclose(engine.logits(), fresh.logits(), atol=TOLERANCE)


def test_back_to_a_branch_all_of_it_is_there(opened: Callable[..., Engine]) -> None:
    engine, fresh = opened(), opened(n_branches=1)
    shared = text(1, 100)
    a, b = [*shared, *text(2, 60)[1:]], [*shared, *text(3, 70)[1:]]
    assert engine.read(a, ignore) == 0
    a += answer(engine, 20)
    assert engine.read(b, ignore) == 100
    assert_as_fresh(engine, fresh, b)
    assert engine.read([*a, 400], ignore) == len(a)
    assert_as_fresh(engine, fresh, [*a, 400])
    assert engine.context_used == len(a) + 1
    assert engine.read([*b, 500], ignore) == len(b)
    assert_as_fresh(engine, fresh, [*b, 500])


def test_branches_share_the_cells_of_their_prefix(opened: Callable[..., Engine]) -> None:
    """Three of 400 tokens, 350 of them the same, in 512 cells."""
    engine = opened()
    shared = text(1, 350)
    branches = [[*shared, *text(i, 51)[1:]] for i in (2, 3, 4)]
    for ids in branches:
        engine.read(ids, ignore)
    for ids in branches:
        assert engine.read([*ids, 400], ignore) == len(ids)


def test_what_was_used_longest_ago_goes_first(opened: Callable[..., Engine]) -> None:
    engine = opened()
    a, b, c, d = (text(i, 60) for i in (1, 2, 3, 4))
    for ids in (a, b, c, a, d):  # b is the oldest of three when d comes
        engine.read(ids, ignore)
    for ids in (a, c, d):
        assert engine.read([*ids, 400], ignore) == len(ids)
    assert engine.read(b, ignore) == 1  # the first token is everybody's


def test_the_conversation_in_hand_gets_all_cells(opened: Callable[..., Engine]) -> None:
    engine, fresh = opened(), opened(n_branches=1)
    a, b, long = text(1, 200), text(2, 200), text(3, 500)
    for ids in (a, b, long):
        engine.read(ids, ignore)
    assert_as_fresh(engine, fresh, long)
    long += answer(engine, 12)
    assert not engine.has_room()
    assert engine.read([*long[:505], 400], ignore) == 505
    assert_as_fresh(engine, fresh, [*long[:505], 400])
    assert engine.read(b, ignore) == 1
    assert_as_fresh(engine, fresh, b)


def test_a_growing_answer_drops_only_as_much_as_it_needs(opened: Callable[..., Engine]) -> None:
    engine = opened()
    a, b, c = text(1, 150), text(2, 150), text(3, 200)
    for ids in (a, b, c):
        engine.read(ids, ignore)
    c += answer(engine, 60)  # 510 cells, and then a's are needed
    assert engine.read([*b, 400], ignore) == len(b)
    assert engine.read([*c, 400], ignore) == len(c)
    assert engine.read(a, ignore) == 1


def test_nobody_comes_back_to_what_was_left_long_ago(opened: Callable[..., Engine]) -> None:
    engine = opened()
    a, b = text(1, 60), text(2, 60)
    for ids in (a, b):
        for _ in range(MOST_TURNS):
            engine.read(ids, ignore)
    assert engine.read([*a, 400], ignore) == len(a)
    for _ in range(MOST_TURNS + 1):
        engine.read([*a, 400], ignore)
    assert engine.read(b, ignore) == 1


def test_a_few_tokens_are_not_worth_a_branch(opened: Callable[..., Engine]) -> None:
    engine = opened()
    a = text(1, 60 + WORTH_KEEPING)
    engine.read(a, ignore)
    engine.read([*a[:60], *text(2, 60)], ignore)
    assert engine.read(a, ignore) == 60
    engine.read([*a[: 59 - 1], *text(3, 60)], ignore)
    assert engine.read([*a, 400], ignore) == len(a)


def test_after_a_decode_that_failed_what_it_left_is_dropped(opened: Callable[..., Engine]) -> None:
    engine, fresh = opened(), opened(n_branches=1)
    a, b = text(1, 80), text(2, 80)
    engine.read(a, ignore)
    engine.read(b, ignore)
    two = np.array([400, 401], np.int32)  # positions that the engine does not know of, in the branch in hand
    sequences = np.full(2, engine._cache._here.sequence, np.int32)
    engine._context.decode(two, np.array([80, 81], np.int32), sequences, np.ones(2, np.int8))
    assert engine.read([*b, 500], ignore) == 80
    assert_as_fresh(engine, fresh, [*b, 500])
    assert engine.read([*a, 500], ignore) == 80


@pytest.mark.parametrize("drafts", [False, True])
def test_whatever_happens_the_logits_are_those_of_a_fresh_cache(
    drafts: bool, opened: Callable[..., Engine], demo_levels: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns of five conversations at random, that go on, branch off, are aborted or filled to the end."""
    monkeypatch.setattr(Costs, "ratio", lambda *_: 1.0)
    monkeypatch.setattr(Costs, "most", lambda *_: 16)
    engine = opened(
        drafts="always" if drafts else "off", draft_model=demo_levels["Q2_K"] if drafts else None, kept_kv_bytes=1 << 26
    )
    fresh = opened(n_branches=1)
    chance = random.Random(7)
    conversations = [text(i, chance.randrange(20, 200)) for i in range(5)]
    last: list[int] = []
    n_reused = 0
    for turn in range(30):
        i = chance.randrange(5)
        ids = conversations[i]
        if chance.random() < 0.3:
            ids = [*ids[: chance.randrange(1, len(ids))], *text(100 + turn, chance.randrange(2, 60))]
        ids = ids[:500]
        if chance.random() < 0.2:
            stop_at = chance.randrange(len(ids))
            with contextlib.suppress(AbortedError):
                engine.read(ids, lambda done, *_, at=stop_at: engine.abort(done >= at))
            engine.abort(False)
        reused = engine.read(ids, ignore)
        assert reused >= n_common(last, ids[:-1])
        n_reused += reused
        assert_as_fresh(engine, fresh, ids)
        drawn = answer(engine, min(chance.randrange(1, 30), 512 - len(ids)))
        last = conversations[i] = [*ids, *drawn]
        assert engine.context_used == len(last)
        engine.keep()
    assert n_reused > 1000
