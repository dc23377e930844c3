"""`bise imatrix` as a user meets it: what it prints and writes, and one line for whatever cannot be."""

from pathlib import Path

import numpy as np
import pytest

from quant.imatrix import read_contents
from runtime.library import data_folder
from tests.checkpoints import DEMO
from tests.imatrices import write_imatrix
from tui.cli import main

PROSE = DEMO.parent / "eval" / "prose.txt"
SMALL = ("--context", "64", "--chunks", "1", "--threads", "1")


def bise(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_matrix_of_the_demo_and_levels_made_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled texts and BF16 are what is taken where nothing is said."""
    code, out, err = bise(capsys, "imatrix", *SMALL)
    path = data_folder() / "imatrix" / "Demo-BF16-imatrix.gguf"
    assert (code, out.partition(";")[0]) == (0, f"written: {path}, 56 entries of 4 chunks")
    assert "making BF16 of demo" in err
    contents, _ = read_contents(path)
    names = ("prose.txt", "code.txt", "languages.txt", "conversations.jsonl")
    assert contents.datasets == tuple(f"calibration/{name}" for name in names)
    assert contents.metadata["bise.imatrix.model"].data == ("Demo-BF16.gguf",)
    assert contents.metadata["bise.imatrix.tokens"].data == (64, 64, 64, 64)
    assert bise(capsys, "imatrix", "demo", *SMALL)[1] == f"already there: {path}, 56 entries of 4 chunks\n"
    made = tmp_path / "made"
    code, out, _ = bise(capsys, "quantize", "demo", "--levels", "Q2_K", "--imatrix", path, "--out", made)
    assert code == 0
    assert (made / "Q2_K" / "Demo-Q2_K.gguf").is_file()


def test_the_best_level_on_disk_is_read_with(
    demo_levels: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model's levels the one named, or the best; a file is read as it is."""
    models = tmp_path / "models"
    for level in ("Q2_K", "Q8_0"):
        (models / level).mkdir(parents=True)
        (models / level / f"Mistral-Large-Instruct-2411-{level}.gguf").symlink_to(demo_levels[level])
    q2, q8 = (models / level / f"Mistral-Large-Instruct-2411-{level}.gguf" for level in ("Q2_K", "Q8_0"))
    for arguments, file in (
        (("mistral-large-2411",), q8),
        (("mistral-large-2411", "--level", "q2_k"), q2),
        ((q2,), q2),
    ):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        assert bise(capsys, "imatrix", *arguments, "--models", models, "--text", PROSE, "--out", out, *SMALL)[0] == 0
        assert read_contents(out)[0].metadata["bise.imatrix.model"].data == (file.name,)


def test_merging_alone_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_imatrix(tmp_path / f"{i}.gguf", {"x": np.ones(4, np.float32)}, {"x": [512]}) for i in (0, 1)]
    code, out, _ = bise(capsys, "imatrix", "--merge", *files, "--out", tmp_path / "sum.gguf")
    assert (code, out) == (0, f"written: {tmp_path / 'sum.gguf'}, 1 entries of 2 chunks\n")


def test_what_cannot_be_is_one_line(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "file").touch()
    (tmp_path / "taken.gguf").write_bytes(b"not ours")
    other = write_imatrix(tmp_path / "other.gguf", {"blk.0.attn_q.weight": np.ones(576, np.float32)})
    out = ("--out", tmp_path / "out.gguf")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((demo, "--text", tmp_path / "short.txt", *out), "tokens and a chunk 512; take a longer text"),
        ((demo, "--text", tmp_path / "latin.txt", *out), "latin.txt: not UTF-8: byte 3 of 4 is 0xe9"),
        ((demo, "--text", tmp_path / "none.txt", *out), "none.txt: no such text"),
        (("no-such-model", "--text", PROSE, *out), "no-such-model"),
        ((tmp_path / "none.gguf", "--text", PROSE, *out), "none.gguf: no such file"),
        ((demo, "--text", PROSE, "--out", tmp_path / "file" / "out.gguf"), "file: cannot be made: "),
        ((demo, "--text", PROSE, "--out", "/proc/out.gguf"), "/proc/out.gguf: cannot be written: "),
        ((demo, "--text", PROSE, "--out", tmp_path / "taken.gguf"), "taken.gguf: not a whole importance matrix"),
        ((demo, "--text", PROSE, "--merge", other, *out), "576 values for blk.0.attn_q.weight, whose rows have 256"),
        ((demo, "--merge", tmp_path / "none.gguf", *out), "none.gguf: no such file"),
        ((demo, "--text", PROSE, "--context", "8", *out), "a context of 8 tokens is too short"),
        ((demo, "--text", PROSE, "--kv", "q2", *out), "'q2' is not a KV cache type"),
    ]
    for arguments, words in cases:
        code, printed, err = bise(capsys, "imatrix", *arguments)
        lines = [line for line in err.splitlines() if line.startswith("bise: ")]
        assert (code, printed, len(lines)) == (1, "", 1), (arguments, err)
        assert words in lines[0]
    assert not (tmp_path / "out.gguf").exists()
    assert not list(tmp_path.glob(".*"))
