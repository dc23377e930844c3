"""Files of importance matrices: what they say by llama-quantize's reading, and what no file may do to the reader."""

import ctypes
import os
import re
import struct
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant.imatrix import read_imatrix
from quant.imatrix_file import Contents, ImatrixError, parse
from tests.imatrices import legacy_imatrix, legacy_tail, write_imatrix

REFERENCE_FOLDER = Path(__file__).parent / "reference"


def _ones(n: int) -> NDArray[np.float32]:
    return np.ones(n, np.float32)


# What a file says


def _parse(data: bytes) -> Contents:
    with TemporaryDirectory() as folder:
        path = Path(folder, "some.file")
        path.write_bytes(data)
        try:
            return parse(path, data)
        except ImatrixError as error:
            raise ImatrixError(str(error).removeprefix(f"{folder}/")) from error


def _read(data: bytes) -> tuple[dict[str, list[float]], tuple[str, ...], int]:
    contents = _parse(data)
    return {name: values.tolist() for name, values in contents.values.items()}, contents.datasets, contents.n_chunks


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """The bytes of a GGUF matrix file with some properties."""

    def write(*arguments: Any, **options: Any) -> bytes:
        return write_imatrix(tmp_path / "some.gguf", *arguments, **options).read_bytes()

    return write


def test_sums_are_divided_by_their_counts_in_float32(written: Any) -> None:
    sums = np.array([1, 2, 0, 1e-40], np.float32)
    expected = [ctypes.c_float(float(value) / 3).value for value in sums]
    assert _read(written({"a": sums}, {"a": [3]})) == ({"a": expected}, ("prose.txt",), 20)
    assert _read(legacy_imatrix({"a": (3, sums)}, legacy_tail(7, "ö.txt"))) == ({"a": expected}, ("ö.txt",), 7)


@pytest.mark.parametrize(
    ("counts", "values"),
    [
        ([0], [1, 1, 1, 1]),
        ([0.4], [1, 1, 1, 1]),
        ([0.5], [2, 4, 6, 8]),
        ([1.5], [1, 2, 3, 4]),
        ([2, 4], [1, 2, 1.5, 2]),
        ([0, 4], [1, 1, 1.5, 2]),
    ],
)
def test_counts_are_rounded_and_what_none_was_counted_for_is_one(written: Any, counts: Any, values: Any) -> None:
    assert _read(written({"a": np.array([2, 4, 6, 8], np.float32)}, {"a": counts}))[0] == {"a": values}


@pytest.mark.parametrize("n_calls", [1, 0, -3])
def test_old_values_without_calls_are_means_already(n_calls: int) -> None:
    assert _read(legacy_imatrix({"a": (n_calls, np.array([2, 4], np.float32))}))[0] == {"a": [2, 4]}


@pytest.mark.parametrize(
    ("tail", "datasets", "n_chunks"),
    [
        (b"", (), 0),
        (struct.pack("<i", 9), (), 9),
        (struct.pack("<i", -9), (), 0),
        (struct.pack("<ii", 9, 0), (), 9),
        (struct.pack("<ii", 9, -1), (), 9),
        (legacy_tail(9, "a\0b") + b"more", ("a",), 9),
    ],
)
def test_the_end_of_an_old_file_may_be_missing(tail: bytes, datasets: tuple[str, ...], n_chunks: int) -> None:
    assert _read(legacy_imatrix({"a": (1, _ones(2))}, tail)) == ({"a": [1, 1]}, datasets, n_chunks)


def test_plain_sums_are_divided_by_their_counts_too(written: Any) -> None:
    """Of either sign, up to what rows that are all alike have, even if their squares are 0; not counted, they are 0."""
    squares = {name: np.array([3, 12, 0, 1e-40, 0], np.float32) for name in ("a", "b")}
    totals = np.array([-3, 6, 0, 1e-20, 3e-24], np.float32)
    contents = _parse(written(squares, {"a": [3], "b": [3]}, totals={"a": totals}))
    assert {name: values.tolist() for name, values in contents.means.items()} == {
        "a": [ctypes.c_float(float(value) / 3).value for value in totals]
    }
    found, plain = contents.sums["a"].totals, contents.sums["b"].totals
    assert (found is not None, plain) == (True, None)
    np.testing.assert_array_equal(found, totals[None].astype(np.float64))
    assert _parse(legacy_imatrix({"a": (3, squares["a"])})).means == {}
    experts = written(
        {"a": np.array([0, 0, 8, 2], np.float32)}, {"a": [0, 2]}, totals={"a": np.array([0, 0, -4, 1], np.float32)}
    )
    assert _parse(experts).means["a"].tolist() == [0, 0, -2, 0.5]


