"""Whether llama.cpp RPC servers answer, and in the same words. Asked here, because llama.cpp would end the process.

A server serves one client after another: while one has it, others wait without an answer.

Protocol: llama.cpp 0c1e57098, ggml/src/ggml-rpc/ggml-rpc.cpp, `negotiate_hello`.
"""

import socket
import struct
from collections.abc import Sequence

from runtime.errors import EngineError

DEFAULT_PORT = 50052
"""llama.cpp's own."""

_SECONDS = 5.0
_SECONDS_AGAIN = 1.0
_MAJOR, _MINOR = 7, 0  # ggml-rpc.h, RPC_PROTO_MAJOR_VERSION
_HELLO = struct.pack("<BQ24x", 14, 24)  # the command, the size of what follows, no capabilities
_ANSWER = struct.Struct("<Q4B24x")  # the size of what follows, the version in three numbers, capabilities


def check_answers(server: str, *, is_ours: bool = False) -> None:
    """Raises EngineError unless a server of our version answers at `server`, host:port.

    One that this process uses already, `is_ours`, is only looked for: it would not answer anybody else.
    """
    with _connected(server, _SECONDS) as connection:
        if is_ours:
            return
        try:
            connection.sendall(_HELLO)
            received = b""
            while len(received) < _ANSWER.size and (more := connection.recv(_ANSWER.size - len(received))):
                received += more
        except TimeoutError:
            raise EngineError(
                f"the RPC server at {server} is busy: it serves one client at a time; end the other, or start a second "
                "`bise worker` there at another --port"
            ) from None
        except OSError:
            received = b""
    size, major, minor, _, _ = _ANSWER.unpack(received) if len(received) == _ANSWER.size else (0, 0, 0, 0, 0)
    if size != _ANSWER.size - 8:
        raise EngineError(f"what answers at {server} is no llama.cpp RPC server of this version; start `bise worker`")
    if major != _MAJOR or minor > _MINOR:
        raise EngineError(
            f"the RPC server at {server} speaks version {major}.{minor} of the protocol, and this llama.cpp "
            f"{_MAJOR}.{_MINOR}; install the same version of Bise on both machines"
        )


def unanswered(servers: Sequence[str]) -> tuple[str, ...]:
    """Those of servers that answered before which cannot be reached any more."""
    return tuple(server for server in servers if not _is_there(server))


def _is_there(server: str) -> bool:
    try:
        _connected(server, _SECONDS_AGAIN).close()
    except EngineError:
        return False
    return True


def _connected(server: str, seconds: float) -> socket.socket:
    """A connection on which every wait is bounded by `seconds`."""
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal():
        raise EngineError(f"{server!r} is not host:port of a llama.cpp RPC server")
    try:
        return socket.create_connection((host, int(port)), timeout=seconds)
    except (OSError, OverflowError, UnicodeError) as error:  # a port beyond 65535, a host that is no name
        reason = getattr(error, "strerror", None) or error
        raise EngineError(
            f"no llama.cpp RPC server answers at {server} ({reason}); start `bise worker` there"
        ) from None
