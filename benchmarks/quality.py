"""`python -m benchmarks.quality`: what the demo model loses at a size, by level, longer search and recipe.

Makes an importance matrix of the calibration text; the levels without it and with it, each by ggml's search and by the
longer one; and a recipe of each level's size, with the matrix and the longer search: all by Bise's own verbs. Measures
their KL divergence from BF16 on the bundled evaluation texts, prints the table and writes quality.json. What is there
of an earlier run is not made or measured again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.divergence import Change, Divergences, Judge, change, mean
from benchmarks.machine import machine
from quant.quality.statistics import Estimate
from quant.quality.texts import BUNDLED, read_text
from quant.work import usable_cores
from runtime import library
from runtime.events import EngineSettings
from runtime.levels import LEVELS, ORIGINAL

MODEL, STEM = "demo", "Demo"


@dataclass(frozen=True, slots=True)
class Row:
    """One level, and what has its size. Divergences are in nats a token, changes shares of that of ggml's search."""

    level: str
    n_bytes: int
    ggml: Estimate
    """Without a matrix, as all that llama-quantize makes by default."""
    best: Change | None
    """None where the longer search has nothing to do."""
    matrix_ggml: Estimate
    matrix_best: Change | None
    recipe_bytes: int
    recipe: Change
    recipe_to_best: Change
    """Beside the longer search at the level, with the matrix as well."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("quality-out"), help="default: quality-out")
    parser.add_argument("--levels", default=",".join(LEVELS), help="default: the ten")
    parser.add_argument("--chunks", type=int, help="of 512 tokens of each text (default: all)")
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args(arguments)
    levels = options.levels.split(",")
    files = _make(options.dir, levels, options.threads)
    settings = EngineSettings(n_ctx=512, n_threads=options.threads)
    texts = [read_text(name) for name in BUNDLED]
    kept = options.dir / (f"divergences-{options.chunks}" if options.chunks else "divergences")
    judge = Judge(files["plain", ORIGINAL], texts, kept, settings, options.chunks)
    found = {key: judge.divergences("-".join(key), path, _say) for key, path in files.items() if key[1] != ORIGINAL}
    rows = [_row(level, files, found) for level in levels]
    n_chunks = {name: len(values) for name, values in found["plain", levels[0]].items()}
    content = {"machine": machine(options.dir), "chunks": n_chunks, "rows": [asdict(row) for row in rows]}
    (options.dir / "quality.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(rows, n_chunks))
    return 0


def _make(folder: Path, levels: Sequence[str], threads: int) -> dict[tuple[str, str], Path]:
    """(plain, matrix or recipe; level) → file."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, with_matrix, matrix = folder / "plain", folder / "matrix", folder / "calibration.gguf"
    both = [*levels, *(f"{level}-BEST" for level in levels if level != "Q8_0")]
    count = ("--threads", str(threads))
    _bise("quantize", MODEL, "--levels", ",".join([ORIGINAL, *both]), "--out", str(plain), *count)
    if not matrix.exists():
        base = library.find_levels(STEM, plain)[ORIGINAL]
        _bise("imatrix", str(base), "--out", str(matrix), *count)
    given = ("--imatrix", str(matrix))
    _bise("quantize", MODEL, "--levels", ",".join(both), "--out", str(with_matrix), *given, *count)
    files, measured = {}, folder / "sensitivity.json"
    for level in levels:
        name = f"RECIPE-{level.replace('_', '')}"
        recipe = folder / "recipes" / f"{name}.yaml"
        if not recipe.exists():
            place = ("--name", name, "--out", str(recipe), "--models", str(plain), "--sensitivity", str(measured))
            _bise("recipe", MODEL, "--like", level, *given, *place, *count)
        _bise("quantize", MODEL, "--recipe", str(recipe), "--out", str(folder / "recipe"), *given, *count)
        files["recipe", level] = folder / "recipe" / name / f"{STEM}-{name}.gguf"
    for kind, where in (("plain", plain), ("matrix", with_matrix)):
        files |= {(kind, level): path for level, path in library.find_levels(STEM, where, both).items()}
    return files


def _bise(*arguments: str) -> None:
    _say(f"bise {' '.join(arguments)}")
    subprocess.run([sys.executable, "-m", "tui.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def _row(level: str, files: Mapping[tuple[str, str], Path], found: Mapping[tuple[str, str], Divergences]) -> Row:
    plain, matrix = found["plain", level], found["matrix", level]
    best = f"{level}-BEST"
    bests = [found.get((kind, best)) for kind in ("plain", "matrix")]
    return Row(
        level=level,
        n_bytes=files["matrix", level].stat().st_size,
        ggml=mean(plain),
        best=change(bests[0], plain) if bests[0] is not None else None,
        matrix_ggml=mean(matrix),
        matrix_best=change(bests[1], matrix) if bests[1] is not None else None,
        recipe_bytes=files["recipe", level].stat().st_size,
        recipe=change(found["recipe", level], matrix),
        recipe_to_best=change(found["recipe", level], bests[1] if bests[1] is not None else matrix),
    )


def table(rows: Sequence[Row], n_chunks: Mapping[str, int]) -> str:
    """KL divergences, and what the longer search and the recipe change of them in per cent, with paired errors."""
    head = ("", "", "no matrix", "", "with matrix", "", "", "", "")
    names = ("level", "MB", "ggml", "best", "ggml", "best", "recipe", "to best", "recipe MB")
    lines = [head, names, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = ", ".join(f"{name} {count}" for name, count in n_chunks.items())
    return "\n".join(
        [
            f"Mean KL divergence from BF16, in nats a token, over chunks of 512 tokens: {told}",
            *("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines),
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.level,
        f"{row.n_bytes / 1e6:.3f}",
        f"{row.ggml.value:.6f}",
        _percent(row.best),
        f"{row.matrix_ggml.value:.6f}",
        _percent(row.matrix_best),
        _percent(row.recipe),
        _percent(row.recipe_to_best),
        f"{row.recipe_bytes / 1e6:.3f}",
    )


def _percent(found: Change | None) -> str:
    if found is None:
        return "–"
    return f"{100 * found.share.value:+.1f} ± {100 * found.share.error:.1f} %"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
