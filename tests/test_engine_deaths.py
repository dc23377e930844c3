"""Every way the engine's process can die, hang or be left alone, for real, and what is said of it."""

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from runtime.engine_log import EngineLog, NativeLines
from runtime.errors import EngineError, WorkerDiedError
from runtime.events import (
    EngineSettings,
    Failed,
    Finished,
    Load,
    Loaded,
    LoadProgress,
    Notice,
    Piece,
    PromptProgress,
    Reply,
    ReplyEvent,
    Sampling,
    Silent,
)
from runtime.memory_watch import resident_bytes
from runtime.messages import Message
from runtime.obituary import Death, last_words, obituary
from runtime.session import Session
from runtime.worker import Worker
from tests.broken_llama import broken
from tests.checkpoints import DEMO
from tests.control_groups import control_group

GREEDY = Sampling(temperature=0.0)
HORSE = Message("user", "Define a horse.")
PROSE = (DEMO.parent / "eval" / "prose.txt").read_text(encoding="utf-8")
RAMBLE = ([HORSE, Message("assistant", PROSE[:100])], Sampling(temperature=2.0, seed=3))
"""What the demo answers with hundreds of words of nonsense."""


def demo_load(path: Path, n_ctx: int = 2048) -> Load:
    settings = EngineSettings(n_ctx=n_ctx, n_batch=256, n_threads=1)
    return Load(path, settings, "mistral-v3", DEMO / "tokenizer.model")


@pytest.fixture
def opened(demo: Path) -> Iterator[Callable[..., Session]]:
    """Makes sessions with the demo, loads and closes them."""
    sessions: list[Session] = []

    def open_session(start: Callable[[], Worker] = Worker, path: Path = demo) -> Session:
        sessions.append(Session(demo_load(path), start))
        list(sessions[-1].load())
        return sessions[-1]

    yield open_session
    for each in sessions:
        each.close()


def worker_of(session: Session) -> Worker:
    assert session._worker is not None
    return session._worker


def ask(session: Session, *messages: Message) -> list[ReplyEvent]:
    return list(session.reply(messages or [HORSE], GREEDY))


def text_of(events: Sequence[ReplyEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def died_of(session: Session) -> str:
    """What is said of an engine that is dead."""
    with pytest.raises(WorkerDiedError) as error:
        ask(session)
    assert "\n" not in str(error.value)
    return str(error.value)


def wait_until(met: Callable[[], bool]) -> None:
    """Wait until `met`; for a minute, which no test needs."""
    for _ in range(6000):
        if met():
            return
        time.sleep(0.01)
    raise AssertionError("still not so after a minute")


# Ways to die


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        ("SIGKILL", "killed by another program or a user); it can be started again"),
        ("SIGTERM", "asked to end by another program); it can be started again"),
        ("SIGHUP", "asked to end by another program); it can be started again"),
        ("SIGABRT", "llama.cpp gave up); it can be started again, and `bise doctor` tests the engine"),
        ("SIGSEGV", "a fault inside llama.cpp); it can be started again, and `bise doctor` tests the engine"),
        ("SIGFPE", "a fault inside llama.cpp); it can be started again, and `bise doctor` tests the engine"),
        ("SIGBUS", "the model file was cut off, or its disk failed, while it was in use); check the file with `bise"),
        (
            "SIGILL",
            "the wheel holds instructions this processor does not have, or AMX code that GCC 12 miscompiled); `",
        ),
    ],
)
def test_a_death_is_told_with_its_signal_and_a_remedy(number: str, cause: str) -> None:
    worker = Worker()
    os.kill(worker.pid, signal.Signals[number])
    for _ in range(2):  # asked again, it says the same
        with pytest.raises(WorkerDiedError) as error:
            worker.receive()
        assert str(error.value).startswith(f"the engine's process ended by {number} ({cause}")
        assert error.value.signal == signal.Signals[number]
    with pytest.raises(WorkerDiedError, match=number):
        worker.send(Reply(()))
    worker.close()


