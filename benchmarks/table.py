"""Results → the table that is printed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.results import (
    Anatomy,
    Comparison,
    CoreSpeed,
    Depth,
    KernelResults,
    KernelSpeed,
    Model,
    Repeats,
    Results,
    Step,
)
from tui.units import gib, gigabytes

LIMIT_BYTES = 3 << 29
"""1.5 GiB: what a conversion of the 123B shapes on 2 threads may hold."""

LEGEND = """\
to read: size of the input files; from disk: what of that was not in memory; written: size of the files made;
resident: highest memory, mapped files included; anonymous: without files; + sync: until all that was written is on the
disk (Bise's own syncing is in its wall time); others: cores that everything else on the machine used meanwhile"""

Row = Sequence[str]


def table(results: Results) -> str:
    """Every part about the converter, with the machine above."""
    parts = [
        f"{machine_lines(results.machine, results.load_after)}\n{model_line(results.model)}; {results.threads} threads",
        *(_comparison(comparison) for comparison in results.comparisons),
        LEGEND,
        f"{results.n_compared:,} tensors made by both sides are the same by SHA-256.",
        _repeats(results.repeats),
        _memory(results),
        _anatomy(results.anatomy, results.threads),
    ]
    return "\n\n".join(parts)


def kernel_table(results: KernelResults) -> str:
    """Every part about the kernels, with the machine above."""
    speeds = results.speeds
    return "\n\n".join(
        [
            machine_lines(results.machine, results.load_after),
            "Million weights a second on one core, and how many times ggml's (median; lowest to highest)\n"
            + _kernel_speeds((*speeds.types, *speeds.levels)),
            f"The longer search, whose blocks are better than ggml's\n{_kernel_speeds(speeds.longer)}",
            f"Six levels on one core and on all\n{_core_speeds(speeds.cores)}",
        ]
    )


def _kernel_speeds(speeds: Sequence[KernelSpeed]) -> str:
    header = ("", "rows", "matrix", "ggml", *(text for side in speeds[0].builds for text in (side.build, "", "")))
    rows: list[Row] = [header]
    for speed in speeds:
        cells = [speed.name, speed.rows, _yes(speed.importance), f"{speed.ggml_weights_per_second / 1e6:.1f}"]
        for side in speed.builds:
            low, middle, high = side.ratios
            cells += [f"{side.weights_per_second / 1e6:.1f}", f"×{middle:.2f}", f"({low:.2f} to {high:.2f})"]
        rows.append(cells)
    return aligned(rows)


def _core_speeds(speeds: Sequence[CoreSpeed]) -> str:
    rows: list[Row] = [("build", "matrix", "cores", "one core", "all cores", "wall ratio", "CPU ratio")]
    for speed in speeds:
        ratios = [
            f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in (speed.wall_ratios, speed.cpu_ratios)
        ]
        numbers = [f"{found / 1e6:.1f}" for found in (speed.one_core, speed.all_cores)]
        rows.append((speed.build, _yes(speed.importance), str(speed.cores), *numbers, *ratios))
    return aligned(rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def machine_lines(machine: Mapping[str, Any], load_after: Sequence[float]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    kind = "a virtual machine, " if machine["virtual"] else ""
    load = f"{machine['load'][0]:.1f} before and {load_after[0]:.1f} after"
    return "\n".join(
        [
            f"{machine['cpu']}, {kind}{machine['cores']} cores, {gib(machine['memory_bytes'])} RAM, {machine['disk']}, "
            f"kernels {machine['kernels']}; "
            f"load {load}",
            versions,
        ]
    )


def model_line(model: Model) -> str:
    shape = model.shape
    layers = "1 layer" if shape.n_layers == 1 else f"{shape.n_layers} layers"
    return (
        f"{layers} of width {shape.n_embd:,}, FFN {shape.n_ff:,}, {shape.n_heads}/{shape.n_heads_kv} "
        f"heads, vocabulary {shape.n_vocab:,}: {model.n_weights / 1e6:,.0f} million weights, {gigabytes(model.n_bytes)}"
    )


def _comparison(comparison: Comparison) -> str:
    first, *rest = comparison.rival
    header = ("", "wall s", "CPU s", "to read", "from disk", "written", "resident", "anonymous", "+ sync s", "others")
    rows = [
        header,
        ("llama.cpp  BF16 GGUF", *_cells(first)),
        *((f"           {step.name}", *_cells(step)) for step in rest),
        ("           all of it", *_total(comparison.rival)),
        (f"Bise       {comparison.ours.name}", *_cells(comparison.ours)),
    ]
    ratios = comparison.ratios
    return (
        f"{len(comparison.levels)} levels, once each side, no input in memory at the start of a step\n"
        f"{aligned(rows)}\n"
        f"Bise is {ratios['wall']:.2f} times as fast (CPU {ratios['cpu']:.2f}; with all files on the disk "
        f"{ratios['flushed']:.2f}; were the BF16 GGUF there already {ratios['levels_only']:.2f}), reads "
        f"1/{ratios['read']:.1f} and writes 1/{ratios['written']:.2f} of the bytes"
    )


def _cells(step: Step) -> tuple[str, ...]:
    cost = step.cost
    return (
        f"{cost.seconds:.1f}",
        f"{cost.cpu_seconds:.1f}",
        gigabytes(step.input_bytes),
        gigabytes(cost.disk_read_bytes),
        gigabytes(step.output_bytes),
        gib(cost.peak_resident_bytes),
        gib(cost.peak_anonymous_bytes),
        f"{cost.flush_seconds:.1f}",
        f"{cost.other_cores:.1f}",
    )


def _total(steps: Sequence[Step]) -> tuple[str, ...]:
    return (
        f"{sum(step.cost.seconds for step in steps):.1f}",
        f"{sum(step.cost.cpu_seconds for step in steps):.1f}",
        gigabytes(sum(step.input_bytes for step in steps)),
        gigabytes(sum(step.cost.disk_read_bytes for step in steps)),
        gigabytes(sum(step.output_bytes for step in steps)),
        gib(max(step.cost.peak_resident_bytes for step in steps)),
        gib(max(step.cost.peak_anonymous_bytes for step in steps)),
        f"{sum(step.cost.flush_seconds for step in steps):.1f}",
        "",
    )


def _repeats(repeats: Repeats) -> str:
    rows: list[Row] = [("pair", "llama.cpp s", "ggml's kernels s", "Bise s", "wall ratios", "CPU ratios")]
    rows += [
        (
            str(i),
            f"{sum(step.cost.seconds for step in pair.rival):.1f}",
            "" if pair.reference is None else f"{pair.reference.cost.seconds:.1f}",
            f"{pair.ours.cost.seconds:.1f}",
            f"{pair.ratios['reference']:.2f}  {pair.ratio:.2f}",
            f"{pair.ratios['reference_cpu']:.2f}  {pair.ratios['cpu']:.2f}",
        )
        for i, pair in enumerate(repeats.pairs, 1)
    ]
    spread = {name: f"{found[1]:.2f} ({found[0]:.2f} to {found[2]:.2f})" for name, found in repeats.spread.items()}
    return (
        f"In turn, inputs in memory, {len(repeats.levels)} levels of {model_line(repeats.model)}\n{aligned(rows)}\n"
        f"Bise with ggml's kernels: {spread['reference']} times as fast as llama.cpp, CPU {spread['reference_cpu']}\n"
        f"Bise with its own: {spread['wall']}, CPU {spread['cpu']} (median, lowest to highest)"
    )


def _memory(results: Results) -> str:
    costs = [comparison.ours.cost for comparison in results.comparisons] + [depth.cost for depth in results.depths]
    highest = max(cost.peak_resident_bytes for cost in costs)
    verdict = "below" if highest < LIMIT_BYTES else "ABOVE"
    return (
        f"Memory of Bise by number of layers\n{_depths(results.depths)}\n"
        f"At most {gib(highest)} here and above, {verdict} the {gib(LIMIT_BYTES)} that the 123B shapes may take"
    )


def _depths(depths: Iterable[Depth]) -> str:
    rows: list[Row] = [("layers", "weights", "resident", "anonymous")]
    rows += [
        (
            str(depth.model.shape.n_layers),
            f"{depth.model.n_weights / 1e6:,.0f} M",
            gib(depth.cost.peak_resident_bytes),
            gib(depth.cost.peak_anonymous_bytes),
        )
        for depth in depths
    ]
    return aligned(rows)


def _anatomy(anatomy: Anatomy, threads: int) -> str:
    whole = anatomy.cost.seconds * threads
    rest = whole - sum(found["seconds"] for found in anatomy.stages.values())
    rest_cpu = anatomy.cost.cpu_seconds - sum(found["cpu_seconds"] for found in anatomy.stages.values())
    rows: list[Row] = [("", "thread s", "CPU s", "of CPU", "no core s", "other waiting s")]
    for name, found in sorted(anatomy.stages.items(), key=lambda item: -item[1]["cpu_seconds"]):
        seconds, cpu, queued = found["seconds"], found["cpu_seconds"], found["queued_seconds"]
        share = f"{cpu / anatomy.cost.cpu_seconds:.1%}"
        waiting = max(seconds - cpu - queued, 0)
        rows.append((name, f"{seconds:.1f}", f"{cpu:.1f}", share, f"{queued:.1f}", f"{waiting:.1f}"))
    share = f"{rest_cpu / anatomy.cost.cpu_seconds:.1%}"
    rows.append(("all else, and idle", f"{rest:.1f}", f"{rest_cpu:.1f}", share, "", ""))
    title = f"Where the threads' time goes, {len(anatomy.levels)} levels in {anatomy.cost.seconds:.1f} s"
    return f"{title}\n{aligned(rows)}"


def aligned(rows: Sequence[Row]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
