"""`python -m benchmarks`: measure kernels, converter and runtime beside llama.cpp's, and what guessing ahead gains.

Prints tables and writes JSON.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.experiments import SCALES, SIX, Bench, check_room, model_of, needed_bytes
from benchmarks.kernels import EFFORTS, kernel_speeds
from benchmarks.machine import machine
from benchmarks.results import KernelResults, Results
from benchmarks.runtime import RuntimeResults, runtime_speeds
from benchmarks.runtime_table import runtime_table
from benchmarks.speculation import SpeculationResults, speculation_speeds
from benchmarks.speculation_table import speculation_table
from benchmarks.table import kernel_table, table
from quant.work import usable_cores
from runtime.errors import UserError
from runtime.levels import LEVELS

PARTS = ("kernels", "converter", "runtime", "speculation")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("bench-out"), help="where to work (default: bench-out)")
    parser.add_argument("--scale", choices=SCALES, default="full", help="default: full")
    parser.add_argument("--only", choices=PARTS, help="default: all")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of both sides (default: every core)")
    parser.add_argument("--levels", default=",".join(LEVELS), help="default: the ten, and six of them")
    parser.add_argument("--repeats", type=int, help="pairs of runs on the smaller model")
    options = parser.parse_args(arguments)
    unknown = [level for level in options.levels.split(",") if level not in LEVELS]
    if unknown or options.threads < 1:
        parser.error(f"unknown level {unknown[0]}" if unknown else "threads must be 1 or more")
    folder = options.dir.absolute()
    parts = PARTS if options.only is None else (options.only,)
    try:
        if "kernels" in parts:
            kernels = measure_kernels(folder, options.scale)
            _show(kernel_table(kernels), kernels.to_json(), options.dir / "kernels.json")
        if "converter" in parts:
            results = measure(folder, options.scale, options.threads, options.levels.split(","), options.repeats)
            _show(table(results), results.to_json(), options.dir / "speed.json")
        if "runtime" in parts:
            found = measure_runtime(folder, options.scale, options.threads)
            _show(runtime_table(found), found.to_json(), options.dir / "runtime.json")
        if "speculation" in parts:
            guesses = measure_speculation(folder, options.scale, options.threads)
            _show(speculation_table(guesses), guesses.to_json(), options.dir / "speculation.json")
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


def measure_kernels(folder: Path, scale: str) -> KernelResults:
    """Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    found_on = machine(folder)
    speeds = kernel_speeds(EFFORTS[scale], sorted(os.sched_getaffinity(0)), _say)
    return KernelResults(found_on, os.getloadavg(), scale, speeds)


def measure_runtime(folder: Path, scale: str, threads: int) -> RuntimeResults:
    """Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    found_on = machine(folder)
    speeds = runtime_speeds(folder, scale, threads, _say)
    return RuntimeResults(found_on, os.getloadavg(), scale, speeds)


def measure_speculation(folder: Path, scale: str, threads: int) -> SpeculationResults:
    """Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    found_on = machine(folder)
    found = speculation_speeds(folder, scale, threads, _say)
    return SpeculationResults(found_on, os.getloadavg(), scale, threads, found)


def measure(folder: Path, scale_name: str, threads: int, levels: list[str], repeats: int | None) -> Results:
    """All experiments with the converter at one scale. Raises UserError."""
    scale = SCALES[scale_name]
    if repeats is not None:
        scale = replace(scale, repeats=max(repeats, 1))
    needed = needed_bytes(folder, scale, levels)
    _say(f"this needs {needed / 1e9:.1f} GB below {folder}")
    check_room(folder, needed)
    folder.mkdir(parents=True, exist_ok=True)
    found_on = machine(folder)

    bench = Bench(folder, threads, _say)
    six = [level for level in SIX if level in levels] or levels
    selections = [levels] if six == levels else [levels, six]
    once = bench.checkpoint(scale.once)
    comparisons, compared = bench.compare(once, selections, cold=True)
    anatomy = bench.anatomy(once, levels)
    pairs, also_compared = bench.repeat(bench.checkpoint(scale.repeated), six, scale.repeats)
    depths = tuple(bench.depth(replace(scale.layered, n_layers=count), levels) for count in scale.layers)
    return Results(
        machine=found_on,
        load_after=os.getloadavg(),
        scale=scale_name,
        threads=threads,
        model=model_of(once),
        comparisons=comparisons,
        repeats=pairs,
        depths=depths,
        anatomy=anatomy,
        n_compared=compared + also_compared,
    )


def _show(text: str, content: str, path: Path) -> None:
    """Print a table, and write what it was made of."""
    path.write_text(content, encoding="utf-8")
    print(f"{text}\n\n{path}\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