def test_a_model_file_cut_off_while_it_is_in_use(opened: Callable[..., Session], demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(demo.read_bytes())
    session = opened(path=path)
    os.truncate(path, 4096)
    said = died_of(session)
    assert "ended by SIGBUS (the model file was cut off" in said
    assert "check the file with `bise verify`" in said


def test_running_out_of_memory_in_a_control_group_is_told_from_a_kill(demo: Path) -> None:
    with control_group(300 << 20) as members:
        worker = Worker()
        worker.send(Reply(()))
        worker.receive()
        members.write_text(str(worker.pid))
        worker.send(demo_load(demo, n_ctx=1 << 20))
        with pytest.raises(WorkerDiedError) as error:
            list(iter(worker.receive, None))
        assert str(error.value).startswith(
            "the engine's process ended by SIGKILL (out of memory: the limit of its control group was reached); take a "
            "smaller level, --context or --kv"
        )
        worker.close()


def test_a_load_that_finds_no_memory_gives_back_what_it_took(demo: Path) -> None:
    """By a limit of 512 MiB more than the process has; the KV cache of the second load needs gigabytes."""
    session = Session(demo_load(demo, n_ctx=256), partial(Worker, broken("poor")))
    list(session.load())
    session._load = demo_load(demo, n_ctx=1 << 20)
    held = []
    for _ in range(5):
        with pytest.raises(
            EngineError, match=r"a context of 1048576 tokens with a f16 KV cache does not fit .*--context"
        ):
            list(session.load())
        held.append(resident_bytes(worker_of(session).pid) or 0)
    assert 0 < held[-1] < held[1] + (8 << 20)  # the weights alone are 19 MB
    session._load = demo_load(demo, n_ctx=256)
    list(session.load())
    assert text_of(ask(session))
    session.close()


@pytest.mark.parametrize(
    ("code", "said", "oom", "cause"),
    [
        (
            -6,
            "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n",
            "",
            "memory",
        ),
        (
            1,
            "Traceback:\nnumpy._core._exceptions._ArrayMemoryError: Unable to allocate 4. GiB\nMemoryError\n",
            "",
            "memory",
        ),
        (-6, "llama.cpp E: CUDA error: out of memory\n/a/ggml-cuda.cu:98: CUDA error\n", "", "memory"),
        (1, "\nlibgomp: Thread creation failed: Resource temporarily unavailable\n", "", "memory"),
        (
            -6,
            "/a/ggml-rpc.cpp:547: Failed to connect to 127.0.0.1:5\n",
            "",
            "(an RPC server failed): Failed to connect to",
        ),
        (-9, "", "cgroup", "memory"),
        (-9, "", "machine", "memory"),
        (-9, "", "", "another program"),
        (-9, "", None, "or the machine ran out of memory"),
        (-35, "", "", "ended by signal 35;"),
        (3, "", "", "ended with exit code 3;"),
    ],
)
def test_causes(code: int, said: str, oom: str | None, cause: str) -> None:
    line = obituary(Death(code, said, oom, Path("/a/b.log")))
    assert cause in line
    assert line.endswith(" (log: /a/b.log)")
    assert "\n" not in line
    assert ("take a smaller level" in line) == (cause == "memory")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("", ""),
        ("llama.cpp E: error loading model: no file\n", ""),
        ("Traceback:\nValueError: bad\nllama.cpp I: later\n", "ValueError: bad"),
        ("noise\n/a/ggml.c:7: GGML_ASSERT(a == b) failed\nnoise\n", "GGML_ASSERT(a == b) failed"),
        ("llama.cpp E: unrelated\n/a/ggml-cuda.cu:98: CUDA error\n", "CUDA error"),
        ("llama.cpp I: CUDA error: not one\n/a/ggml-cuda.cu:98: CUDA error\n", "CUDA error"),
        (
            "llama.cpp E: CUDA error: out of memory\nllama.cpp E: current device: 0\n/a/ggml-cuda.cu:98: CUDA error\n",
            "CUDA error: out of memory",
        ),
        ("its words\nFatal Python error: Aborted\n\nThread 0x1:\n  File\n", "its words"),
    ],
)
def test_last_words(said: str, words: str) -> None:
    assert last_words(said) == words


# A wheel that does not suit the processor


