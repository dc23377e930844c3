"""The threads of a conversion: chunks of rows in, blocks at their places out.

A thread reads a chunk, and makes its blocks in each encoding that some level wants, once for all of those levels.
Chunks are handed out in the order of the files and at most a window of them is under way, so memory is bounded by chunk
and thread count, not by the model. Knows nothing of what is already there, or of final names.
"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from quant.blocks import Chunk, check_weights, chunks, encode, to_float32
from quant.kernels import Kernels
from quant.naming import is_rotary
from quant.plan import ConversionPlan, FilePlan, PlacedTensor
from quant.recipes import Encoding, TensorSpec
from quant.shards import LevelFiles
from quant.source import SourceTensor, WeightReader
from runtime.ggml import initialize, row_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WINDOW = 4
"""Chunks under way for each thread; more let the others go on while one is slow."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion has come. Bytes are those of the source, whatever the number of levels."""

    tensor: str
    """The GGUF name of the tensor that was worked on last."""
    read_bytes: int
    """Done, earlier interrupted runs included."""
    total_bytes: int
    written_bytes: int
    """Written by this run, all levels together."""
    resumed_bytes: int
    """Share of `read_bytes` that earlier runs had done."""
    seconds: float
    """Since this run began to convert."""
    tensors_done: int = 0
    """Earlier interrupted runs included."""
    total_tensors: int = 0
    checking: bool = False
    """What an earlier run wrote is read back; bytes are then those of its files."""

    @property
    def bytes_per_second(self) -> float:
        """In this run."""
        return (self.read_bytes - self.resumed_bytes) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None until there is a rate to judge by."""
        rate = self.bytes_per_second
        return (self.total_bytes - self.read_bytes) / rate if rate > 0 else None


Report = Callable[[Progress], None]


class Stop:
    """Tells threads that nobody waits for their work any more."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()


class Job:
    """One tensor, and where its blocks of each encoding go."""

    def __init__(
        self,
        spec: TensorSpec,
        source: SourceTensor,
        targets: Mapping[Encoding, Sequence[tuple[LevelFiles, FilePlan, PlacedTensor]]],
        head_dim: int,
    ) -> None:
        self.spec = spec
        self.source = source
        self.targets = targets
        self.chunks = tuple(chunks(spec, head_dim if is_rotary(spec) else 1))
        self.chunks_left = len(self.chunks)
        self._digests = [b""] * len(self.chunks)

    def note(self, index: int, rows: "NDArray[np.generic]") -> None:
        """Remember what chunk `index` was made of."""
        self._digests[index] = hashlib.sha256(rows.data).digest()

    def source_digest(self) -> str:
        """Of the whole tensor, once every chunk is noted: the same whatever kind of input it came from."""
        assert all(self._digests), self.spec
        title = f"{self.source.dtype.name} {list(self.spec.shape)}\n".encode()
        return hashlib.sha256(title + b"".join(self._digests)).hexdigest()


def jobs(plan: ConversionPlan, levels: Iterable[LevelFiles]) -> list[Job]:
    """What is left to do, in the order of the files. A tensor is left if some level has not finished it."""
    targets: dict[str, dict[Encoding, list[tuple[LevelFiles, FilePlan, PlacedTensor]]]] = {}
    for files in levels:
        for file in files.plan.files:
            for tensor in file.tensors:
                if tensor.spec.name not in files.tensors:
                    targets.setdefault(tensor.spec.name, {}).setdefault(tensor.encoding, []).append(
                        (files, file, tensor)
                    )
    source = plan.source
    return [
        Job(spec, source.tensors[spec.name], targets[spec.name], source.shape.head_dim)
        for spec in source.specs
        if spec.name in targets
    ]


