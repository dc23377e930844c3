"""A conversion plan → what it costs: memory, disk, time. What `--dry-run` prints, in numbers.

Sizes follow from the plan. Memory is added up from what the threads hold. Time comes from a short calibration: every
type the plan needs is made of random weights for a few hundredths of a second on one core. Nothing is written.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant.blocks import chunks, encode, to_float32
from quant.digest import CROWD, PIECE_BYTES
from quant.disks import Disk, disks
from quant.kernels import Kernels, best
from quant.naming import is_rotary
from quant.plan import ConversionPlan
from quant.recipes import Encoding, TensorSpec
from quant.shards import LevelState, demand
from quant.work import WINDOW
from runtime.ggml import GgmlType, initialize, row_bytes

CALIBRATION_SECONDS = 0.05
"""For each type."""

CALIBRATION_ROWS, CALIBRATION_COLUMNS = 8, 4096


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan costs on this machine."""

    threads: int
    peak_memory_bytes: int
    """Resident memory of the process at its highest."""
    disks: tuple[Disk, ...]
    seconds: float
    """Of computing on all threads, if the disks keep up."""
    read_bytes_per_second: float
    """What the source's disk must give for that."""
    write_bytes_per_second: float
    """What the targets' disks must take for that, together."""


def estimate(
    plan: ConversionPlan, threads: int, states: Mapping[str, LevelState], kernels: Kernels | None = None
) -> Estimate:
    """Calibrate and add up. `states` says by level what is there already: it needs no more room.

    Time and memory are those of the whole plan.
    """
    seconds = sum(_seconds(plan, kernels or best())) / threads
    return Estimate(
        threads=threads,
        peak_memory_bytes=peak_memory_bytes(plan, threads),
        disks=disks(demand(level, states[level.level]) for level in plan.levels if not states[level.level].complete),
        seconds=seconds,
        read_bytes_per_second=plan.read_bytes / seconds,
        write_bytes_per_second=plan.write_bytes / seconds,
    )


def peak_memory_bytes(plan: ConversionPlan, threads: int) -> int:
    """What this process holds now, and what the threads will: it depends on the widest tensor, not on the layers.

    A thread holds the chunk as stored (twice while rows are put in order) and as float32, and reads back pieces of a
    resumed file; the window holds blocks that wait for their turn to be hashed. A third more is what the C library
    keeps of memory that was given back.
    """
    widest = 0
    for spec, encodings in encodings_wanted(plan).items():
        chunk = next(chunks(spec, plan.source.shape.head_dim if is_rotary(spec) else 1))
        weights = chunk.count * spec.row_length
        stored = weights * plan.source.tensors[spec.name].row_bytes // spec.row_length
        blocks = sum(chunk.count * row_bytes(encoding.type, spec.row_length) for encoding in encodings)
        widest = max(widest, threads * (2 * stored + 4 * weights + PIECE_BYTES) + (WINDOW * threads + CROWD) * blocks)
    headers = sum(len(file.header) for level in plan.levels for file in level.files)
    return resident_bytes() + headers + widest * 4 // 3


def encodings_wanted(plan: ConversionPlan) -> dict[TensorSpec, set[Encoding]]:
    """Tensor → the encodings that some level wants it in; each is made once."""
    wanted: dict[TensorSpec, set[Encoding]] = {spec: set() for spec in plan.source.specs}
    for level in plan.levels:
        for tensor in level.tensors:
            wanted[tensor.spec].add(tensor.encoding)
    return wanted


def resident_bytes() -> int:
    """Memory that this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def as_json(plan: ConversionPlan, cost: Estimate, states: Mapping[str, LevelState]) -> dict[str, Any]:
    """The object that `--dry-run --json` prints. Bytes and seconds."""
    return {
        "source": {"path": str(plan.source.path), "kind": plan.source.kind, "read_bytes": plan.read_bytes},
        "levels": {
            level.level: {
                "state": states[level.level].word,
                "tensor_bytes": level.tensor_bytes,
                "file_bytes": level.n_bytes,
                "bits_per_weight": level.bits_per_weight,
                "shards": [{"path": str(file.path), "bytes": file.n_bytes} for file in level.files],
                "types": {tensor.spec.name: tensor.type.name for tensor in level.tensors},
            }
            for level in plan.levels
        },
        "threads": cost.threads,
        "peak_memory_bytes": cost.peak_memory_bytes,
        "disk": [
            {
                "mount": str(disk.folder),
                "needed_bytes": disk.needed,
                "free_bytes": disk.free,
                "shortfall_bytes": disk.shortfall,
            }
            for disk in cost.disks
        ],
        "estimated_seconds": cost.seconds,
        "notes": list(plan.source.notes),
    }


def _seconds(plan: ConversionPlan, kernels: Kernels) -> Iterable[float]:
    """Of one core, for each tensor."""
    making: dict[Encoding, float] = {}
    passing: dict[GgmlType, float] = {}
    for spec, wanted in encodings_wanted(plan).items():
        tensor = plan.source.tensors[spec.name]
        if tensor.dtype not in passing:
            passing[tensor.dtype] = _passing_seconds(tensor.dtype)
        made = wanted - {Encoding(tensor.dtype)}
        for encoding in made - making.keys():
            making[encoding] = _encoding_seconds(encoding, kernels)
        yield spec.n_elements * (passing[tensor.dtype] + sum(making[encoding] for encoding in made))


def _encoding_seconds(encoding: Encoding, kernels: Kernels) -> float:
    """Of one core, for a weight made into blocks and hashed."""
    import numpy as np

    initialize(encoding.type)
    rows = np.random.default_rng(0).standard_normal((CALIBRATION_ROWS, CALIBRATION_COLUMNS), np.float32)
    rows *= np.float32(0.02)
    began = time.perf_counter()
    rounds = 0
    while (passed := time.perf_counter() - began) < CALIBRATION_SECONDS:
        hashlib.sha256(encode(rows, encoding.type, kernels=kernels, search=encoding.search).data).digest()
        rounds += 1
    return passed / (rounds * rows.size)


def _passing_seconds(dtype: GgmlType) -> float:
    """Of one core, for a weight that is hashed, made float32 and looked at."""
    import numpy as np

    stored = np.zeros((CALIBRATION_ROWS, CALIBRATION_COLUMNS), np.float32 if dtype is GgmlType.F32 else np.uint16)
    began = time.perf_counter()
    rounds = 0
    while (passed := time.perf_counter() - began) < CALIBRATION_SECONDS:
        hashlib.sha256(stored.data).digest()
        rows = to_float32(stored, dtype)
        float(rows.max()), float(rows.min())
        rounds += 1
    return passed / (rounds * stored.size)
