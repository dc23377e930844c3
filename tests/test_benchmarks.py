"""The benchmark runs, and what it says hangs together. Times are not looked at: they are other ones every time."""

import json
import re
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from benchmarks.__main__ import main
from benchmarks.checkpoints import DEMO, SIGMA, padded_demo, random_checkpoint
from benchmarks.experiments import MISTRAL_LARGE, SCALES, SIX, check_room, needed_bytes, same_tensors
from benchmarks.kernels import Effort, check_same, family_pieces, paired
from benchmarks.speculation import Guessing, Pair, share_right
from benchmarks.stages import PLACES, Stages
from quant.convert import make_levels
from quant.kernels import SEARCHED, TYPES, built
from quant.reading.checkpoint import open_checkpoint
from quant.recipes import tensor_bytes, tensors, types
from runtime.engine import Engine
from runtime.errors import UserError
from runtime.events import EngineSettings
from runtime.ggml import GgmlType
from runtime.levels import Shape
from tests.checkpoints import DEMO_SHAPE

LEVELS = ("Q2_K", "Q8_0")
SMALL = Shape(n_layers=1, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, head_dim=64, n_vocab=4096)

Found = tuple[Mapping[str, Any], str, Path]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one run on the demo wrote, what it printed, and where."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.extend(texts))
        for part in ("kernels", "converter"):
            levels = ",".join(LEVELS)
            options = ["--dir", str(folder), "--scale", "demo", "--threads", "2", "--levels", levels, "--only", part]
            assert main(options) == 0
    return json.loads((folder / "speed.json").read_text()), "\n".join(printed), folder


def test_both_sides_read_and_write_the_bytes_they_must(found: Found) -> None:
    (comparison,) = found[0]["comparisons"]
    ours, rival = comparison["ours"], comparison["rival"]
    assert [step["name"] for step in rival] == ["BF16", *LEVELS]
    weights = sum(path.stat().st_size for path in DEMO.glob("*.safetensors"))
    assert (ours["input_bytes"], rival[0]["input_bytes"]) == (weights, weights)
    assert {step["input_bytes"] for step in rival[1:]} == {rival[0]["output_bytes"]}
    sizes = {level: tensor_bytes(DEMO_SHAPE, level) for level in ("BF16", *LEVELS)}
    for step in rival:
        assert sizes[step["name"]] < step["output_bytes"] < sizes[step["name"]] + 200_000  # metadata and padding
    assert 0 <= sum(step["output_bytes"] for step in rival[1:]) - ours["output_bytes"] < 100_000
    for step in (ours, *rival):
        assert step["cost"]["asked_write_bytes"] >= step["output_bytes"]
    assert weights <= ours["cost"]["asked_read_bytes"] < 1.2 * weights


def test_memory_is_counted_in_the_process_that_works(found: Found) -> None:
    (comparison,) = found[0]["comparisons"]
    costs = [step["cost"] for step in (comparison["ours"], *comparison["rival"])]
    costs += [depth["cost"] for depth in found[0]["depths"]]
    for cost in costs:
        assert 10 << 20 < cost["peak_anonymous_bytes"] < cost["peak_resident_bytes"] < 1 << 30
    assert [depth["model"]["shape"]["n_layers"] for depth in found[0]["depths"]] == [1, 2]


def test_the_table_shows_the_ratios_of_the_json(found: Found) -> None:
    results, printed, _ = found
    (comparison,) = results["comparisons"]
    seconds = [step["cost"]["seconds"] for step in comparison["rival"]]
    ratio = sum(seconds) / comparison["ours"]["cost"]["seconds"]
    assert comparison["ratios"]["wall"] == pytest.approx(ratio)
    assert f"Bise is {ratio:.2f} times as fast" in printed
    for name in ("wall", "reference"):
        (pair,) = results["repeats"]["pairs"]
        assert results["repeats"]["spread"][name] == [pair["ratios"][name]] * 3
        assert f"{pair['ratios'][name]:.2f} ({pair['ratios'][name]:.2f} to" in printed
    for step in (*comparison["rival"], comparison["ours"]):
        assert re.search(rf"{step['name']}\b.* {step['cost']['seconds']:.1f} ", printed), step["name"]
    assert f"ggml {results['machine']['versions']['ggml']}" in printed


def test_every_tensor_is_compared(found: Found) -> None:
    assert found[0]["n_compared"] == 3 * len(LEVELS) * len(tensors(DEMO_SHAPE))  # once, and twice in the repeats


def test_every_stage_is_seen_and_fits_into_the_whole(found: Found) -> None:
    anatomy = found[0]["anatomy"]
    made = {type_ for level in LEVELS for type_ in types(DEMO_SHAPE, level).values()}
    expected = {stage for _, _, stage in PLACES if stage != "encode"} | {f"encode {type_.name}" for type_ in made}
    assert set(anatomy["stages"]) == expected
    assert sum(stage["cpu_seconds"] for stage in anatomy["stages"].values()) <= anatomy["cost"]["cpu_seconds"] + 0.05
    assert sum(stage["seconds"] for stage in anatomy["stages"].values()) <= 2 * anatomy["cost"]["seconds"] + 0.05
    assert all(stage["cpu_seconds"] >= 0 <= stage["seconds"] for stage in anatomy["stages"].values())


