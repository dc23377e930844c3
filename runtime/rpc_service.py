"""This machine's devices for others over llama.cpp's RPC protocol: the process that serves, and its owner's handle.

llama.cpp ends the process on a message that it does not understand, so the owner is another process: it says why, and
can start a new one. Run as `python -m runtime.rpc_service OWNER ADDRESS THREADS CACHE [DEVICE …]`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.ending import end_with
from runtime.engine_log import EngineLog
from runtime.errors import EngineError
from runtime.hardware import Device
from runtime.memory_watch import OomKills
from runtime.obituary import Death, obituary
from runtime.rpc_address import unanswered

_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Offer:
    """What is to be served, and where."""

    address: str
    """host:port; the host as a numeric IPv4 address, all that llama.cpp takes."""
    devices: tuple[str, ...] = ()
    """ggml's names, such as CUDA0; none: every GPU, or the processor where there is none."""
    n_threads: int = 1
    """That compute on the processor."""
    cache: Path | None = None
    """Keeps weights that clients sent, so that they need not be sent again."""


class RpcService:
    """A process that serves. Raises EngineError where it cannot."""

    def __init__(self, offer: Offer) -> None:
        self._log = EngineLog()
        arguments = [str(os.getpid()), offer.address, str(offer.n_threads), str(offer.cache or ""), *offer.devices]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "runtime.rpc_service", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log.descriptor,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        self._oom_kills = OomKills.seen_by(self._process.pid)
        try:
            self.devices = self._started(offer.address)
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Wait for the end of the process."""
        self._process.wait()

    def obituary(self, again: str = "look at the log") -> str:
        """How the process ended, in one line; `again` is what to do where nothing needs to be changed."""
        death = Death(self._process.wait(), self._log.tail(), self._oom_kills.verdict(), self._log.path, again=again)
        return obituary(death, "the process that serves")

    def close(self) -> None:
        """End the process. A log stays where it died by itself."""
        is_dead = self._process.poll() is not None
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close(keep=is_dead)

    def _started(self, address: str) -> tuple[Device, ...]:
        """The devices, once they are served."""
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said:
            raise EngineError(self.obituary())
        told = json.loads(said)
        if "error" in told:
            raise EngineError(told["error"])
        while unanswered((address,)):
            if self._process.poll() is not None:
                raise EngineError(self.obituary())
            time.sleep(_POLL_SECONDS)
        return tuple(Device(**device) for device in told["devices"])


def main(owner: int, address: str, n_threads: int, cache: str, names: Sequence[str]) -> None:
    """Say which devices are served, as a line of JSON on stdout, and serve them until the process ends."""
    end_with(owner)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the owner decides what it means
    from runtime.engine_log import NativeLines
    from runtime.native import LOG
    from runtime.native_devices import devices, require_rpc, serve_rpc

    LOG.listener = NativeLines().write
    try:
        require_rpc()
        served = _chosen(devices(), names)
        if cache:
            Path(cache).mkdir(parents=True, exist_ok=True)
    except EngineError as error:
        told: dict[str, object] = {"error": str(error)}
    except OSError as error:
        told = {"error": f"{cache}: cannot be made: {error.strerror}; name another folder as --cache"}
    else:
        told = {"devices": [asdict(device) for device in served]}
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(told).encode() + b"\n")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # llama.cpp tells of its clients there
    if "devices" in told:
        serve_rpc(address, [device.name for device in served], n_threads, Path(cache) if cache else None)
        sys.exit(1)  # it returns only where it cannot serve


def _chosen(here: Sequence[Device], names: Sequence[str]) -> list[Device]:
    by_name = {device.name: device for device in here}
    if unknown := [name for name in names if name not in by_name]:
        raise EngineError(f"no device is called {unknown[0]!r}; here are {', '.join(by_name)}")
    gpus = [device for device in here if device.kind == "gpu"]
    return [by_name[name] for name in names] or gpus or [device for device in here if device.kind == "cpu"]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:])
