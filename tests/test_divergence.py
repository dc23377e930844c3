"""Paired comparisons of files: closed forms, and the harness's own means."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.divergence import Judge, change, mean
from quant.quality.judge import judge
from quant.quality.results import this_environment
from quant.quality.texts import read_text
from quant.quality.trial import LevelFile, Trial
from runtime.events import EngineSettings
from runtime.scoring import ScoringEngine


def test_a_change_is_paired_by_chunk_and_its_error_is_that_of_the_differences() -> None:
    """Files that differ by the same share everywhere differ for certain, however much chunks differ."""
    other = {"a": np.array([1.0, 9.0]), "b": np.array([2.0, 4.0])}
    better = change({name: 0.9 * values for name, values in other.items()}, other)
    assert better.share.value == pytest.approx(-0.1)
    assert better.share.error == pytest.approx(np.std([0.1, 0.9, 0.2, 0.4], ddof=1) / 2 / 4)
    assert better.is_better
    assert better.by_text["b"].value == pytest.approx(-0.1)
    noisy = change({"a": np.array([0.0, 8.0]), "b": np.array([3.0, 4.0])}, other)
    assert noisy.share.value == pytest.approx(-1 / 16)
    assert not noisy.is_better
    assert not change(other, other).is_better


def test_a_mean_is_over_all_chunks() -> None:
    found = mean({"a": np.array([1.0, 2.0, 3.0]), "b": np.array([6.0])})
    assert found.value == 3.0
    assert found.error == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)


def test_divergences_are_those_of_bise_perplexity_and_are_kept(demo_levels: dict[str, Path], tmp_path: Path) -> None:
    settings = EngineSettings(n_ctx=128)
    texts = [read_text("prose"), read_text("code")]
    measured = Judge(demo_levels["BF16"], texts, tmp_path / "kept", settings, 3)
    found = measured.divergences("Q2_K", demo_levels["Q2_K"])
    levels = tuple(LevelFile(level, demo_levels[level]) for level in ("BF16", "Q2_K"))
    trial = Trial("Demo", levels, tuple(texts), settings, tmp_path / "r.json", base="BF16", max_chunks=3)
    results = judge(trial, ScoringEngine, this_environment("", "", {}, ()), ())
    for text in texts:
        row = results.row("Q2_K", text.name)
        assert row is not None
        assert found[text.name].shape == (3,)
        assert found[text.name].mean() == pytest.approx(row.kld_mean, rel=1e-12)
    again = measured.divergences("Q2_K", Path("gone.gguf"))
    assert all(np.array_equal(again[name], values) for name, values in found.items())
