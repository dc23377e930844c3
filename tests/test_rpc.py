"""Devices of other machines: what `bise worker` offers, says and survives, and what becomes of its clients."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from runtime.errors import EngineError, WorkerDiedError
from runtime.events import EngineSettings, Finished, Load, Piece, ReplyEvent, Sampling
from runtime.hardware import Device
from runtime.messages import Message
from runtime.native_devices import devices
from runtime.rpc_address import check_answers, unanswered
from runtime.rpc_service import Offer, RpcService
from runtime.session import Session
from tests.checkpoints import DEMO
from tests.rpc import apart, free_ports, rpc_servers, wait_until_it_answers, worker_process

BISE = str(Path(sys.executable).parent / "bise")
HORSE = Message("user", "Define a horse.")


def session_over(servers: tuple[str, ...], path: Path) -> Session:
    settings = EngineSettings(n_ctx=512, n_threads=1, rpc_servers=servers)
    return Session(Load(path, settings, "mistral-v3", DEMO / "tokenizer.model"))


def ask(session: Session, *messages: Message, max_tokens: int = 40) -> Iterator[ReplyEvent]:
    return session.reply(messages or [HORSE], Sampling(temperature=0.0, max_tokens=max_tokens))


def text_of(events: Iterator[ReplyEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def service_of(worker: "subprocess.Popen[str]") -> int:
    """The process that serves, a child of the one that was started."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    wait_until(lambda: children.read_text(encoding="ascii") != "")
    return int(children.read_text(encoding="ascii"))


def wait_until(met: Callable[[], bool]) -> None:
    for _ in range(3000):
        if met():
            return
        time.sleep(0.01)
    raise AssertionError("still not so after half a minute")


# A worker that fails, and its client


def test_a_worker_that_dies_in_an_answer_is_named_and_the_conversation_goes_on(demo: Path) -> None:
    """Two workers; the second is killed, and another started in its place."""
    with rpc_servers(1) as first, ExitStack() as stack:
        second = f"127.0.0.1:{free_ports(1)[0]}"
        worker = stack.enter_context(worker_process(second))
        wait_until_it_answers(second, worker)
        session = session_over((*first, second), demo)
        stack.callback(session.close)
        list(session.load())
        expected = text_of(ask(session))
        answer = ask(session, max_tokens=400)
        said = [next(event.text for event in answer if isinstance(event, Piece))]
        worker.kill()
        with pytest.raises(WorkerDiedError) as error:
            said.extend(event.text for event in answer if isinstance(event, Piece))
        assert re.fullmatch(
            rf"the engine's process ended by SIGABRT \({second} failed\): Remote RPC server crashed or .+; start `bise "
            r"worker` there again, or leave it out of --rpc; it can be started again \(log: .+\)",
            str(error.value),
        )
        assert expected.startswith("".join(said)[: len(expected)])
        with pytest.raises(EngineError, match=rf"no llama.cpp RPC server answers at {second} "):
            list(session.load())
        again = stack.enter_context(worker_process(second))
        wait_until_it_answers(second, again)
        list(session.load())
        assert text_of(ask(session)) == expected


def test_a_worker_starts_again_what_serves_and_says_so(demo: Path) -> None:
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    with worker_process(address) as worker, ExitStack() as stack:
        wait_until_it_answers(address, worker)
        session = session_over((address,), demo)
        stack.callback(session.close)
        list(session.load())
        expected = text_of(ask(session))
        served = service_of(worker)
        os.kill(served, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="start `bise worker` there again"):
            text_of(ask(session))
        wait_until(lambda: not unanswered((address,)))
        assert service_of(worker) != served
        list(session.load())
        assert text_of(ask(session)) == expected
        worker.terminate()
        said, faults = worker.communicate()
    assert worker.returncode == 128 + signal.SIGTERM
    assert re.fullmatch(r"CPU  .+ free\nserved at .+\nthe protocol has no authentication .+\n", said)
    assert re.fullmatch(r"bise: the process that serves ended by SIGKILL \(.+\); it is started again \(.+\)\n", faults)


def test_no_worker_outlives_its_owner() -> None:
    (port,) = free_ports(1)
    with worker_process(f"127.0.0.1:{port}") as worker:
        wait_until_it_answers(f"127.0.0.1:{port}", worker)
        served = service_of(worker)
        worker.kill()
        wait_until(lambda: not Path(f"/proc/{served}").exists())


def test_ctrl_c_ends_a_worker() -> None:
    (port,) = free_ports(1)
    with worker_process(f"127.0.0.1:{port}") as worker:
        wait_until_it_answers(f"127.0.0.1:{port}", worker)
        served = service_of(worker)
        worker.send_signal(signal.SIGINT)
        _, faults = worker.communicate()
    assert (worker.returncode, faults) == (130, "bise: interrupted\n")
    assert not Path(f"/proc/{served}").exists()


