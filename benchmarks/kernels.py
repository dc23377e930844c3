"""How fast blocks are made: every build of the kernels beside ggml's own, type by type, for six levels, on every core.

One core is measured in CPU time of a thread that is pinned to it, in rounds in which all sides take turns, so that
ratios are of neighbours in time. All cores are measured in wall time too, which hears what else the machine does. What
the sides make is compared byte by byte, and a difference fails the run.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments import MISTRAL_LARGE, SIX
from benchmarks.results import CoreSpeed, KernelSpeed, KernelSpeeds, SideSpeed
from quant.blocks import encode, to_float32
from quant.kernels import GGML, SEARCHED, TYPES, Kernels, built
from quant.recipes import tensors, types
from runtime.errors import UserError
from runtime.ggml import GgmlType
from runtime.levels import Search, Shape

Rows = NDArray[Any]

N_ROWS, ROW_LENGTH = 16, 4096
"""Of one call: as float32, an eighth of what the converter hands a thread."""

DTYPES = (GgmlType.F32, GgmlType.BF16)
"""Of the rows."""

FAMILY_ROWS = 64
"""Of the stream of which six levels are made."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long is measured."""

    rounds: int
    """In which every side is measured once."""
    sample_seconds: float
    """At least, of one side in one round."""


EFFORTS = {"full": Effort(9, 0.02), "small": Effort(5, 0.01), "demo": Effort(1, 0.001)}


