"""Results of guessing ahead → the table that is printed."""

from collections.abc import Sequence
from itertools import groupby
from statistics import median

from benchmarks.speculation import Guessing, Pair, SpeculationResults, share_right
from benchmarks.table import Row, aligned, machine_lines
from tui.units import gib

LEGEND = """\
ratio: tokens a second from the first token on, with guesses over without, by pairs of answers, median (lowest to
highest); right: of the guesses that were computed, those that were drawn"""


def speculation_table(results: SpeculationResults) -> str:
    """Every model, with the machine above."""
    parts = [
        _model(list(found), results.threads)
        for _, found in groupby(results.found, lambda each: (each.model, each.temperature))
    ]
    return "\n\n".join([machine_lines(results.machine, results.load_after), *parts, LEGEND])


def _model(found: Sequence[Guessing], threads: int) -> str:
    first = found[0]
    title = f"{first.model}, {gib(first.file_bytes)}; {threads} threads, temperature {first.temperature:g}"
    rows: list[Row] = [("guesses by", "question", "without", "with", "ratio", "right")]
    for each in found:
        rows += [
            _row(each.way, name, [pair for pair in each.pairs if pair.question == name], ratios)
            for name, ratios in each.ratios.items()
        ]
    return f"{title}\n{aligned(rows)}"


def _row(way: str, question: str, found: Sequence[Pair], ratios: tuple[float, float, float]) -> Row:
    low, middle, high = ratios
    return (
        way,
        question,
        f"{median(pair.plain for pair in found):,.1f} tokens/s",
        f"{median(pair.guessing for pair in found):,.1f} tokens/s",
        f"{middle:.2f} ({low:.2f} to {high:.2f})",
        f"{share_right(found):.0%}",
    )
