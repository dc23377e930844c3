"""Turn a model into GGUF files: every wanted level from one read of the weights."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quant.convert import Report
    from quant.plan import ConversionPlan
    from quant.quality.results import Results
    from quant.shards import LevelState
    from quant.source import Source
    from quant.work import Progress
    from runtime.catalogue import Catalogue, Model
    from runtime.levels import Recipe
    from tui.progress import ProgressLine

HELP = "make GGUF levels from safetensors or a GGUF"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="a name, folder or GGUF")
    parser.add_argument("--levels", help="such as Q4_K_M,Q6_K; all, the default, is the ten; also BF16, F16, recipes")
    parser.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help="a recipe by name, or those in a file of bise recipe; no level is then made unasked; may be repeated",
    )
    parser.add_argument(
        "--out",
        action="append",
        metavar="[LEVEL=]DIR",
        help="DIR/<LEVEL>/… (default: the user's data folder); LEVEL=DIR puts one level elsewhere; may be repeated",
    )
    parser.add_argument(
        "--tensor",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="another type for the tensors whose names match, such as 'ffn_down=Q6_K'; may be repeated, the first wins",
    )
    parser.add_argument("--output-type", metavar="TYPE", help="type of output.weight")
    parser.add_argument("--embedding-type", metavar="TYPE", help="type of token_embd.weight")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix, GGUF or .dat, as llama.cpp's")
    parser.add_argument(
        "--search",
        choices=("ggml", "best"),
        default="ggml",
        help="best: longer, less error at the same size; names such as Q4_K_M-BEST (default: ggml, its bytes)",
    )
    parser.add_argument(
        "--kernels", choices=("best", "reference"), default="best", help="reference: ggml's, same bytes, slower"
    )
    parser.add_argument(
        "--quality", type=Path, metavar="FILE", help="results of bise perplexity, for the card (README)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: every core")
    parser.add_argument("--shard-size", metavar="SIZE", help="most bytes of one file, such as 24G (default: 48G)")
    parser.add_argument("--force", action="store_true", help="replace files that differ, begin unfinished ones anew")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, memory, disk and time, and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")


def run(arguments: argparse.Namespace) -> int:
    from quant.convert import convert, survey
    from quant.estimate import as_json, estimate
    from quant.imatrix import read_imatrix
    from quant.kernels import GGML, best
    from quant.plan import SHARD_BYTES, plan_conversion
    from quant.quality.results import load
    from quant.shards import journal_path
    from quant.work import usable_cores
    from runtime import library
    from runtime.catalogue import parse_bytes
    from tui.plans import describe
    from tui.progress import ProgressLine

    catalogue = library.shipped_catalogue()
    recipes = _recipes(arguments, catalogue)
    source, model = _source(arguments, catalogue)
    quality = load(arguments.quality) if arguments.quality else None
    folder, elsewhere = _folders(arguments.out or [], recipes)
    plan = plan_conversion(
        source,
        recipes,
        folder or library.models_folder(),
        elsewhere=elsewhere,
        shard_bytes=parse_bytes(arguments.shard_size) if arguments.shard_size else SHARD_BYTES,
        importance=read_imatrix(arguments.imatrix) if arguments.imatrix else None,
    )
    kernels = GGML if arguments.kernels == "reference" else best()
    if arguments.dry_run:
        states = survey(plan)
        cost = estimate(plan, arguments.threads or usable_cores(), states, kernels)
        print(json.dumps(as_json(plan, cost, states), indent=1) if arguments.json else describe(plan, cost, states))
        return 0
    with ProgressLine(f"{source.name}:", quiet=arguments.quiet) as line:
        for note in source.notes:
            line.say(f"note: {note}")
        if kernels is GGML and arguments.kernels == "best":
            line.say("note: Bise's own kernels are not built (no C++ compiler at installation); ggml makes the blocks")
        states = survey(plan)
        try:
            report = convert(
                plan,
                threads=arguments.threads,
                overwrite=arguments.force,
                kernels=kernels,
                progress=lambda state: _show(state, plan, states, line),
            )
        except KeyboardInterrupt:
            kept = any(journal_path(level).exists() for level in plan.levels)
            line.say("the same command goes on where this one stopped" if kept else "no tensor was finished yet")
            raise
    _tell(plan, report, arguments)
    _write_cards(plan, model, quality)
    return 0


def _source(arguments: argparse.Namespace, catalogue: "Catalogue") -> "tuple[Source, Model | None]":
    """The model to convert. A plan needs only its shape."""
    from quant.inputs import described_source
    from runtime import library

    if arguments.dry_run and arguments.model in catalogue.models:
        model = catalogue.models[arguments.model]
        if library.checkpoint_folder(model) is None:
            return described_source(model), model
    return open_named_source(arguments.model, catalogue)


def open_named_source(argument: str, catalogue: "Catalogue") -> "tuple[Source, Model | None]":
    """MODEL → what its levels are made of, with what its files say of their origin, and its catalogue entry."""
    from dataclasses import replace

    from quant.inputs import open_source
    from quant.provenance import provenance
    from runtime import library

    path, found, name = library.find_checkpoint(argument, catalogue)
    source = open_source(path, name, licence_metadata(found), context=found.context if found else None)
    if source.kind == "GGUF":  # its metadata is carried over as it is, with what it says of its own origin
        return source, found
    return replace(source, metadata={**source.metadata, **provenance(source)}), found


def _recipes(arguments: argparse.Namespace, catalogue: "Catalogue") -> "tuple[Recipe, ...]":
    """The levels and recipes that --levels names, with the exceptions of the command line before their own."""
    from dataclasses import replace

    from runtime.catalogue import parse_override, parse_type

    tensors = tuple(parse_override(text) for text in arguments.tensor)
    output = parse_type(arguments.output_type) if arguments.output_type else None
    embedding = parse_type(arguments.embedding_type) if arguments.embedding_type else None
    chosen = _wanted(arguments, catalogue)
    if arguments.search == "best":  # of a level whose tensors all have one way only, such as Q8_0, there is no other
        chosen = tuple(catalogue.recipes.get(f"{recipe.name}-BEST", recipe) for recipe in chosen)
    return tuple(
        replace(
            recipe,
            tensors=(*tensors, *recipe.tensors),
            output=output if output is not None else recipe.output,
            embedding=embedding if embedding is not None else recipe.embedding,
        )
        for recipe in chosen
    )


def _wanted(arguments: argparse.Namespace, catalogue: "Catalogue") -> "tuple[Recipe, ...]":
    """The levels and recipes of --levels, then those of --recipe."""
    from runtime.catalogue import parse_recipes, read_recipes

    named = arguments.levels if arguments.levels or arguments.recipe else "all"
    found = list(parse_recipes(named, catalogue.recipes)) if named else []
    for argument in arguments.recipe:
        path = Path(argument).expanduser()
        if path.suffix.lower() in (".yaml", ".yml"):
            found += read_recipes(path).values()
        else:
            found += parse_recipes(argument, catalogue.recipes)
    return tuple(dict.fromkeys(found))


def _folders(out: list[str], recipes: "tuple[Recipe, ...]") -> tuple[Path | None, dict[str, Path]]:
    """--out: the folder of all levels, and those of single ones. Raises CatalogueError."""
    from runtime.catalogue import parse_recipes
    from runtime.errors import CatalogueError

    known = {recipe.name: recipe for recipe in recipes}
    everywhere: list[Path] = []
    elsewhere: dict[str, Path] = {}
    for text in out:
        level, equals, folder = text.partition("=")
        if not equals or "/" in level:
            everywhere.append(Path(text).expanduser())
            continue
        for recipe in parse_recipes(level, known):
            if recipe.name not in known:
                raise CatalogueError(f"--out {text}: {recipe.name} is not among the levels to make; add it to --levels")
            elsewhere[recipe.name] = Path(folder).expanduser()
    if len(everywhere) > 1:
        raise CatalogueError(f"--out names two folders for all levels, {everywhere[0]} and {everywhere[1]}; give one")
    return (everywhere[0] if everywhere else None), elsewhere


def _announce(plan: "ConversionPlan", states: "Mapping[str, LevelState]", line: "ProgressLine") -> None:
    """Each level before the work: how large, where, and what is there of it."""
    from tui.units import gigabytes

    for level in plan.levels:
        state = states[level.level]
        done = sum(tensor.n_bytes for tensor in level.tensors if tensor.spec.name in state.tensors)
        word = f"goes on at {done / level.tensor_bytes:.0%}" if state.word == "goes on" else state.word
        files = "1 file" if len(level.files) == 1 else f"{len(level.files)} files"
        line.say(f"{level.level:<7} {gigabytes(level.n_bytes):>9} in {files} to {level.folder}: {word}")


def _show(state: "Progress", plan: "ConversionPlan", states: "dict[str, LevelState]", line: "ProgressLine") -> None:
    """How far it is; before the first time, what is to be done, for only now is it known that it can be."""
    from tui.units import gigabytes

    if states:
        _announce(plan, states, line)
        states.clear()
    share = state.read_bytes / state.total_bytes
    rate = f"{gigabytes(state.bytes_per_second)}/s"
    if state.checking:
        line.show(share, rate, state.seconds_left, "checking what an earlier run wrote")
        return
    done = f"{gigabytes(state.read_bytes)} of {gigabytes(state.total_bytes)}"
    tensor = f"tensor {state.tensors_done}/{state.total_tensors}"
    line.show(share, rate, state.seconds_left, f"{done}  {tensor}  {state.tensor}")


def _write_cards(plan: "ConversionPlan", model: "Model | None", quality: "Results | None") -> None:
    """A README in every folder that levels went to, about all levels of the model there."""
    from quant.card import find_manifests, model_card, write_card
    from runtime.library import file_stem

    stem = file_stem(plan.source.name)
    for folder in dict.fromkeys(level.folder.parent for level in plan.levels):
        card = model_card(
            find_manifests(folder, stem),
            title=model.title if model else plan.source.name,
            licence=model.licence if model else None,
            repository=model.source.removeprefix("hub:") if model and model.source.startswith("hub:") else None,
            results=quality,
        )
        write_card(folder, card, stem)


def _tell(plan: "ConversionPlan", report: "Report", arguments: argparse.Namespace) -> None:
    """What was made, on stdout."""
    from tui.units import duration, gigabytes

    if arguments.json:
        made = {level: [str(path) for path in paths] for level, paths in report.made.items()}
        print(
            json.dumps(
                {
                    "made": made,
                    "already_there": list(report.already_there),
                    "written_bytes": report.written_bytes,
                    "seconds": report.seconds,
                },
                indent=1,
            )
        )
        return
    if arguments.quiet:
        return
    for level in plan.levels:
        state = "already there" if level.level in report.already_there else "made"
        shards = f" and {len(level.files) - 1} more" if len(level.files) > 1 else ""
        print(f"{level.level:<7} {gigabytes(level.n_bytes):>9}  {level.files[0].path}{shards}  {state}")
    print(f"{gigabytes(report.written_bytes)} written in {duration(report.seconds)}")


def licence_metadata(model: object) -> dict[str, str]:
    """The licence keys that go into the GGUF: only those of a licence the user must know of."""
    from runtime.catalogue import Model

    if not isinstance(model, Model) or model.licence.link is None:
        return {}
    return {"general.license.name": model.licence.name, "general.license.link": model.licence.link}
