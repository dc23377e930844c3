"""The longer search: what it finds is read back by ggml and weighed by hand."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.blocks import encode
from quant.kernels import GGML, SEARCHED, TYPES, KernelsError, best, built
from runtime.ggml import GgmlType, block_bytes, dequantize, validate
from runtime.levels import Search
from tests.test_kernels import BUILDS, DISTRIBUTIONS, IMPORTANCES, SHAPE

Rows = NDArray[np.float32]

GAIN = 2
"""How much more a miss along the weights costs (measure.h)."""

Columns = tuple[Rows | None, Rows | None]
"""Importance and means."""


def _columns() -> Iterator[tuple[str, Columns]]:
    """Every importance alone, and two with means that take up to all of it."""
    rng = np.random.default_rng(3)
    for name, importance in IMPORTANCES.items():
        yield name, (importance, None)
    for name in ("gamma", "some zero"):
        importance = IMPORTANCES[name]
        assert importance is not None
        share = rng.uniform(-1, 1, importance.shape)
        yield f"{name} with means", (importance, (share * np.sqrt(importance)).astype(np.float32))


COLUMNS = dict(_columns())


def _blocks(rows: Rows, type_: GgmlType, columns: Columns, search: Search, lanes: int = 4) -> NDArray[np.uint8]:
    out = np.empty(rows.size // 256 * block_bytes(type_), np.uint8)
    importance, means = columns
    BUILDS[lanes].encode(rows, type_, out, importance, search, means)
    return out


def _costs(rows: Rows, type_: GgmlType, columns: Columns, blocks: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of each super-block, by the measure of measure.h: (super-blocks,)."""
    back = np.empty_like(rows)
    dequantize(blocks, type_, back)
    with np.errstate(invalid="ignore"):  # ggml makes scales of a few of these rows infinite
        x, miss = (array.reshape(-1, 256).astype(np.float64) for array in (rows, rows - back))
        importance, means = (
            np.tile(column if column is not None else np.full(rows.shape[1], other), len(rows)).reshape(-1, 256)
            for column, other in zip(columns, (1.0, 0.0), strict=True)
        )
        weight = np.maximum(importance - means.astype(np.float64) ** 2, 0.1 * importance)
        gain = (weight * x * miss).sum(axis=1) ** 2 / np.maximum((weight * x**2).sum(axis=1), 1e-300)
        costs: NDArray[np.float64] = (weight * miss**2).sum(axis=1) + (means * miss).sum(axis=1) ** 2 + GAIN * gain
    return costs


@pytest.mark.parametrize("type_", SEARCHED, ids=lambda type_: type_.name)
@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS.keys())
def test_no_super_block_is_worse_than_ggmls(type_: GgmlType, columns: Columns) -> None:
    """A level halfway between two may fall either way, hence the last digits."""
    for name, rows in DISTRIBUTIONS.items():
        before, after = (
            _costs(rows, type_, columns, _blocks(rows, type_, columns, search)) for search in (Search.GGML, Search.BEST)
        )
        usable = np.isfinite(before)
        assert (after[usable] <= before[usable] * (1 + 1e-4) + 1e-30).all(), name


@pytest.mark.parametrize("type_", SEARCHED, ids=lambda type_: type_.name)
@pytest.mark.parametrize("name", ["none", "gamma", "gamma with means"])
def test_ordinary_weights_cost_less_in_most_super_blocks(type_: GgmlType, name: str) -> None:
    rows, columns = DISTRIBUTIONS["BF16"], COLUMNS[name]
    before, after = (
        _costs(rows, type_, columns, _blocks(rows, type_, columns, search)) for search in (Search.GGML, Search.BEST)
    )
    assert (after < before).mean() > 0.9
    assert after.sum() < 0.98 * before.sum()


@pytest.mark.parametrize("type_", SEARCHED, ids=lambda type_: type_.name)
@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS.keys())
def test_every_build_makes_the_same_blocks_and_they_are_valid_where_ggmls_are(
    type_: GgmlType, columns: Columns
) -> None:
    for name, rows in DISTRIBUTIONS.items():
        first, *others = (_blocks(rows, type_, columns, Search.BEST, lanes) for lanes in BUILDS)
        assert all(np.array_equal(first, other) for other in others), name
        assert validate(first, type_) or not validate(_blocks(rows, type_, columns, Search.GGML), type_), name


def test_how_a_tile_is_filled_changes_nothing() -> None:
    rows = DISTRIBUTIONS["BF16"].reshape(1, -1)[:, : 33 * 256].copy()
    for type_ in SEARCHED:
        whole = _blocks(rows, type_, (None, None), Search.BEST, max(BUILDS)).reshape(-1, block_bytes(type_))
        for i in range(33):
            alone = _blocks(rows[:, i * 256 : (i + 1) * 256].copy(), type_, (None, None), Search.BEST, max(BUILDS))
            assert np.array_equal(alone, whole[i]), (type_, i)


def test_a_type_with_one_search_is_made_as_ever() -> None:
    rows = DISTRIBUTIONS["normal"]
    for type_ in (GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.Q5_1, GgmlType.F16):
        assert np.array_equal(encode(rows, type_, search=Search.BEST), encode(rows, type_)), type_


def test_ggmls_kernels_say_that_they_have_one_search() -> None:
    rows = np.ones((1, 256), np.float32)
    with pytest.raises(KernelsError, match=r"ggml's kernels know only ggml's search, and Q4_K is wanted by the best"):
        encode(rows, GgmlType.Q4_K, kernels=GGML, search=Search.BEST)


def test_these_are_all_builds() -> None:
    assert built() == BUILDS
    assert best() in BUILDS.values()
    assert set(SEARCHED) < set(TYPES)
    assert SHAPE[0] * SHAPE[1] // 256 % 4 == 1
