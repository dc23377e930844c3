"""Devices: what ggml lists, and RPC devices that are really used. Also the engine's own test of itself."""

import json
import re
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.engine import Engine
from runtime.errors import EngineError
from runtime.events import EngineSettings, Load, Piece, Sampling
from runtime.hardware import Device, host_memory
from runtime.messages import Message
from runtime.native_devices import devices
from runtime.session import Session
from tests.checkpoints import DEMO
from tests.rpc import apart

SETTINGS = EngineSettings(n_ctx=256, n_threads=1)


def test_the_processor_is_a_device_with_the_hosts_memory() -> None:
    (cpu,) = (device for device in devices() if device.kind == "cpu")
    _, total = host_memory()
    assert cpu.name == "CPU"
    assert cpu.description
    assert cpu.memory_total == total


def registered(servers: tuple[str, ...]) -> tuple[Device, ...]:
    """The devices of a process that knows these servers."""
    from runtime.native_devices import register_rpc

    register_rpc(servers)
    register_rpc(servers[:1])  # once more changes nothing
    return devices()


def test_rpc_servers_are_devices(servers: tuple[str, ...]) -> None:
    remote = [device for device in apart(registered, servers) if device.name.startswith("RPC")]
    assert [(device.name, device.description, device.kind) for device in remote] == [
        (f"RPC{i}", server, "gpu") for i, server in enumerate(servers)
    ]
    assert all(0 < device.memory_free <= device.memory_total for device in remote)


def loaded(path: Path, settings: EngineSettings) -> tuple[list[str], list[float]]:
    """The device of each layer, the output last, and the logits after a short prompt."""
    from runtime import native

    native.LOG.lines = deque(maxlen=None)
    kept: list[str] = []

    def progress(_: float) -> bool:
        kept[:] = [text for _, text in native.LOG.lines]
        return True

    engine = Engine(path, settings, progress)
    found = [m[1] for line in kept if (m := re.search(r"layer +\d+ assigned to device (\w+)", line))]
    engine.read(engine.vocabulary.tokenize("In the beginning", bos=True), lambda *_: None)
    logits = engine.logits().tolist()
    engine.close()
    return found, logits


@pytest.mark.parametrize(("n_gpu_layers", "n_remote"), [(-1, 9), (0, 0), (3, 3)])
def test_layers_go_where_they_are_told(n_gpu_layers: int, n_remote: int, demo: Path, servers: tuple[str, ...]) -> None:
    settings = replace(SETTINGS, rpc_servers=servers[:1], n_gpu_layers=n_gpu_layers)
    found, _ = apart(loaded, demo, settings)
    assert found == ["CPU"] * (9 - n_remote) + ["RPC0"] * n_remote


def answer(path: Path, servers: tuple[str, ...]) -> str:
    session = Session(Load(path, replace(SETTINGS, rpc_servers=servers), "mistral-v3", DEMO / "tokenizer.model"))
    try:
        list(session.load())
        events = list(session.reply([Message("user", "Define a horse.")], Sampling(temperature=0.0)))
    finally:
        session.close()
    return "".join(event.text for event in events if isinstance(event, Piece))


def test_two_devices_answer_as_the_processor_does(demo: Path, servers: tuple[str, ...]) -> None:
    assert answer(demo, servers[:2]) == answer(demo, ())


def test_layers_are_spread_over_devices_evenly(demo: Path, servers: tuple[str, ...]) -> None:
    alone, expected = apart(loaded, demo, SETTINGS)
    found, logits = apart(loaded, demo, replace(SETTINGS, rpc_servers=servers[:2]))
    assert set(alone) == {"CPU"}
    assert [found.count(f"RPC{i}") for i in (0, 1)] in ([4, 5], [5, 4])
    assert logits == pytest.approx(expected, abs=0.1)


def test_the_main_gpu_holds_the_whole_model(demo: Path, servers: tuple[str, ...]) -> None:
    found, _ = apart(loaded, demo, replace(SETTINGS, rpc_servers=servers[:2], main_gpu=1))
    assert found == ["RPC1"] * 9


