"""The report, as a reader sees it: figures with the digits they deserve, columns that stand in line."""

from dataclasses import replace

import pytest

from quant.quality.report import figure, markdown, size, table
from quant.quality.results import (
    SCHEMA,
    Environment,
    FileRecord,
    ModelRecord,
    Results,
    Row,
    Run,
    TextRecord,
)
from quant.quality.statistics import Distribution, Divergence, Estimate
from runtime.events import EngineSettings

NOTHING = Distribution(Estimate(0, 0), {})
STATISTICS = Divergence(
    ppl=Estimate(23.037, 0.373),
    ppl_base=Estimate(21.541, 0.35),
    correlation=0.9885,
    ln_ratio=Estimate(0.067148, 0.002459),
    ratio=Estimate(1.069454, 0.00263),
    difference=Estimate(1.496109, 0.059546),
    kld=Distribution(Estimate(0.074402, 0.000522), {}),
    p_diff=NOTHING,
    p_diff_rms=Estimate(0.06812, 0.0008),
    same_top=Estimate(0.82081, 0.00243),
)
BASE = Row(
    "Demo", "BF16", "prose", 512, 98, 24_990, 21.5435, 0.35015, None, None, None, 19_413_000, 16.007, 2122.4, None
)
Q2_K = Row(
    *("Demo", "Q2_K", "prose", 512, 98, 24_990, 23.0371, 0.37336, 0.074402, 0.000522, 0.82081),
    *(4_020_000, 3.3085, 12_345.6, STATISTICS),
)
RESULTS = Results(
    schema=SCHEMA,
    model="Demo",
    base="BF16",
    settings=EngineSettings(n_ctx=512, n_threads=2),
    max_chunks=None,
    environment=Environment(
        "0.1.0",
        "0.3.36",
        "0c1e57098",
        {"AVX2": "1", "AMX": "0"},
        "3.11.7",
        "2.1",
        "Linux-6",
        "Some CPU",
        ("CPU: Some CPU", "CUDA0: H100"),
    ),
    runs=(Run("2026-01-01T00:00:00+00:00", ("bise", "perplexity", "my demo")),),
    models=(ModelRecord("Q2_K", (FileRecord("Demo-Q2_K.gguf", 4_020_000, 5, "ab12"),)),),
    texts=(TextRecord("prose", 178_000, "cd34"),),
    results=(Q2_K, BASE),
)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(23.0371, 0.37336), "23.04 ± 0.37"),
        (Estimate(0.074402, 0.000522), "0.07440 ± 0.00052"),
        (Estimate(1234.5, 99.6), "1234 ± 100"),
        (Estimate(-0.5, 0.1), "-0.50 ± 0.10"),
        (Estimate(1.0, 0.0), "1 ± 0"),
        (Estimate(0.0, 0.0), "0 ± 0"),
    ],
)
def test_a_figure_has_two_digits_of_its_error(estimate: Estimate, text: str) -> None:
    assert figure(estimate) == text


def test_a_figure_keeps_the_digits_it_is_compared_by() -> None:
    assert figure(Estimate(6.12345, 0.3), 4) == "6.123 ± 0.300"
    assert figure(Estimate(21.5435, 0.35015), 4) == "21.54 ± 0.35"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(999, "999 B"), (9_996, "10.0 kB"), (6_049_000, "6.05 MB"), (999_600, "1.00 MB"), (73_218_834_432, "73.2 GB")],
)
def test_a_size_has_three_digits(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text


def test_the_table_stands_in_line() -> None:
    assert table(RESULTS) == (
        "prose: 24,990 tokens scored in 98 chunks of 512\n"
        "\n"
        "level     size  bits/weight           PPL        ΔPPL %                KLD    same top %  tokens/s\n"
        "BF16   19.4 MB        16.01  21.54 ± 0.35             –                  –             –     2,122\n"
        "Q2_K   4.02 MB         3.31  23.04 ± 0.37  +6.93 ± 0.26  0.07440 ± 0.00052  82.08 ± 0.24    12,346\n"
    )


def test_levels_stand_from_the_largest_whatever_order_they_were_measured_in() -> None:
    levels = ("Q4_K_M", "mine", "Q8_0", "BF16", "Q4_K_S")
    rows = tuple(replace(BASE, level=level) for level in levels)
    lines = table(replace(RESULTS, results=rows)).splitlines()[3:]
    assert [line.split()[0] for line in lines] == ["BF16", "Q8_0", "Q4_K_M", "Q4_K_S", "mine"]


def test_without_a_base_nothing_is_compared() -> None:
    results = replace(RESULTS, base=None, results=(replace(Q2_K, statistics=None),))
    assert "–             –" in table(results).replace("  –", "–             –")
    report = markdown(results)
    assert "**KLD**" not in report
    assert "| base | none |" in report


def test_the_report_says_what_was_measured_and_how_to_repeat_it() -> None:
    report = markdown(RESULTS)
    for line in (
        "# Quality of Demo",
        "Measured on Some CPU, CUDA0: H100 with Bise 0.1.0, llama.cpp 0c1e57098.",
        "## prose",
        "| Q2_K | 4.02 MB | 3.31 | 23.04 ± 0.37 | +6.93 ± 0.26 | 0.07440 ± 0.00052 | 82.08 ± 0.24 | 12,346 |",
        "    bise perplexity 'my demo'  # 2026-01-01T00:00:00+00:00",
        "| chunks of each text | all |",
        "| n_threads | 2 |",
        "| kv_type | f16 |",
        "| CPU features | AVX2 |",
        "| Demo-Q2_K.gguf | 4,020,000 | `ab12` |",
        "| prose | 178,000 | `cd34` |",
    ):
        assert line in report.splitlines()
    assert "\x1b" not in report
    assert "in nats a token" in report


def test_the_report_says_when_only_a_part_was_read() -> None:
    results = replace(RESULTS, max_chunks=98)
    assert "24,990 tokens scored in the first 98 chunks of 512." in markdown(results)
    assert "| chunks of each text | the first 98 |" in markdown(results)
