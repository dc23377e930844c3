"""What fits where: against llama.cpp's own buffers for the exact shape, published figures, and exhaustive search."""

import ctypes
import itertools
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from quant.recipes import weights_by_place
from runtime.errors import EngineError
from runtime.events import EngineSettings
from runtime.levels import LEVELS, Shape
from runtime.placement import (
    KV_BYTES,
    Holds,
    Split,
    Weights,
    Wish,
    compute_bytes,
    fewest_host_layers,
    kv_bytes,
    largest_context,
    place,
    unpacked_bytes,
)
from tests.checkpoints import DEMO_SHAPE, MISTRAL_LARGE_2
from tests.gguf_files import write_sparse
from tests.rpc import apart

GIB, MIB = 2**30, 2**20
TWO_CARDS = (80 * GIB, 80 * GIB)
LONG = 131_072


# Figures


def test_the_kv_cache_of_one_token() -> None:
    per_token = {kv: kv_bytes(MISTRAL_LARGE_2, Wish(256, kv)) / 256 for kv in KV_BYTES}
    assert per_token == {"f16": 360_448, "q8_0": 191_488, "q4_0": 101_376}


def test_the_kv_cache_of_the_whole_context() -> None:
    gib = {kv: round(kv_bytes(MISTRAL_LARGE_2, Wish(LONG, kv)) / GIB, 1) for kv in KV_BYTES}
    assert gib == {"f16": 44.0, "q8_0": 23.4, "q4_0": 12.4}


def test_the_kv_cache_comes_in_steps_of_256_tokens() -> None:
    assert kv_bytes(MISTRAL_LARGE_2, Wish(257)) == kv_bytes(MISTRAL_LARGE_2, Wish(512))


def test_an_unknown_kv_type_is_told_with_the_known() -> None:
    with pytest.raises(EngineError, match="'q5_1' is not a KV cache type; known: f16, q8_0, q4_0"):
        kv_bytes(MISTRAL_LARGE_2, Wish(256, "q5_1"))


@pytest.mark.parametrize(
    ("level", "kv_type", "fits"),
    [
        ("BF16", "q4_0", False),
        ("Q8_0", "f16", False),
        ("Q8_0", "q8_0", True),
        ("Q6_K", "f16", True),
        ("Q4_K_M", "f16", True),
    ],
)
def test_what_two_cards_of_80_gib_hold_at_the_whole_context(level: str, kv_type: str, fits: bool) -> None:
    placement = place(weights_by_place(MISTRAL_LARGE_2, level), MISTRAL_LARGE_2, Wish(LONG, kv_type), TWO_CARDS)
    assert placement.fits is fits


def test_one_card_holds_q4_k_m_with_a_short_context() -> None:
    weights = weights_by_place(MISTRAL_LARGE_2, "Q4_K_M")
    longest = largest_context(weights, MISTRAL_LARGE_2, Wish(LONG), (80 * GIB,), LONG)
    assert 25_000 < longest < 35_000
    for n_ctx, fits in ((longest, True), (longest + 256, False)):
        assert place(weights, MISTRAL_LARGE_2, Wish(n_ctx), (80 * GIB,)).fits is fits


def test_the_longest_context_is_0_where_nothing_fits_and_the_limit_where_all_does() -> None:
    weights = weights_by_place(MISTRAL_LARGE_2, "Q2_K")
    assert largest_context(weights, MISTRAL_LARGE_2, Wish(LONG), (8 * GIB,), LONG) == 0
    assert largest_context(weights, MISTRAL_LARGE_2, Wish(LONG), TWO_CARDS, LONG) == LONG


@pytest.mark.parametrize("level", [*LEVELS, "BF16"])
def test_every_byte_has_one_place(level: str) -> None:
    weights = weights_by_place(MISTRAL_LARGE_2, level)
    placement = place(weights, MISTRAL_LARGE_2, Wish(LONG), TWO_CARDS)
    assert sum(use.weights for use in placement.uses) + weights.host == weights.total
    assert sum(use.kv for use in placement.uses) == kv_bytes(MISTRAL_LARGE_2, Wish(LONG))
    assert sum(use.n_layers for use in placement.uses) == MISTRAL_LARGE_2.n_layers


