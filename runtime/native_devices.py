"""ggml's devices behind types: list them, add RPC servers to them, serve one.

Everything goes through libllama's own handle, which finds ggml's functions in the libraries libllama was linked with.
Opening libggml.so by its path would not do: the wheel holds it under three names as three files, so that would be a
second copy with a registry of its own, and devices added there would never be used.
"""

import ctypes
import socket
from collections.abc import Sequence

from runtime import native
from runtime.errors import EngineError
from runtime.hardware import Device
from runtime.native import function

_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}  # enum ggml_backend_dev_type, ggml-backend.h

_CONNECT_SECONDS = 5.0


def devices() -> tuple[Device, ...]:
    """Every device llama.cpp can use now, the CPU among them."""
    count = function("ggml_backend_dev_count", ctypes.c_size_t)
    get = function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name = function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    description = function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    kind = function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    memory = function("ggml_backend_dev_memory", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    found = []
    for i in range(count()):
        pointer = get(i)
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        memory(pointer, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                name=name(pointer).decode(),
                description=description(pointer).decode("utf-8", "replace"),
                kind=_KINDS.get(kind(pointer), "other"),
                memory_free=free.value,
                memory_total=total.value,
            )
        )
    return tuple(found)


def has_backend(name: str) -> bool:
    """Whether the build has the backend that ggml calls so, such as CUDA or RPC; it may find no device."""
    return bool(function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)(name.encode()))


def register_rpc(servers: Sequence[str]) -> None:
    """Make llama.cpp RPC servers (host:port) devices of this process. The protocol has no authentication.

    Upstream's order (llama.cpp 0c1e57098, common/arg.cpp `add_rpc_devices`): add the server, register it, then load.
    Raises EngineError for a server that does not answer; llama.cpp itself would end the process.
    """
    for server in servers:
        _check_answers(server)
    if not servers:
        return
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(_rpc_function("ggml_backend_rpc_add_server"))
    register = function("ggml_backend_register", None, ctypes.c_void_p)
    for server in servers:
        register(add_server(server.encode()))


def serve_rpc(endpoint: str, n_threads: int) -> None:
    """Offer this machine's CPU as an RPC device at host:port until the process ends. Blocks.

    Whoever can reach the port can use and crash it: bind to loopback unless the network is trusted.
    """
    start = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
    )(_rpc_function("ggml_backend_rpc_start_server"))
    cpu = function("ggml_backend_dev_by_type", ctypes.c_void_p, ctypes.c_int)(0)
    start(endpoint.encode(), None, n_threads, 1, (ctypes.c_void_p * 1)(cpu))


def _rpc_function(name: str) -> int:
    if not native.supports_rpc():
        raise EngineError("this build of llama-cpp-python has no RPC backend; run `make setup` again")
    registry = function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)(b"RPC")
    find = function("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
    address: int = find(registry, name.encode())
    return address


def _check_answers(server: str) -> None:
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal():
        raise EngineError(f"{server!r} is not host:port of a llama.cpp RPC server")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise EngineError(
            f"no llama.cpp RPC server answers at {server} ({error.strerror or error}); start one there"
        ) from None
