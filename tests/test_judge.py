"""The judge, on models whose probabilities are known: its figures in closed form, and runs that end early."""

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.quality.baselog import BaseLog, BaseLogError
from quant.quality.judge import Progress, judge
from quant.quality.results import Environment, Results, ResultsError, Row, load
from quant.quality.texts import Text, TextError, read_text
from quant.quality.trial import LevelFile, Trial
from runtime.errors import ModelFileError, UserError
from runtime.events import EngineSettings
from tests.scorers import N_VOCAB, CountingModels

ENVIRONMENT = Environment("0.1", "0.3.36", "0c1e57098", {"AVX2": "1"}, "3.11", "2.0", "Linux", "a CPU", ())
COMMAND = ("bise", "perplexity", "demo")
N_CTX = 16
LEVELS = {"BF16": 0.8, "Q8_0": 0.75, "Q2_K": 0.05}


def text(tmp_path: Path, name: str, n_chunks: int, step: int = 1) -> Text:
    """A file of digits that count up by `step`, wrapping from 9 to 0."""
    path = tmp_path / f"{name}.txt"
    path.write_text("".join(str(i * step % 10) for i in range(n_chunks * N_CTX)) + "\n")
    return read_text(str(path))


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """Three models and two texts: 5 chunks that count up, 3 that count in threes."""
    files = []
    for level, likelihood in LEVELS.items():
        path = tmp_path / f"{level}.gguf"
        path.write_text(str(likelihood))
        files.append(LevelFile(level, path))
    return Trial(
        model="counting",
        levels=tuple(files[::-1]),  # the base comes last and must be measured first
        texts=(text(tmp_path, "up", 5), text(tmp_path, "threes", 3, step=3)),
        settings=EngineSettings(n_ctx=N_CTX, n_threads=1),
        out=tmp_path / "report" / "results.json",
        base="BF16",
    )


def run(trial: Trial, models: CountingModels | None = None, environment: Environment = ENVIRONMENT) -> Results:
    return judge(trial, models or CountingModels(), environment, COMMAND)


def measured(results: Results, level: str, name: str) -> Row:
    row = results.row(level, name)
    assert row is not None
    return row


def targets_follow(text: Text, chunk: int) -> list[bool]:
    """For each scored token of a chunk, whether it is the one after its predecessor. Token 0 of the text is BOS."""
    tokens = [0, *(int(digit) + 1 for digit in text.content)]
    start = chunk * N_CTX
    return [(tokens[i - 1] + 1) % N_VOCAB == tokens[i] for i in range(start + N_CTX // 2 + 1, start + N_CTX)]


def expected_losses(text: Text, n_chunks: int, likelihood: float) -> NDArray[np.float64]:
    other = (1 - likelihood) / (N_VOCAB - 1)
    follow = [hit for chunk in range(n_chunks) for hit in targets_follow(text, chunk)]
    return np.array([-math.log(likelihood if hit else other) for hit in follow])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "n_chunks"), [("up", 5), ("threes", 3)])
def test_perplexity_is_the_known_one(trial: Trial, level: str, name: str, n_chunks: int) -> None:
    row = measured(run(trial), level, name)
    losses = expected_losses(next(t for t in trial.texts if t.name == name), n_chunks, LEVELS[level])
    assert (row.chunks, row.tokens, row.context) == (n_chunks, 7 * n_chunks, N_CTX)
    assert row.ppl == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert row.ppl_error == pytest.approx(row.ppl * losses.std() / math.sqrt(len(losses) - 1), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("level", "same_top"), [("Q8_0", 1), ("Q2_K", 0)])