@pytest.mark.parametrize(("n_host_layers", "split"), [(0, "layer"), (30, "layer"), (88, "layer"), (0, "tensor")])
def test_layers_on_the_host_and_parts_of_tensors_are_all_counted(n_host_layers: int, split: Split) -> None:
    weights = weights_by_place(MISTRAL_LARGE_2, "Q5_K_M")
    wish = Wish(LONG, split=split)
    placement = place(weights, MISTRAL_LARGE_2, wish, (60 * GIB, 80 * GIB), n_host_layers=n_host_layers)
    host = placement.host
    assert abs(sum(use.weights for use in placement.uses) + host.embedding + host.weights - weights.total) < 2
    assert abs(sum(use.kv for use in placement.uses) + host.kv - kv_bytes(MISTRAL_LARGE_2, wish)) < 2
    assert host.weights == sum(weights.layers[:n_host_layers])
    assert placement.n_gpu_layers == {0: -1, 30: 59, 88: 1}[n_host_layers]


def test_as_few_layers_as_possible_go_to_the_host() -> None:
    weights = weights_by_place(MISTRAL_LARGE_2, "Q4_K_M")
    found = fewest_host_layers(weights, MISTRAL_LARGE_2, Wish(8192), (48 * GIB,))
    assert found is not None
    n = found.host.n_layers
    for n_host_layers, fits in ((n, True), (n - 1, False)):
        placed = place(weights, MISTRAL_LARGE_2, Wish(8192), (48 * GIB,), n_host_layers=n_host_layers)
        assert placed.fits is fits
    assert fewest_host_layers(weights, MISTRAL_LARGE_2, Wish(8192), (GIB,)) is None, "not even the output fits"


def test_every_sequence_has_whole_steps_of_the_cache() -> None:
    assert kv_bytes(MISTRAL_LARGE_2, Wish(3000, n_seq=4)) == kv_bytes(MISTRAL_LARGE_2, Wish(4 * 768))


@pytest.mark.parametrize(
    ("kv_type", "n_host_layers", "devices", "message"),
    [
        ("q8_0", 0, (1, 1), "needs a KV cache that is not quantized, and --kv is q8_0; take --kv f16, or --split-mode"),
        ("f16", 3, (1, 1), "needs all layers on the GPUs; leave out --gpu-layers"),
        (
            "f16",
            0,
            (1,) * 9,
            "needs a part of every tensor for each of 9 devices; here attention has at most 8",
        ),
    ],
)
def test_what_tensors_cannot_be_split_for_is_refused(
    kv_type: str, n_host_layers: int, devices: tuple[int, ...], message: str
) -> None:
    weights, wish = weights_by_place(MISTRAL_LARGE_2, "Q4_K_M"), Wish(8192, kv_type, split="tensor")
    with pytest.raises(EngineError, match=f"--split-mode tensor {message}"):
        place(weights, MISTRAL_LARGE_2, wish, [n * 80 * GIB for n in devices], 0, n_host_layers=n_host_layers)


# The split


def fullest(weights: Weights, shape: Shape, wish: Wish, capacities: Sequence[int], ends: Sequence[int]) -> float:
    """Fill of the fullest device where the layers are cut at `ends`."""
    fills = []
    for device, (start, end) in enumerate(itertools.pairwise([0, *ends, shape.n_layers])):
        last = device == len(capacities) - 1
        n_bytes = sum(weights.layers[start:end]) + kv_bytes(shape, wish, end - start) + last * weights.output
        if end > start or last:
            holds: Holds = "output" if end == start else "last layer" if start == shape.n_layers - 1 else "layers"
            n_bytes += compute_bytes(shape, wish, device, len(capacities), holds=holds)
            n_bytes += (end > start) * unpacked_bytes(shape, wish)
        fills.append(n_bytes / capacities[device])
    return max(fills)


