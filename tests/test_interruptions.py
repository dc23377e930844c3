"""What is left of a conversion that ends early: by kill -9, Ctrl-C, or weights that are no numbers."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.convert import convert, make_levels
from quant.journal import read_journal
from quant.plan import SHARD_BYTES
from quant.recipes import tensors
from quant.shards import journal_path
from quant.work import Progress
from runtime.errors import CheckpointError, OutputError, UserError
from runtime.levels import ORIGINAL
from tests.checkpoints import DEMO, DEMO_SHAPE, TINY, weights, write_checkpoint, write_safetensors
from tests.conversions import all_files, demo_plan, visible_files
from tests.faults import kill
from tests.llama_quantize import llama_loads

REPOSITORY = Path(__file__).parent.parent


def _faults(folder: Path, *calls: int) -> list[Any]:
    """What `python -m tests.faults` prints, line by line."""
    command = [sys.executable, "-m", "tests.faults", str(folder), *map(str, calls)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_conversion_killed_anywhere_ends_with_the_same_files(tmp_path: Path) -> None:
    """By kill -9 at random system calls, and again in the next run: half of them from the moment that the last tensor
    is written, between syncs and renames. Nothing half-made ever has a final name."""
    write_checkpoint(tmp_path / "model", TINY)
    names: list[str] = _faults(tmp_path)[0]
    first_removal = names.index("unlink")
    early = random.Random(len(names)).sample(range(1, first_removal), 30)
    late = random.Random(1).sample(range(first_removal - 5, len(names) + 1), 30)
    outcomes = _faults(tmp_path, *early, *late)
    assert len(outcomes) == 60
    assert [outcome for outcome in outcomes if outcome["half_made"] or not outcome["same"]] == []
    assert {tuple(outcome["codes"][::2]) for outcome in outcomes[:30]} == {(-signal.SIGKILL, 0)}


def test_a_killed_conversion_does_not_begin_anew(tmp_path: Path) -> None:
    plan = demo_plan(tmp_path, "Q2_K", "Q4_K_M", shard_bytes=3_000_000)
    killed = "from tests.test_interruptions import die_after; die_after(40, __import__('sys').argv[1])"
    run = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert run.returncode == -signal.SIGKILL
    assert visible_files(tmp_path) == {}
    steps: list[Progress] = []
    report = convert(plan, threads=2, progress=steps.append)
    converting = [step for step in steps if not step.checking]
    assert converting[0].resumed_bytes > plan.read_bytes / 4
    assert report.written_bytes < plan.write_bytes * 3 / 4
    assert any(step.checking for step in steps)


def die_after(chunks: int, out: str) -> None:
    """In a process of its own: convert the demo, and be killed after so many chunks."""
    plan = demo_plan(Path(out), "Q2_K", "Q4_K_M", shard_bytes=3_000_000)
    convert(plan, threads=2, progress=_after(chunks, kill), sync_seconds=0)


def test_a_journal_cut_off_by_a_power_cut_counts_up_to_its_last_whole_line(
    demo_levels: dict[str, Path], tmp_path: Path
) -> None:
    """And the next line does not grow onto what is left of it."""
    journal = _interrupted(tmp_path, "Q2_K", 30)
    journal.write_bytes(journal.read_bytes()[:-4])
    _interrupted(tmp_path, "Q2_K", 5)
    state = read_journal(journal)
    assert state is not None
    assert set(state.tensors) <= {spec.name for spec in tensors(DEMO_SHAPE)}
    convert(demo_plan(tmp_path, "Q2_K"), threads=2)
    assert (tmp_path / "Q2_K" / "Demo-Q2_K.gguf").read_bytes() == demo_levels["Q2_K"].read_bytes()


def test_what_the_disk_lost_is_made_again(demo_levels: dict[str, Path], tmp_path: Path) -> None:
    """A tensor that the journal calls finished is read back; one whose checksum is wrong is not trusted."""
    journal = _interrupted(tmp_path, "Q2_K", 30)
    state = read_journal(journal)
    assert state is not None
    tensor = next(t for t in demo_plan(tmp_path, "Q2_K").levels[0].tensors if t.spec.name == max(state.tensors))
    with (tmp_path / "Q2_K" / ".Demo-Q2_K.gguf.partial").open("r+b") as file:
        file.seek(tensor.offset + tensor.n_bytes // 2)
        file.write(bytes(8))
    convert(demo_plan(tmp_path, "Q2_K"), threads=2)
    assert (tmp_path / "Q2_K" / "Demo-Q2_K.gguf").read_bytes() == demo_levels["Q2_K"].read_bytes()


def _interrupted(out: Path, level: str, chunks: int, folder: Path = DEMO, shard_bytes: int = SHARD_BYTES) -> Path:
    """The journal of a conversion that Ctrl-C ended after so many chunks."""
    plan = demo_plan(out, level, folder=folder, shard_bytes=shard_bytes)
    with pytest.raises(KeyboardInterrupt):
        convert(plan, threads=2, progress=_after(chunks, _interrupt), sync_seconds=0)
    return journal_path(plan.levels[0])


def _after(calls: int, act: Callable[[], object]) -> Callable[[Progress], None]:
    """A progress callback that acts at its nth call."""
    left = iter(range(calls, 0, -1))

    def progress(_: Progress) -> None:
        if next(left, 0) == 1:
            act()

    return progress


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_finished_file_that_was_cut_off_is_not_taken_for_whole(tmp_path: Path) -> None:
    plan = demo_plan(tmp_path, "Q2_K")
    path = convert(plan, threads=2).made["Q2_K"][0]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OutputError, match=r"Demo-Q2_K\.gguf already exists and was not made by this conversion"):
        convert(plan, threads=2)


def test_unfinished_files_of_another_plan_are_refused_and_cleared_away_on_request(tmp_path: Path) -> None:
    _interrupted(tmp_path, "Q2_K", 20, shard_bytes=2_000_000)
    assert len(all_files(tmp_path)) == 4
    refusal = r"^Demo-Q2_K in .* is unfinished: the recipe or the size of shards changed since; use --force"
    with pytest.raises(OutputError, match=refusal):
        convert(demo_plan(tmp_path, "Q2_K"), threads=2)
    assert len(all_files(tmp_path)) == 4
    convert(demo_plan(tmp_path, "Q2_K"), threads=2, overwrite=True)
    assert all_files(tmp_path) == ["Demo-Q2_K.gguf", "Demo-Q2_K.json", "Demo-Q2_K.sha256"]


def test_no_threads_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^0 threads cannot convert anything; give 1 or more"):
        convert(demo_plan(tmp_path, "Q2_K"), threads=0)


def test_ctrl_c_leaves_a_conversion_that_goes_on(demo_levels: dict[str, Path], tmp_path: Path) -> None:
    plan = demo_plan(tmp_path, "Q2_K", "Q8_0")
    with pytest.raises(KeyboardInterrupt):
        convert(plan, threads=2, progress=_after(30, _interrupt), sync_seconds=0)
    assert visible_files(tmp_path) == {}
    steps: list[Progress] = []
    convert(plan, threads=2, progress=steps.append)
    assert steps[-1].resumed_bytes > 0
    for level in ("Q2_K", "Q8_0"):
        assert (tmp_path / level / f"Demo-{level}.gguf").read_bytes() == demo_levels[level].read_bytes()


def test_a_cancelled_conversion_says_so_and_goes_on(demo_levels: dict[str, Path], tmp_path: Path) -> None:
    plan = demo_plan(tmp_path, "Q8_0")
    steps: list[Progress] = []
    report = convert(plan, threads=2, progress=steps.append, cancelled=lambda: len(steps) >= 30)
    assert (report.cancelled, dict(report.made)) == (True, {})
    assert visible_files(tmp_path) == {}
    report = convert(plan, threads=2)
    assert not report.cancelled
    assert report.made["Q8_0"][0].read_bytes() == demo_levels["Q8_0"].read_bytes()


def test_an_interrupted_run_is_not_resumed_with_other_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", TINY)
    out = tmp_path / "out"
    _interrupted(out, "Q8_0", 8, folder)
    for path in folder.glob("*.safetensors"):
        os.utime(path, ns=(0, 0))
    with pytest.raises(OutputError, match=r"is unfinished: the weights changed since; use --force to begin it anew"):
        convert(demo_plan(out, "Q8_0", folder=folder), threads=1)
    steps: list[Progress] = []
    convert(demo_plan(out, "Q8_0", folder=folder), threads=1, overwrite=True, progress=steps.append)
    assert steps[-1].resumed_bytes == 0


def test_files_made_of_other_weights_are_kept_unless_forced(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", TINY)
    out = tmp_path / "out"
    path = make_levels(folder, "Tiny", ["Q8_0"], out)["Q8_0"]
    before = visible_files(out)
    shutil.rmtree(folder)
    write_checkpoint(folder, TINY, "F32", n_files=1)
    with pytest.raises(OutputError, match=r"Q8_0\.gguf already exists and was not made by this .* use --force"):
        make_levels(folder, "Tiny", ["Q2_K", "Q8_0"], out)
    assert visible_files(out) == before
    assert make_levels(folder, "Tiny", ["Q8_0"], out, overwrite=True) == {"Q8_0": path}
    assert visible_files(out) != before


def test_force_replaces_one_file_by_shards_and_leaves_no_other(tmp_path: Path) -> None:
    convert(demo_plan(tmp_path, "Q2_K"), threads=2)
    shards = demo_plan(tmp_path, "Q2_K", shard_bytes=2_000_000)
    with pytest.raises(OutputError, match=r"Demo-Q2_K\.gguf already exists"):
        convert(shards, threads=2)
    before = visible_files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        convert(shards, threads=2, overwrite=True, progress=_after(10, _interrupt))
    assert visible_files(tmp_path) == before
    convert(shards, threads=2, overwrite=True)
    files = [f"Q2_K/Demo-Q2_K-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(visible_files(tmp_path)) == [*files, "Q2_K/Demo-Q2_K.json", "Q2_K/Demo-Q2_K.sha256"]


def test_a_refused_level_does_no_harm_to_one_that_can_go_on(tmp_path: Path) -> None:
    """Two levels are locked together; the second is another run's. What the first had stays."""
    journal = _interrupted(tmp_path, "Q2_K", 30)
    before = journal.read_bytes()
    other = demo_plan(tmp_path, "Q8_0")
    both = demo_plan(tmp_path, "Q2_K", "Q8_0")
    refusals: list[str] = []

    def convert_both() -> None:
        try:
            convert(both, threads=1)
        except OutputError as error:
            refusals.append(str(error))

    convert(other, threads=1, progress=_after(20, convert_both))
    assert len(refusals) == 1
    assert journal.read_bytes() == before