def kernel_speeds(effort: Effort, cores: Sequence[int], say: Callable[[str], None]) -> KernelSpeeds:
    """Everything about the kernels. `cores` are the numbers of those to use. Raises UserError where bytes differ."""
    ways = (GGML, *built().values())
    by_type = []
    with pinned(cores[-1]):
        for type_ in TYPES:
            for weighted in (False, True) if type_ is not GgmlType.Q8_0 else (False,):
                by_type += [_one_type(type_, dtype, ways, effort, weighted=weighted) for dtype in DTYPES]
            say(f"kernels: {type_.name}")
        longer = [_longer(type_, ways[-1], effort, weighted=on) for type_ in SEARCHED for on in (False, True)]
        say("kernels: the longer search")
        family = tuple(_family(ways, effort, weighted=weighted) for weighted in (False, True))
        say(f"kernels: {len(SIX)} levels")
    together = tuple(_together(ways[-1], cores, effort, weighted=weighted) for weighted in (False, True))
    say(f"kernels: {len(cores)} cores")
    return KernelSpeeds(tuple(by_type), tuple(longer), family, together)


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This thread on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def paired(sides: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    """Name of a side → CPU seconds of one call, in each round. Each round begins with another side."""
    calls = {}
    for name, side in sides.items():
        calls[name] = max(round(effort.sample_seconds / _cpu_seconds(side, 1)), 1)
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(effort.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(_cpu_seconds(sides[name], calls[name]))
    return found


def family_pieces(shape: Shape, levels: Sequence[str], n_rows: int) -> list[tuple[int, tuple[GgmlType, ...]]]:
    """Rows, and the types that levels want of them, as the weights of a model are shared out among such sets of types.

    Each type is made once, however many levels want it.
    """
    weights: dict[tuple[GgmlType, ...], int] = {}
    chosen = [types(shape, level) for level in levels]
    for spec in tensors(shape):
        wanted = tuple(sorted({level[spec.name] for level in chosen}))
        weights[wanted] = weights.get(wanted, 0) + (0 if spec.is_vector else spec.n_elements)
    total = sum(weights.values())
    pieces = [(round(n_rows * count / total), wanted) for wanted, count in weights.items()]
    return [(count, wanted) for count, wanted in pieces if count]


def _one_type(
    type_: GgmlType, dtype: GgmlType, ways: Sequence[Kernels], effort: Effort, *, weighted: bool
) -> KernelSpeed:
    stored = _weights(N_ROWS, dtype)
    importance = _importance() if weighted else None

    def make(way: Kernels) -> NDArray[np.uint8]:
        return encode(to_float32(stored, dtype), type_, importance, kernels=way)

    check_same({way.name: make(way).tobytes() for way in ways}, type_.name)
    seconds = paired({way.name: partial(make, way) for way in ways}, effort)
    return _speed(type_.name, dtype, seconds, stored.size, weighted=weighted)


def _longer(type_: GgmlType, way: Kernels, effort: Effort, *, weighted: bool) -> KernelSpeed:
    """The longer search, which makes other blocks, beside ggml's kernels. With means where there is a matrix."""
    rows = _weights(N_ROWS, GgmlType.F32)
    importance = _importance() if weighted else None
    means = (np.sqrt(importance) / 2).astype(np.float32) if importance is not None else None
    sides: dict[str, Callable[[], object]] = {
        GGML.name: lambda: encode(rows, type_, importance, kernels=GGML),
        f"{way.name}, longer": lambda: encode(rows, type_, importance, kernels=way, search=Search.BEST, means=means),
    }
    return _speed(type_.name, GgmlType.F32, paired(sides, effort), rows.size, weighted=weighted)


def _family(ways: Sequence[Kernels], effort: Effort, *, weighted: bool) -> KernelSpeed:
    work = _Family(weighted=weighted)
    check_same({way.name: work.make(way) for way in ways}, f"{len(SIX)} levels")
    seconds = paired({way.name: partial(work.make, way) for way in ways}, effort)
    return _speed(f"{len(SIX)} levels", GgmlType.BF16, seconds, work.n_weights, weighted=weighted)


class _Family:
    """A stream of BF16 rows of which six levels are made."""

    def __init__(self, *, weighted: bool) -> None:
        self._pieces = family_pieces(MISTRAL_LARGE, SIX, FAMILY_ROWS)
        self._rows = [_weights(count, GgmlType.BF16) for count, _ in self._pieces]
        self._importance = _importance() if weighted else None
        self.n_weights = sum(rows.size for rows in self._rows)

    def make(self, way: Kernels) -> bytes:
        """The last blocks of every type, to compare."""
        made = []
        for stored, (_, wanted) in zip(self._rows, self._pieces, strict=True):
            rows = to_float32(stored, GgmlType.BF16)
            made += [encode(rows, type_, self._importance, kernels=way)[-512:] for type_ in wanted]
        return b"".join(blocks.tobytes() for blocks in made)


def _together(way: Kernels, cores: Sequence[int], effort: Effort, *, weighted: bool) -> CoreSpeed:
    """Six levels on one core, and on all of them at once, in turn."""
    work = [_Family(weighted=weighted) for _ in cores]
    calls = max(round(10 * effort.sample_seconds / _cpu_seconds(partial(work[0].make, way), 1)), 1)
    alone, together = [], []
    for _ in range(effort.rounds):
        alone.append(_at_once(way, work[:1], cores[:1], calls))
        together.append(_at_once(way, work, cores, calls))
    n_weights = work[0].n_weights * calls
    wall = [len(cores) * one[0] / all_[0] for one, all_ in zip(alone, together, strict=True)]
    cpu = [len(cores) * one[1] / (all_[1] / len(cores)) for one, all_ in zip(alone, together, strict=True)]
    return CoreSpeed(
        build=way.name,
        importance=weighted,
        cores=len(cores),
        one_core=n_weights / median(wall_seconds for wall_seconds, _ in alone),
        all_cores=len(cores) * n_weights / median(wall_seconds for wall_seconds, _ in together),
        wall_ratios=_spread(wall),
        cpu_ratios=_spread(cpu),
    )


def _at_once(way: Kernels, work: Sequence[_Family], cores: Sequence[int], calls: int) -> tuple[float, float]:
    """Wall seconds until every core has done its work, and the CPU seconds of all."""
    barrier = threading.Barrier(len(work) + 1)
    cpu = [0.0] * len(work)

    def run(i: int) -> None:
        with pinned(cores[i]):
            barrier.wait()
            cpu[i] = _cpu_seconds(partial(work[i].make, way), calls) * calls

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, sum(cpu)


def _speed(
    name: str, dtype: GgmlType, seconds: Mapping[str, Sequence[float]], n_weights: int, *, weighted: bool
) -> KernelSpeed:
    theirs = seconds[GGML.name]
    builds = tuple(
        SideSpeed(build, n_weights / median(ours), _spread([a / b for a, b in zip(theirs, ours, strict=True)]))
        for build, ours in seconds.items()
        if build != GGML.name
    )
    return KernelSpeed(name, dtype.name, weighted, n_weights / median(theirs), builds)


def _spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    return min(ratios), median(ratios), max(ratios)


def check_same(made: Mapping[str, bytes], name: str) -> None:
    """Raises UserError where a side makes other bytes than ggml."""
    for way, data in made.items():
        if data != made[GGML.name]:
            raise UserError(f"the kernels {way} make other blocks of {name} than ggml")


def _cpu_seconds(side: Callable[[], object], calls: int) -> float:
    """Of one call, on average, in this thread."""
    began = time.thread_time()
    for _ in range(calls):
        side()
    return (time.thread_time() - began) / calls


def _weights(n_rows: int, dtype: GgmlType) -> Rows:
    """Normal weights of the spread that trained ones have, exact in BF16, as F32 or as the bits of BF16."""
    numbers = np.random.default_rng(0).standard_normal((n_rows, ROW_LENGTH)).astype(np.float32) * np.float32(0.02)
    bits = numbers.view(np.uint32) >> np.uint32(16)
    return (bits << np.uint32(16)).view(np.float32) if dtype is GgmlType.F32 else bits.astype(np.uint16)


def _importance() -> NDArray[np.float32]:
    """Of the columns: most small, some large."""
    return np.random.default_rng(1).gamma(0.3, 2, ROW_LENGTH).astype(np.float32) + np.float32(1e-3)
