"""Results of the runtime → the table that is printed."""

from collections.abc import Sequence
from statistics import median

from benchmarks.runtime import LEVEL, RuntimeResults, RuntimeSpeed
from benchmarks.table import Row, aligned, machine_lines, model_line
from tui.units import gib

LEGEND = """\
ratio: Bise's speed over that of the bare loop in the same round, median (lowest to highest); prompt: until the first
token is there, with prompt format, text and events; drawn: with the default sampling, for which random weights are the
worst case; next turn: time to the first token of one more turn; load: until it
can answer, the process running; anonymous: memory that is not the mapped file"""


def runtime_table(results: RuntimeResults) -> str:
    """Every part, with the machine above."""
    parts = [_speed(speed) for speed in results.speeds]
    return "\n\n".join([machine_lines(results.machine, results.load_after), *parts, LEGEND])


def _speed(speed: RuntimeSpeed) -> str:
    n_prompt = round(median(each.n_prompt for each in speed.rounds))
    title = f"{LEVEL} of {model_line(speed.model)}; {speed.threads} threads, context {speed.n_ctx:,}"
    rows: list[Row] = [
        ("", "bare loop", "Bise", "ratio"),
        _rates(
            f"prompt of about {n_prompt:,} tokens",
            [each.raw_prompt for each in speed.rounds],
            [each.our_prompt for each in speed.rounds],
            speed.ratios["prompt"],
        ),
        _rates(
            f"answer of {speed.n_answer} tokens",
            [each.raw_answer for each in speed.rounds],
            [each.our_answer for each in speed.rounds],
            speed.ratios["answer"],
        ),
        _rates(
            "the same, drawn",
            [each.raw_answer for each in speed.rounds],
            [each.our_drawn_answer for each in speed.rounds],
            speed.ratios["drawn_answer"],
        ),
        (
            "load",
            f"{median(speed.raw_load_seconds):.2f} s",
            f"{median(speed.our_load_seconds):.2f} s, from nothing {median(speed.our_start_seconds):.2f} s",
            _ratio(speed.ratios["load"]),
        ),
        ("memory", gib(speed.raw_resident_bytes), gib(speed.our_resident_bytes), ""),
        ("anonymous", gib(speed.raw_anonymous_bytes), gib(speed.our_anonymous_bytes), ""),
    ]
    return f"{title}\n{aligned(rows)}\n{_turns(speed)}"


def _rates(
    name: str, raw: Sequence[float], ours: Sequence[float], ratio: tuple[float, float, float]
) -> tuple[str, str, str, str]:
    return name, f"{median(raw):,.1f} tokens/s", f"{median(ours):,.1f} tokens/s", _ratio(ratio)


def _turns(speed: RuntimeSpeed) -> str:
    turn = sorted(speed.turns, key=lambda each: each.cold_seconds / each.warm_seconds)[len(speed.turns) // 2]
    return (
        f"next turn, {turn.n_reused:,} of {turn.n_prompt:,} tokens read before: {turn.warm_seconds:.3f} s, "
        f"{turn.cold_seconds:.2f} s cold: {_ratio(speed.ratios['next_turn'])} times as fast\n"
        f"back from another conversation, {turn.n_back_reused:,} tokens copied: {turn.back_seconds:.3f} s"
    )


def _ratio(spread: tuple[float, float, float]) -> str:
    low, middle, high = spread
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
