"""`bise quantize` as a user meets it: plans of the 123B model, where levels go, exceptions, matrices, interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quant.recipes import tensor_bytes
from runtime.levels import EVERY_LEVEL, LEVELS, Shape
from tests.checkpoints import MISTRAL_LARGE_2, TINY, write_checkpoint, write_sparse_checkpoint
from tests.imatrices import write_imatrix
from tests.llama_quantize import llama_loads
from tests.test_cli import BISE, bise

ROOT = Path(__file__).parent.parent
REFERENCE = json.loads((Path(__file__).parent / "reference" / "mistral-large-2-types.json").read_text())
MIB = 2**20


@pytest.fixture
def environment() -> dict[str, str]:
    """That of the test, with its own empty home (tests/conftest.py)."""
    return dict(os.environ)


def _plan(environment: dict[str, str], *arguments: str | Path) -> dict[str, Any]:
    run = bise(environment, "quantize", *arguments, "--dry-run", "--json", "--threads", "2")
    assert run.returncode == 0, run.stderr
    plan: dict[str, Any] = json.loads(run.stdout)
    return plan


def _error(run: "subprocess.CompletedProcess[str]") -> str:
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    return run.stderr


def _types(level: str) -> dict[str, str]:
    """Tensor → type, by llama-quantize's own dry run."""
    found = {}
    for name, entry in REFERENCE["levels"][level].items():
        if isinstance(entry, str):
            found[name] = entry.upper()
            continue
        for type_, ranges in entry.items():
            for part in ranges.split(","):
                first, _, last = part.partition("-")
                found |= {f"blk.{i}.{name}.weight": type_.upper() for i in range(int(first), int(last or first) + 1)}
    return found


