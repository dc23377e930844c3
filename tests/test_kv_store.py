"""KV caches on the disk: the same logits as if everything had been read again, within a quota, whatever lies there."""

import os
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.engine import Engine
from runtime.errors import EngineError, WorkerDiedError
from runtime.events import EngineSettings, Finished, Load, Piece, PromptProgress, ReplyEvent
from runtime.kv_store import KvStore, fingerprint, n_common
from runtime.library import kv_folder
from runtime.messages import Message
from runtime.sampling import Sampling
from runtime.session import Session
from tests.checkpoints import DEMO

SETTINGS = EngineSettings(n_ctx=512, n_batch=128, n_ubatch=64, n_threads=1, kept_kv_bytes=1 << 30)
PROSE = (DEMO.parent / "eval" / "prose.txt").read_text(encoding="utf-8")


def ignore(*_: int) -> None:
    """Progress that nobody watches."""


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


def prose_ids(engine: Engine, n: int) -> list[int]:
    return engine.vocabulary.tokenize(PROSE[:4000], bos=True)[:n]


def kept() -> list[Path]:
    return sorted(kv_folder().iterdir())


# In an engine


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_kept_cache_gives_the_very_logits(kv_type: str, opened: Callable[..., Engine]) -> None:
    first, second = opened(kv_type=kv_type), opened(kv_type=kv_type)
    ids = prose_ids(first, 300)
    first.read(ids, ignore)
    first.keep()
    assert first.read(ids, ignore) == 299
    steps: list[tuple[int, int, int]] = []
    assert second.read(ids, lambda *step: steps.append(step)) == 299
    assert steps[0] == (299, 300, 299)
    np.testing.assert_array_equal(second.logits(), first.logits())
    assert second.context_used == 300


def test_of_a_kept_cache_the_common_prefix_is_taken(opened: Callable[..., Engine]) -> None:
    first, second, fresh = opened(), opened(), opened(kept_kv_bytes=0)
    ids = prose_ids(first, 300)
    other = [*ids[:128], *([400] * 60)]
    first.read(ids, ignore)
    first.keep()
    assert second.read(other, ignore) == 128
    assert fresh.read(other, ignore) == 0
    np.testing.assert_array_equal(second.logits(), fresh.logits())  # 128 is where two batches meet, so all is the same


def test_conversations_in_turn_each_find_their_cache(opened: Callable[..., Engine]) -> None:
    engine = opened()
    ids = prose_ids(engine, 300)
    one, two = ids[:200], [ids[0], *ids[100:]]
    for conversation in (one, two):
        engine.read(conversation, ignore)
        engine.keep()
    assert len(kept()) == 2
    assert engine.read(one, ignore) == len(one) - 1
    assert engine.read(two, ignore) == len(two) - 1
    engine.read(ids[:150], ignore)
    engine.keep()
    assert len(kept()) == 2, "a prefix of a kept one needs no file"
    longer = [*one, *([400] * 80)]
    engine.read(longer, ignore)
    engine.keep()
    assert len(kept()) == 2, "a longer one takes the place of its beginning"
    assert all(path.stat().st_mode & 0o077 == 0 for path in [kv_folder(), *kept()])


def test_what_differs_in_the_model_or_the_cache_is_not_taken(
    opened: Callable[..., Engine], demo: Path, demo_levels: dict[str, Path], tmp_path: Path
) -> None:
    engine = opened()
    ids = prose_ids(engine, 200)
    engine.read(ids, ignore)
    engine.keep()
    assert opened(kv_type="q8_0").read(ids, ignore) == 0
    copy = tmp_path / "copy.gguf"
    data = bytearray(demo.read_bytes())
    copy.write_bytes(data)
    assert fingerprint(copy, "f16") == fingerprint(demo, "f16"), "a copy is the same model"
    data[1 << 23] ^= 1
    copy.write_bytes(data)
    names = {fingerprint(path, kv) for path in (demo, copy, demo_levels["Q8_0"]) for kv in ("f16", "q8_0")}
    assert len(names) == 6


def test_a_context_too_small_for_a_kept_cache_leaves_it_alone(opened: Callable[..., Engine]) -> None:
    engine = opened()
    ids = prose_ids(engine, 300)
    engine.read(ids, ignore)
    engine.keep()
    assert opened(n_ctx=256).read(ids[:200], ignore) == 0
    assert len(kept()) == 1


@pytest.mark.parametrize("damage", ["cut", "grown", "header", "other", "ids"])
def test_a_damaged_file_is_not_believed(damage: str, opened: Callable[..., Engine]) -> None:
    engine, other = opened(), opened()
    ids = prose_ids(engine, 300)
    engine.read(ids, ignore)
    engine.keep()
    (path,) = kept()
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "grown":
            path.write_bytes(data[:8] + (10**9).to_bytes(4, "little") + data[12:])
        case "header":
            path.write_bytes(bytes(12) + data[12:])
        case "other":
            path.write_bytes(b"not a cache")
        case "ids":  # one more id than positions
            path.write_bytes(data[:8] + (301).to_bytes(4, "little") + data[12:1212] + bytes(4) + data[1212:])
    assert other.read(ids, ignore) == 0
    assert kept() == ([] if damage in ("cut", "ids") else [path]), "it is removed where it was taken for a cache"
    engine.read(ids, ignore)
    np.testing.assert_allclose(other.logits(), engine.logits(), atol=0.1)