def test_the_divergence_is_the_known_one(trial: Trial, level: str, same_top: int) -> None:
    """Of two such models it is p ln(p/q) + (1−p) ln((1−p)/(1−q)) at every token."""
    p, q = LEVELS["BF16"], LEVELS[level]
    row = measured(run(trial), level, "up")
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert row.kld_mean == pytest.approx(expected, abs=1e-4)
    assert row.kld_error == pytest.approx(0, abs=1e-6)
    assert row.same_top == same_top
    assert row.statistics is not None
    follow = [hit for chunk in range(5) for hit in targets_follow(trial.texts[0], chunk)]
    changes = [q - p if hit else (p - q) / (N_VOCAB - 1) for hit in follow]
    assert row.statistics.p_diff.mean.value == pytest.approx(np.mean(changes), abs=1e-4)


def test_a_row_says_what_was_measured(trial: Trial) -> None:
    results = run(trial)
    row = measured(results, "Q8_0", "threes")
    assert (row.model, row.file_bytes, row.bits_per_weight) == ("counting", 4, 4.0)
    assert row.prompt_tokens_per_second > 0
    base = measured(results, "BF16", "up")
    assert (base.kld_mean, base.kld_error, base.same_top, base.statistics) == (None, None, None, None)
    assert load(trial.out) == results
    assert [(run.command, run.date[:2]) for run in results.runs] == [(COMMAND, "20")]


def test_each_model_is_loaded_once_and_the_base_first(trial: Trial) -> None:
    models = CountingModels()
    run(trial, models)
    assert models.opened == ["BF16", "Q2_K", "Q8_0"]
    assert all(model.closed for model in models.models)
    assert models.n_decodes == 3 * (3 + 2)  # 5 and 3 chunks, two at a time
    assert [path.name for path in trial.out.parent.iterdir()] == ["results.json"], "base files are gone"


def test_only_the_first_chunks_are_read_when_told_so(trial: Trial) -> None:
    results = run(replace(trial, max_chunks=2))
    assert {row.chunks for row in results.results} == {2}
    losses = expected_losses(trial.texts[0], 2, LEVELS["Q8_0"])
    assert measured(results, "Q8_0", "up").ppl == pytest.approx(math.exp(losses.mean()), rel=1e-6)


def test_without_a_base_there_is_perplexity_alone(trial: Trial) -> None:
    results = run(replace(trial, base=None, levels=trial.levels[:2]))
    assert len(results.results) == 4
    assert {row.kld_mean for row in results.results} == {None}
    assert not trial.base_folder.exists()


def test_nothing_is_measured_twice(trial: Trial) -> None:
    first = run(trial)
    models = CountingModels()
    again = run(trial, models)
    assert models.opened == []
    assert again == first == load(trial.out)


@pytest.mark.parametrize("stop", range(1, 16))
def test_an_interrupted_run_goes_on_where_it_stopped(trial: Trial, stop: int) -> None:
    """Whatever decode is the last: what was measured stays, and nothing but the text at hand is read again."""
    whole = run(replace(trial, out=trial.out.with_name("whole.json")))
    with pytest.raises(KeyboardInterrupt):
        run(trial, CountingModels(interrupt_at=stop))
    kept = load(trial.out).results if trial.out.exists() else ()
    rows_done = sum(stop > n for n in (3, 5, 8, 10, 13, 15))
    assert len(kept) == rows_done
    models = CountingModels()
    results = run(trial, models)
    decodes_done = [0, 3, 5, 8, 10, 13, 15][rows_done]
    assert models.n_decodes == 15 - decodes_done
    for row in whole.results:
        same = measured(results, row.level, row.text)
        assert replace(same, prompt_tokens_per_second=row.prompt_tokens_per_second) == row
    assert not trial.base_folder.exists()


def test_a_level_added_later_needs_the_base_again_unless_it_was_kept(trial: Trial) -> None:
    fewer = replace(trial, levels=trial.levels[1:])
    run(fewer)
    models = CountingModels()
    results = run(trial, models)
    assert models.opened == ["BF16", "Q2_K"]
    assert len(results.results) == len(results.models) * 2 == 6

    kept = replace(fewer, keep_base=True, out=trial.out.with_name("kept.json"))
    run(kept)
    assert len(list(kept.base_folder.iterdir())) == 2
    models = CountingModels()
    run(replace(trial, out=kept.out), models)
    assert models.opened == ["Q2_K"]
    assert not kept.base_folder.exists()


