"""The longer search: what it finds is read back by ggml and weighed by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.blocks import encode
from quant.kernels import GGML, SEARCHED, TYPES, KernelsError, best, built
from runtime.ggml import GgmlType, block_bytes, dequantize, validate
from runtime.levels import Search
from tests.test_kernels import BUILDS, DISTRIBUTIONS, IMPORTANCES, SHAPE

Rows = NDArray[np.float32]

SIGMA_FACTOR = {GgmlType.Q2_K: 1, GgmlType.Q6_K: 1}
"""Of the mean square in the measure with an importance matrix, where it is not 2 as in ggml's own."""


def _blocks(rows: Rows, type_: GgmlType, importance: Rows | None, search: Search, lanes: int = 4) -> NDArray[np.uint8]:
    out = np.empty(rows.size // 256 * block_bytes(type_), np.uint8)
    BUILDS[lanes].encode(rows, type_, out, importance, search)
    return out


def _errors(rows: Rows, type_: GgmlType, importance: Rows | None, blocks: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of each super-block, by the measure of refine.h: (super-blocks,)."""
    back = np.empty_like(rows)
    dequantize(blocks, type_, back)
    with np.errstate(invalid="ignore"):  # ggml makes scales of a few of these rows infinite
        x, miss = (array.reshape(-1, 256).astype(np.float64) for array in (rows, rows - back))
    factor = 1 if importance is None else SIGMA_FACTOR.get(type_, 2)
    weight = np.sqrt(factor * (x**2).mean(axis=1, keepdims=True) + x**2)
    if importance is not None:
        weight *= np.tile(importance, len(rows)).reshape(-1, 256)
    with np.errstate(invalid="ignore"):
        sums: NDArray[np.float64] = (weight * miss**2).sum(axis=1)
    return sums


@pytest.mark.parametrize("type_", SEARCHED, ids=lambda type_: type_.name)
@pytest.mark.parametrize("importance", IMPORTANCES.values(), ids=IMPORTANCES.keys())
def test_no_super_block_is_worse_than_ggmls(type_: GgmlType, importance: Rows | None) -> None:
    """A level halfway between two may fall either way, hence the last digits."""
    for name, rows in DISTRIBUTIONS.items():
        before, after = (
            _errors(rows, type_, importance, _blocks(rows, type_, importance, search))
            for search in (Search.GGML, Search.BEST)
        )
        usable = np.isfinite(before)
        assert (after[usable] <= before[usable] * (1 + 1e-4) + 1e-30).all(), name


@pytest.mark.parametrize("type_", SEARCHED, ids=lambda type_: type_.name)
@pytest.mark.parametrize("importance", ["none", "gamma"])
def test_ordinary_weights_lose_error_in_most_super_blocks(type_: GgmlType, importance: str) -> None:
    rows, weights = DISTRIBUTIONS["BF16"], IMPORTANCES[importance]
    before, after = (
        _errors(rows, type_, weights, _blocks(rows, type_, weights, search)) for search in (Search.GGML, Search.BEST)
    )
    assert (after < before).mean() > 0.9
    assert after.sum() < 0.98 * before.sum()


@pytest.mark.parametrize("type_", SEARCHED, ids=lambda type_: type_.name)
@pytest.mark.parametrize("importance", IMPORTANCES.values(), ids=IMPORTANCES.keys())
def test_every_build_makes_the_same_blocks_and_they_are_valid_where_ggmls_are(
    type_: GgmlType, importance: Rows | None
) -> None:
    for name, rows in DISTRIBUTIONS.items():
        first, *others = (_blocks(rows, type_, importance, Search.BEST, lanes) for lanes in BUILDS)
        assert all(np.array_equal(first, other) for other in others), name
        assert validate(first, type_) or not validate(_blocks(rows, type_, importance, Search.GGML), type_), name


def test_how_a_tile_is_filled_changes_nothing() -> None:
    rows = DISTRIBUTIONS["BF16"].reshape(1, -1)[:, : 33 * 256].copy()
    for type_ in SEARCHED:
        whole = _blocks(rows, type_, None, Search.BEST, max(BUILDS)).reshape(-1, block_bytes(type_))
        for i in range(33):
            alone = _blocks(rows[:, i * 256 : (i + 1) * 256].copy(), type_, None, Search.BEST, max(BUILDS))
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
