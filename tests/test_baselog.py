"""The base file, against llama-perplexity's layout packed by hand, and in all the ways it can be the wrong one."""

import math
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.quality.baselog import BaseLog, BaseLogError, BaseLogWriter, encode, file_bytes
from quant.quality.scores import BaseRows
from runtime.errors import OutputError

RANDOM = np.random.default_rng(11)
N_CTX, N_VOCAB = 8, 5  # 3 rows a chunk, of an odd vocabulary
CHUNKS = np.arange(16, dtype=np.int32).reshape(2, N_CTX)


def some_logits() -> NDArray[np.float32]:
    return RANDOM.normal(0, 4, (2, 3, N_VOCAB)).astype(np.float32)


def written(path: Path, logits: NDArray[np.float32], chunks: NDArray[np.int32] = CHUNKS) -> Path:
    with BaseLogWriter(path, logits.shape[2], chunks) as writer:
        for rows in logits:
            writer.append(rows)
    return path


def log_p(base: BaseRows) -> NDArray[np.float64]:
    return base.scale[:, None].astype(np.float64) * base.steps.astype(np.float64) + base.low[:, None].astype(np.float64)


def softmax_log(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = logits.astype(np.float64)
    result: NDArray[np.float64] = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    return result


def test_what_is_written_is_read_back_to_half_a_step(tmp_path: Path) -> None:
    logits = some_logits()
    with BaseLog(written(tmp_path / "a.kld", logits)) as log:
        log.check(N_VOCAB, CHUNKS)
        assert (log.n_ctx, log.n_vocab, log.n_chunks) == (N_CTX, N_VOCAB, 2)
        for rows in logits:
            base = log.read()
            step = float(base.scale.max()) * 0.501
            assert log_p(base) == pytest.approx(softmax_log(rows), abs=step + 1e-6)


def test_the_layout_is_llama_perplexitys(tmp_path: Path) -> None:
    """A file packed by hand after perplexity.cpp:77 and :457: one row of 0, −8 and −40, whose likeliest token is e⁰."""
    logits = np.array([[[0, -8, -40, -40, -40]] * 3] * 2, np.float32)
    data = written(tmp_path / "a.kld", logits).read_bytes()
    log_sum = math.log(1 + math.exp(-8) + 3 * math.exp(-40))
    header = b"_logits_" + struct.pack("<3i", 8, 5, 2) + struct.pack("<16i", *range(16))
    # 16 nats in 65,535 steps; −8 is step 32767.5, which float32 may round to either side; 5 entries are made 6.
    rows = [struct.pack("<2f6H", 16 / 65535, -16 - log_sum, 65535, step, 0, 0, 0, 0) for step in (32767, 32768)]
    assert data[: len(header)] == header
    assert data[len(header) :] in [row * 6 for row in rows]
    assert len(data) == file_bytes(8, 5, 2) == len(header) + 6 * 20


def test_a_file_of_llama_perplexity_is_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.kld"
    row = struct.pack("<2f4H", 0.5, -3.0, 6, 4, 0, 2)
    path.write_bytes(b"_logits_" + struct.pack("<3i", 8, 4, 1) + struct.pack("<8i", *range(8)) + row * 3)
    with BaseLog(path) as log:
        assert log.chunks.tolist() == [list(range(8))]
        assert log_p(log.read()).tolist() == [[0, -1, -3, -2]] * 3


def test_the_size_on_wikitext_is_the_one_llama_perplexity_writes() -> None:
    assert file_bytes(512, 32_768, 642) == 10_731_523_076


def test_logits_without_spread_are_kept(tmp_path: Path) -> None:
    base = encode(np.full((2, 4), 7, np.float32))
    assert base["scale"].tolist() == [0, 0]
    assert base["low"] == pytest.approx([-math.log(4)] * 2)
    assert base["steps"].tolist() == [[0] * 4] * 2


def test_a_run_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.kld"
    with pytest.raises(KeyboardInterrupt), BaseLogWriter(path, N_VOCAB, CHUNKS) as writer:  # noqa: PT012
        writer.append(some_logits()[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_would_not_fit_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    chunks = np.zeros((1000, 512), np.int32)
    with pytest.raises(OutputError, match=r"need 510,[0-9,]+ bytes and [0-9,]+ are free"):
        BaseLogWriter(tmp_path / "a.kld", 10**9, chunks).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def file_limit() -> Iterator[int]:
    """Files of this process end at 10,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield 10_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_gives_one_line_and_no_file(tmp_path: Path, file_limit: int) -> None:
    logits = np.zeros((2, 3, file_limit), np.float32)
    with pytest.raises(OutputError, match=r"a\.kld: cannot be written: File too large"):
        written(tmp_path / "a.kld", logits)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        written(tmp_path / "file" / "a.kld", some_logits())


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.kld"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BaseLogError, match=r"not a file of base log-probabilities \(starts with b'GGUF"):
        BaseLog(path)
    path.write_bytes(b"")
    with pytest.raises(BaseLogError, match="not a file of base log-probabilities"):
        BaseLog(path)
    path.write_bytes(b"_logits_" + bytes(12))
    with pytest.raises(BaseLogError, match="damaged: context 0, vocabulary 0, 0 chunks"):
        BaseLog(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BaseLogError, match="No such file"):
        BaseLog(tmp_path / "a.kld")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_cut_off_or_too_long_is_refused_with_both_sizes(tmp_path: Path, change: int) -> None:
    path = written(tmp_path / "a.kld", some_logits())
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + b"x")[: size + change])
    with pytest.raises(BaseLogError, match=f"{size + change} bytes, but 2 chunks take {size}"):
        BaseLog(path)


@pytest.mark.parametrize(
    ("n_vocab", "chunks", "message"),
    [
        (6, CHUNKS, "a vocabulary of 5, and this run has 6"),
        (5, CHUNKS.reshape(1, 16), "a context of 8, and this run has 16"),
        (5, CHUNKS[:1], "a number of chunks of 2, and this run has 1"),
        (5, np.where(CHUNKS > 13, 0, CHUNKS), r"2 of 16 tokens differ .* the first at 14 \(14 there, 0 here\)"),
    ],
)
def test_a_file_of_another_run_is_refused_with_both_numbers(
    tmp_path: Path, n_vocab: int, chunks: NDArray[np.int32], message: str
) -> None:
    with BaseLog(written(tmp_path / "a.kld", some_logits())) as log, pytest.raises(BaseLogError, match=message):
        log.check(n_vocab, chunks)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.kld", np.zeros((2, 3, 50_000), np.float32))
    with BaseLog(path) as log:
        log.read()
        with path.open("r+b") as file:
            file.truncate(400_000)
        with pytest.raises(BaseLogError, match="ended early"):
            log.read()
