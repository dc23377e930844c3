"""llama.cpp RPC devices on loopback: processes that stand in for GPUs.

A device stays registered with ggml until its process ends, so whatever uses these runs in a process of its own: a
`Worker`, or `apart`.
"""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

# The server ends with its owner, however that ends: when its standard input closes.
_SERVE = """
import os, sys, threading
from runtime.native_devices import serve_rpc
def end_with_owner():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=end_with_owner, daemon=True).start()
serve_rpc(sys.argv[1], n_threads=1)
"""


@contextlib.contextmanager
def rpc_servers(n: int) -> Iterator[tuple[str, ...]]:
    """host:port of `n` devices that answer."""
    with contextlib.ExitStack() as stack:
        endpoints = tuple(f"127.0.0.1:{port}" for port in _free_ports(n))
        processes = [stack.enter_context(_server(endpoint)) for endpoint in endpoints]
        for endpoint, process in zip(endpoints, processes, strict=True):
            _wait_until_it_answers(endpoint, process)
        yield endpoints


def apart(function: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
    """The function's result, computed in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _server(endpoint: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _SERVE, endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def _wait_until_it_answers(endpoint: str, process: "subprocess.Popen[bytes]") -> None:
    host, _, port = endpoint.rpartition(":")
    while process.poll() is None:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            continue
        return
    raise AssertionError(f"the RPC server at {endpoint} ended with {process.returncode}")
