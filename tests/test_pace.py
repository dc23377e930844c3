"""Rates and times left, by a clock that tests move."""

import pytest

from runtime.pace import Pace, Stride


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_counts_what_was_done_since_the_beginning() -> None:
    clock = Clock()
    pace = Pace(1000, 200, clock)
    assert pace.at(200) == (None, None)
    clock.now += 2
    assert pace.at(300) == (50.0, 14.0)
    clock.now += 2
    assert pace.at(1000) == (200.0, 0.0)


def test_a_rate_is_not_told_too_early_or_of_nothing() -> None:
    clock = Clock()
    pace = Pace(1000, clock=clock)
    clock.now += 0.1
    assert pace.at(10) == (None, None)
    clock.now += 5
    assert Pace(1000, clock=clock).at(0) == (None, None)


def test_a_rate_forgets_what_lies_ten_seconds_back() -> None:
    """From the page cache first, 1000 a second; then from the disk, 10 a second."""
    clock = Clock()
    pace = Pace(2000, clock=clock)
    clock.now += 1
    assert pace.at(1000) == (1000.0, 1.0)
    for second in range(1, 20):
        clock.now += 1
        rate, left = pace.at(1000 + 10 * second)
    assert rate == pytest.approx(10)
    assert left == pytest.approx((2000 - 1190) / 10)


def test_a_stride_stays_between_half_a_second_and_two() -> None:
    stride = Stride(512, 2048)
    taken = []
    for seconds in (0.1, 0.1, 0.1, 1.0, 3.0, 3.0, 3.0, 0.1):
        taken.append(stride.tokens)
        stride.took(seconds)
    assert taken == [512, 1024, 2048, 2048, 2048, 1024, 512, 512]
    assert stride.tokens == 1024


@pytest.mark.parametrize(("n_ubatch", "n_batch", "most"), [(512, 512, 512), (100, 350, 300), (64, 32, 64)])
def test_a_stride_is_whole_ubatches_of_a_batch(n_ubatch: int, n_batch: int, most: int) -> None:
    stride = Stride(n_ubatch, n_batch)
    for _ in range(5):
        assert stride.tokens % n_ubatch == 0
        stride.took(0.0)
    assert stride.tokens == most