@pytest.mark.parametrize("fault", ["sigill", pytest.param("sigsegv", marks=pytest.mark.slow)])
def test_an_engine_that_dies_of_repacked_weights_is_started_once_without(
    fault: str, opened: Callable[..., Session]
) -> None:
    session = opened(partial(Worker, broken(fault)))
    events = ask(session)
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.text == (
        f"the engine's process ended by {fault.upper()} and is started again without weight repacking, which is "
        "slower; if that helps, the wheel does not suit this processor: "
        f"`{sys.executable} -m runtime.wheel` builds one that does"
    )
    assert isinstance(events[-1], Finished)
    assert text_of(events)
    assert not any(isinstance(event, Notice) for event in ask(session)), "said once"
    os.kill(worker_of(session).pid, signal.SIGKILL)
    died_of(session)
    assert isinstance(list(session.load())[-1], Loaded)
    assert not any(isinstance(event, Notice) for event in ask(session)), "what helped is remembered"


@pytest.mark.slow
def test_an_engine_that_dies_while_it_loads_is_started_once_without(demo: Path) -> None:
    session = Session(demo_load(demo), partial(Worker, broken("early")))
    events = list(session.load())
    assert [type(event) for event in events if not isinstance(event, LoadProgress)] == [Notice, Loaded]
    assert text_of(ask(session))
    session.close()


@pytest.mark.slow
def test_a_wheel_with_amx_code_is_run_without_repacking_and_told(demo: Path) -> None:
    session = Session(demo_load(demo), partial(Worker, broken("amx")))
    (notice,) = [event for event in session.load() if isinstance(event, Notice)]
    assert notice.text == (
        "llama-cpp-python holds AMX code, which GCC 12 miscompiles, so the model runs without weight repacking, which "
        f"is slower; `{sys.executable} -m runtime.wheel` builds one without it"
    )
    assert [type(event) for event in ask(session) if isinstance(event, Notice)] == []
    session.close()


@pytest.mark.slow
def test_an_engine_that_dies_either_way_is_started_again_only_once(opened: Callable[..., Session]) -> None:
    session = opened(partial(Worker, broken("hopeless")))
    assert "-m runtime.wheel` puts one built for this machine in its place" in died_of(session)
    assert not worker_of(session).is_alive()


@pytest.mark.slow
def test_a_fault_of_an_engine_that_has_answered_is_not_tried_again(opened: Callable[..., Session]) -> None:
    session = opened()
    ask(session)
    os.kill(worker_of(session).pid, signal.SIGSEGV)
    assert "SIGSEGV" in died_of(session)


# Silence


def test_an_engine_that_hangs_is_told_and_a_stop_ends_it(opened: Callable[..., Session]) -> None:
    session = opened(partial(Worker, broken("hangs"), silent_seconds=1))
    answer = iter(session.reply([HORSE], GREEDY))
    while not isinstance(event := next(answer), Silent):
        pass
    assert event.seconds >= 1
    session.stop()
    with pytest.raises(WorkerDiedError) as error:
        next(answer)
    assert str(error.value) == "the engine's process gave no sign of life and was ended; it can be started again"


@pytest.mark.slow
def test_leaving_an_answer_that_hangs_ends_the_engine(opened: Callable[..., Session]) -> None:
    session = opened(partial(Worker, broken("hangs"), silent_seconds=1))
    answer = session.reply([HORSE], GREEDY)
    next(iter(answer))
    answer.close()  # type: ignore[attr-defined]
    assert not worker_of(session).is_alive()


def test_a_stopped_engine_is_told_and_goes_on_as_if_nothing_had_been(opened: Callable[..., Session]) -> None:
    session = opened(partial(Worker, silent_seconds=1))
    question = (RAMBLE[0], replace(RAMBLE[1], max_tokens=20))
    list(session.reply(*question))
    expected = text_of(list(session.reply(*question)))  # with the prompt read already, as below
    events: list[ReplyEvent] = []
    pid = worker_of(session).pid
    for event in session.reply(*question):
        if isinstance(event, PromptProgress):
            os.kill(pid, signal.SIGSTOP)
        if isinstance(event, Silent):
            os.kill(pid, signal.SIGCONT)
        events.append(event)
    assert any(isinstance(event, Silent) for event in events)
    assert text_of(events) == expected


def test_a_batch_that_takes_long_is_not_silence(opened: Callable[..., Session]) -> None:
    session = opened(partial(Worker, broken("slow"), silent_seconds=2))
    assert not any(isinstance(event, Silent) for event in ask(session))