@pytest.mark.parametrize("seed", range(30))
def test_the_split_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    shape = Shape(rng.randint(1, 9), 64, 128, 4, 2, 16, 1000)
    weights = Weights(rng.randint(0, 10**6), tuple(rng.randint(1, 10**7) for _ in range(shape.n_layers)), 10**6)
    wish = Wish(rng.choice([256, 4096]), rng.choice(list(KV_BYTES)), 64)
    capacities = [rng.randint(10**6, 10**8) for _ in range(rng.randint(1, 4))]
    placement = place(weights, shape, wish, capacities, reserve=0)
    ours = max(use.total / use.capacity for use in placement.uses)
    cuts = itertools.combinations_with_replacement(range(shape.n_layers + 1), len(capacities) - 1)
    assert ours == min(fullest(weights, shape, wish, capacities, ends) for ends in cuts)


def llama_layers(split: Sequence[float], n_layers: int) -> list[int]:
    """Layers a device gets, the output among them: llama.cpp 0c1e57098, src/llama-model.cpp, `load_tensors`."""
    total, cumulated = np.float32(0), []
    for share in split:
        total = np.float32(total + np.float32(share))
        cumulated.append(total)
    shares = [np.float32(share / total) for share in cumulated]
    counts = [0] * len(split)
    for layer in range(n_layers + 1):
        value = np.float32(np.float32(layer) / np.float32(n_layers + 1))
        counts[next(device for device, share in enumerate(shares) if share > value)] += 1
    return counts


@pytest.mark.parametrize("seed", range(20))
def test_the_tensor_split_survives_rounding_to_32_bits(seed: int) -> None:
    rng = random.Random(seed)
    shape = Shape(rng.choice([1, 8, 88, 126]), 64, 128, 4, 2, 16, 1000)
    weights = Weights(0, tuple(rng.randint(1, 10**7) for _ in range(shape.n_layers)), 10**6)
    capacities = [rng.choice([1, 10**6, 10**7, 10**8]) for _ in range(rng.randint(1, 6))]
    placement = place(weights, shape, Wish(256), capacities, reserve=0)
    layers = [use.n_layers for use in placement.uses]
    assert min(placement.tensor_split) >= 0
    assert llama_layers(placement.tensor_split, shape.n_layers) == [*layers[:-1], layers[-1] + 1]


def native_layers(path: Path, servers: tuple[str, ...], splits: list[tuple[float, ...]]) -> list[list[str]]:
    """For each split, the device of each layer, the output last, as llama.cpp assigns them. Runs in its own process."""
    from runtime import native
    from runtime.native_devices import register_rpc

    register_rpc(servers)
    native.LOG.lines = deque(maxlen=None)
    found = []
    for split in splits:
        model = native.Model(path, EngineSettings(n_ctx=256, tensor_split=split))
        lines = [text for _, text in native.LOG.lines]
        found.append([m[1] for line in lines if (m := re.search(r"layer +\d+ assigned to device (\w+)", line))])
        model.close()
    return found


def test_llama_cpp_lays_the_layers_as_planned(demo: Path, servers: tuple[str, ...]) -> None:
    weights = weights_by_place(DEMO_SHAPE, "BF16")
    machines = [(60, 60, 60), (30, 60, 100), (100, 40, 25), (1, 100, 100), (100, 100, 1)]
    plans = [place(weights, DEMO_SHAPE, Wish(256), [n * MIB for n in machine], reserve=0) for machine in machines]
    planned = [[f"RPC{device}" for device, use in enumerate(plan.uses) for _ in range(use.n_layers)] for plan in plans]
    assert len({tuple(plan) for plan in planned}) > 3
    actual = apart(native_layers, demo, servers, [plan.tensor_split for plan in plans])
    assert actual == [[*plan, "RPC2"] for plan in planned]