def test_keys_that_do_not_matter_may_be_there_or_not(written: Any) -> None:
    more = {"imatrix.chunk_count": 1 << 31, "imatrix.chunk_size": 0, "some.other": 3}
    texts = ("first", "\x1b[2J\0end", "")
    found = _read(written({"a": _ones(2)}, datasets=texts, keys=more, general_type=None))
    assert found == ({"a": [1, 1]}, ("first", "\x1b[2J", ""), 0)


def test_tensors_that_are_neither_sums_nor_counts_are_skipped(tmp_path: Path, written: Any) -> None:
    data = written({"a": _ones(8)}).replace(b"a.counts", b"a.counte").replace(b"a.in_sum2", b"a.in_some")
    (tmp_path / "some.gguf").write_bytes(data)
    with pytest.raises(ImatrixError, match="without entries"):
        read_imatrix(tmp_path / "some.gguf")


def test_the_content_and_not_the_name_tells_the_format(tmp_path: Path) -> None:
    path = tmp_path / "some.dat"
    write_imatrix(path, {"a": _ones(3)})
    assert list(read_imatrix(path).values) == ["a"]
    path = tmp_path / "some.gguf"
    path.write_bytes(legacy_imatrix({"b": (1, _ones(3))}))
    assert list(read_imatrix(path).values) == ["b"]


# Files that are refused


def _refusal(data: bytes) -> str:
    with pytest.raises(ImatrixError) as caught:
        _parse(data)
    return str(caught.value)


@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (-1e-9, "-1e-09")])
def test_values_that_are_no_importance_are_refused_with_name_and_index(written: Any, bad: float, shown: str) -> None:
    values = np.array([1, 0, 2, bad, 3], np.float32)
    for data in (written({"blk.0": values}), legacy_imatrix({"blk.0": (2, values)})):
        assert re.search(rf"'blk\.0(\.in_sum2)?' holds {shown}\S* at index 3, ", _refusal(data))
    assert "'a.counts' holds nan at index 0" in _refusal(written({"a": _ones(2)}, {"a": [np.nan]}))
    assert "'a' has 4 sums and 2 counts of up to 1e+19" in _refusal(written({"a": _ones(4)}, {"a": [3, 1e19]}))


@pytest.mark.parametrize(
    ("totals", "fault"),
    [
        ([0, np.nan, 0, 0], "'a.in_sum' holds nan at index 1, and all must be finite;"),
        ([0, 0, 0, -np.inf], "'a.in_sum' holds -inf at index 3, and all must be finite;"),
        ([0, 0, 0], "'a' has 4 values of .in_sum2 and 3 of .in_sum;"),
        ([6, -6, 6, 6.1], "'a.in_sum' holds 6.1 in column 3, and .in_sum2 allows 6.03 at most;"),
        ([6, -6.1, 6, 6], "'a.in_sum' holds -6.1 in column 1, and .in_sum2 allows 6.03 at most;"),
    ],
)
def test_sums_that_no_numbers_have_are_refused(written: Any, totals: list[float], fault: str) -> None:
    """3 numbers whose squares add up to 12 have a sum of -6 to 6: those of three times 2."""
    squares = {"a": np.full(4, 12, np.float32)}
    assert fault in _refusal(written(squares, {"a": [3]}, totals={"a": np.array(totals, np.float32)}))


def test_every_cut_of_a_file_is_refused(written: Any) -> None:
    entries = {"blk.0": _ones(5), "blk.1": _ones(3)}
    data = written(entries, totals={"blk.0": -_ones(5)})
    for n in range(len(data)):
        assert _refusal(data[:n]).startswith("some.file: not a whole importance matrix: ")
    data = legacy_imatrix({name: (1, values) for name, values in entries.items()})
    tail = legacy_tail(3, "text")
    for n in {*range(len(data + tail))} - {len(data), len(data) + 4}:
        assert _refusal((data + tail)[:n]).startswith("some.file: not a whole importance matrix: ")


