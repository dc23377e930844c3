"""The engine's process: commands and events, stops that come early, an ordinary end. Deaths: test_engine_deaths.py."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import WorkerDiedError
from runtime.events import EngineSettings, Event, Failed, Finished, Load, Loaded, Reply, Sampling, Stop
from runtime.messages import Message
from runtime.worker import Worker
from tests.checkpoints import DEMO

LONG = Message("user", (DEMO.parent / "eval" / "prose.txt").read_text(encoding="utf-8")[:6000])
GREEDY = Sampling(temperature=0.0)


def load(path: Path, **settings: object) -> Load:
    engine = EngineSettings(n_ctx=2048, n_batch=256, n_threads=1, **settings)  # type: ignore[arg-type]
    return Load(path, engine, "mistral-v3", DEMO / "tokenizer.model")


def events(worker: Worker) -> Iterator[Event]:
    """Events up to the last of a command."""
    while True:
        event = worker.receive()
        yield event
        if isinstance(event, Loaded | Finished | Failed):
            return


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def loaded(worker: Worker, demo: Path) -> Worker:
    """A worker that holds the demo."""
    worker.send(load(demo))
    *_, last = events(worker)
    assert isinstance(last, Loaded), last
    return worker


def test_a_reply_without_a_model_fails_and_the_process_lives(worker: Worker) -> None:
    worker.send(Reply((Message("user", "Hi"),)))
    assert worker.receive() == Failed("no model is loaded")
    assert worker.is_alive()


def test_a_failed_load_leaves_a_process_that_can_load(worker: Worker, demo: Path, tmp_path: Path) -> None:
    worker.send(load(tmp_path / "no.gguf"))
    assert worker.receive() == Failed(f"{tmp_path}/no.gguf: no such file; `bise models` lists what is on disk")
    worker.send(load(demo))
    assert isinstance(list(events(worker))[-1], Loaded)


def test_a_second_model_takes_the_place_of_the_first(loaded: Worker, demo_levels: dict[str, Path]) -> None:
    loaded.send(load(demo_levels["Q8_0"]))
    last = list(events(loaded))[-1]
    assert isinstance(last, Loaded)
    assert "Q8_0" in last.description
    loaded.send(Reply((Message("user", "Define a horse."),), Sampling(max_tokens=3)))
    assert isinstance(list(events(loaded))[-1], Finished)


def test_a_stop_right_behind_a_reply_reaches_it(loaded: Worker) -> None:
    for attempt in range(20):
        loaded.send(Reply((LONG, Message("user", f"Attempt {attempt}.")), GREEDY))
        loaded.send(Stop())
        last = list(events(loaded))[-1]
        assert isinstance(last, Finished)
        assert last.reason == "stopped"
        assert last.context_used < last.prompt_tokens


def test_a_stop_right_behind_a_load_cancels_it(worker: Worker, demo: Path) -> None:
    worker.send(load(demo))
    worker.send(Stop())
    assert list(events(worker))[-1] == Failed("loading was cancelled")


def test_a_stop_that_finds_nothing_to_stop_does_not_stop_the_next_reply(loaded: Worker) -> None:
    loaded.send(Stop())
    loaded.send(Reply((Message("user", "Define a horse."),), Sampling(max_tokens=2)))
    last = list(events(loaded))[-1]
    assert isinstance(last, Finished)
    assert last.answer_tokens > 0


def test_a_stop_that_finds_nothing_to_stop_does_not_cancel_the_next_load(loaded: Worker, demo: Path) -> None:
    loaded.send(Stop())
    loaded.send(load(demo))
    assert isinstance(list(events(loaded))[-1], Loaded)


def test_a_bug_is_told_with_the_end_of_its_traceback(loaded: Worker) -> None:
    loaded.send("not a command")  # type: ignore[arg-type]
    with pytest.raises(WorkerDiedError, match="ended with exit code 1: AttributeError: 'str' object has no attribute"):
        loaded.receive()


def test_an_interrupt_while_waiting_leaves_the_process_as_it_was(loaded: Worker) -> None:
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        loaded.receive()
    timer.join()
    loaded.send(Reply((Message("user", "Define a horse."),), Sampling(temperature=0)))
    assert isinstance(list(events(loaded))[-1], Finished)


def test_closing_wakes_who_waits(worker: Worker) -> None:
    errors: list[WorkerDiedError] = []

    def wait() -> None:
        try:
            worker.receive()
        except WorkerDiedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    worker.close()
    thread.join()
    assert [str(error) for error in errors] == ["the engine was closed"]
    worker.close()


def test_a_process_that_does_not_listen_is_ended_by_force(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    worker.send(Reply((Message("user", "long" * 1_000_000),)))  # more than the socket holds: must not block
    worker.close()
    assert not worker.is_alive()


def test_a_folder_called_runtime_where_the_user_works_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").write_text("raise SystemExit('the wrong runtime')")
    monkeypatch.chdir(tmp_path)
    worker = Worker()
    try:
        worker.send(Reply(()))
        assert isinstance(worker.receive(), Failed)
    finally:
        worker.close()


def test_the_process_writes_nothing_to_the_terminal(demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worker = Worker()
    worker.send(load(demo))
    list(events(worker))
    worker.close()
    assert capfd.readouterr() == ("", "")
