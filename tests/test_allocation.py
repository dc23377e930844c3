"""What placement.py foresees against what llama.cpp allocates, buffer by buffer, as its log tells."""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from quant.recipes import weights_by_place
from runtime.events import EngineSettings
from runtime.fitting import read_weights
from runtime.levels import Shape
from runtime.placement import Placement, Wish, host_bytes, place
from tests.checkpoints import DEMO_SHAPE
from tests.gguf_files import write_sparse
from tests.rpc import apart

MIB = 2**20
MIDDLE = Shape(n_layers=6, n_embd=2048, n_ff=5632, n_heads=16, n_heads_kv=4, head_dim=128, n_vocab=32_000)
ROOM = 8 * 2**30

Buffers = dict[str, dict[str, float]]
"""Device (CPU, RPC0, …; Meta for all of them) → kind (model, KV, compute, output) → MiB."""


def allocated(path: Path, servers: tuple[str, ...], settings: EngineSettings, wishes: Sequence[Wish]) -> list[Buffers]:
    """For each wish, the buffers of a model and a context that are really loaded. Runs in its own process."""
    from runtime import native
    from runtime.native_context import Context, ContextSettings
    from runtime.native_devices import register_rpc

    register_rpc(servers)
    names = {server: f"RPC{i}" for i, server in enumerate(servers)}
    native.LOG.lines = deque(maxlen=None)

    def buffers() -> Buffers:
        log = "".join(text for _, text in native.LOG.lines)
        found: Buffers = {}
        for device, kind, mib in re.findall(r"(\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB", log):
            address = re.fullmatch(r"RPC\d+\[([^]]+)\]", device)
            on_host = device.endswith("_Host")  # pinned, such as CUDA_Host
            name = names[address[1]] if address else "CPU" if on_host else device.partition("(")[0].partition("_")[0]
            found.setdefault(name, {}).setdefault(kind, 0.0)
            found[name][kind] += float(mib)
        return found

    model = native.Model(path, settings)
    weights = buffers()
    every = []
    for wish in wishes:
        context = Context(
            model,
            ContextSettings(
                n_ctx=wish.n_ctx,
                n_batch=min(2048, wish.n_ctx),
                n_ubatch=min(wish.n_ubatch, wish.n_ctx),
                n_seq_max=wish.n_seq,
                n_outputs_max=max(wish.n_outputs, wish.n_seq),
                n_threads=1,
                kv_type=wish.kv_type,
                unified=wish.unified,
            ),
        )
        every.append({device: weights.get(device, {}) | kinds for device, kinds in (weights | buffers()).items()})
        context.close()
    model.close()
    return every


def gap(plan: Placement, found: Buffers, n_embd: int, names: Sequence[str] = ("RPC0", "RPC1", "RPC2")) -> float:
    """Assert that devices and host hold what was planned; the largest difference of a buffer in MiB.

    Weights and KV cache to the printed digit, and all together within 64 MiB or 3 %. Compute buffers, without host
    layers, within as many rows of activations as placement.py says.
    """
    row = min(plan.wish.n_ubatch, plan.wish.n_ctx) * n_embd * 4 / MIB
    n_rows = 1 if len(plan.uses) == 1 or plan.wish.split == "tensor" else 5
    planned = {name: (use.weights, use.kv, use.compute) for name, use in zip(names, plan.uses, strict=False)}
    if plan.wish.split == "tensor":  # one figure for all: the largest of them
        planned = {"Meta": max(planned.values())}
    planned["CPU"] = (plan.host.embedding + plan.host.weights, plan.host.kv, plan.host.compute)
    assert found.keys() <= planned.keys()
    largest = 0.0
    for device, parts in planned.items():
        actual = found.get(device, {})
        measured = (actual.get("model", 0), actual.get("KV", 0), actual.get("compute", 0) + actual.get("output", 0))
        gaps = [n_bytes / MIB - mib for n_bytes, mib in zip(parts, measured, strict=True)]
        case = (device, gaps, measured, plan)
        assert max(abs(gaps[0]), abs(gaps[1])) < 0.01 + 0.01 * sum(measured) * (plan.wish.split == "tensor"), case
        if not plan.host.n_layers:
            assert -0.1 * row - 0.5 < gaps[2] < (n_rows + 0.1) * row, case
        assert abs(sum(gaps)) < max(64, 0.03 * sum(measured)), case
        largest = max(largest, *map(abs, gaps))
    return largest