ONE = struct.pack("<i", 1)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 1, 0), "GGUF version 1 of 2023"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "the key imatrix.datasets is missing"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
            "it announces 1,152,921,504,606,846,976 tensors, and 8 bytes are",
        ),
        (ONE + struct.pack("<i", -1), "the length of a name is -1, and 0 to 63 are possible"),
        (ONE + struct.pack("<i", 1 << 30), "the length of a name is 1,073,741,824, and 0 to 63 are possible"),
        (ONE + struct.pack("<i1s", 1, b"\xff"), r"the name '\ufffd' is not UTF-8"),
        (ONE + struct.pack("<i1sii", 1, b"a", 1, 0), "the number of values of 'a' is 0, and 1 to 2,147,483,647 are"),
        (ONE + struct.pack("<i1sii", 1, b"a", 1, 1 << 30), "'a' needs 4,294,967,296 bytes at byte 17, and 0 are left"),
        (struct.pack("<i", 0), "the number of entries is 0, and 1 to 65,536 are possible"),
        (struct.pack("<i", -5), "the number of entries is -5, and 1 to 65,536 are possible"),
        (b"a text file, chosen by mistake", "the number of entries is 1,702,109,281, and 1 to 65,536 are possible"),
    ],
)
def test_faults_are_told_in_one_line_with_both_numbers(data: bytes, fault: str) -> None:
    message = _refusal(data)
    assert fault in message
    assert message.endswith("; copy it again, or make it again with llama-imatrix")
    assert message.count("again") == 2
    assert message.isprintable()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (b"imatrix.datasets", b"imatrix.datasetz", "the key imatrix.datasets is missing"),
        (b"imatrix.chunk_count", b"imatrix.chunk_comte", "the key imatrix.chunk_count is missing"),
        (b"imatrix.chunk_size", b"imatrix.chunk_sice", "the key imatrix.chunk_size is missing"),
        (b"chunk_count\4\0\0\0", b"chunk_count\5\0\0\0", "the value of imatrix.chunk_count is not an unsigned 32-bit"),
        (b"chunk_size\4\0\0\0", b"chunk_size\6\0\0\0", "the value of imatrix.chunk_size is not an unsigned 32-bit"),
        (b"a.counts", b"b.counts", "'a' lacks .in_sum2 or .counts"),
        (b"a.in_sum2", b"b.in_sum2", "'a' lacks .in_sum2 or .counts"),
        (b"a.in_sum\1", b"b.in_sum\1", "'b' lacks .in_sum2 or .counts"),
        (b"a.counts\2\0\0\0", b"a.counts\5\0\0\0", "its header is damaged (tensor 'a.counts' has 5 dimensions, "),
        (b"general.type", b"general.tyyy", None),
    ],
)
def test_a_changed_file_is_told_from_a_whole_one(written: Any, old: bytes, new: bytes, fault: str | None) -> None:
    data = written({"a": _ones(6)}, {"a": [1, 1]}, totals={"a": _ones(6)})
    assert data.count(old) == 1
    if fault is None:
        assert _read(data.replace(old, new)) == _read(data)
    else:
        assert fault in _refusal(data.replace(old, new))


def _info(name: bytes, *dims: int, type_: int = 0, offset: int = 0) -> bytes:
    return struct.pack(f"<Q{len(name)}sI{len(dims)}QIQ", len(name), name, len(dims), *dims, type_, offset)


def _with_tensors(*infos: bytes, datasets: bytes = struct.pack("<IIQ", 9, 8, 0)) -> bytes:
    """A GGUF file with the keys of a matrix and these tensors."""
    keys = [
        _key("imatrix.datasets", datasets),
        _key("imatrix.chunk_count", struct.pack("<II", 4, 3)),
        _key("imatrix.chunk_size", struct.pack("<II", 4, 512)),
    ]
    return b"".join([b"GGUF", struct.pack("<IQQ", 3, len(infos), len(keys)), *keys, *infos, bytes(4096)])


