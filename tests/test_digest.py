"""The running hash of a file, whatever the order of its pieces and threads, against hashlib and zlib."""

import hashlib
import random
import threading
import time
import zlib
from itertools import pairwise
from pathlib import Path

import pytest

from quant.digest import CROWD, FileDigest
from quant.plan import FilePlan, PlacedTensor
from quant.recipes import Encoding, TensorSpec
from runtime.ggml import GgmlType

HEADER = b"GGUF" + bytes(60)


def _file(n_tensors: int, seed: int = 1) -> tuple[FilePlan, bytes]:
    """A file of F32 vectors of odd lengths with zeros between them, and its content."""
    rng = random.Random(seed)
    content, tensors = HEADER, []
    for i in range(n_tensors):
        spec = TensorSpec(f"t{i}", (rng.randrange(1, 400),))
        tensors.append(PlacedTensor(spec, Encoding(GgmlType.F32), len(content)))
        content += rng.randbytes(4 * spec.row_length)
        content += bytes(-len(content) % 32)
    return FilePlan(Path("f"), HEADER, tuple(tensors), len(content)), content


def _pieces(file: FilePlan, content: bytes, rng: random.Random) -> list[tuple[int, memoryview]]:
    pieces = []
    for tensor in file.tensors:
        cuts = sorted({0, tensor.n_bytes, *(rng.randrange(tensor.n_bytes) for _ in range(3))})
        for left, right in pairwise(cuts):
            start = tensor.offset + left
            pieces.append((start, memoryview(content)[start : tensor.offset + right]))
    return pieces


def _crc32(content: bytes, tensor: PlacedTensor) -> int:
    return zlib.crc32(content[tensor.offset : tensor.offset + tensor.n_bytes])


@pytest.mark.parametrize("seed", range(8))
def test_pieces_in_any_order_give_the_hash_of_the_file(seed: int) -> None:
    rng = random.Random(seed)
    file, content = _file(20, seed)
    present = {t.spec.name: _crc32(content, t) for t in file.tensors if rng.random() < 0.3}
    found: dict[str, int] = {}
    digest = FileDigest(
        file,
        present,
        lambda offset, count: content[offset : offset + count],
        lambda tensor, crc32: found.update({tensor.spec.name: crc32}),
    )
    pieces = [
        piece for t in file.tensors if t.spec.name not in present for piece in _pieces(_one(file, t), content, rng)
    ]
    rng.shuffle(pieces)
    for offset, data in pieces:
        assert digest.sha256 is None
        digest.feed(offset, data)
    digest.advance()
    assert digest.sha256 == hashlib.sha256(content).hexdigest()
    assert {**present, **found} == {t.spec.name: _crc32(content, t) for t in file.tensors}
    assert not present.keys() & found.keys()


def _one(file: FilePlan, tensor: PlacedTensor) -> FilePlan:
    return FilePlan(file.path, file.header, (tensor,), file.n_bytes)


def test_threads_that_feed_at_once_lose_nothing() -> None:
    file, content = _file(300)
    finished: list[str] = []
    digest = FileDigest(file, {}, lambda *_: b"", lambda tensor, _: finished.append(tensor.spec.name))
    pieces = iter(_pieces(file, content, random.Random(0)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            digest.feed(*piece)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digest.sha256 == hashlib.sha256(content).hexdigest()
    assert finished == [tensor.spec.name for tensor in file.tensors]


def test_pieces_do_not_pile_up_behind_a_slow_thread() -> None:
    """While one thread is held up in noting a tensor, others may bring a few pieces more, and then wait for it."""
    file, content = _file(200)
    release = threading.Event()
    brought: list[int] = []

    def finished(tensor: PlacedTensor, _: int) -> None:
        if tensor is file.tensors[0]:
            release.wait()

    digest = FileDigest(file, {}, lambda *_: b"", finished)

    def work() -> None:
        for i, (offset, data) in enumerate(_pieces(file, content, random.Random(0))):
            if offset >= file.tensors[1].offset:
                digest.feed(offset, data)
                brought.append(i)

    def bring_first() -> None:
        for offset, data in _pieces(_one(file, file.tensors[0]), content, random.Random(0)):
            digest.feed(offset, data)

    first = threading.Thread(target=bring_first)
    first.start()
    second = threading.Thread(target=work)
    second.start()
    time.sleep(0.2)
    held = len(brought)
    release.set()
    first.join()
    second.join()
    assert held <= CROWD
    assert digest.sha256 == hashlib.sha256(content).hexdigest()