def test_a_worker_whose_service_cannot_live_gives_up() -> None:
    (port,) = free_ports(1)
    with worker_process(f"127.0.0.1:{port}") as worker:
        while worker.poll() is None:
            if not unanswered((f"127.0.0.1:{port}",)):
                os.kill(service_of(worker), signal.SIGSEGV)
        _, faults = worker.communicate()
    assert worker.returncode == 1
    *restarts, last = faults.splitlines()
    assert len(restarts) <= 3
    assert all("it is started again" in line for line in restarts)
    assert last.startswith("bise: the process that serves ended by SIGSEGV")
    assert "it is started again" not in last


# What is offered


def test_devices_are_named_and_weights_kept(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    service = RpcService(Offer(f"127.0.0.1:{port}", ("CPU",), 1, tmp_path / "new" / "cache"))
    try:
        assert [device.name for device in service.devices] == ["CPU"]
        assert (tmp_path / "new" / "cache").is_dir()
        check_answers(f"127.0.0.1:{port}")
    finally:
        service.close()
    with pytest.raises(EngineError, match=r"no device is called 'CUDA7'; here are CPU"):
        RpcService(Offer(f"127.0.0.1:{port}", ("CUDA7",)))
    with pytest.raises(EngineError, match=r"cannot be made: Not a directory; name another folder as --cache"):
        RpcService(Offer(f"127.0.0.1:{port}", cache=Path(__file__) / "cache"))
    with pytest.raises(EngineError, match=r"the process that serves ended with exit code 1: Failed to create server"):
        RpcService(Offer("8.8.8.8:50052"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "no-such-host.invalid"], r"cannot listen at no-such-host\.invalid:50052: .+; name an IPv4 address"),
        (["--host", "::1"], r"cannot listen at ::1:50052: .+; name an IPv4 address of this machine and a free port"),
        (["--port", "70000"], r"--port 70000 is not a port, 1 to 65535"),
        (["--threads", "0"], r"--threads 0 is not a number of threads"),
    ],
)
def test_what_cannot_be_offered_is_one_line(arguments: list[str], words: str) -> None:
    run = subprocess.run([BISE, "worker", *arguments], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(rf"bise: {words}.*\n", run.stderr)


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = subprocess.run([BISE, "worker", "--port", port], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == (
        f"bise: cannot listen at 127.0.0.1:{port}: Address already in use; name an IPv4 address of this machine and a "
        "free port\n"
    )


def test_an_address_that_others_reach_is_warned_of() -> None:
    (port,) = free_ports(1)
    with worker_process(f"0.0.0.0:{port}") as worker:
        assert worker.stdout is not None
        said = "".join(worker.stdout.readline() for _ in range(3))
    assert f"`--rpc {socket.gethostname()}:{port}`" in said
    assert "WHOEVER REACHES THIS ADDRESS can use these devices" in said


# Servers that are asked


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """host:port of a server that says this to whatever it hears, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "no llama.cpp RPC server of this version"),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n", "no llama.cpp RPC server of this version"),
        (
            (28).to_bytes(8, "little") + bytes([6, 1, 0, 0]) + bytes(24),
            r"version 6\.1 of the protocol, and this .+ 7\.0;",
        ),
        ((28).to_bytes(8, "little") + bytes([7, 1, 0, 0]) + bytes(24), r"version 7\.1 of the protocol"),
    ],
)
def test_a_server_that_is_none_is_refused(answer: bytes, words: str) -> None:
    with answering(answer) as server, pytest.raises(EngineError, match=words):
        check_answers(server)


def test_the_version_is_that_of_the_build(servers: tuple[str, ...]) -> None:
    """The header that the wheel was built with says which one."""
    import llama_cpp

    header = (Path(llama_cpp.__file__).parent.parent / "include" / "ggml-rpc.h").read_text(encoding="utf-8")
    version = [re.search(rf"RPC_PROTO_{part}_VERSION +(\d+)", header) for part in ("MAJOR", "MINOR")]
    assert [found and int(found[1]) for found in version] == [7, 0]
    check_answers(servers[0])


def used_and_known_again(server: str, path: Path) -> tuple[Device, ...]:
    from runtime.native_devices import register_rpc
    from runtime.opening import open_model

    model = open_model(path, EngineSettings(n_ctx=512, n_threads=1, rpc_servers=(server,)))
    register_rpc((server,))
    model.close()
    return devices()


def test_a_busy_server_is_told_and_is_not_busy_with_oneself(demo: Path) -> None:
    with rpc_servers(1) as (server,), ExitStack() as stack:
        session = session_over((server,), demo)
        stack.callback(session.close)
        list(session.load())
        assert isinstance(list(ask(session))[-1], Finished)
        with pytest.raises(EngineError, match=rf"the RPC server at {server} is busy: it serves one client at a time"):
            check_answers(server)
        list(session.load())  # in the same process
        assert isinstance(list(ask(session))[-1], Finished)
        session.close()
        assert len(apart(used_and_known_again, server, demo)) == 2
