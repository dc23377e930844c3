"""Offer this machine's devices to other machines, for their `--rpc`, by llama.cpp's RPC protocol. Until Ctrl-C."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.rpc_service import Offer

HELP = "offer this machine's devices to other machines"

_LOOPBACK = "127.0.0.1"
_QUICK_SECONDS = 5.0
_MOST_QUICK_ENDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default=_LOOPBACK, help="address to listen at (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=50052, metavar="P", help="default: 50052")
    parser.add_argument(
        "--devices", default="", metavar="NAME,…", help="such as CUDA0 (default: every GPU; the processor without one)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="on the processor (default: every core)")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep weights that are sent here, so that they are sent but once"
    )


def run(arguments: argparse.Namespace) -> int:
    import os
    import signal
    import time

    from runtime.errors import EngineError
    from runtime.rpc_service import Offer, RpcService
    from tui.units import gib

    if arguments.threads is not None and arguments.threads < 1:
        raise EngineError(f"--threads {arguments.threads} is not a number of threads")
    offer = Offer(
        address=_address(arguments.host, arguments.port),
        devices=tuple(name for name in arguments.devices.split(",") if name),
        n_threads=arguments.threads or len(os.sched_getaffinity(0)),
        cache=arguments.cache,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as a service is ended
    n_quick = 0
    while True:
        began = time.monotonic()
        service = RpcService(offer)
        try:
            if not n_quick:
                for device in service.devices:
                    free, total = gib(device.memory_free), gib(device.memory_total)
                    print(f"{device.name}  {device.description}  {free} of {total} free")
                _explain(offer, arguments.host)
            service.wait()
            n_quick = n_quick + 1 if time.monotonic() - began < _QUICK_SECONDS else 1
            if n_quick > _MOST_QUICK_ENDS:
                raise EngineError(service.obituary())
            print(f"bise: {service.obituary('it is started again')}", file=sys.stderr, flush=True)
        finally:
            service.close()


def _address(host: str, port: int) -> str:
    """host:port as llama.cpp takes it, which is free. Raises EngineError."""
    import socket

    from runtime.errors import EngineError

    if not 0 < port < 65536:
        raise EngineError(f"--port {port} is not a port, 1 to 65535")
    try:
        numeric = socket.gethostbyname(host)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((numeric, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EngineError(
            f"cannot listen at {host}:{port}: {reason}; name an IPv4 address of this machine and a free port"
        ) from None
    return f"{numeric}:{port}"


def _explain(offer: "Offer", host: str) -> None:
    import socket

    numeric, _, port = offer.address.rpartition(":")
    reached = f"{socket.gethostname()}:{port}" if numeric == "0.0.0.0" else f"{host}:{port}"
    print(f"served at {offer.address}, one client at a time; use it with `--rpc {reached}`; Ctrl-C ends it")
    who = "a program on this machine" if numeric.startswith("127.") else "WHOEVER REACHES THIS ADDRESS"
    print(
        f"the protocol has no authentication and no encryption: {who} can use these devices, read what is computed on "
        "them, and crash this process",
        flush=True,
    )