def test_a_stage_within_a_stage_is_taken_off() -> None:
    def work(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    stages = Stages()
    inner = stages.clocked(work, "inner")

    def both() -> None:
        inner(0.06)
        inner(0.06)
        work(0.03)

    stages.clocked(both, "outer")()
    assert stages.times["inner"].calls == 2
    assert 0.12 <= stages.times["inner"].cpu_seconds < 0.15
    assert 0.03 <= stages.times["outer"].cpu_seconds < 0.06  # 0.15 with the inner ones


def test_nothing_but_the_result_is_left(found: Found) -> None:
    assert {path.name for path in found[2].iterdir()} == {"speed.json", "kernels.json"}


def test_every_build_makes_every_type_beside_ggml(found: Found) -> None:
    """With a matrix and without, from both kinds of rows; Q8_0 looks at no matrix."""
    results = json.loads((found[2] / "kernels.json").read_text())
    speeds = results["speeds"]["types"]
    expected = {(type_.name, rows, matrix) for type_ in TYPES for rows in ("F32", "BF16") for matrix in (False, True)}
    expected -= {("Q8_0", rows, True) for rows in ("F32", "BF16")}
    assert {(speed["name"], speed["rows"], speed["importance"]) for speed in speeds} == expected
    assert [speed["importance"] for speed in results["speeds"]["levels"]] == [False, True]
    longer = [(speed["name"], speed["importance"]) for speed in results["speeds"]["longer"]]
    assert longer == [(type_.name, matrix) for type_ in SEARCHED for matrix in (False, True)]
    for speed in (*speeds, *results["speeds"]["levels"]):
        assert [side["build"] for side in speed["builds"]] == [build.name for build in built().values()]
        for side in speed["builds"]:
            ratio = side["weights_per_second"] / speed["ggml_weights_per_second"]
            assert side["ratios"] == pytest.approx([ratio] * 3)  # one round
            assert re.search(rf" {side['weights_per_second'] / 1e6:.1f} +×{ratio:.2f} ", found[1])


def test_six_levels_are_shared_out_as_the_weights_of_the_model_are() -> None:
    """token_embd, attn_q, attn_k, ffn_gate and ffn_up get each level's own type."""
    pieces = family_pieces(MISTRAL_LARGE, SIX, 1000)
    assert sum(count for count, _ in pieces) == pytest.approx(1000, abs=3)
    own_types = tuple(sorted(TYPES))
    plain = 32_768 * 12_288 + 88 * 12_288 * (12_288 + 1_024 + 2 * 28_672)
    share = 1000 * plain / 122_610_069_504
    assert sum(count for count, wanted in pieces if wanted == own_types) == round(share) == 626
    assert all(GgmlType.Q8_0 in wanted and GgmlType.Q6_K in wanted for _, wanted in pieces)


def test_sides_take_turns() -> None:
    calls: list[str] = []

    def side(name: str) -> None:
        calls.append(name)
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass

    seconds = paired({name: partial(side, name) for name in "abc"}, Effort(3, 0.001))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # once for the number of calls, then three rounds
    assert all(found >= 0.002 for rounds in seconds.values() for found in rounds)


def test_blocks_that_differ_end_the_run() -> None:
    check_same({"ggml": b"12", "8 lanes": b"12"}, "Q2_K")
    with pytest.raises(UserError, match="the kernels 8 lanes make other blocks of Q2_K than ggml"):
        check_same({"ggml": b"12", "8 lanes": b"13"}, "Q2_K")


def test_a_tensor_that_differs_ends_the_run() -> None:
    ours = {"output.weight": "Q6_K [256, 4096] 00", "output_norm.weight": "F32 [256] 11"}
    assert same_tensors(ours, dict(ours), "Q2_K") == 2
    with pytest.raises(UserError, match=r"output\.weight of Q2_K differs"):
        same_tensors(ours, {**ours, "output.weight": "Q6_K [256, 4096] 01"}, "Q2_K")
    with pytest.raises(UserError, match=r"output\.weight of Q2_K differs: ours is None"):
        same_tensors({"output_norm.weight": ours["output_norm.weight"]}, ours, "Q2_K")


def test_random_weights_are_the_same_for_any_number_of_threads_and_written_once(tmp_path: Path) -> None:
    one, three = (random_checkpoint(tmp_path / str(threads), SMALL, threads) for threads in (1, 3))
    file = one / "model.safetensors"
    assert file.read_bytes() == (three / "model.safetensors").read_bytes()
    assert open_checkpoint(one).shape == SMALL
    written = file.stat().st_mtime_ns
    assert random_checkpoint(one, SMALL, 1) == one
    assert file.stat().st_mtime_ns == written
    places = [tensor.offset for tensor in open_checkpoint(one).tensors.values()]
    assert len({file.read_bytes()[place : place + 64] for place in places}) == len(places)
    bits = np.frombuffer(file.read_bytes()[-2 * 4096 * 256 :], np.uint16)
    numbers = (bits.astype(np.uint32) << 16).view(np.float32)
    assert numbers.std() == pytest.approx(SIGMA, rel=0.02)
    assert abs(numbers.mean()) < SIGMA / 100


def test_the_room_is_known_before_anything_is_written(tmp_path: Path) -> None:
    """A layer of the true shape: its weights, and either all levels, or the BF16 GGUF and one of them."""
    needed = needed_bytes(tmp_path, SCALES["full"], LEVELS)
    assert 8_000_000_000 < needed < 14_000_000_000
    with pytest.raises(UserError, match=r"needs 1,000,.* bytes below .* are free"):
        check_room(tmp_path, 10**18)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_runtime_is_measured_beside_the_bare_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dir", str(tmp_path), "--scale", "demo", "--threads", "1", "--only", "runtime"]) == 0
    (speed,) = json.loads((tmp_path / "runtime.json").read_text())["speeds"]
    printed = capsys.readouterr().out
    (round_,) = speed["rounds"]
    text = (DEMO.parent / "eval" / "prose.txt").read_text(encoding="utf-8")[400:800]
    n_tokens = len(SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model")).encode(text))
    assert round_["n_prompt"] == n_tokens + 1  # and [/INST]; every question begins with <s>[INST]
    for name, ours in (("prompt", "our_prompt"), ("answer", "our_answer"), ("drawn_answer", "our_drawn_answer")):
        raw = round_["raw_prompt" if name == "prompt" else "raw_answer"]
        assert speed["ratios"][name] == pytest.approx([round_[ours] / raw] * 3)
        assert re.search(rf" {round_[ours]:,.1f} tokens/s +{round_[ours] / raw:.3f} ", printed)
    (turn,) = speed["turns"]
    assert 200 < turn["n_reused"] < turn["n_prompt"] - 10  # two turns; the new question is not among them
    assert turn["n_back_reused"] >= turn["n_reused"]
    assert (
        f"back from another conversation, {turn['n_back_reused']:,} tokens copied: {turn['back_seconds']:.3f} s"
        in printed
    )
    assert speed["ratios"]["next_turn"][1] == pytest.approx(turn["cold_seconds"] / turn["warm_seconds"])
    for side in ("raw", "our"):
        assert 6 << 20 < speed[f"{side}_anonymous_bytes"] < speed[f"{side}_resident_bytes"] < 1 << 30


def test_the_padded_demo_says_what_the_demo_says(tmp_path: Path, demo: Path) -> None:
    checkpoint = padded_demo(tmp_path / "weights", 1280, 9)
    shape = open_checkpoint(checkpoint).shape
    assert (shape.n_ff, shape.n_layers) == (1280, 9)
    (padded,) = make_levels(checkpoint, "Padded", ["BF16"], tmp_path, threads=2).values()
    logits = []
    for path in (demo, padded):
        with closing(Engine(path, EngineSettings(n_ctx=64, n_threads=1))) as engine:
            engine.read(engine.vocabulary.tokenize("The wind over the mountains", bos=True), lambda *_: None)
            logits.append(np.array(engine.logits()))
    assert np.ptp(logits[0]) > 5
    np.testing.assert_allclose(logits[1], logits[0], atol=0.05)


def test_guessing_is_measured_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dir", str(tmp_path), "--scale", "demo", "--threads", "1", "--only", "speculation"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "speculation.json").read_text())
    assert [found["way"] for found in results["found"]] == ["lookup", "Demo-Q8_0", "Demo-Q2_K"]
    for found in results["found"]:
        (pair,) = found["pairs"]
        ratio = pair["guessing"] / pair["plain"]
        assert found["ratios"]["prose"] == pytest.approx([ratio] * 3)
        assert 0 <= pair["accepted"] <= pair["drafted"]
        share = pair["accepted"] / max(pair["drafted"], 1)
        assert re.search(rf"{found['way']} +prose .*{ratio:.2f} \({ratio:.2f} to .* {share:.0%}\n", printed)


def test_guessing_gains_per_question() -> None:
    found = [Pair("a", 10.0, 15.0, 4, 3, True), Pair("a", 10.0, 25.0, 4, 4, True), Pair("b", 10.0, 5.0, 0, 0, True)]
    guessing = Guessing("large", 1, 0.0, "small", tuple(found))
    assert guessing.ratios == {"a": (1.5, 2.0, 2.5), "b": (0.5, 0.5, 0.5)}
    assert share_right(found) == 7 / 8
    assert share_right(found[2:]) == 0
