"""Several conversations in turn: what is kept, what goes first, and that the KV cache is never another's."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import kv_cache
from runtime.drafting import Costs
from runtime.engine import Engine
from runtime.events import EngineSettings
from runtime.kv_cache import WORTH_KEEPING
from runtime.kv_store import n_common
from runtime.native_context import ASIDE, HAND, AbortedError, Context
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


@pytest.mark.parametrize("n_shared", [1, 30, 350])
def test_branches_take_no_cells_of_the_one_in_hand(n_shared: int, opened: Callable[..., Engine]) -> None:
    """Three of 400 tokens in 512 cells."""
    engine, fresh = opened(), opened(n_branches=1)
    shared = text(1, n_shared)
    branches = [[*shared, *text(i, 401 - n_shared)[1:]] for i in (2, 3, 4)]
    for ids in branches:
        engine.read(ids, ignore)
    for ids in branches:
        assert engine.read([*ids, 400], ignore) == len(ids)
        assert_as_fresh(engine, fresh, [*ids, 400])
        assert engine._context.length(HAND) == len(ids) + 1
        assert engine._context.length(ASIDE) == 0
        assert engine._context.state_bytes(HAND) == fresh._context.state_bytes(HAND)


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
    assert engine.read([*b, 400], ignore) == len(b)
    assert_as_fresh(engine, fresh, [*b, 400])


def test_what_is_wanted_in_part_stays_whole(opened: Callable[..., Engine]) -> None:
    engine, fresh = opened(), opened(n_branches=1)
    a, b = text(1, 200), text(2, 60)
    for ids in (a, b):
        engine.read(ids, ignore)
    other = [*a[:120], *text(3, 60)]
    assert engine.read(other, ignore) == 120
    assert engine.read([*a, 400], ignore) == len(a)
    assert_as_fresh(engine, fresh, [*a, 400])
    assert engine.read([*other, 400], ignore) == len(other)
    assert_as_fresh(engine, fresh, [*other, 400])


def test_a_branch_comes_back_with_what_it_parted_from(opened: Callable[..., Engine]) -> None:
    """The end of `first` was copied alone, its beginning with `second`."""
    engine, fresh = opened(), opened(n_branches=1)
    shared = text(1, 200)
    first, second = [*shared, *text(2, 60)], [*shared, *text(3, 60)]
    for ids in (first, second, text(4, 60)):
        engine.read(ids, ignore)
    assert engine.read([*first, 400], ignore) == len(first)
    assert_as_fresh(engine, fresh, [*first, 400])


def test_a_branch_of_which_little_stays_is_copied_whole(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, fresh = opened(), opened(n_branches=1)
    shared = text(1, 100)
    a, b = [*shared, *text(2, 201)[1:]], [*shared, *text(3, 60)]
    for ids in (a, b):
        engine.read(ids, ignore)
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "host_memory", lambda: (0, 1 << 40))
        engine.read(text(4, 60), ignore)  # b, with the beginning that they share, is gone
    assert engine.read([*a, 400], ignore) == len(a)
    assert_as_fresh(engine, fresh, [*a, 400])


def test_what_the_host_has_no_room_for_is_read_again(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened()
    a, b = text(1, 100), text(2, 100)
    monkeypatch.setattr(kv_cache, "host_memory", lambda: (200_000, 1 << 40))  # 2,048 bytes a token
    for ids in (a, b):
        engine.read(ids, ignore)
    assert engine.read(a, ignore) == 1
    monkeypatch.setattr(kv_cache, "host_memory", lambda: (4_000_000, 1 << 40))
    engine.read(b, ignore)
    assert engine.read([*a, 400], ignore) == len(a)


def test_what_takes_too_long_to_copy_is_read_again(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 tokens are copied to know how long it takes, and no more."""
    engine = opened()
    a, b = text(1, 400), text(2, 100)
    copied: list[int] = []
    copy_out = Context.copy_out

    def slow(context: Context, start: int) -> NDArray[np.uint8] | None:
        copied.append(context.length(HAND) - start)
        time.sleep(0.02)
        return copy_out(context, start)

    monkeypatch.setattr(Context, "copy_out", slow)
    monkeypatch.setattr(kv_cache, "_MOST_SECONDS", 0.05)
    for ids in (a, b):
        engine.read(ids, ignore)
    assert copied == [64]
    assert engine.read(a, ignore) == 1
    monkeypatch.setattr(Context, "copy_out", copy_out)  # what was slow once is tried again
    engine.read(b, ignore)
    assert engine.read([*a, 400], ignore) == len(a)


@pytest.mark.parametrize("way", ["copy_out", "copy_in"])
def test_what_cannot_be_copied_is_read_again(
    way: str, opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, fresh = opened(), opened(n_branches=1)
    a, b = text(1, 100), text(2, 100)
    monkeypatch.setattr(Context, way, lambda *_: None)
    for ids in (a, b):
        engine.read(ids, ignore)
    assert engine.read(a, ignore) <= 1
    assert_as_fresh(engine, fresh, a)
    monkeypatch.undo()
    engine.read(b, ignore)
    assert engine.read([*a, 400], ignore) == len(a)
    assert_as_fresh(engine, fresh, [*a, 400])


def test_a_few_tokens_are_not_worth_a_branch(opened: Callable[..., Engine]) -> None:
    engine = opened()
    a = text(1, 60 + WORTH_KEEPING)
    engine.read(a, ignore)
    engine.read([*a[:60], *text(2, 60)], ignore)
    assert engine.read(a, ignore) == 60
    engine.read([*a[: 59 - 1], *text(3, 60)], ignore)
    assert engine.read([*a, 400], ignore) == len(a)


@pytest.mark.parametrize("leaves", [False, True])
def test_after_a_decode_that_failed_what_it_left_is_dropped(leaves: bool, opened: Callable[..., Engine]) -> None:
    engine, fresh = opened(), opened(n_branches=1)
    a, b = text(1, 80), text(2, 80)
    engine.read(a, ignore)
    engine.read(b, ignore)
    two = np.array([400, 401], np.int32)  # positions that the engine does not know of, in the branch in hand
    sequences = np.full(2, HAND, np.int32)
    engine._context.decode(two, np.array([80, 81], np.int32), sequences, np.ones(2, np.int8))
    if leaves:
        assert engine.read([*a, 500], ignore) == 80
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