def test_the_123_billion_parameters_are_planned_from_sparse_shards_to_the_byte(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """51 files of 245 GB that take no room."""
    folder = write_sparse_checkpoint(tmp_path / "Large", MISTRAL_LARGE_2)
    assert len(list(folder.glob("*.safetensors"))) == 51
    plan = _plan(environment, folder, "--levels", "all,BF16", "--out", tmp_path / "out")
    assert list(plan["levels"]) == [*LEVELS, "BF16"]
    assert plan["source"]["read_bytes"] == 245_224_488_960 - 2 * 177 * 12_288  # norms are BF16 there, and F32 in GGUF
    for level, entry in plan["levels"].items():
        assert entry["tensor_bytes"] == tensor_bytes(MISTRAL_LARGE_2, level)
        assert entry["file_bytes"] == sum(shard["bytes"] for shard in entry["shards"])
        assert 0 < entry["file_bytes"] - entry["tensor_bytes"] < MIB
        assert max(shard["bytes"] for shard in entry["shards"]) < 50e9
        if level in LEVELS:
            assert entry["types"] == _types(level)
            assert entry["bits_per_weight"] == pytest.approx(8 * entry["tensor_bytes"] / 122_610_069_504)
    assert plan["peak_memory_bytes"] < 1536 * MIB
    assert plan["disk"][0]["needed_bytes"] == sum(entry["file_bytes"] for entry in plan["levels"].values())
    assert not (tmp_path / "out").exists()


def test_a_model_is_planned_before_any_download(environment: dict[str, str]) -> None:
    plan = _plan(environment, "mistral-large-2411", "--levels", "all")
    sizes = {level: entry["tensor_bytes"] for level, entry in plan["levels"].items()}
    assert sizes == {level: tensor_bytes(MISTRAL_LARGE_2, level) for level in LEVELS}
    assert any("not on this disk" in note for note in plan["notes"])


def test_a_dry_run_says_what_it_costs(environment: dict[str, str], tmp_path: Path) -> None:
    run = bise(environment, "quantize", "demo", "--levels", "Q4_K_M,F16", "--dry-run", "--out", tmp_path / "out")
    lines = run.stdout.splitlines()
    assert lines[0].startswith("Demo: 19.4 MB of weights, 2 files, Hugging Face safetensors, ")
    rows = {line.split()[0]: line for line in lines if line[:1].isupper()}
    assert rows["Q4_K_M"].endswith("Q4_K 49, F32 17, Q6_K 9")
    assert lines[-4] == f"to      {tmp_path / 'out'}: Q4_K_M, F16"
    assert [line.split()[0] for line in lines[-3:]] == ["memory", "disk", "time"]
    assert not (tmp_path / "out").exists()


def test_every_level_goes_where_it_is_sent(environment: dict[str, str], tmp_path: Path) -> None:
    run = bise(
        environment, "quantize", "demo", "--levels", "Q2_K,Q8_0,F16", "--out", tmp_path / "a", "--out",
        f"q8_0={tmp_path / 'b'}", "--json",
    )  # fmt: skip
    made = json.loads(run.stdout)["made"]
    assert made == {
        "Q2_K": [str(tmp_path / "a/Q2_K/Demo-Q2_K.gguf")],
        "Q8_0": [str(tmp_path / "b/Q8_0/Demo-Q8_0.gguf")],
        "F16": [str(tmp_path / "a/F16/Demo-F16.gguf")],
    }
    for paths in made.values():
        llama_loads(Path(paths[0]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "a", "--out", "b"], "--out names two folders for all levels, a and b; give one"),
        (["--levels", "Q2_K", "--out", "Q8_0=b"], "Q8_0 is not among the levels to make; add it to --levels"),
        (["--tensor", "ffn_up=Q9_K"], "Q9_K"),
        (["--tensor", "ffn_up"], "REGEX=TYPE"),
        (["--tensor", "(=Q8_0"], "regular expression"),
        (["--tensor", "ffn_wrong=Q8_0"], "no tensor's name matches 'ffn_wrong'"),
        (["--output-type", "Q9_K"], "Q9_K"),
        (["--imatrix", "nowhere.gguf"], "nowhere.gguf"),
        (["--shard-size", "48X"], "'48X' is not a size"),
        (["--threads", "0"], "0 threads"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(
    arguments: list[str], words: str, environment: dict[str, str], tmp_path: Path
) -> None:
    run = bise(environment, "quantize", "demo", *arguments, cwd=tmp_path)
    assert words in _error(run)
    assert list(tmp_path.iterdir()) == []


def test_exceptions_decide_the_types_of_the_tensors_they_name(environment: dict[str, str], tmp_path: Path) -> None:
    run = bise(
        environment, "quantize", "demo", "--levels", "Q4_K_M", "--out", tmp_path,
        "--tensor", r"blk\.(0|7)\.ffn_up=q8_0", "--tensor", "ffn_up=Q2_K", "--output-type", "Q8_0",
        "--embedding-type", "F16",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    path = tmp_path / "Q4_K_M/Demo-Q4_K_M.gguf"
    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert [types[f"blk.{i}.ffn_up.weight"] for i in range(8)] == ["Q8_0", *["Q2_K"] * 6, "Q8_0"]
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "F16")
    assert reader.fields["bise.recipe"].contents().startswith(r"Q4_K_M, blk\.(0|7)\.ffn_up=Q8_0, ffn_up=Q2_K, output=")
    llama_loads(path)


def test_a_file_says_where_it_comes_from(environment: dict[str, str], tmp_path: Path) -> None:
    """As in the hub's cache: the folder's name tells repository and commit."""
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--mistralai--Tiny-2411" / "snapshots" / commit
    write_checkpoint(snapshot, TINY, n_files=1)
    run = bise(environment, "quantize", snapshot, "--levels", "Q8_0", "--out", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    (path,) = (tmp_path / "out").rglob("*.gguf")
    fields = gguf.GGUFReader(path).fields
    told = {key: field.contents() for key, field in fields.items() if key.startswith("bise.")}
    assert (fields["general.name"].contents(), "general.finetune" in fields) == ("Tiny-2411", False)
    hashed = subprocess.run(["sha256sum", "model.safetensors"], cwd=snapshot, capture_output=True, check=True)
    listed = subprocess.run(["sha256sum"], input=hashed.stdout, capture_output=True, check=True)
    assert told == {
        "bise.version": told["bise.version"],
        "bise.ggml_version": told["bise.ggml_version"],
        "bise.source.repository": "mistralai/Tiny-2411",
        "bise.source.revision": commit,
        "bise.source.sha256": listed.stdout.decode().split()[0],
    }


def test_a_matrix_changes_the_blocks_and_is_named_in_the_file(environment: dict[str, str], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = {f"blk.{i}.ffn_up.weight": rng.gamma(0.5, 2.0, 256).astype(np.float32) for i in range(8)}
    write_imatrix(tmp_path / "demo.imatrix.gguf", values)
    for out, extra in (("with", ["--imatrix", str(tmp_path / "demo.imatrix.gguf")]), ("without", [])):
        run = bise(environment, "quantize", "demo", "--levels", "Q3_K_M", "--out", tmp_path / out, *extra)
        assert run.returncode == 0, run.stderr
    readers = [gguf.GGUFReader(tmp_path / out / "Q3_K_M/Demo-Q3_K_M.gguf") for out in ("with", "without")]
    data = [{tensor.name: tensor.data.tobytes() for tensor in reader.tensors} for reader in readers]
    assert {name for name in data[0] if data[0][name] != data[1][name]} == set(values)
    assert readers[0].fields["quantize.imatrix.file"].contents() == "demo.imatrix.gguf"
    assert "quantize.imatrix.file" not in readers[1].fields


def test_a_matrix_of_another_model_is_refused_before_anything_is_written(
    environment: dict[str, str], tmp_path: Path
) -> None:
    write_imatrix(tmp_path / "other.gguf", {"blk.0.ffn_up.weight": np.ones(128, np.float32)})
    run = bise(environment, "quantize", "demo", "--out", tmp_path / "out", "--imatrix", tmp_path / "other.gguf")
    assert "128 values for blk.0.ffn_up.weight, whose rows have 256 weights" in _error(run)
    assert not (tmp_path / "out").exists()


def test_every_folder_has_a_card_of_all_the_levels_in_it(environment: dict[str, str], tmp_path: Path) -> None:
    for level in ("Q8_0", "Q2_K"):
        run = bise(environment, "quantize", "demo", "--levels", level, "--out", tmp_path)
        assert run.returncode == 0, run.stderr
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")
    assert "Demo-Q8_0.gguf" in card
    assert "Demo-Q2_K.gguf" in card


def test_quiet_says_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    run = bise(environment, "quantize", "demo", "--levels", "Q8_0", "--out", tmp_path, "--quiet")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_ctrl_c_ends_it_and_the_same_command_goes_on(environment: dict[str, str], tmp_path: Path) -> None:
    """A layer of 12,288 columns, all zeros: seconds of work at ten levels."""
    shape = Shape(n_layers=1, n_embd=12_288, n_ff=2048, n_heads=16, n_heads_kv=8, head_dim=128, n_vocab=4096)
    folder = write_sparse_checkpoint(tmp_path / "Wide", shape)
    command = [
        BISE,
        "quantize",
        str(folder),
        "--levels",
        "Q2_K,Q4_K_M,Q5_K_M,Q8_0",
        "--out",
        str(tmp_path / "out"),
        "--kernels",
        "reference",
    ]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    journal = tmp_path / "out/Q8_0/.Wide-Q8_0.journal"
    while not journal.exists() or journal.read_text().count("\n") < 2:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on where this one stopped" in stderr
    for path in (tmp_path / "out").rglob("*.gguf"):  # none, unless it ended just then
        llama_loads(path)
    assert bise(environment, *command[1:]).returncode == 0
    llama_loads(tmp_path / "out/Q8_0/Wide-Q8_0.gguf")
    shutil.rmtree(tmp_path / "out")


def test_without_kernels_ggml_makes_the_same_files_and_a_note_says_so(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """A checkout in which nothing was compiled; `--kernels reference` is the same by choice, and needs no note."""
    plain = tmp_path / "plain"
    for folder in ("runtime", "quant", "tui"):
        (plain / folder).mkdir(parents=True)
        for path in (ROOT / folder).iterdir():
            if path.name != "kernels":
                (plain / folder / path.name).symlink_to(path)
    (plain / "models.yaml").symlink_to(ROOT / "models.yaml")
    (plain / "quant/kernels").mkdir()
    (plain / "quant/kernels/__init__.py").symlink_to(ROOT / "quant/kernels/__init__.py")
    command = ["quantize", "demo", "--levels", "Q4_K_S", "--out"]
    script = "import sys; from tui.cli import main; sys.exit(main())"
    without = subprocess.run(
        [sys.executable, "-c", script, *command, tmp_path / "without"],
        env={**environment, "PYTHONPATH": str(plain)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    chosen = bise(environment, *command, tmp_path / "chosen", "--kernels", "reference")
    best = bise(environment, *command, tmp_path / "best")
    note = "Bise's own kernels are not built"
    assert without.stderr.count(note) == 1
    assert note not in chosen.stderr + best.stderr
    sums = {(tmp_path / name / "Q4_K_S/Demo-Q4_K_S.sha256").read_text() for name in ("without", "chosen", "best")}
    assert len(sums) == 1


def test_all_levels_have_a_place_in_the_help() -> None:
    assert set(EVERY_LEVEL) == {*LEVELS, "BF16", "F16"}


def test_the_longer_search_makes_levels_of_the_same_size_beside_the_others(
    environment: dict[str, str], tmp_path: Path, demo_levels: dict[str, Path]
) -> None:
    """In one run with ggml's, which stay as they are; found by name; Q8_0 has only one search."""
    matrix = write_imatrix(tmp_path / "m.gguf", {"blk.0.attn_q.weight": np.ones(256, np.float32)})
    run = bise(environment, "quantize", "demo", "--levels", "Q4_K_M,Q4_K_M-BEST", "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    plain, better = (tmp_path / level / f"Demo-{level}.gguf" for level in ("Q4_K_M", "Q4_K_M-BEST"))
    tensors = {path: gguf.GGUFReader(path).tensors for path in (plain, better, demo_levels["Q4_K_M"])}
    alone = tensors[demo_levels["Q4_K_M"]]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(tensors[plain], alone, strict=True))
    assert [(t.name, t.tensor_type) for t in tensors[plain]] == [(t.name, t.tensor_type) for t in tensors[better]]
    for ours, theirs in zip(tensors[better], tensors[plain], strict=True):
        is_searched = ours.tensor_type.name in ("Q4_K", "Q6_K")
        assert np.array_equal(ours.data, theirs.data) is not is_searched, ours.name
    recipe = gguf.GGUFReader(better).fields["bise.recipe"].contents()
    assert recipe == "Q4_K_M, search=best"
    assert json.loads((better.parent / "Demo-Q4_K_M-BEST.json").read_text())["recipe"] == recipe

    searched = bise(environment, "quantize", "demo", "--search", "best", "--levels", "q4_k_m,q8_0", "--out", tmp_path)
    assert searched.returncode == 0, searched.stderr
    assert [line.split()[0] for line in searched.stdout.splitlines()[:-1]] == ["Q4_K_M-BEST", "Q8_0"]
    assert "already there" in searched.stdout.splitlines()[0]
    again = bise(environment, "quantize", "demo", "--levels", "Q4_K_M-BEST", "--imatrix", matrix, "--out", tmp_path)
    assert "already exists and was not made by this conversion" in _error(again)
    ggml = bise(
        environment, "quantize", "demo", "--search", "best", "--kernels", "reference", "--out", tmp_path / "new"
    )
    assert "ggml's kernels know only ggml's search" in _error(ggml)
    assert not (tmp_path / "new").exists()


def test_the_longer_search_asks_the_matrix_for_means(environment: dict[str, str], tmp_path: Path) -> None:
    """Other means of one tensor make other blocks of that tensor alone; ggml's search does not look at them."""
    sums = {f"blk.{i}.attn_q.weight": np.full(256, 2, np.float32) for i in range(2)}
    made = {}
    for sign in (1, -1):
        totals = {name: np.where(np.arange(256) % 2, 1, sign).astype(np.float32) for name in sums}
        totals["blk.1.attn_q.weight"] = np.ones(256, np.float32)
        matrix = write_imatrix(tmp_path / f"m{sign}.gguf", sums, totals=totals)
        out = tmp_path / str(sign)
        run = bise(environment, "quantize", "demo", "--levels", "Q4_K_S,Q4_K_S-BEST", "--imatrix", matrix, "--out", out)
        assert run.returncode == 0, run.stderr
        for level in ("Q4_K_S", "Q4_K_S-BEST"):
            made[sign, level] = gguf.GGUFReader(out / level / f"Demo-{level}.gguf").tensors
    for level, expected in (("Q4_K_S", []), ("Q4_K_S-BEST", ["blk.0.attn_q.weight"])):
        pairs = zip(made[1, level], made[-1, level], strict=True)
        assert [a.name for a, b in pairs if not np.array_equal(a.data, b.data)] == expected