# Compute buffers, for the exact shape of the 123B model


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mistral Large 2 at Q4_K_M without its weights: 73 GB long, but only the header takes room on the disk."""
    path = write_sparse(tmp_path_factory.mktemp("large") / "large.gguf", MISTRAL_LARGE_2, "Q4_K_M", LONG)
    yield path
    path.unlink()


def native_buffers(
    path: Path, servers: tuple[str, ...], split: tuple[float, ...], wishes: list[Wish]
) -> list[list[float]]:
    """MiB of the compute buffer of each server for each wish, without allocating any. Runs in its own process."""
    import llama_cpp.llama_cpp as lib

    from runtime import native
    from runtime.native_context import KV_TYPES
    from runtime.native_devices import register_rpc

    register_rpc(servers)
    params = lib.llama_model_default_params()
    params.no_alloc, params.n_gpu_layers, params.load_mode = True, -1, 0
    shares = (ctypes.c_float * lib.llama_max_devices())(*split)
    params.tensor_split = shares
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model, native.LOG.errors()
    found = []
    for wish in wishes:
        context = lib.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = wish.n_ctx, 2048, wish.n_ubatch
        context.type_k = context.type_v = KV_TYPES[wish.kv_type]
        context.n_outputs_max, context.n_seq_max, context.flash_attn_type = 1, 1, 1
        native.LOG.clear()
        made = lib.llama_init_from_model(model, context)
        assert made, native.LOG.errors()
        log = "".join(text for _, text in native.LOG.lines)
        sizes = dict(re.findall(r"RPC\d+\[([^]]+)\] compute buffer size = +([\d.]+) MiB", log))
        found.append([float(sizes[server]) for server in servers])
        lib.llama_free(made)
    lib.llama_model_free(model)
    return found


WISHES = [
    Wish(n_ctx, kv_type, n_ubatch)
    for n_ctx, kv_type, n_ubatch in (
        (512, "f16", 512),
        (8192, "f16", 512),
        (32_768, "f16", 2048),
        (LONG, "f16", 256),
        (LONG, "f16", 512),
        (LONG, "f16", 1024),
        (LONG, "q8_0", 512),
        (LONG, "q4_0", 2048),
        (1000, "f16", 512),
        (256, "f16", 512),
    )
]


@pytest.mark.parametrize("n_devices", [1, 2, 3])
def test_the_compute_buffers_are_llama_cpps(large: Path, servers: tuple[str, ...], n_devices: int) -> None:
    split = place(weights_by_place(MISTRAL_LARGE_2, "Q4_K_M"), MISTRAL_LARGE_2, Wish(8192), [80 * GIB] * n_devices)
    actual = apart(native_buffers, large, servers[:n_devices], split.tensor_split, WISHES)
    for wish, sizes in zip(WISHES, actual, strict=True):
        for device, mib in enumerate(sizes):
            planned = compute_bytes(MISTRAL_LARGE_2, wish, device, n_devices) / MIB
            spared = 0 if wish.kv_type == "f16" else wish.n_ubatch * MISTRAL_LARGE_2.n_embd * 4 / MIB
            assert -0.01 < planned - mib < spared + 0.01, (wish, device, mib, planned)


ON_CUDA = {
    ("f16", 8192, 512): 248.01,
    ("f16", 65_536, 2048): 1216.04,
    ("f16", LONG, 512): 368.01,
    ("f16", LONG, 2048): 1472.04,
    ("q8_0", 8192, 512): 248.09,
    ("q8_0", 32_768, 512): 272.09,
    ("q8_0", 65_536, 512): 416.09,
    ("q8_0", 66_048, 512): 418.59,
    ("q8_0", 98_304, 512): 576.09,
    ("q8_0", LONG, 512): 736.09,
    ("q8_0", LONG, 2048): 1472.12,
    ("q4_0", 32_768, 1024): 544.10,
    ("q4_0", 66_048, 2048): 1218.12,
    ("q4_0", 98_304, 512): 576.09,
    ("q4_0", LONG, 512): 736.09,
}
"""(KV type, context, ubatch) → MiB of the compute buffer of one NVIDIA H200 (driver 580.159.04, CUDA 13.0), as
llama.cpp 0c1e57098 logged it on 2026-11-26 for the shape of Mistral Large 2 with flash attention."""


@pytest.mark.parametrize(("kv_type", "n_ctx", "n_ubatch"), ON_CUDA)
def test_the_compute_buffer_is_what_cuda_took(kv_type: str, n_ctx: int, n_ubatch: int) -> None:
    weights, wish = weights_by_place(MISTRAL_LARGE_2, "Q4_K_M"), Wish(n_ctx, kv_type, n_ubatch)
    (use,) = place(weights, MISTRAL_LARGE_2, wish, [140 * GIB]).uses
    assert (use.compute + use.unpacked) / MIB == pytest.approx(ON_CUDA[kv_type, n_ctx, n_ubatch], abs=0.1)