def test_a_text_added_later_is_measured_alone(trial: Trial) -> None:
    run(replace(trial, texts=trial.texts[:1]))
    models = CountingModels()
    results = run(trial, models)
    assert models.n_decodes == 3 * 2
    assert [record.name for record in results.texts] == ["up", "threes"]


def test_a_kept_base_is_llama_perplexitys_file(trial: Trial) -> None:
    run(replace(trial, keep_base=True))
    path = next(path for path in trial.base_folder.iterdir() if path.name.startswith("threes-"))
    with BaseLog(path) as log:
        assert (log.n_ctx, log.n_vocab, log.n_chunks) == (N_CTX, N_VOCAB, 3)
        tokens = log.chunks.reshape(-1).tolist()
        assert tokens[:4] == [0, 1, 4, 7]
        assert tokens[N_CTX] == (N_CTX - 1) * 3 % 10 + 1, "the text's own token, where the model reads BOS"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": EngineSettings(n_ctx=8, n_threads=1)}, "n_ctx 16 and this run has 8"),
        ({"settings": EngineSettings(n_ctx=16, n_threads=1, kv_type="q8_0")}, "kv_type f16 and this run has q8_0"),
        ({"max_chunks": 2}, "max_chunks None and this run has 2"),
        ({"base": "Q8_0"}, "base BF16 and this run has Q8_0"),
        ({"model": "other"}, "model counting and this run has other"),
    ],
)
def test_other_settings_are_refused_with_both_values(trial: Trial, change: dict[str, object], message: str) -> None:
    before = run(trial)
    with pytest.raises(ResultsError, match=message):
        run(replace(trial, **change))  # type: ignore[arg-type]
    assert load(trial.out) == before
    models = CountingModels()
    anew = run(replace(trial, overwrite=True, **change), models)  # type: ignore[arg-type]
    assert len(models.opened) == len(trial.levels)
    assert (load(trial.out), len(anew.runs)) == (anew, 1)


def test_another_machine_is_refused(trial: Trial) -> None:
    run(trial)
    with pytest.raises(ResultsError, match="cpu a CPU and this run has another"):
        run(trial, environment=replace(ENVIRONMENT, cpu="another"))


def test_a_model_file_that_changed_is_refused(trial: Trial) -> None:
    run(trial)
    trial.levels[0].path.write_text("0.06")
    with pytest.raises(ResultsError, match=r"Q2_K\.gguf: not the Q2_K that was measured before \(SHA-256 \w{12}…"):
        run(trial)


def test_a_model_file_that_was_only_touched_is_the_same(trial: Trial) -> None:
    before = run(trial)
    trial.levels[0].path.write_text("0.05")
    assert run(trial).results == before.results


def test_a_text_that_changed_is_refused(trial: Trial, tmp_path: Path) -> None:
    run(trial)
    with pytest.raises(ResultsError, match="a text up of SHA-256"):
        run(replace(trial, texts=(text(tmp_path, "up", 6),)))


def test_a_base_file_that_was_cut_is_refused(trial: Trial) -> None:
    run(replace(trial, levels=trial.levels[1:], keep_base=True))
    for path in trial.base_folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BaseLogError, match="delete it and run again"):
        run(trial)


def test_a_level_that_reads_the_text_otherwise_is_refused(trial: Trial) -> None:
    """As a file of another model would."""

    class OtherTokens(CountingModels):
        def __call__(self, path: Path, settings: EngineSettings) -> "object":  # type: ignore[override]
            model = super().__call__(path, settings)
            if path.stem != "BF16":
                tokenize = model.tokenize
                model.tokenize = lambda text: (tokenize(text) + 1) % N_VOCAB  # type: ignore[method-assign]
            return model

    models = OtherTokens()
    with pytest.raises(BaseLogError, match="tokens differ from this text's"):
        run(trial, models)
    assert all(model.closed for model in models.models)