@pytest.mark.parametrize("level", ["BF16", "Q8_0"])
def test_parts_of_tensors_on_two_devices_compute_the_same(
    level: str, demo_levels: dict[str, Path], servers: tuple[str, ...]
) -> None:
    _, expected = apart(loaded, demo_levels[level], SETTINGS)
    split = replace(SETTINGS, rpc_servers=servers[:2], split_mode="tensor")
    found, logits = apart(loaded, demo_levels[level], split)
    assert len(set(found)) == 1, "llama.cpp calls both together one device"
    assert logits == pytest.approx(expected, abs=0.15)


def test_blocks_that_cannot_be_cut_are_refused_before_they_crash(
    demo_levels: dict[str, Path], servers: tuple[str, ...]
) -> None:
    split = replace(SETTINGS, rpc_servers=servers[:2], split_mode="tensor")
    with pytest.raises(EngineError, match="here attention has at most 1, and these shares leave one without"):
        apart(loaded, demo_levels["Q4_K_M"], split)


def threads(path: Path, servers: tuple[str, ...]) -> list[int]:
    """Threads by default, with every layer on a device, with some, and with none."""
    from runtime.opening import n_cores, n_threads, open_model

    chosen = []
    for n_gpu_layers in (-1, 9, 8, 0):
        settings = EngineSettings(n_ctx=256, rpc_servers=servers, n_gpu_layers=n_gpu_layers)
        model = open_model(path, settings)
        chosen.append(n_threads(settings, model))
        assert n_threads(replace(settings, n_threads=7), model) == 7
        model.close()
    return [*chosen, n_cores()]


def test_one_thread_serves_where_every_layer_is_on_a_device(demo: Path, servers: tuple[str, ...]) -> None:
    every, counted, some, none, cores = apart(threads, demo, servers[:1])
    assert (every, counted, some, none) == (1, 1, cores, cores)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (
            "127.0.0.1:1",
            r"no llama\.cpp RPC server answers at 127\.0\.0\.1:1 \(Connection refused\); start `bise worker` there",
        ),
        (
            "no-such-host.invalid:50052",
            r"no llama\.cpp RPC server answers at no-such-host\.invalid:50052 \(.+\); start",
        ),
        ("localhost", r"'localhost' is not host:port of a llama\.cpp RPC server"),
        (":50052", r"':50052' is not host:port of a llama\.cpp RPC server"),
        ("localhost:99999", r"localhost:99999"),
    ],
)
def test_a_server_that_does_not_answer_is_one_line(server: str, message: str, demo: Path) -> None:
    session = Session(Load(demo, replace(SETTINGS, rpc_servers=(server,)), "mistral-v3"))
    try:
        with pytest.raises(EngineError, match=message) as error:
            list(session.load())
    finally:
        session.close()
    assert "\n" not in str(error.value)


def stages(*arguments: str) -> list[dict[str, object]]:
    """What the engine's test of itself prints."""
    command = [sys.executable, "-P", "-m", "runtime.selftest", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_the_self_test_without_a_model_describes_the_library() -> None:
    (library,) = stages()
    assert library["stage"] == "library"
    assert library["version"] == "0.3.36"
    assert isinstance(library["devices"], list)
    assert [device["name"] for device in library["devices"] if device["kind"] == "cpu"] == ["CPU"]


def test_the_self_test_with_a_model_passes_every_stage(demo_levels: dict[str, Path]) -> None:
    facts = stages(str(demo_levels["Q4_K_M"]))
    assert [stage["stage"] for stage in facts] == ["library", "load", "prompt", "steps", "done"]
    assert facts[2]["tokens"] == facts[3]["tokens"] != 0
    assert facts[4]["finite"] is True
    assert isinstance(facts[4]["difference"], float)
    assert facts[4]["difference"] < 0.05