def _key(name: str, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + value


@pytest.mark.parametrize("datasets", [struct.pack("<IIQ", 9, 8, 0), struct.pack("<IIQI", 9, 4, 1, 7), b"\4\0\0\0abcd"])
def test_datasets_that_are_no_texts_are_none(datasets: bytes) -> None:
    data = _with_tensors(_info(b"a.in_sum2", 2), _info(b"a.counts", 1, offset=32), datasets=datasets)
    assert _read(data) == ({"a": [1, 1]}, (), 3)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (_with_tensors(_info(b"a.in_sum2", 8), _info(b"a.in_sum2", 8, offset=32)), "tensor 'a.in_sum2' occurs twice"),
        (_with_tensors(_info(b"a.in_sum2", 8, type_=1), _info(b"a.counts", 1, offset=32)), "is F16, and must be F32"),
        (_with_tensors(_info(b"a.in_sum2", 8), _info(b"a.counts", 1, type_=26, offset=32)), "is I32, and must be F32"),
        (_with_tensors(_info(b"a.in_sum2", 1 << 40)), "cut off within tensor 'a.in_sum2' (it ends at byte 4,398,046,"),
        (_with_tensors(_info(b"a.in_sum2", 8, 0), _info(b"a.counts", 1)), "'a.in_sum2' has the dimensions [8, 0]"),
        (_with_tensors(_info(b"a.in_sum2", 8), _info(b"a.counts", 3, offset=32)), "'a' has 8 sums and 3 counts"),
        (_with_tensors(_info(b"\x1b[2J\n.counts", 8)), r"'\x1b[2J\n' lacks .in_sum2 or .counts"),
        (
            _with_tensors(
                _info(b"a.in_sum2", 8), _info(b"a.counts", 1, offset=32), _info(b"a.in_sum", 8, type_=1, offset=64)
            ),
            "'a.in_sum' is F16, and must be F32",
        ),
    ],
)
def test_tensors_that_cannot_be_are_refused(data: bytes, fault: str) -> None:
    message = _refusal(data)
    assert fault in message
    assert message.isprintable()


def test_entries_that_stand_twice_are_refused() -> None:
    data = legacy_imatrix({"a": (1, _ones(2)), "b": (1, _ones(2))})
    assert "'a' is there twice" in _refusal(data.replace(b"b", b"a"))
    assert r"'\x00' is there twice, or no name" in _refusal(data.replace(b"b", b"\0"))


def test_a_model_is_not_taken_for_a_matrix(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_tensor("output_norm.weight", _ones(4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ImatrixError, match="not an importance matrix, but a GGUF file of type 'model'; name the file"):
        read_imatrix(path)


def test_what_is_no_file_of_a_possible_size_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    for name, fault in {
        "nowhere": "nowhere: no such file; name the file that llama-imatrix made",
        "": ": not a file; ",
        "pipe": "pipe: not a file; ",
        "large/below": "large/below: cannot be read: Not a directory",
        "null\0byte": "cannot be read: .*null",
        "large": "large: 1,099,511,627,776 bytes, and an importance matrix has at most 268,435,456; .* not the model",
    }.items():
        with pytest.raises(ImatrixError, match=fault):
            read_imatrix(tmp_path / name)


SMALL = {"blk.0.ffn_up.weight": _ones(4), "blk.0.ffn_down.weight": np.array([0, 1, 2, 3], np.float32)}
WHOLE = (
    (REFERENCE_FOLDER / "demo-imatrix.gguf").read_bytes(),
    _with_tensors(_info(b"a.in_sum2", 4, 2), _info(b"a.counts", 2, offset=32)),
    _with_tensors(_info(b"a.in_sum2", 8), _info(b"a.counts", 1, offset=32), _info(b"a.in_sum", 8, offset=64)),
    legacy_imatrix({name: (2, values) for name, values in SMALL.items()}, legacy_tail(3, "text")),
)
NUMBERS = st.sampled_from([0, 1, 2, 8, 9, 63, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1])


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    whole=st.sampled_from(WHOLE),
    changes=st.lists(st.tuples(st.integers(0, 1 << 12), NUMBERS, st.sampled_from(["<B", "<I", "<Q"])), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 1 << 12)),
    more=st.binary(max_size=20),
)
def test_damage_is_either_seen_or_harmless(whole: bytes, changes: Any, cut: int | None, more: bytes) -> None:
    data = bytearray(whole)
    for at, number, layout in changes:
        piece = struct.pack(layout, number & ((1 << 8 * struct.calcsize(layout)) - 1))
        at %= len(data) - len(piece)
        data[at : at + len(piece)] = piece
    message = ""
    tracemalloc.start()
    try:
        contents = _parse(bytes(data[:cut]) + more)
        assert all(np.isfinite(values).all() and values.min() >= 0 for values in contents.values.values())
        assert all(np.isfinite(values).all() for values in contents.means.values())
    except ImatrixError as error:
        message = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == "" or (message.isprintable() and len(message) < 400)
    assert peak < 5 * len(data) + (4 << 20)
