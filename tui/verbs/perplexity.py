"""Measure what each level costs: perplexity, KL divergence to BF16, speed and size; as a table, JSON and Markdown."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quant.quality.judge import Progress
    from quant.quality.results import Environment
    from quant.quality.trial import LevelFile
    from tui.progress import ProgressLine

HELP = "what each level costs in quality, speed and size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tui.engine_options import add_engine_arguments

    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="a name or a file (default: demo)")
    parser.add_argument("--levels", default="all", help="default: all on disk; BF16, the base, comes with them")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where levels lie (default: the user's data folder)")
    parser.add_argument("--texts", default="prose,code,definitions", help="bundled names or UTF-8 files, with commas")
    parser.add_argument("--chunks", type=int, metavar="N", help="only the first N chunks of each text (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the report (default: the user's data folder)")
    parser.add_argument("--keep-base", action="store_true", help="keep the base's log-probabilities for later runs")
    parser.add_argument("--force", action="store_true", help="begin anew, whatever the result file holds")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    add_engine_arguments(parser, context=512)


def run(arguments: argparse.Namespace) -> int:
    from quant.quality.judge import judge
    from quant.quality.report import markdown, table
    from quant.quality.texts import read_text
    from quant.quality.trial import Trial
    from runtime import library
    from runtime.errors import OutputError
    from runtime.levels import ORIGINAL
    from runtime.scoring import ScoringEngine
    from tui.engine_options import engine_settings
    from tui.progress import ProgressLine

    with ProgressLine("measuring") as line:
        name, levels = _levels(arguments, line)
        out = arguments.out or library.data_folder() / "reports"
        trial = Trial(
            model=name,
            levels=levels,
            texts=tuple(read_text(text) for text in arguments.texts.split(",") if text),
            settings=engine_settings(arguments, None),
            out=out / f"{name}.json",
            base=ORIGINAL if any(file.level == ORIGINAL for file in levels) else None,
            max_chunks=arguments.chunks,
            keep_base=arguments.keep_base,
            overwrite=arguments.force,
        )
        results = judge(
            trial, ScoringEngine, _environment(), ("bise", *sys.argv[1:]), lambda progress: _show(line, progress)
        )
    report = out / f"{name}.md"
    try:
        report.write_text(markdown(results), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{report}: cannot be written: {error.strerror}; the figures are in {trial.out}") from None
    if arguments.json:
        print(trial.out.read_text(encoding="utf-8"), end="")
    else:
        print(table(results))
        print(f"\nwritten: {trial.out}, {report}")
    return 0


def _levels(arguments: argparse.Namespace, line: "ProgressLine") -> "tuple[str, tuple[LevelFile, ...]]":
    """The name for the report, and the files to measure: the base first, where there is one."""
    from quant.quality.trial import LevelFile
    from runtime import library
    from runtime.catalogue import parse_recipes
    from runtime.errors import CatalogueError
    from runtime.levels import ORIGINAL
    from tui.choose import DEMO, ensure_levels

    catalogue = library.shipped_catalogue()
    folder = arguments.models or library.models_folder()
    path = Path(arguments.model).expanduser()
    if arguments.model not in catalogue.models and (path.suffix == ".gguf" or path.is_file()):
        first = library.first_shard(path)
        return first.stem, (LevelFile(library.level_of(first) or first.stem, first),)
    wanted = [recipe.name for recipe in parse_recipes(arguments.levels, catalogue.recipes)]
    if arguments.model == DEMO:
        ensure_levels(catalogue.model(DEMO), (ORIGINAL, *wanted), folder, line.say)
        name = catalogue.model(DEMO).name
    elif (model := catalogue.models.get(arguments.model)) is not None:
        name = model.name
        if (packaged := library.packaged_file(model)) is not None:
            return name, (LevelFile(library.level_of(packaged) or packaged.stem, packaged),)
    else:
        _, _, name = library.find_checkpoint(arguments.model, catalogue)
    found = library.find_levels(name, folder, catalogue.recipes)
    everything = "all" in arguments.levels.lower().split(",")
    missing = [level for level in wanted if level not in found]
    if missing and not (everything and found):
        raise CatalogueError(
            f"{name} is not in {folder} at {', '.join(missing)}; make it with "
            f"`bise quantize {arguments.model} --levels {','.join(missing)}`"
        )
    if ORIGINAL not in found:
        line.say(f"no {ORIGINAL} of {name} in {folder}: perplexity alone is measured, without KL divergence")
    others = [level for level in found if level in wanted and level != ORIGINAL]
    chosen = [*([ORIGINAL] if ORIGINAL in found else []), *others]
    return name, tuple(LevelFile(level, found[level]) for level in chosen)


def _environment() -> "Environment":
    from quant.quality.results import this_environment
    from runtime import native, wheel
    from runtime.native_devices import devices

    return this_environment(
        native.version(),
        wheel.LLAMA_CPP_COMMIT,
        native.system_info(),
        tuple(f"{device.name}: {device.description}" for device in devices()),
    )


def _show(line: "ProgressLine", progress: "Progress") -> None:
    if progress.activity == "score" and progress.total_chunks:
        line.show(
            progress.done_chunks / progress.total_chunks,
            f"{progress.tokens_per_second:,.0f} tokens/s",
            progress.seconds_left,
            f"{progress.level} {progress.text}" + (f" ppl {progress.ppl:.3f}" if progress.ppl else ""),
        )
    elif progress.activity != "score":
        total = progress.total_chunks
        share = progress.done_chunks / total if total else 0.0
        line.show(share, "", None, f"{progress.level}: {progress.activity} {progress.part:.0%}")