# Nobody is left behind


def test_an_engine_that_dies_unnoticed_leaves_no_zombie() -> None:
    worker = Worker()
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{worker.pid}").exists())
    worker.close()


def test_the_engine_ends_where_its_handle_is_dropped() -> None:
    """While its owner lives, only the end of the socket tells it."""
    pid = Worker().pid
    gc.collect()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_the_engine_survives_the_thread_that_started_it() -> None:
    """The kernel's death signal comes when a thread ends, not when a process does."""
    workers: list[Worker] = []

    def start() -> None:
        workers.append(Worker())
        workers[0].send(Reply(()))
        workers[0].receive()  # by now it has asked the kernel for the signal

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    workers[0].send(Reply(()))
    assert workers[0].receive() == Failed("no model is loaded")
    workers[0].close()


_OWNER = """
import sys
from pathlib import Path
from runtime.events import *
from runtime.worker import Worker
worker = Worker()
model, tokenizer, state = sys.argv[1:]
print(worker.pid, flush=True)
if state != "starting":
    worker.send(Load(Path(model), EngineSettings(n_ctx=2048, n_threads=1), "mistral-v3", Path(tokenizer)))
    while not isinstance(event := worker.receive(), LoadProgress if state == "loading" else Loaded):
        pass
if state == "answering":
    worker.send(Reply((Message("user", "Define a horse."), Message("assistant", "a")), Sampling(temperature=2, seed=3)))
    while not isinstance(worker.receive(), Piece):
        pass
print("ready", flush=True)
line = sys.stdin.readline()
if line == "leave\\n":
    sys.exit()
while not isinstance(event := worker.receive(), (Finished, Silent)):
    pass
print(type(event).__name__, flush=True)
sys.stdin.readline()
"""


@contextmanager
def owner(demo: Path, state: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A process that has an engine in some state, and the engine's pid."""
    command = [sys.executable, "-P", "-c", _OWNER, str(demo), str(DEMO / "tokenizer.model"), state]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert process.stdout.readline() == "ready\n"
        try:
            yield process, pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    "state",
    [
        "starting",
        pytest.param("loading", marks=pytest.mark.slow),
        pytest.param("idle", marks=pytest.mark.slow),
        "answering",
        "stopped",
    ],
)
def test_the_engine_ends_with_its_owner(state: str, demo: Path) -> None:
    with owner(demo, state) as (process, pid):
        if state == "stopped":  # it cannot hear of it: the kernel has to end it
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait()
        wait_until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.slow
def test_the_engine_ends_with_an_owner_that_forgets_it(demo: Path) -> None:
    with owner(demo, "answering") as (process, pid):
        assert process.stdin is not None
        process.stdin.write("leave\n")
        process.stdin.flush()
        assert process.wait() == 0
        wait_until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.slow
def test_an_owner_that_was_stopped_goes_on(demo: Path) -> None:
    with owner(demo, "answering") as (process, _):
        assert process.stdin is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "Finished\n"


@pytest.mark.slow
def test_a_conversation_survives_a_hundred_deaths(opened: Callable[..., Session]) -> None:
    session = opened()
    expected = text_of(ask(session))
    for number in [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGILL] * 25:
        answer = session.reply(*RAMBLE)
        while not isinstance(next(answer), Piece):
            pass
        os.kill(worker_of(session).pid, number)
        with pytest.raises(WorkerDiedError, match=f"ended by {number.name}"):
            list(answer)
        list(session.load())
        assert text_of(ask(session)) == expected
    assert len(os.listdir("/proc/self/fd")) < 60