def test_two_conversions_do_not_write_the_same_files(tmp_path: Path) -> None:
    plan = demo_plan(tmp_path, "Q2_K")
    refusals: list[str] = []

    def convert_again() -> None:
        try:
            convert(plan, threads=1)
        except OutputError as error:
            refusals.append(str(error))

    report = convert(plan, threads=1, progress=_after(20, convert_again))
    assert refusals == [
        f"another conversion is writing Demo-Q2_K into {tmp_path / 'Q2_K'}; wait for it, or name another folder"
    ]
    assert llama_loads(report.made["Q2_K"][0])


def _spoil(folder: Path, name: str, value: float, dtype: str) -> Path:
    arrays = dict(weights(TINY))
    arrays[name].reshape(-1)[-1] = value
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    write_safetensors(folder / "model.safetensors", arrays, dict.fromkeys(arrays, dtype))
    return folder


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "row"), [("model.norm.weight", 0), ("model.layers.1.mlp.up_proj.weight", 95)])
def test_weights_that_are_no_numbers_leave_nothing(
    value: float, name: str, row: int, dtype: str, tmp_path: Path
) -> None:
    folder = _spoil(write_checkpoint(tmp_path / "model", TINY), name, value, dtype)
    with pytest.raises(
        CheckpointError, match=f"^{name} holds a weight that is NaN or infinite, in row {row}, column 63; "
    ):
        make_levels(folder, "Tiny", ["Q2_K", ORIGINAL], tmp_path / "out", threads=2)
    assert all_files(tmp_path / "out") == []