def test_a_folder_that_cannot_be_made_is_told(opened: Callable[..., Engine]) -> None:
    kv_folder().parent.mkdir(parents=True, exist_ok=True)
    kv_folder().touch()
    with pytest.raises(EngineError, match=r"KV caches cannot be kept there .*; leave out --keep-kv"):
        opened()


# The files


def store(folder: Path, quota: int = 1000) -> KvStore:
    return KvStore(folder, "model", quota)


def put(store: KvStore, ids: list[int], n_bytes: int = 300) -> bool:
    """Keep ids in a file that looks like llama.cpp's."""
    header = b"".join(n.to_bytes(4, "little") for n in (0x67677371, 3, len(ids)))
    data = header + np.asarray(ids, np.int32).tobytes()
    return store.keep(ids, n_bytes, lambda path: path.write_bytes(data.ljust(n_bytes, b"x")) > 0)


def test_files_not_used_for_longest_make_room(tmp_path: Path) -> None:
    files = store(tmp_path, 2000)
    for start in (0, 1000, 2000):
        assert put(files, list(range(start, start + 100)), 600)
    for path in tmp_path.iterdir():
        os.utime(path, (1000, 1000))
    used = files.best(list(range(1000, 1100)))
    assert used is not None
    assert files.read(used.path, lambda _: [1]) == [1]
    assert put(files, list(range(3000, 3100)), 600)
    assert put(files, list(range(4000, 4100)), 600)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000
    assert [files.best([start]) is not None for start in (0, 1000, 2000, 3000, 4000)] == [
        False,
        True,
        False,
        True,
        True,
    ]


def test_what_is_not_worth_a_file_or_too_large_is_not_kept(tmp_path: Path) -> None:
    files = store(tmp_path)
    assert not put(files, list(range(63)))
    assert not put(files, list(range(100)), 1001)
    assert put(files, list(range(100)), 500)
    assert not put(files, list(range(150)), 700), "not so much longer"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_nothing_and_loses_nothing(tmp_path: Path) -> None:
    files = store(tmp_path)
    put(files, list(range(100)), 500)

    def fails(path: Path) -> bool:
        path.write_bytes(b"half")
        return False

    def breaks(path: Path) -> bool:
        raise OSError

    for write in (fails, breaks):
        assert not files.keep(list(range(200)), 900, write)
        found = files.best(list(range(200)))
        assert found is not None
        assert found.n_common == 100
        assert [path.suffix for path in tmp_path.iterdir()] == [".kv"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    dead, alive = tmp_path / f"a.{2**22 + 1}.part", tmp_path / f"b.{os.getpid()}.part"
    dead.touch()
    alive.touch()
    store(tmp_path)
    assert list(tmp_path.iterdir()) == [alive]


@pytest.mark.parametrize(
    ("a", "b", "n"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([2], [1], 0)]
)
def test_n_common(a: list[int], b: list[int], n: int) -> None:
    assert n_common(a, b) == n_common(b, a) == n


# In a session


def test_a_file_that_ends_the_engine_does_not_end_the_next(demo: Path) -> None:
    """llama.cpp gives up on a state that it cannot read, here one that was cut and has a fitting checksum."""
    settings = replace(SETTINGS, n_ctx=1024)
    session = Session(Load(demo, settings, "mistral-v3", DEMO / "tokenizer.model"))
    list(session.load())
    talk = [Message("user", PROSE[:1000])]
    once = Sampling(temperature=0.0, max_tokens=1)
    list(session.reply(talk, once))
    list(session.reply([Message("user", "Define a horse.")], once))  # drops the first from the cache, not the disk
    (path,) = kept()
    data = path.read_bytes()[: path.stat().st_size // 2]
    stem = path.stem.rpartition("-")[0]
    path.unlink()
    (kv_folder() / f"{stem}-{zlib.crc32(data):08x}.kv").write_bytes(data)
    with pytest.raises(WorkerDiedError, match="SIGABRT"):
        list(session.reply(talk, once))
    list(session.load())
    end = list(session.reply(talk, once))[-1]
    session.close()
    assert isinstance(end, Finished)
    assert end.reused_tokens == 0
    assert [found.suffix for found in kept()] == [".kv"]


def test_a_conversation_goes_on_after_a_crash_without_being_read_again(demo: Path) -> None:
    settings = EngineSettings(n_ctx=2048, n_batch=256, n_threads=1, kept_kv_bytes=1 << 30)
    session = Session(Load(demo, settings, "mistral-v3", DEMO / "tokenizer.model"))
    list(session.load())
    talk = [Message("user", PROSE[:3000])]
    before: list[ReplyEvent] = list(session.reply(talk, Sampling(temperature=0.0, max_tokens=30)))
    answer = "".join(event.text for event in before if isinstance(event, Piece))
    talk += [Message("assistant", answer), Message("user", "Define a horse.")]
    ready = iter(session.reply(talk, Sampling(temperature=0.0)))  # so that the first has been kept
    expected = next(ready)
    ready.close()  # type: ignore[attr-defined]
    assert session._worker is not None
    os.kill(session._worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        list(session.reply(talk, Sampling(temperature=0.0)))
    list(session.load())
    after = list(session.reply(talk, Sampling(temperature=0.0, max_tokens=5)))
    end = after[-1]
    session.close()
    assert isinstance(expected, PromptProgress)
    assert isinstance(end, Finished)
    assert end.reused_tokens == expected.reused
    assert end.reused_tokens > end.prompt_tokens / 2