@pytest.mark.slow
def test_a_conversation_survives_running_out_of_memory_a_hundred_times(opened: Callable[..., Session]) -> None:
    """By a limit on the process, which llama.cpp hears of from the allocator: no death, and the next load is well."""
    session = opened()
    expected = text_of(ask(session))
    engine, small = worker_of(session), session._load
    for _ in range(100):
        held = int(Path(f"/proc/{engine.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(engine.pid, resource.RLIMIT_AS, (held + (256 << 20), resource.RLIM_INFINITY))
        session._load = replace(small, settings=replace(small.settings, n_ctx=1 << 20))
        with pytest.raises(EngineError, match="does not fit"):
            list(session.load())
        session._load = small
        list(session.load())
        assert text_of(ask(session)) == expected
    assert worker_of(session) is engine, "it lived through all of them"


@pytest.mark.slow
def test_a_conversation_survives_a_hundred_kills_for_memory(opened: Callable[..., Session]) -> None:
    session = opened()
    expected = text_of(ask(session))
    small = session._load
    with control_group(300 << 20) as members:
        for _ in range(100):
            members.write_text(str(worker_of(session).pid))
            session._load = replace(small, settings=replace(small.settings, n_ctx=1 << 20))
            with pytest.raises(WorkerDiedError, match="the limit of its control group was reached"):
                list(session.load())
            session._load = small
            list(session.load())
            assert text_of(ask(session)) == expected


# The log


def test_the_log_stays_where_the_engine_died_and_only_there(opened: Callable[..., Session]) -> None:
    first, second = opened(), Worker()
    path = worker_of(first)._log.path
    assert path is not None
    other = second._log.path
    assert other is not None
    assert other.exists()
    assert "llama.cpp I: llama_model_loader: loaded meta data" in path.read_text()
    os.kill(worker_of(first).pid, signal.SIGABRT)
    assert died_of(first).endswith(f" (log: {path})")
    first.close()
    second.close()
    assert path.exists()
    assert "Fatal Python error: Aborted" in path.read_text()
    assert not other.exists()


def test_the_last_logs_are_kept_and_nobody_else_reads_them(tmp_path: Path) -> None:
    (tmp_path / "other.log").touch()
    for _ in range(15):
        log = EngineLog(tmp_path)
        assert log.path is not None
        assert log.path.stat().st_mode & 0o077 == 0
        log.close(keep=True)
    assert len(list(tmp_path.iterdir())) == 11
    assert (tmp_path / "other.log").exists()


def test_a_log_without_a_folder_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    log = EngineLog(tmp_path / "file")
    assert log.path is None
    os.write(log.descriptor, b"words")
    assert log.tail() == "words"
    log.close(keep=True)


def test_lines_of_llama_cpp_keep_their_level_and_the_log_its_bounds(tmp_path: Path) -> None:
    log = EngineLog(tmp_path)
    lines = NativeLines(log.descriptor)
    messages = [
        (2, "one\n"),
        (1, "debug\n"),
        (5, "of it\n"),
        (2, "dots "),
        (5, ".."),
        (5, ".."),
        (4, "bad\n"),
        (3, "w\n"),
    ]
    for level, text in messages:
        lines.write(level, text)
    assert log.tail() == "llama.cpp I: one\nllama.cpp I: dots ....\nllama.cpp E: bad\nllama.cpp W: w\n"
    for _ in range(100):
        lines.write(2, "x" * 100_000 + "\n")
    assert os.fstat(log.descriptor).st_size < 5 << 20
    lines.write(4, "the last\n")
    assert log.tail().endswith("llama.cpp E: the last\n")
    log.close(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_errors_the_process_survived_are_not_its_last_words(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    session = Session(demo_load(path))
    with pytest.raises(EngineError):
        list(session.load())
    worker = worker_of(session)
    assert "llama.cpp E: gguf_init" in worker._log.tail()
    os.kill(worker.pid, signal.SIGTERM)
    with pytest.raises(
        WorkerDiedError, match=r"ended by SIGTERM \(asked to end by another program\); it can be started"
    ):
        worker.receive()
    session.close()


def test_a_load_left_early_leaves_nothing(demo: Path, smollm2: Path) -> None:
    """Neither memory nor open files, of a model of 93 MB."""
    session = Session(demo_load(demo), partial(Worker, broken("slow")))
    list(session.load())
    worker = worker_of(session)
    files = Path(f"/proc/{worker.pid}/fd")
    before, held = len(list(files.iterdir())), resident_bytes(worker.pid)
    assert held is not None
    session._load = Load(smollm2, EngineSettings(n_ctx=256, n_threads=1), "template")
    for _ in range(3):
        loading = session.load()
        assert isinstance(next(iter(loading)), LoadProgress)
        loading.close()  # type: ignore[attr-defined]
        assert len(list(files.iterdir())) <= before
        assert (resident_bytes(worker.pid) or 0) < held + (40 << 20)
    session.close()
