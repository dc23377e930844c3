"""ggml's devices behind types: list them, add RPC servers to them, serve one.

Everything goes through libllama's own handle, which finds ggml's functions in the libraries libllama was linked with.
Opening libggml.so by its path would not do: the wheel holds it under three names as three files, so that would be a
second copy with a registry of its own, and devices added there would never be used.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

from runtime import native
from runtime.errors import EngineError
from runtime.hardware import Device
from runtime.native import function
from runtime.rpc_address import check_answers

_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}  # enum ggml_backend_dev_type, ggml-backend.h


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
    if not servers:
        return
    ours = {device.description for device in devices()}
    for server in servers:
        check_answers(server, is_ours=server in ours)
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(_rpc_function("ggml_backend_rpc_add_server"))
    register = function("ggml_backend_register", None, ctypes.c_void_p)
    for server in servers:
        register(add_server(server.encode()))


def serve_rpc(endpoint: str, names: Sequence[str] = (), n_threads: int = 1, cache: Path | None = None) -> None:
    """Offer devices of this machine at host:port, a numeric IPv4 address, until the process ends. Blocks.

    `names` as ggml has them; none offers the processor. `n_threads` compute on the processor. Weights that clients send
    are kept in `cache`, so that they need not be sent again. Returns, and says why on stderr, where the address cannot
    be had. Whoever can reach the port can use and crash this process: bind to loopback unless the network is trusted.
    """
    start = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
    )(_rpc_function("ggml_backend_rpc_start_server"))
    by_name = function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)
    pointers = [by_name(name.encode()) for name in names or ("CPU",)]
    folder = str(cache).encode() if cache is not None else None
    start(endpoint.encode(), folder, n_threads, len(pointers), (ctypes.c_void_p * len(pointers))(*pointers))


def require_rpc() -> None:
    """Raises EngineError where the build has no RPC backend."""
    if not native.supports_rpc():
        raise EngineError("this build of llama-cpp-python has no RPC backend; run `make setup` again")


def _rpc_function(name: str) -> int:
    require_rpc()
    registry = function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)(b"RPC")
    find = function("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
    address: int = find(registry, name.encode())
    return address
