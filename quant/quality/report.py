"""Results → a plain-text table for the terminal, and a Markdown report that stands by itself.

Takes `Results`, gives text without colour codes. A figure is written to two digits of its error. Measures nothing,
reads no file.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import fields

from quant.quality.results import Results, Row
from quant.quality.statistics import Estimate
from runtime.levels import LEVELS, ORIGINAL

_HEADS = ("level", "size", "bits/weight", "PPL", "ΔPPL %", "KLD", "same top %", "tokens/s")

_NONE = "–"

_ORDER = (ORIGINAL, *reversed(LEVELS))

_PPL_DIGITS = 4
"""PPL is compared with llama-perplexity's to four digits, however wide its error."""

_LEGEND = """\
## What the figures say

- **PPL**, perplexity: exp of the mean negative log-likelihood of the scored tokens; lower is better. The ± is one
  standard deviation for *this much text*. All levels read the same text, so it is no measure of their distance: levels
  whose PPL differ by less than it cannot be told apart by PPL alone.
"""

_LEGEND_BASE = """\
- **ΔPPL**: PPL against {base}'s, in per cent. Its ± is paired: it comes from the differences token by token.
- **KLD**: Kullback–Leibler divergence from {base}, in nats a token: how far the predicted distribution moved, whatever
  the text says next. It tells levels apart where PPL cannot.
- **same top**: share of tokens where the level and {base} find the same token likeliest.
"""

_LEGEND_END = """\
- **size**: of all its files. **bits/weight**: of all tensors together.
- **tokens/s**: speed of reading in batches, on this machine with these settings. Writing an answer is slower.

A chunk starts with an empty context; its first half is read but not scored. Chunks, batches and formulas are those of
llama-perplexity.
"""


def table(results: Results) -> str:
    """For each text a table with aligned columns, for a terminal."""
    parts = []
    for name in _texts(results):
        lines = [_HEADS, *_lines(results, name)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADS))]
        body = "\n".join(_aligned(line, widths) for line in lines)
        parts.append(f"{name}: {_extent(results, name)}\n\n{body}\n")
    return "\n".join(parts)


def markdown(results: Results) -> str:
    """The report: tables, what the figures mean, and all that is needed to measure them again."""
    parts = [f"# Quality of {results.model}\n\n{_where(results)}\n"]
    for name in _texts(results):
        lines = [_HEADS, ("---", *["---:"] * (len(_HEADS) - 1)), *_lines(results, name)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {name}\n\n{_extent(results, name)}.\n\n{body}\n")
    compared = _LEGEND_BASE.format(base=results.base) if results.base is not None else ""
    parts += [_LEGEND + compared + _LEGEND_END, _reproduction(results)]
    return "\n".join(parts)


def figure(estimate: Estimate, least_digits: int = 1, *, sign: bool = False) -> str:
    """Value ± error to two digits of the error, and at least so many digits of the value: 21.54 ± 0.35."""
    decimals = 0
    if estimate.error > 0:
        decimals = 1 - math.floor(math.log10(estimate.error))
    if estimate.value != 0:
        decimals = max(decimals, least_digits - 1 - math.floor(math.log10(abs(estimate.value))))
    decimals = max(decimals, 0)
    return f"{estimate.value:{'+' if sign else ''}.{decimals}f} ± {estimate.error:.{decimals}f}"


def size(n_bytes: int) -> str:
    """Decimal units, three digits: 73.2 GB, 6.05 MB."""
    number, unit = float(n_bytes), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if number < 999.5:
            break
        number, unit = number / 1000, bigger
    return f"{_three_digits(number)} {unit}"


def _three_digits(number: float) -> str:
    texts = (f"{number:,.{decimals}f}" for decimals in (2, 1))
    return next((text for text in texts if len(text) <= 4), f"{number:,.0f}")


def _texts(results: Results) -> list[str]:
    """The texts that have rows, in the order they were given."""
    measured = {row.text for row in results.results}
    return [text.name for text in results.texts if text.name in measured]


def _lines(results: Results, text: str) -> list[tuple[str, ...]]:
    """The rows of a text as cells: the original, then the levels from the largest, then what has a name of its own."""
    rows = [row for row in results.results if row.text == text]
    rows.sort(key=lambda row: _ORDER.index(row.level) if row.level in _ORDER else len(_ORDER))
    base = next((row for row in rows if row.level == results.base), None)
    return [_cells(row, base) for row in rows]


def _cells(row: Row, base: Row | None) -> tuple[str, ...]:
    change = kld = same_top = _NONE
    if row.statistics is not None:
        figures = row.statistics
        if base is not None:
            change = figure(Estimate(100 * (row.ppl / base.ppl - 1), 100 * figures.ratio.error), sign=True)
        kld = figure(figures.kld.mean)
        same_top = figure(Estimate(100 * figures.same_top.value, 100 * figures.same_top.error))
    return (
        row.level,
        size(row.file_bytes),
        f"{row.bits_per_weight:.2f}",
        figure(Estimate(row.ppl, row.ppl_error), _PPL_DIGITS),
        change,
        kld,
        same_top,
        _three_digits(row.prompt_tokens_per_second),
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join((first, *others))


def _extent(results: Results, text: str) -> str:
    """How much of a text was read."""
    row = next(row for row in results.results if row.text == text)
    first = "the first " if row.chunks == results.max_chunks else ""
    return f"{row.tokens:,} tokens scored in {first}{row.chunks} chunks of {row.context:,}"


def _where(results: Results) -> str:
    environment = results.environment
    devices = "".join(f", {device}" for device in environment.devices if not device.startswith("CPU"))
    return f"Measured on {environment.cpu}{devices} with Bise {environment.bise}, llama.cpp {environment.llama_cpp}."


def _reproduction(results: Results) -> str:
    """Settings, software, files and commands."""
    environment, settings = results.environment, results.settings
    facts = [
        ("chunks of each text", "all" if results.max_chunks is None else f"the first {results.max_chunks}"),
        ("base", results.base or "none"),
        *((f.name, getattr(settings, f.name)) for f in fields(settings) if getattr(settings, f.name) not in (None, ())),
        ("llama-cpp-python", environment.llama_cpp_python),
        ("Python, NumPy", f"{environment.python}, {environment.numpy}"),
        ("platform", environment.platform),
        ("CPU features", " ".join(name for name, value in environment.system_info.items() if value != "0")),
    ]
    settings_table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    files = [(file.name, file.n_bytes, file.sha256) for model in results.models for file in model.files]
    files += [(text.name, text.n_bytes, text.sha256) for text in results.texts]
    file_table = "\n".join(f"| {name} | {n_bytes:,} | `{digest}` |" for name, n_bytes, digest in files)
    commands = "\n".join(f"    {shlex.join(run.command)}  # {run.date}" for run in results.runs)
    return (
        f"## How to measure it again\n\n{commands}\n\n| setting | |\n|---|---|\n{settings_table}\n\n"
        f"| file or text | bytes | SHA-256 |\n|---|---:|---|\n{file_table}\n"
    )
