"""Cutting tensors into parts: against llama.cpp's arithmetic as its source writes it, for many shapes and shares."""

import random
from math import lcm

import numpy as np
import pytest

from runtime.levels import Shape
from runtime.parts import all_have_a_part, apportioned, n_groups
from tests.checkpoints import DEMO_SHAPE, MISTRAL_LARGE_2


def cut(n_elements: int, granularity: int, shares: list[float], rotation: int) -> list[int]:
    """Elements of each device: llama.cpp 0c1e57098, src/llama-model.cpp, `llama_meta_device_get_split_state`."""
    n = len(shares)
    scan = np.cumsum([np.float32(shares[(j + rotation) % n]) for j in range(n)], dtype=np.float32)
    low, found = 0, [0] * n
    for j in range(n - 1):
        high = int(np.float32(np.float32(n_elements) * scan[j]) / scan[-1])
        high -= high % granularity
        found[(j + rotation) % n] = high - low
        low = high
    found[(n - 1 + rotation) % n] = n_elements - low
    return found


def attention(shape: Shape, block: int, n_devices: int) -> tuple[int, int]:
    """Width of attn_output's rows, and the granularity it is cut at."""
    group = shape.n_heads // shape.n_heads_kv * shape.head_dim
    wide = block
    while wide < 128 and wide * n_devices < group:
        wide *= 2
    return shape.n_heads * shape.head_dim, lcm(group, wide)


@pytest.mark.parametrize("seed", range(40))
def test_every_device_gets_what_was_apportioned(seed: int) -> None:
    rng = random.Random(seed)
    heads_kv, dim = rng.choice([2, 4, 8, 16]), rng.choice([64, 128])
    shape = Shape(2, 2048, 256 * rng.randint(16, 64), heads_kv * rng.choice([1, 4, 8, 12]), heads_kv, dim, 1000)
    block, n = rng.choice([1, 32, 256]), rng.randint(2, 4)
    groups = n_groups(shape, block, n)
    if groups < n:
        assert not all_have_a_part(shape, block, [1] * n)
        return
    parts = apportioned(groups, [rng.randint(10, 80) for _ in range(n)])
    assert sum(parts) == groups
    width, granularity = attention(shape, block, n)
    for rotation in range(n):
        assert cut(width, granularity, list(map(float, parts)), rotation) == [part * granularity for part in parts]
        if all_have_a_part(shape, block, parts):
            assert min(cut(shape.n_ff, lcm(block, 128), list(map(float, parts)), rotation)) > 0


@pytest.mark.parametrize("seed", range(40))
def test_shares_that_leave_a_device_without_a_part_are_known(seed: int) -> None:
    rng = random.Random(seed)
    n, block = rng.randint(2, 4), rng.choice([1, 32, 256])
    shares = [float(rng.randint(1, 9)) for _ in range(n)]
    for shape in (MISTRAL_LARGE_2, DEMO_SHAPE):
        width, granularity = attention(shape, block, n)
        least = min(
            part
            for rotation in range(n)
            for part in (
                *cut(width, granularity, shares, rotation),
                *cut(shape.n_ff, lcm(block, 128), shares, rotation),
            )
        )
        assert all_have_a_part(shape, block, shares) is (least > 0), (shape, shares, least)


def test_memory_decides_about_the_groups() -> None:
    assert apportioned(8, [80, 80]) == (4, 4)
    assert apportioned(8, [80, 79]) == (4, 4), "nearly even is even"
    assert apportioned(8, [24, 80]) == (2, 6)
    assert apportioned(8, [1, 80]) == (1, 7)
