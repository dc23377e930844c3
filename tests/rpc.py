"""Devices of `bise worker` on loopback: processes that stand in for GPUs.

A device stays registered with ggml until its process ends, so whatever uses these runs in a process of its own: a
`Worker`, or `apart`.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

# It ends with its owner, however that ends.
_WORKER = """
import sys
from runtime.ending import end_with
from tui.cli import main
end_with(int(sys.argv[1]))
sys.exit(main(["worker", "--host", sys.argv[2], "--port", sys.argv[3], "--threads", "1"]))
"""


@contextlib.contextmanager
def rpc_servers(n: int) -> Iterator[tuple[str, ...]]:
    """host:port of `n` devices that answer."""
    with contextlib.ExitStack() as stack:
        endpoints = tuple(f"127.0.0.1:{port}" for port in free_ports(n))
        processes = [stack.enter_context(worker_process(endpoint)) for endpoint in endpoints]
        for endpoint, process in zip(endpoints, processes, strict=True):
            wait_until_it_answers(endpoint, process)
        yield endpoints


def apart(function: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
    """The function's result, computed in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def worker_process(endpoint: str) -> Iterator["subprocess.Popen[str]"]:
    """`bise worker`, which may not answer yet."""
    arguments = [str(os.getpid()), *endpoint.split(":")]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


def wait_until_it_answers(endpoint: str, process: "subprocess.Popen[str]") -> None:
    host, _, port = endpoint.rpartition(":")
    while process.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            continue
        return
    raise AssertionError(f"the RPC server at {endpoint} ended with {process.returncode}")