def check(levels: Sequence[LevelFiles], threads: int, report: Report) -> None:
    """Read back what earlier runs wrote, several levels at a time."""
    total = sum(
        tensor.n_bytes for files in levels for tensor in files.plan.tensors if tensor.spec.name in files.tensors
    )
    if not total:
        threads = 1
    began = time.monotonic()
    stop = Stop()
    seen = 0
    lock = threading.Lock()

    def count(n_bytes: int) -> None:
        nonlocal seen
        with lock:
            seen += n_bytes

    pool = ThreadPoolExecutor(threads, "check")
    try:
        pending = {pool.submit(files.check, stop, count) for files in levels}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            if total:
                report(Progress("", seen, total, 0, 0, time.monotonic() - began, checking=True))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class Work:
    """One conversion's threads, and what they have done so far."""

    def __init__(self, plan: ConversionPlan, reader: WeightReader, left: Sequence[Job], kernels: Kernels) -> None:
        self._plan = plan
        self._kernels = kernels
        self._reader = reader
        self._jobs = left
        self._total = plan.read_bytes
        self._resumed = plan.read_bytes - sum(job.source.n_bytes for job in left)
        self._read = self._resumed
        self._tensors_done = len(plan.source.tensors) - len(left)
        self._began = time.monotonic()
        self._stop = Stop()
        self.written_bytes = 0

    def run(self, threads: int, report: Report, cancelled: Callable[[], bool]) -> bool:
        """Work until all is done (True) or `cancelled` (False)."""
        for type_ in {encoding.type for job in self._jobs for encoding in job.targets}:
            initialize(type_)
        work = ((job, index) for job in self._jobs for index in range(len(job.chunks)))
        pool = ThreadPoolExecutor(threads, "quantize")
        try:
            # Oldest first: a chunk leaves the window only behind all before it, for the files are hashed in order.
            window: deque[Future[tuple[Job, Chunk, int]]] = deque(self._submit(pool, work, WINDOW * threads))
            pending = set(window)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    self._count(*future.result())
                    report(self._progress(future.result()[0]))
                if cancelled():
                    return False
                while window and window[0].done():
                    window.popleft()
                fresh = self._submit(pool, work, WINDOW * threads - len(window))
                window.extend(fresh)
                pending.update(fresh)
            return True
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, work: Iterator[tuple[Job, int]], count: int
    ) -> list[Future[tuple[Job, Chunk, int]]]:
        """Hand the pool the next `count` chunks, or what is left."""
        return [pool.submit(self._convert, job, index) for job, index in islice(work, count)]

    def _convert(self, job: Job, index: int) -> tuple[Job, Chunk, int]:
        """In a thread: read, encode, write. Gives the bytes written."""
        import numpy as np

        chunk = job.chunks[index]
        stored = self._reader.rows(job.source, chunk.first, chunk.count)
        job.note(index, stored)
        rows = to_float32(stored, job.source.dtype)
        check_weights(rows, [encoding.type for encoding in job.targets], job.source.name, chunk.first)
        importance, means = self._plan.importance_of(job.spec), self._plan.means_of(job.spec)
        n_written = 0
        for encoding, targets in job.targets.items():
            if self._stop():
                break
            if encoding.type is job.source.dtype:
                blocks = stored.view(np.uint8).reshape(-1).data
            else:
                blocks = encode(
                    rows, encoding.type, importance, job.spec.name, self._kernels, encoding.search, means
                ).data
            within = chunk.first * row_bytes(encoding.type, job.spec.row_length)
            for files, file, tensor in targets:
                files.write(file, tensor.offset + within, blocks)
                n_written += len(blocks)
        return job, chunk, n_written

    def _count(self, job: Job, chunk: Chunk, n_written: int) -> None:
        self._read += chunk.count * job.source.row_bytes
        self.written_bytes += n_written
        job.chunks_left -= 1
        self._tensors_done += job.chunks_left == 0

    def _progress(self, job: Job) -> Progress:
        return Progress(
            tensor=job.spec.name,
            read_bytes=self._read,
            total_bytes=self._total,
            written_bytes=self.written_bytes,
            resumed_bytes=self._resumed,
            seconds=time.monotonic() - self._began,
            tensors_done=self._tensors_done,
            total_tensors=len(self._plan.source.tensors),
        )


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))
