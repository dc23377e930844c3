"""`bise verify` as a user meets it: exit codes, one line of error, JSON, Ctrl-C, and bounded memory."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from quant.convert import convert
from quant.header import Value, ValueType, header
from quant.recipes import TensorSpec
from runtime.ggml import GgmlType
from tests.checkpoints import TINY, write_checkpoint
from tests.conversions import demo_plan
from tests.terminal import Terminal
from tests.test_cli import BISE, _one_line_error, bise, environment

__all__ = ["environment"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `model`, and in `out` two levels. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model", TINY)
    convert(demo_plan(folder / "out", "Q8_0", "Q4_K_M", folder=folder / "model"), threads=2)
    return folder


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy of the levels; one has a scale that is no number."""
    out = Path(shutil.copytree(made / "out", tmp_path / "out"))
    path = out / "Q8_0" / "Demo-Q8_0.gguf"
    content = bytearray(path.read_bytes())
    entry = json.loads(path.with_suffix(".json").read_text())["files"][0]["tensors"][0]
    content[entry["offset"] : entry["offset"] + 2] = b"\0\x7e"
    path.write_bytes(content)
    return out


def test_all_is_well(made: Path, environment: dict[str, str]) -> None:
    run = bise(environment, "verify", made / "out")
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "all"]
    assert re.fullmatch(r"all is well: 2 files, \S+ MB", lines[-1])
    quiet = bise(environment, "verify", made / "out", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_damage_is_one_line_for_the_file_and_one_line_of_error(damaged: Path, environment: dict[str, str]) -> None:
    for flags in ([], ["--quiet"]):
        run = bise(environment, "verify", damaged, *flags)
        assert _one_line_error(run) == "bise: 1 of 2 files is wrong; what to do is said above"
        assert len(run.stderr.splitlines()) == 1, "not a line of ggml's own for the invalid block"
        wrong = [line for line in run.stdout.splitlines() if line.startswith("wrong")]
        assert len(wrong) == 1
        for words in ("Demo-Q8_0.gguf", "'output.weight'", "make the level again with `bise quantize … --levels Q8_0"):
            assert words in wrong[0]
        assert len(run.stdout.splitlines()) == (1 if flags else 2)


def test_the_verdict_is_the_last_line_where_both_streams_go_to_one_file(
    damaged: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    buffered = {name: value for name, value in environment.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "log").open("w") as log:
        subprocess.run([BISE, "verify", damaged], env=buffered, stdout=log, stderr=log, check=False)
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith("bise: 1 of 2 files is wrong")


def test_the_advice_helps(made: Path, environment: dict[str, str], tmp_path: Path) -> None:
    command: list[str | Path] = ["quantize", made / "model", "--levels", "Q8_0", "--out", tmp_path]
    assert bise(environment, *command).returncode == 0
    path = tmp_path / "Q8_0" / "model-Q8_0.gguf"
    path.write_bytes(path.read_bytes()[:-100] + b"x" * 100)
    assert "already there" in bise(environment, *command).stdout, "it looks at sizes only"
    assert "with `bise quantize … --levels Q8_0 --force`" in bise(environment, "verify", tmp_path).stdout
    assert bise(environment, *command, "--force").returncode == 0
    assert bise(environment, "verify", tmp_path).returncode == 0


def test_json_is_one_object_with_all_of_it(damaged: Path, made: Path, environment: dict[str, str]) -> None:
    run = bise(environment, "verify", damaged, "--json", "--against", made / "model")
    assert run.returncode == 1
    told = json.loads(run.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (told["well"], told["verdict"]) == (False, "1 of 2 files is wrong; what to do is said above")
    files = {file["path"]: file for level in told["levels"] for file in level["files"]}
    wrong = files[str(damaged / "Q8_0" / "Demo-Q8_0.gguf")]
    assert [finding["tensor"] for finding in wrong["findings"]] == ["output.weight"]
    assert "--force" in wrong["advice"]
    q8_0 = next(level for level in told["comparisons"] if level["name"] == "Demo-Q8_0")
    assert q8_0["made_of_source"] is True
    assert q8_0["tensors"][0] == {
        "name": "output.weight",
        "type": "Q8_0",
        "n_elements": 4096 * 64,
        "rmse": None,
        "relative_rmse": None,
        "cosine": None,
        "max_error": None,
    }
    assert len(q8_0["tensors"]) == 21
    assert q8_0["by_type"]["F32"]["rmse"] == 0


def test_the_table_of_errors(made: Path, environment: dict[str, str], tmp_path: Path) -> None:
    run = bise(environment, "verify", made / "out" / "Q8_0", "--against", made / "model", "--worst", "3")
    assert run.returncode == 0, run.stderr
    assert "made of these weights" in run.stdout
    rows = [line.split() for line in run.stdout.splitlines() if " Q8_0 " in line]
    assert len(rows) == 4, "three tensors, and all of the type"
    errors = [float(row[2]) for row in rows[:3]]
    assert errors == sorted(errors, reverse=True)
    assert "the whole level" in run.stdout
    assert "--worst -1" in _one_line_error(bise(environment, "verify", made / "out", "--worst", "-1"))
    other = write_checkpoint(tmp_path / "other", TINY, "F16")
    run = bise(environment, "verify", made / "out" / "Q8_0", "--against", other)
    assert _one_line_error(run) == "bise: 1 of 1 level cannot be of these weights; what to do is said above"
    assert "name the model that it was made from" in run.stdout


def test_the_users_own_levels_are_the_default(made: Path, environment: dict[str, str], tmp_path: Path) -> None:
    home = {**environment, "XDG_DATA_HOME": str(tmp_path)}
    assert "no such file" in _one_line_error(bise(home, "verify"))
    shutil.copytree(made / "out", tmp_path / "bise" / "models")
    assert "all is well: 2 files" in bise(home, "verify").stdout


def test_unfinished_alone_is_nothing_verified(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".Demo-Q8_0.journal").write_text("{}\n")
    run = bise(environment, "verify", tmp_path)
    assert "nothing is verified: 1 level unfinished" in _one_line_error(run)
    assert run.stdout.startswith("unfinished")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 12 GB that takes no room: all its weights are zeros that were never written."""
    start = header(
        {"general.architecture": Value(ValueType.STRING, "llama")},
        [(TensorSpec(f"t{i}", (1_000_000, 1000)), GgmlType.F32) for i in range(3)],
    )
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    path.write_bytes(start.data)
    os.truncate(path, start.file_bytes)
    return path


def test_ctrl_c_stops_it(large: Path, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [BISE, "verify", large], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b"bise: interrupted\n"


def test_a_terminal_shows_how_far_it_is_in_little_memory(large: Path, environment: dict[str, str]) -> None:
    with Terminal([BISE, "verify", str(large), "--threads", "2"], environment) as terminal:
        screen = terminal.wait_for("of 12.0 GB", "left")
        assert re.search(r"verified +\d+%  \S+ [kMG]?B/s  [\d:]+ left  \S+ [kMG]?B of 12.0 GB  0/1 files", screen)
        status = Path(f"/proc/{terminal.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak is not None
        assert int(peak[1]) < 150_000
        terminal.type("\x03")
        assert terminal.wait_for_end() == 130