WISHES = (
    Wish(512),
    Wish(4096, "q8_0"),
    Wish(8192, "q4_0", n_ubatch=256),
    Wish(8192, n_seq=4),
    Wish(8192, n_seq=4, n_outputs=16, unified=True),
    Wish(4000, n_seq=3, n_ubatch=128),
    Wish(4096, n_seq=4, n_outputs=2048),
    Wish(32_768, "q8_0", n_ubatch=1024),
)


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 million parameters, all zeros, at Q4_K_M."""
    return write_sparse(tmp_path_factory.mktemp("middle") / "middle.gguf", MIDDLE, "Q4_K_M", 32_768)


def gaps(path: Path, servers: tuple[str, ...], plans: Sequence[Placement], n_embd: int) -> list[float]:
    """Load every plan, those that lay the layers alike on one loaded model."""
    alike: dict[tuple[int, ...], list[Placement]] = {}
    for plan in plans:
        alike.setdefault(tuple(use.n_layers for use in plan.uses), []).append(plan)
    found = []
    for group in alike.values():
        settings = EngineSettings(
            n_ctx=512, tensor_split=group[0].tensor_split, n_gpu_layers=group[0].n_gpu_layers, use_extra_bufts=False
        )
        every = apart(allocated, path, servers, settings, [plan.wish for plan in group])
        found += [gap(plan, buffers, n_embd) for plan, buffers in zip(group, every, strict=True)]
    return found


@pytest.mark.parametrize(
    ("n_devices", "n_host_layers"),
    [(1, 0), (2, 0), (2, 3)] + [pytest.param(*more, marks=pytest.mark.slow) for more in ((3, 0), (1, 2), (2, 6))],
)
def test_layers_take_the_memory_that_was_planned(
    n_devices: int, n_host_layers: int, middle: Path, servers: tuple[str, ...]
) -> None:
    weights = weights_by_place(MIDDLE, "Q4_K_M")
    plans = [place(weights, MIDDLE, wish, [ROOM] * n_devices, n_host_layers=n_host_layers) for wish in WISHES]
    found = gaps(middle, servers[:n_devices], plans, MIDDLE.n_embd)
    assert len(found) == len(WISHES)
    assert max(found) < 64


@pytest.mark.parametrize("n_devices", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_the_demo_takes_the_memory_that_was_planned(n_devices: int, demo: Path, servers: tuple[str, ...]) -> None:
    read = read_weights(demo)
    assert read is not None
    assert read[1] == DEMO_SHAPE
    plans = [place(*read, wish, [ROOM] * n_devices) for wish in WISHES]
    assert max(gaps(demo, servers[:n_devices], plans, DEMO_SHAPE.n_embd)) < 64


@pytest.mark.parametrize("n_devices", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_parts_of_tensors_take_the_memory_that_was_planned(
    n_devices: int, middle: Path, servers: tuple[str, ...]
) -> None:
    weights = weights_by_place(MIDDLE, "Q4_K_M")
    plans = [
        place(weights, MIDDLE, replace(wish, split="tensor"), [ROOM] * n_devices)
        for wish in WISHES
        if wish.kv_type == "f16"
    ]
    settings = EngineSettings(n_ctx=512, tensor_split=plans[0].tensor_split, split_mode="tensor", use_extra_bufts=False)
    every = apart(allocated, middle, servers[:n_devices], settings, [plan.wish for plan in plans])
    for plan, found in zip(plans, every, strict=True):
        gap(plan, found, MIDDLE.n_embd)


def cards() -> list[str]:
    """Names of the CUDA devices. Runs in its own process."""
    from runtime.native_devices import devices

    return [device.name for device in devices() if device.name.startswith("CUDA")]


@pytest.mark.cuda
@pytest.mark.parametrize("n_host_layers", [0, 2])
def test_cuda_devices_take_the_memory_that_was_planned(n_host_layers: int, middle: Path) -> None:
    """`copied` and `unpacked` count against the compute buffer, which is where CUDA makes them.

    CUDA reads prompts through the host's layers too, so that the host needs no more for them than without any:
    seen on an H200. Not run again since it expects that.
    """
    if not (names := apart(cards)):
        pytest.skip("no CUDA device")
    plans = [
        place(weights_by_place(MIDDLE, "Q4_K_M"), MIDDLE, wish, [ROOM] * len(names), n_host_layers=n_host_layers)
        for wish in WISHES
    ]
    for plan in plans:
        settings = EngineSettings(n_ctx=512, tensor_split=plan.tensor_split, n_gpu_layers=plan.n_gpu_layers)
        (found,) = apart(allocated, middle, (), replace(settings, use_extra_bufts=False), [plan.wish])
        uses = tuple(
            replace(use, compute=use.compute + use.copied + use.unpacked, copied=0, unpacked=0) for use in plan.uses
        )
        host = replace(plan.host, compute=host_bytes(MIDDLE, plan.wish, len(names), 0))
        gap(replace(plan, uses=uses, host=host), found, MIDDLE.n_embd, names)