@pytest.mark.parametrize("likelihood", ["nan", "1e-320"])
def test_a_model_that_gives_no_probability_is_refused(trial: Trial, likelihood: str) -> None:
    trial.levels[0].path.write_text(likelihood)
    with pytest.raises(ModelFileError, match=r"Q2_K\.gguf: gives [67] of the 7 tokens of chunk 1 no probability"):
        run(trial)
    assert {row.level for row in load(trial.out).results} == {"BF16"}


def test_a_file_of_the_same_size_and_time_is_not_read_again(trial: Trial) -> None:
    """A hundred gigabytes take minutes to read."""
    before = run(trial)
    path = trial.levels[0].path
    status = path.stat()
    path.write_text("0.06")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(trial) == before


def test_every_shard_counts(trial: Trial, tmp_path: Path) -> None:
    first, second = (tmp_path / f"big-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2))
    first.write_text("0.7")
    sharded = replace(trial, levels=(*trial.levels, LevelFile("Q4_K_M", first)))
    with pytest.raises(ModelFileError, match="00002-of-00002"):
        run(sharded)
    assert not trial.out.exists(), "it was refused before anything was measured"
    second.write_bytes(bytes(100))
    results = run(sharded)
    assert measured(results, "Q4_K_M", "up").file_bytes == 103
    record = results.record("Q4_K_M")
    assert record is not None
    assert [(file.name, file.n_bytes) for file in record.files] == [(first.name, 3), (second.name, 100)]
    assert record.content[1] == hashlib.sha256(bytes(100)).hexdigest()


def test_a_text_too_short_is_refused_by_name(trial: Trial, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="short has 17 tokens and a context of 16 needs at least 32"):
        run(replace(trial, texts=(text(tmp_path, "short", 1),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "Q4_K_M"}, "the base Q4_K_M is not among the levels Q2_K, Q8_0, BF16"),
        ({"max_chunks": 0}, "0 chunks measure nothing"),
        ({"settings": EngineSettings(n_ctx=4)}, "a context of 4 tokens is too short"),
    ],
)
def test_a_trial_that_makes_no_sense_is_refused(trial: Trial, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(trial, **change)  # type: ignore[arg-type]


def test_two_texts_of_one_name_are_refused(trial: Trial) -> None:
    with pytest.raises(UserError, match="two of the texts are called up"):
        replace(trial, texts=(*trial.texts, trial.texts[0]))


def test_progress_counts_every_chunk_to_the_end(trial: Trial) -> None:
    seen: list[Progress] = []
    judge(trial, CountingModels(), ENVIRONMENT, COMMAND, seen.append)
    assert [event.level for event in seen if event.activity == "load"] == ["BF16", "Q2_K", "Q8_0"]
    scored = [event for event in seen if event.activity == "score"]
    assert [event.done_chunks for event in scored] == list(range(1, 25))
    assert {event.total_chunks for event in scored} == {24}
    assert scored[-1].seconds_left == 0
    assert [event.part for event in scored[:5]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert scored[4].ppl == pytest.approx(measured(load(trial.out), "BF16", "up").ppl)


def test_progress_of_a_run_that_goes_on_begins_where_it_stopped(trial: Trial) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(trial, CountingModels(interrupt_at=9))
    seen: list[Progress] = []
    judge(trial, CountingModels(), ENVIRONMENT, COMMAND, seen.append)
    scored = [event for event in seen if event.activity == "score"]
    assert [event.done_chunks for event in scored] == list(range(14, 25))


def test_a_ctrl_c_leaves_a_file_that_any_json_reader_reads(trial: Trial) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(trial, CountingModels(interrupt_at=9))
    data = json.loads(trial.out.read_text())
    assert [(row["level"], row["text"]) for row in data["results"]] == [
        ("BF16", "up"),
        ("BF16", "threes"),
        ("Q2_K", "up"),
    ]
