"""Every build of the kernels that this processor runs, against ggml, to the byte."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant import kernels
from quant.kernels import GGML, TYPES, Kernels, built
from runtime.ggml import GgmlType, block_bytes, row_bytes

Rows = NDArray[np.float32]

SHAPE = (13, 1280)
"""65 super-blocks: whole tiles and a rest, at any number of lanes."""


def _distributions() -> Iterator[tuple[str, Rows]]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(SHAPE).astype(np.float32)
    yield "normal", normal * np.float32(0.02)
    yield "BF16", ((normal * np.float32(0.02)).view(np.uint32) & 0xFFFF0000).view(np.float32)
    yield "heavy tails", normal**5
    yield "uniform", rng.uniform(-1, 1, SHAPE).astype(np.float32)
    yield "all positive", np.abs(normal) + np.float32(3)
    yield "all negative", -np.abs(normal) - np.float32(3)
    yield "far from zero", normal * np.float32(1e-6) - np.float32(1000)
    yield "tiny", normal * np.float32(1e-20)
    yield "denormal", normal * np.float32(1e-40)
    yield "huge", normal * np.float32(1e4)
    yield "mostly zero", np.where(rng.random(SHAPE) < 0.95, np.float32(0), normal)
    yield "zero", np.zeros(SHAPE, np.float32)
    yield "minus zero", np.full(SHAPE, -0.0, np.float32)
    yield "constant", np.full(SHAPE, 0.37, np.float32)
    yield "negative constant", np.full(SHAPE, -0.37, np.float32)
    yield "a grid", (np.round(normal * 3) / np.float32(7)).astype(np.float32)
    yield "rows of many sizes", (normal * np.exp(rng.uniform(-20, 20, (SHAPE[0], 1)))).astype(np.float32)
    outliers = normal * np.float32(0.02)
    outliers[:, ::64] *= 1000
    yield "outliers", outliers
    halves = normal.copy()
    halves[:, :640] = 0
    yield "half zero", halves


def _importances() -> Iterator[tuple[str, Rows | None]]:
    rng = np.random.default_rng(1)
    yield "none", None
    yield "gamma", rng.gamma(0.3, 2, SHAPE[1]).astype(np.float32)
    yield "equal", np.ones(SHAPE[1], np.float32)
    yield "some zero", (rng.random(SHAPE[1]) < 0.5).astype(np.float32)
    yield "of many sizes", np.exp(rng.uniform(-20, 20, SHAPE[1])).astype(np.float32)


def _encoded(kernels_: Kernels, rows: Rows, type_: GgmlType, importance: Rows | None) -> NDArray[np.uint8]:
    out = np.full(rows.shape[0] * row_bytes(type_, rows.shape[1]), 0xAA, np.uint8)
    kernels_.encode(rows, type_, out, importance)
    return out.reshape(-1, block_bytes(type_))


DISTRIBUTIONS, IMPORTANCES = dict(_distributions()), dict(_importances())
BUILDS: Mapping[int, Kernels] = built()


def test_they_are_built_here() -> None:
    """CI has a compiler, so that all else in this module is tested."""
    assert 4 in BUILDS
    assert kernels.best().lanes == max(BUILDS)


@pytest.mark.parametrize("lanes", BUILDS)
@pytest.mark.parametrize("type_", TYPES, ids=lambda type_: type_.name)
@pytest.mark.parametrize("importance", IMPORTANCES.values(), ids=IMPORTANCES.keys())
def test_every_block_is_ggmls(lanes: int, type_: GgmlType, importance: Rows | None) -> None:
    for name, rows in DISTRIBUTIONS.items():
        ours, theirs = (_encoded(way, rows, type_, importance) for way in (BUILDS[lanes], GGML))
        assert not (ours != theirs).any(axis=1).any(), name


@pytest.mark.parametrize("lanes", BUILDS)
@pytest.mark.parametrize("n_blocks", [1, 2, 3, 5, 7, 9, 15, 17, 31, 33])
def test_a_tile_may_be_filled_in_part(lanes: int, n_blocks: int) -> None:
    rows = DISTRIBUTIONS["heavy tails"].reshape(1, -1)[:, : n_blocks * 256].copy()
    importance = np.random.default_rng(2).gamma(0.3, 2, rows.size).astype(np.float32)
    for type_ in TYPES:
        for weights in (None, importance):
            ours, theirs = (_encoded(way, rows, type_, weights) for way in (BUILDS[lanes], GGML))
            assert np.array_equal(ours, theirs), type_


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    size=st.floats(-25, 8),
    spread=st.floats(0, 12),
    offset=st.floats(-4, 4),
    zeros=st.floats(0, 1),
    weighted=st.booleans(),
)
def test_blocks_of_any_weights_are_ggmls(
    seed: int, size: float, spread: float, offset: float, zeros: float, weighted: bool
) -> None:
    rng = np.random.default_rng(seed)
    scale = np.exp(size + spread * rng.standard_normal(768))
    rows = np.clip((rng.standard_normal((3, 768)) + offset) * scale, -6e4, 6e4).astype(np.float32)
    rows[rng.random(rows.shape) < zeros / 2] = 0
    importance = np.exp(spread * rng.standard_normal(768)).astype(np.float32) if weighted else None
    for type_ in TYPES:
        theirs = _encoded(GGML, rows, type_, importance)
        for lanes, ours in BUILDS.items():
            assert np.array_equal(_encoded(ours, rows, type_, importance), theirs), (lanes, type_)


def test_other_types_are_left_to_ggml() -> None:
    rows = DISTRIBUTIONS["normal"]
    for type_ in (GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.F16, GgmlType.BF16, GgmlType.F32):
        ours, theirs = (_encoded(way, rows, type_, None) for way in (kernels.best(), GGML))
        assert np.array_equal(ours, theirs), type_


def test_without_a_compiler_the_installation_goes_on() -> None:
    """And with one that knows none of the flags."""
    script = "from pathlib import Path; from quant.kernels.build import compile_kernels; print(compile_kernels(Path()))"
    for compiler, words in (("no-such-compiler", "no C++ compiler found"), ("false", "failed")):
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "CXX": compiler},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout == "[]\n"
        assert words in run.stderr


def test_libraries_of_another_interface_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of an older checkout: a call with other arguments would end the process."""
    monkeypatch.setattr(kernels, "_INTERFACE", 0)
    assert kernels.built.__wrapped__() == {}
