"""Collecting importance matrices: against llama-imatrix's own, sums in closed form, and runs that end early.

Where ggml computes with the kernels of the reference's machine, every value is llama-imatrix's within 1e-3. Other
kernels round activations otherwise, and a column whose sum a few tokens make up then moves by more: llama-imatrix
itself, built for a processor with AVX2 alone, differs from the reference by up to 1.7e-3 (median 1.7e-5), and Bise from
that build's values by up to 2.3e-5 on the same machine, which is llama-imatrix's adding up in float32.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from quant.imatrix import read_contents, read_imatrix
from quant.imatrix_file import ImatrixError, Sum, parse, serialize
from quant.importance.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, save_checkpoint
from quant.importance.collection import Collection, Progress, Report, collect
from quant.importance.corpus import CalibrationText, read_texts
from quant.importance.sums import Collector
from quant.quality.texts import TextError
from quant.recipes import tensors
from runtime.errors import ModelFileError, OutputError, UserError
from runtime.events import EngineSettings, Load
from runtime.native import system_info
from runtime.native_graph import Node, Observer
from runtime.scoring import ScoringEngine
from tests.checkpoints import DEMO, DEMO_SHAPE
from tests.faults import at_call, fill_disk
from tests.imatrices import legacy_imatrix, legacy_tail, write_imatrix
from tests.rpc import apart

REFERENCE = Path(__file__).parent / "reference" / "demo-imatrix.gguf"
PROSE = DEMO.parent / "eval" / "prose.txt"
SETTINGS = EngineSettings(n_ctx=64, n_batch=128, n_ubatch=64, n_threads=1)
SAME_KERNELS = {"AVX512_VNNI", "AVX512_BF16", "REPACK"} <= {name for name, on in system_info().items() if on == "1"}

Values = dict[str, NDArray[np.float32]]


@dataclass
class Readers:
    """Opens the real engine, and counts what is asked of it."""

    n_reads: int = 0
    interrupt_at: int | None = None
    """The batch at which the user presses Ctrl-C."""

    def __call__(self, path: Path, settings: EngineSettings, observer: Observer) -> "CountingEngine":
        return CountingEngine(path, settings, observer, self)


class CountingEngine(ScoringEngine):
    def __init__(self, path: Path, settings: EngineSettings, observer: Observer, readers: Readers) -> None:
        super().__init__(path, settings, observer=observer)
        self._readers = readers

    def read(self, chunks: NDArray[np.int32]) -> None:
        self._readers.n_reads += 1
        if self._readers.n_reads == self._readers.interrupt_at:
            raise KeyboardInterrupt
        super().read(chunks)


def text(tmp_path: Path, name: str = "text.txt", n_bytes: int = 2000, start: int = 0) -> CalibrationText:
    path = tmp_path / name
    path.write_bytes(PROSE.read_bytes()[start : start + n_bytes])
    return read_texts(str(path))[0]


@pytest.fixture
def collection(demo: Path, tmp_path: Path) -> Collection:
    """Five chunks of each of two texts, two a batch."""
    texts = (text(tmp_path), text(tmp_path, "more.txt", start=5000))
    out = tmp_path / "out" / "demo.gguf"
    return Collection(Load(demo, SETTINGS, "template"), texts, out, chunk_size=64, max_chunks=5)


def run(collection: Collection, readers: Readers | None = None, say: Callable[[str], None] = lambda _: None) -> Report:
    return collect(collection, readers or Readers(), "llama.cpp", say=say)


def with_settings(collection: Collection, **changes: object) -> Collection:
    assert collection.model is not None
    settings = replace(collection.model.settings, **changes)  # type: ignore[arg-type]
    return replace(collection, model=replace(collection.model, settings=settings))


# Values


def check_against_reference(found: Values, median: float, most: float) -> None:
    expected = read_imatrix(REFERENCE).values
    assert found.keys() == expected.keys()
    off = np.concatenate([np.abs(found[name] / expected[name] - 1) for name in expected])
    assert float(np.median(off)) < median
    assert float(np.quantile(off, 0.99)) < 1e-3
    assert float(off.max()) < most


def test_the_matrix_is_llama_imatrixs(demo: Path, tmp_path: Path) -> None:
    """On the same 20 chunks: values, counts, and everything in the file but its `bise.` keys."""
    load = Load(demo, EngineSettings(n_ctx=512), "template")
    out = tmp_path / "demo.gguf"
    report = run(Collection(load, read_texts(str(PROSE)), out, max_chunks=20))
    assert (report.n_entries, report.n_chunks, report.n_tokens) == (56, 20, 10_240)
    contents, _ = read_contents(out)
    expected, _ = read_contents(REFERENCE)
    check_against_reference(contents.values, 1e-4, 1e-3 if SAME_KERNELS else 4e-3)
    assert {name: added.counts.tolist() for name, added in contents.sums.items()} == {
        name: added.counts.tolist() for name, added in expected.sums.items()
    }
    assert (contents.datasets, contents.n_chunks, contents.chunk_size) == (("prose.txt",), 20, 512)
    ours = {key: value for key, value in contents.metadata.items() if not key.startswith("bise.")}
    assert list(ours.items()) == list(expected.metadata.items())


def test_files_are_written_as_llama_imatrix_writes_them() -> None:
    data = REFERENCE.read_bytes()
    contents = parse(REFERENCE, data)
    sums = dict(reversed(contents.sums.items()))  # it sorts them
    assert serialize(sums, contents.datasets, contents.n_chunks, contents.chunk_size, {}) == data


def test_files_with_experts_are_written_as_gguf_writes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sums = {"blk.0.ffn_up_exps.weight": rng.random((3, 32), np.float32), "blk.0.a": rng.random(32, np.float32)}
    counts = {"blk.0.ffn_up_exps.weight": [5.0, 0.0, 7.0], "blk.0.a": [12.0]}
    path = write_imatrix(tmp_path / "experts.gguf", sums, counts)
    contents = parse(path, path.read_bytes())
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(serialize(contents.sums, contents.datasets, contents.n_chunks, contents.chunk_size, {}))
    again, _ = read_contents(copy)
    for name, values in sums.items():
        np.testing.assert_array_equal(again.sums[name].squares.reshape(-1), values.reshape(-1))
        np.testing.assert_array_equal(again.sums[name].counts, counts[name])


def test_plain_sums_follow_where_they_are_known(tmp_path: Path) -> None:
    """By gguf's reading: a third tensor, behind llama-imatrix's two, which stay as they are."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((2, 5, 32)) + 0.3
    known = Sum((rows**2).sum(axis=1), np.array([5, 5]), rows.sum(axis=1))
    one = Sum((rows[0] ** 2).sum(axis=0)[None], np.array([5]), rows[0].sum(axis=0)[None])
    sums = {"b": known, "a": one, "c": replace(one, totals=None)}
    path = tmp_path / "some.gguf"
    path.write_bytes(serialize(sums, (), 1, 512, {}))
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(found) == [
        *("a.in_sum2", "a.counts", "a.in_sum"),
        *("b.in_sum2", "b.counts", "b.in_sum"),
        *("c.in_sum2", "c.counts"),
    ]
    np.testing.assert_array_equal(found["b.in_sum"].data, rows.sum(axis=1).astype(np.float32))
    np.testing.assert_array_equal(found["a.in_sum"].data, rows[0].sum(axis=0).astype(np.float32))
    np.testing.assert_array_equal(found["a.in_sum2"].data, (rows[0] ** 2).sum(axis=0).astype(np.float32))
    means = read_imatrix(path).means
    np.testing.assert_allclose(means["b"], rows.mean(axis=1).reshape(-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(means["a"], rows[0].mean(axis=0), rtol=1e-5, atol=1e-7)


class Inputs:
    """Keeps what every weight is multiplied with, while another observer watches too."""

    def __init__(self, other: Observer | None = None) -> None:
        self.rows: dict[str, list[NDArray[np.float32]]] = {}
        self._other = other

    def wants(self, node: Node) -> bool:
        return node.operation == "MUL_MAT" and node.source(0).is_weight

    def observe(self, node: Node) -> None:
        self.rows.setdefault(node.source(0).name, []).append(node.source(1).floats().copy())
        if self._other is not None and self._other.wants(node):
            self._other.observe(node)


def test_sums_are_of_numbers_and_squares_column_by_column(demo: Path) -> None:
    """Added up in float64, over several ubatches and batches; the output only when asked for."""
    chunks = np.arange(100, 100 + 4 * 64, dtype=np.int32).reshape(4, 64)
    inputs, collector = Inputs(), Collector(demo, output=True)
    for observer in (inputs, collector):
        engine = ScoringEngine(demo, replace(SETTINGS, n_ubatch=32), observer=observer)
        engine.read(chunks[:2])
        engine.read(chunks[2:])
        engine.close()
    sums = collector.take()
    assert sums.keys() == inputs.rows.keys()
    assert len(sums) == 57
    for name, parts in inputs.rows.items():
        rows = np.concatenate(parts).astype(np.float64)
        assert rows.shape[0] == sums[name].counts[0] == 256
        np.testing.assert_allclose(sums[name].squares[0], (rows**2).sum(axis=0), rtol=2e-6)
        totals = sums[name].totals
        assert totals is not None
        assert (np.abs(totals[0] - rows.sum(axis=0)) <= 2e-6 * np.abs(rows).sum(axis=0)).all()
    assert collector.take() == {}


def test_means_are_those_of_what_was_read(collection: Collection) -> None:
    """Of a whole run: two texts, several batches, and the file in between."""
    watched: list[Inputs] = []

    def open_reader(path: Path, settings: EngineSettings, observer: Observer) -> ScoringEngine:
        watched.append(Inputs(observer))
        return ScoringEngine(path, settings, observer=watched[0])

    collect(collection, open_reader, "llama.cpp")
    matrix = read_imatrix(collection.out)
    specs = [spec for spec in tensors(DEMO_SHAPE) if spec.name in matrix.values]
    assert len(specs) == 56
    shares = []
    for spec in specs:
        rows = np.concatenate(watched[0].rows[spec.name]).astype(np.float64)
        importance, mean = matrix.of(spec), matrix.mean_of(spec)
        assert importance is not None
        assert mean is not None
        assert rows.shape == (10 * 64, spec.row_length)
        np.testing.assert_allclose(importance, (rows**2).mean(axis=0), rtol=2e-6)
        assert (np.abs(mean - rows.mean(axis=0)) <= 2e-6 * np.abs(rows).mean(axis=0)).all()
        shares.append(float((mean.astype(np.float64) ** 2).sum() / importance.sum()))
    assert 0.01 < min(shares) < max(shares) < 1  # the demo's are no means of 0
    assert [matrix.mean_of(spec) for spec in tensors(DEMO_SHAPE) if spec.name == "output.weight"] == [None]


def test_ubatches_of_a_few_tokens_do_not_count(demo: Path) -> None:
    """40 tokens in ubatches of 32: llama-imatrix passes over the other 8."""
    collector = Collector(demo)
    engine = ScoringEngine(demo, EngineSettings(n_ctx=40, n_batch=40, n_ubatch=32, n_threads=1), observer=collector)
    engine.read(np.arange(100, 140, dtype=np.int32)[None])
    engine.close()
    sums = collector.take()
    assert {int(added.counts[0]) for added in sums.values()} == {32}
    assert "output.weight" not in sums


def collected(collection: Collection) -> Values:
    run(collection)
    return dict(read_imatrix(collection.out).values)


def test_other_devices_give_the_same_matrix(collection: Collection, servers: tuple[str, ...], tmp_path: Path) -> None:
    """Two of them, from which what is watched must be fetched. They compute with the same kernels."""
    expected = collected(collection)
    remote = with_settings(collection, rpc_servers=servers[:2])
    found = apart(collected, replace(remote, out=tmp_path / "rpc.gguf"))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


def test_what_is_not_finite_is_refused(demo: Path, tmp_path: Path) -> None:
    from tests.test_native_graph import file_tensors

    content = bytearray(demo.read_bytes())
    offset = file_tensors(demo)["blk.4.ffn_norm.weight"].data_offset
    content[offset : offset + 4] = np.float32(np.nan).tobytes()
    path = tmp_path / "nan.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"nan\.gguf: what blk\.4\.ffn_(gate|up)\.weight is multiplied with"):
        run(Collection(Load(path, SETTINGS, "template"), (text(tmp_path),), tmp_path / "out.gguf"))


def test_a_quantized_model_with_conversations(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    talks = [
        {"messages": [{"role": "user", "content": "Name a river. " * 20}, {"role": "assistant", "content": "The Po."}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
    ]
    path.write_text("\n".join(map(json.dumps, talks)) + "\n\n")
    said: list[str] = []
    load = Load(smollm2, SETTINGS, "template")
    run(Collection(load, read_texts(str(path)), tmp_path / "a.gguf", max_chunks=1, chunk_size=64), say=said.append)
    contents, _ = read_contents(tmp_path / "a.gguf")
    assert len(contents.sums) == 210
    assert contents.datasets == ("talks.jsonl",)
    assert said == []


# Runs that end early


def test_a_run_goes_on_where_it_stopped(collection: Collection, tmp_path: Path) -> None:
    """10 chunks in 5 batches. Stopped twice, the file is that of an undisturbed run, to the byte."""
    undisturbed = Readers()
    run(replace(collection, out=tmp_path / "whole.gguf"), undisturbed)
    assert undisturbed.n_reads == 5
    readers = Readers(interrupt_at=3)
    with pytest.raises(KeyboardInterrupt):
        run(collection, readers)
    assert not collection.out.exists()
    readers.interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(collection, readers)
    kept = load_checkpoint(checkpoint_path(collection.out))
    assert kept is not None
    assert kept.n_chunks == 6
    report = run(collection, readers)
    assert report.resumed_chunks == 6
    assert readers.n_reads == 5 + 2  # and the two that were interrupted
    assert collection.out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert [path.name for path in collection.out.parent.iterdir()] == [collection.out.name]


def test_a_run_that_is_done_reads_nothing(collection: Collection) -> None:
    run(collection)
    readers = Readers()
    report = run(collection, readers)
    assert (report.already_there, readers.n_reads, report.n_chunks) == (True, 0, 10)
    with pytest.raises(ImatrixError, match="made of another model, other texts or settings; name another file"):
        run(replace(collection, max_chunks=4), readers)
    run(replace(collection, overwrite=True), readers)
    assert readers.n_reads == 5


def test_another_run_does_not_go_on(collection: Collection, demo_levels: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(collection, Readers(interrupt_at=3))
    assert collection.model is not None
    other_text = text(tmp_path, "more.txt", 2001, 5000)
    other_model = replace(collection.model, path=demo_levels["Q8_0"])
    for other, message in (
        (with_settings(collection, n_ctx=32), "with n_ctx 64, and this run has 32"),
        (with_settings(collection, n_threads=2), "with n_threads 1, and this run has 2"),
        (replace(collection, max_chunks=3), "with chunks 5, and this run has 3"),
        (replace(collection, output=True), "with output False, and this run has True"),
        (replace(collection, texts=(collection.texts[0], other_text)), r"more\.txt, [0-9a-f]{12}…, and .*more\.txt"),
        (replace(collection, texts=collection.texts[:1]), r"with texts text\.txt, .*more\.txt"),
        (replace(collection, model=other_model), r"with model Demo-BF16\.gguf, .* this run has Demo-Q8_0\.gguf"),
    ):
        readers = Readers()
        with pytest.raises(ImatrixError, match=message):
            run(other, readers)
        assert readers.n_reads == 0
    readers = Readers()
    run(replace(collection, max_chunks=1, overwrite=True), readers)
    assert readers.n_reads == 1


def test_a_run_begun_without_plain_sums_does_not_go_on(collection: Collection) -> None:
    path = checkpoint_path(collection.out)
    with pytest.raises(KeyboardInterrupt):
        run(collection, Readers(interrupt_at=3))
    kept = load_checkpoint(path)
    assert kept is not None
    earlier = {key: value for key, value in kept.identity.items() if key != "sums"}
    save_checkpoint(path, replace(kept, identity=earlier))
    with pytest.raises(ImatrixError, match="with sums None, and this run has squares, totals"):
        run(collection)


def test_what_is_kept_comes_back_to_the_bit(tmp_path: Path) -> None:
    rows = np.random.default_rng(4).standard_normal((3, 8))
    whole = Sum((rows**2).sum(axis=0)[None], np.array([3]), rows.sum(axis=0)[None])
    sums = {"x": whole, "x.totals": replace(whole, totals=None), "y": whole + whole}
    save_checkpoint(tmp_path / "kept", Checkpoint({}, "", 1, sums))
    kept = load_checkpoint(tmp_path / "kept")
    assert kept is not None
    assert list(kept.sums) == list(sums)
    for name, added in sums.items():
        found = kept.sums[name]
        assert found.squares.tobytes() == added.squares.tobytes()
        assert found.counts.tobytes() == added.counts.tobytes()
        if added.totals is None:
            assert found.totals is None
        else:
            assert found.totals is not None
            assert found.totals.tobytes() == added.totals.tobytes()


def test_a_damaged_checkpoint_is_one_line(collection: Collection) -> None:
    path = checkpoint_path(collection.out)
    with pytest.raises(KeyboardInterrupt):
        run(collection, Readers(interrupt_at=3))
    whole = path.read_bytes()
    flipped = bytes([whole[i] ^ (i == len(whole) // 2) for i in range(len(whole))])
    for data in (whole[: len(whole) // 2], b"", flipped):
        path.write_bytes(data)
        with pytest.raises(ImatrixError, match="damaged, so that no run can go on from it"):
            run(collection)


def test_a_full_disk_loses_nothing(collection: Collection, tmp_path: Path) -> None:
    """At every call with which sums are kept: an error in one line, and the sums of before."""
    path = tmp_path / "kept"
    before = Checkpoint({"a": 1}, "", 2, {"x": Sum(np.ones((1, 4)), np.array([64]))})
    save_checkpoint(path, before)
    for call in count(1):
        with at_call(call, fill_disk) as calls, contextlib.suppress(OutputError):
            save_checkpoint(path, replace(before, n_chunks=3))
        if len(calls) < call:
            break
        kept = load_checkpoint(path)
        assert kept is not None
        assert kept.n_chunks == (3 if "replace" in calls[: call - 1] else 2), calls
        assert sorted(tmp_path.glob("kept*")) == [path] or calls[call - 1] == "unlink"
        save_checkpoint(path, before)
    assert {"fsync", "replace"} <= set(calls)
    with at_call(1, fill_disk), pytest.raises(OutputError, match=r"demo\.gguf: cannot be written: No space left"):
        run(collection, Readers(interrupt_at=3))


def test_where_nothing_can_be_written_nothing_is_read(collection: Collection, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    readers = Readers()
    for out, message in (
        (tmp_path / "file" / "out.gguf", r"file: cannot be made: (File exists|Not a directory)"),
        (Path("/proc/nowhere.gguf"), "cannot be written"),
    ):
        with pytest.raises(OutputError, match=message):
            run(replace(collection, out=out), readers)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImatrixError, match="not a file"):
        run(replace(collection, out=tmp_path / "folder"), readers)
    with pytest.raises(OutputError, match="a folder; name the file to write"):
        run(replace(collection, out=tmp_path / "folder", overwrite=True), readers)
    assert readers.n_reads == 0


# Merging


def test_merging_adds_sums_and_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    a, b = ({name: rng.random(32, np.float32) for name in names} for names in (("x", "y"), ("y", "z")))
    one = write_imatrix(tmp_path / "a.gguf", a, {"x": [1024], "y": [1024]}, datasets=("a.txt", "b.txt"))
    two = write_imatrix(tmp_path / "b.gguf", b, {"y": [512], "z": [512]}, datasets=("c.txt",))
    report = run(Collection(None, (), tmp_path / "out.gguf", (one, two)))
    contents, _ = read_contents(report.out)
    np.testing.assert_array_equal(contents.sums["y"].squares[0], (a["y"].astype(np.float64) + b["y"]).astype("<f4"))
    np.testing.assert_array_equal(contents.sums["x"].squares[0], a["x"])
    assert {name: added.counts.tolist() for name, added in contents.sums.items()} == {
        "x": [1024],
        "y": [1536],
        "z": [512],
    }
    assert (contents.datasets, contents.n_chunks, contents.chunk_size) == (("a.txt", "b.txt", "c.txt"), 3, 512)


def test_merging_adds_plain_sums_and_loses_them_with_a_note(tmp_path: Path) -> None:
    """A weight that one of the matrices has no plain sums of has none; the others keep theirs."""
    a, b = np.array([1, -2, 3, 0], np.float32), np.array([-4, 1, 1, 0.5], np.float32)
    full = {name: np.full(4, 64, np.float32) for name in ("x", "y")}
    counts = {"x": [512], "y": [512]}
    one = write_imatrix(tmp_path / "one.gguf", full, counts, totals={"x": a, "y": b})
    two = write_imatrix(tmp_path / "two.gguf", full, counts, totals={"x": b, "y": b})
    none = write_imatrix(tmp_path / "none.gguf", {"y": full["y"]}, counts)
    old = tmp_path / "old.dat"
    old.write_bytes(legacy_imatrix({"y": (1, full["y"])}))
    said: list[str] = []
    run(Collection(None, (), tmp_path / "1", (one, two)), say=said.append)
    run(Collection(None, (), tmp_path / "2", (none, old)), say=said.append)
    assert said == []
    run(Collection(None, (), tmp_path / "3", (one, none, two, old)), say=said.append)
    assert said == ["note: no means in none.gguf, old.dat, so that the matrix has none for what they measured"]
    found = [read_imatrix(tmp_path / name).means for name in "123"]
    assert [sorted(means) for means in found] == [["x", "y"], [], ["x"]]
    np.testing.assert_array_equal(found[0]["x"], (a + b) / 1024)
    np.testing.assert_array_equal(found[2]["x"], (a + b) / 1024)


def test_a_model_that_reads_loses_means_to_a_matrix_without(collection: Collection) -> None:
    said: list[str] = []
    run(replace(collection, merged=(REFERENCE,), max_chunks=1), say=said.append)
    assert said == ["note: no means in demo-imatrix.gguf, so that the matrix has none for what it measured"]
    matrix = read_imatrix(collection.out)
    assert (len(matrix.values), matrix.means) == (56, {})


def test_merging_a_dat_file(tmp_path: Path) -> None:
    """Its sums are of means of chunks: 3 chunks of 512 with 6 in all are 3,072 over 1,536 rows."""
    path = tmp_path / "a.dat"
    path.write_bytes(legacy_imatrix({"x": (3, np.full(4, 6, np.float32))}, legacy_tail(3, "old.txt")))
    other = write_imatrix(tmp_path / "b.gguf", {"x": np.full(4, 100, np.float32)}, {"x": [512]})
    run(Collection(None, (), tmp_path / "out.gguf", (path, other)))
    contents, _ = read_contents(tmp_path / "out.gguf")
    np.testing.assert_array_equal(contents.sums["x"].squares, np.full((1, 4), 3072 + 100))
    assert contents.sums["x"].counts.tolist() == [2048]
    assert contents.datasets == ("old.txt", "prose.txt")


def test_texts_and_matrices_together(collection: Collection, tmp_path: Path) -> None:
    """Each text by itself and merged: what both together give, but for the last bit of float32."""
    collection = with_settings(collection, n_batch=64)  # so that texts do not share a batch
    run(collection)
    for i in (0, 1):
        run(replace(collection, texts=collection.texts[i : i + 1], out=tmp_path / f"{i}.gguf"))
    run(
        replace(collection, texts=(), model=None, merged=(tmp_path / "0.gguf", tmp_path / "1.gguf"), out=tmp_path / "2")
    )
    run(replace(collection, texts=collection.texts[1:], merged=(tmp_path / "0.gguf",), out=tmp_path / "3"))
    whole = read_imatrix(collection.out)
    for name in ("2", "3"):
        merged = read_imatrix(tmp_path / name)
        assert merged.datasets == whole.datasets
        assert merged.n_chunks == whole.n_chunks
        for tensor, values in whole.values.items():
            np.testing.assert_allclose(merged.values[tensor], values, rtol=1e-6)
            allowed = 1e-6 * np.sqrt(values)  # a mean is at most that
            assert (np.abs(merged.means[tensor] - whole.means[tensor]) <= allowed).all()


def test_a_matrix_of_another_model_is_not_merged(collection: Collection, tmp_path: Path) -> None:
    other = write_imatrix(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": np.ones(576, np.float32)})
    with pytest.raises(ImatrixError, match=r"576 values for blk\.0\.ffn_up\.weight, whose rows have 256 weights"):
        run(replace(collection, merged=(other,)))
    third = write_imatrix(tmp_path / "b.gguf", {"blk.0.ffn_up.weight": np.ones(256, np.float32)})
    with pytest.raises(
        ImatrixError, match=r"256 values for blk\.0\.ffn_up\.weight, and 576 in .*merge matrices of one model"
    ):
        run(Collection(None, (), tmp_path / "out.gguf", (other, third)))


# What makes no sense


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ()}, "no text and no matrix given"),
        ({"max_chunks": 0}, "0 chunks measure nothing"),
        ({"chunk_size": 15}, "a context of 15 tokens is too short; take 16 or more"),
    ],
)
def test_senseless_collections(changes: dict[str, object], message: str, collection: Collection) -> None:
    with pytest.raises(UserError, match=message):
        replace(collection, **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"two of the texts are called text\.txt"):
        replace(collection, texts=(collection.texts[0],) * 2)


def test_a_text_shorter_than_a_chunk(collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"text\.txt has \d+ tokens and a chunk 64; take a longer text"):
        run(replace(collection, texts=(text(tmp_path, n_bytes=60),)))
    assert not collection.out.exists()


@dataclass
class Heard:
    progress: list[Progress] = field(default_factory=list)


def test_progress_says_how_far_it_is(collection: Collection) -> None:
    heard = Heard()
    collect(collection, Readers(), "llama.cpp", heard.progress.append)
    read = [progress for progress in heard.progress if progress.activity == "read"]
    assert [progress.done_chunks for progress in read] == list(range(2, 11, 2))
    assert {progress.total_chunks for progress in read} == {10}
    assert [progress.text for progress in read] == ["text.txt"] * 2 + ["more.txt"] * 3
    assert read[-1].share == 1
    assert read[-1].seconds_left == 0
    assert all(progress.tokens_per_second > 0 for progress in read)
