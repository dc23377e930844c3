"""Choose the type of each tensor so that a model of a given size loses least, by what the model itself shows."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quant.choosing.distortion import Progress as Trying
    from quant.choosing.losses import Losses
    from quant.choosing.selection import Choice, Selection
    from quant.choosing.sensitivity import Sensitivity, Setting
    from quant.imatrix import ImportanceMatrix
    from quant.importance.corpus import CalibrationText
    from quant.source import Source
    from runtime.catalogue import Model
    from runtime.ggml import GgmlType
    from runtime.scoring import ScoringEngine
    from tui.progress import ProgressLine

HELP = "choose each tensor's type for a size, by measuring"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="a name, folder or GGUF")
    size = parser.add_argument_group("the size (one of these)").add_mutually_exclusive_group(required=True)
    size.add_argument("--target-size", metavar="SIZE", help="of the files, at most, such as 70G")
    size.add_argument("--bits", type=float, metavar="N", help="for a weight, such as 4.5")
    size.add_argument("--like", metavar="LEVEL", help="not larger than that level's files, such as Q4_K_M")
    size.add_argument("--fit", metavar="DEVICES", help="the most that fits, such as 80GiB,80GiB; with --context")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="with --fit (default: what it was trained for)")
    parser.add_argument("--kv", default="f16", metavar="TYPE", help="with --fit: KV cache type (default: f16)")
    parser.add_argument("--reserve", default="1GiB", metavar="SIZE", help="with --fit: left free on each device")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix that the levels are made with")
    parser.add_argument("--search", choices=("best", "ggml"), default="best", help="for blocks (default: best)")
    parser.add_argument("--name", help="of the recipe (default: the model's and its bits, such as Demo-4.50bpw)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: NAME.yaml where Bise finds it by its name")
    parser.add_argument("--proxy", action="store_true", help="measure nothing: judge by weights and matrix alone")
    parser.add_argument("--on", metavar="LEVEL", help="level that is loaded to measure on (default: BF16)")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where levels lie (default: the user's data folder)")
    parser.add_argument("--texts", metavar="FILES", help="to measure on, with commas (default: calibration)")
    parser.add_argument("--chunks", type=int, default=16, metavar="N", help="of 512 tokens, spread over the texts")
    parser.add_argument("--types", default="Q2_K,Q6_K", help="to measure each tensor at (default: Q2_K,Q6_K)")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="measure N neighbouring layers as one")
    parser.add_argument("--sensitivity", type=Path, metavar="FILE", help="where measurements are kept")
    parser.add_argument("--threads", type=int, metavar="N", help="default: every core")
    parser.add_argument("--force", action="store_true", help="replace the recipe, measure anew")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    import json

    from quant.choosing import recipe_file
    from quant.choosing.distortion import distortions
    from quant.choosing.losses import measured_losses, proxy_losses
    from quant.choosing.selection import Selection, candidates
    from quant.imatrix import check_fits, read_imatrix
    from runtime import library
    from runtime.errors import UserError
    from runtime.levels import Search
    from tui.progress import ProgressLine
    from tui.recipes import as_json, comments, describe
    from tui.verbs.quantize import open_named_source

    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"{arguments.threads} threads cannot measure anything; give 1 or more")
    source, model = open_named_source(arguments.model, library.shipped_catalogue())
    importance = read_imatrix(arguments.imatrix) if arguments.imatrix else None
    if importance is not None:
        check_fits(importance, source.specs)
    search = Search(arguments.search)
    types = candidates(source)
    nothing_known = {name: dict.fromkeys(its, 0.0) for name, its in types.items()}
    _choose(arguments, source, model, Selection(source, nothing_known, importance, search))  # refuse now what cannot be
    with ProgressLine(f"{source.name}:") as line:
        measured = None if arguments.proxy else _measure(arguments, source, model, importance, line)
        found = distortions(
            source,
            types,
            importance,
            search=search,
            threads=arguments.threads,
            progress=lambda state: _show_trying(line, state),
        )
    proxy = proxy_losses(found, source.specs)
    losses = measured_losses(found, measured[1].measurements) if measured is not None else proxy
    selection = Selection(source, losses, importance, search)
    choice, wish = _choose(arguments, source, model, selection)
    path = arguments.out or library.recipes_folder() / f"{choice.sized.recipe.name}.yaml"
    told = comments(choice, source, wish, importance, measured)
    recipe_file.write(path, recipe_file.text(choice.sized.recipe, told), replace=arguments.force)
    if arguments.json:
        print(json.dumps(as_json(choice, selection.levels(), path), indent=1))
        return 0
    print(describe(choice, selection.levels(), source.specs, measured=measured is not None))
    if measured is not None:
        print(_ranks(proxy, losses, measured[1]))
    named = choice.sized.recipe.name if arguments.out is None else path
    matrix = f" --imatrix {arguments.imatrix}" if arguments.imatrix else ""
    print(f"written: {path}; make it with `bise quantize {arguments.model} --recipe {named}{matrix}`")
    return 0


def _choose(
    arguments: argparse.Namespace, source: "Source", model: "Model | None", selection: "Selection"
) -> "tuple[Choice, str]":
    """The recipe that was asked for, with its name, and what was asked for in words."""
    from dataclasses import replace

    from quant.choosing.selection import default_name
    from runtime.catalogue import parse_bytes, parse_levels, recipe_name
    from runtime.errors import CatalogueError

    if arguments.target_size is not None:
        choice, wish = selection.of_size(parse_bytes(arguments.target_size)), f"at most {arguments.target_size}"
    elif arguments.bits is not None:
        choice, wish = selection.of_bits(arguments.bits), f"at most {arguments.bits:g} bits per weight"
    elif arguments.like is not None:
        levels = parse_levels(arguments.like)
        if len(levels) != 1:
            raise CatalogueError(f"--like {arguments.like} names {len(levels)} levels; name one")
        n_bytes = next(sized.n_bytes for sized in selection.levels() if sized.recipe.name == levels[0])
        choice, wish = selection.of_size(n_bytes), f"not larger than {levels[0]}"
    else:
        choice, wish = _fitting(arguments, source, model, selection)
    name = recipe_name(arguments.name or default_name(source, choice))
    note = f"{choice.sized.bits_per_weight:.2f} bits per weight, chosen for {source.name}, {wish}."
    recipe = replace(choice.sized.recipe, name=name, note=note)
    return replace(choice, sized=replace(choice.sized, recipe=recipe)), wish


def _fitting(
    arguments: argparse.Namespace, source: "Source", model: "Model | None", selection: "Selection"
) -> "tuple[Choice, str]":
    from runtime.catalogue import parse_bytes
    from runtime.errors import CatalogueError
    from runtime.hardware import parse_devices
    from runtime.placement import Wish

    said = source.metadata.get("llama.context_length")
    trained = model.context if model is not None else said.data if said is not None else None
    context = arguments.context or trained
    if not isinstance(context, int) or context < 1 or (isinstance(trained, int) and context > trained):
        raise CatalogueError(f"--context {context} is not between 1 and the {trained} tokens the model was trained for")
    devices, reserve = parse_devices(arguments.fit), parse_bytes(arguments.reserve)
    choice = selection.fitting(Wish(context, arguments.kv), devices, reserve)
    return choice, f"to fit {arguments.fit} with {context:,} tokens of {arguments.kv} KV cache"


def _measure(
    arguments: argparse.Namespace,
    source: "Source",
    model: "Model | None",
    importance: "ImportanceMatrix | None",
    line: "ProgressLine",
) -> "tuple[Path, Sensitivity]":
    """Measurements of every matrix, those of earlier runs among them, and where they are kept."""
    from quant.choosing.disturbance import Disturbance, spread
    from quant.choosing.sensitivity import Sensitivity, load, save
    from quant.importance.corpus import BUNDLED, read_texts
    from runtime import library
    from runtime.events import EngineSettings
    from runtime.levels import Search
    from runtime.scoring import ScoringEngine
    from tui.recipes import show_measuring

    file, level = _model_file(arguments, source, line)
    texts = [text for name in (arguments.texts or BUNDLED).split(",") for text in read_texts(name)]
    wanted = _wanted(arguments, source)
    setting = _setting(arguments, source, importance, file, level, texts, line)
    path = arguments.sensitivity or library.data_folder() / "sensitivity" / setting.file_name
    known = load(path, setting) if path.exists() and not arguments.force else Sensitivity(setting)
    if all(known.find(names, type_) for names, type_ in wanted):
        return path, known.only(wanted)
    settings = EngineSettings(n_ctx=setting.context, n_threads=arguments.threads)

    def loading(share: float) -> bool:
        line.show(share, detail=f"loading {file.name}")
        return True

    scorer = ScoringEngine(file, settings, loading, writable=True)
    try:
        tokens = spread(_chunks(scorer, texts, model, line), setting.chunks)
        disturbance = Disturbance(
            scorer, scorer.weights(), source, importance, search=Search(setting.search), threads=arguments.threads
        )
        known = disturbance.measure(
            tokens, wanted, known, lambda found: save(found, path), lambda state: show_measuring(line, state)
        )
    except KeyboardInterrupt:
        line.say("the same command goes on where this one stopped")
        raise
    finally:
        scorer.close()
    return path, known.only(wanted)


def _wanted(arguments: argparse.Namespace, source: "Source") -> "list[tuple[tuple[str, ...], GgmlType]]":
    """What is to be measured: which tensors together, at which types, or what their rows allow instead."""
    from quant.choosing.sensitivity import groups
    from quant.recipes import fitting_type
    from runtime.catalogue import parse_type
    from runtime.errors import CatalogueError

    types = [parse_type(text) for text in arguments.types.split(",")]
    if plain := [type_.name for type_ in types if not type_.is_quantized]:
        raise CatalogueError(f"--types {plain[0]} disturbs nothing; name quantized types, such as Q2_K,Q6_K")
    rows = {spec.name: spec.row_length for spec in source.specs}
    found = [
        (names, fitting_type(type_, rows[names[0]]))
        for names in groups(source.specs, arguments.together)
        for type_ in types
    ]
    return list(dict.fromkeys(found))


def _model_file(arguments: argparse.Namespace, source: "Source", line: "ProgressLine") -> tuple[Path, str]:
    """The GGUF file to load and disturb, or its first shard, and its level: BF16 unless --on says another."""
    from runtime import library
    from runtime.catalogue import parse_levels
    from runtime.errors import CatalogueError
    from runtime.levels import EVERY_LEVEL, ORIGINAL
    from tui.choose import DEMO, ensure_levels

    if source.kind == "GGUF" and arguments.on is None:
        return library.first_shard(source.path), library.level_of(source.path) or source.path.stem
    (level,) = parse_levels(arguments.on or ORIGINAL, EVERY_LEVEL)[:1]
    folder = arguments.models or library.models_folder()
    if arguments.model == DEMO:
        ensure_levels(library.shipped_catalogue().model(DEMO), (level,), folder, line.say)
    found = library.find_levels(source.name, folder)
    if level not in found:
        others = ", ".join(found) or "no level"
        raise CatalogueError(
            f"{source.name} is to be measured on, and {others} of it is in {folder}, not {level}; make it with "
            f"`bise quantize {arguments.model} --levels {level}`, name another with --on (Q8_0 is near enough), or "
            "measure nothing with --proxy"
        )
    return found[level], level


def _chunks(
    scorer: "ScoringEngine", texts: "list[CalibrationText]", model: "Model | None", line: "ProgressLine"
) -> "list[NDArray[np.int32]]":
    """Those of each text, (C, n_ctx), conversations as the model's prompt format writes them."""
    from quant.importance.corpus import text_chunks
    from runtime import library
    from runtime.prompts import prompter

    tokenizer = library.tokenizer_file(model) if model is not None else None
    kind = model.prompt if model is not None else "template"
    form = prompter(kind, scorer.vocabulary, template=scorer.chat_template(), tokenizer=tokenizer)
    found = []
    for text in texts:
        chunks, n_left_out = text_chunks(text, scorer.tokenize, form.transcribe, scorer.n_ctx, None)
        if n_left_out:
            line.say(f"note: {text.name}: {n_left_out} conversations that the model's format cannot express")
        found.append(chunks)
    return found


def _setting(
    arguments: argparse.Namespace,
    source: "Source",
    importance: "ImportanceMatrix | None",
    file: Path,
    level: str,
    texts: "list[CalibrationText]",
    line: "ProgressLine",
) -> "Setting":
    """What the measurements will hold for. Reads the model's files for their SHA-256."""
    from hashlib import sha256

    from quant.choosing.disturbance import CONTEXT
    from quant.choosing.sensitivity import Setting
    from quant.quality.results import hash_file
    from runtime import library
    from runtime.errors import UserError
    from runtime.wheel import LLAMA_CPP_COMMIT

    if arguments.chunks < 1:
        raise UserError(f"{arguments.chunks} chunks measure nothing; take 1 or more")
    total = library.file_bytes(file)
    hashes = [
        hash_file(shard, lambda n_bytes: line.show(n_bytes / total, detail=f"checking {file.name}")).sha256
        for shard in library.shards(file)
    ]
    return Setting(
        model=source.name,
        level=level,
        model_sha256=hashes[0] if len(hashes) == 1 else sha256("\n".join(hashes).encode()).hexdigest(),
        text=",".join(text.name for text in texts),
        text_sha256=sha256("\n".join(text.sha256 for text in texts).encode()).hexdigest(),
        context=CONTEXT,
        chunks=arguments.chunks,
        imatrix_sha256=importance.sha256 if importance is not None else "",
        search=arguments.search,
        llama_cpp=LLAMA_CPP_COMMIT,
    )


def _show_trying(line: "ProgressLine", state: "Trying") -> None:
    """How far the distortions of all tensors at all types are."""
    rate = state.done / state.seconds if state.seconds > 0 else 0.0
    left = (state.total - state.done) / rate if rate else None
    line.show(state.done / state.total, f"{rate / 1e6:,.1f} M weights/s", left, f"trying types  {state.tensor}")


def _ranks(proxy: "Losses", losses: "Losses", measured: "Sensitivity") -> str:
    """How far the proxy orders what was measured as measuring does."""
    from quant.choosing.losses import rank_correlations

    first = {m.tensors: m.type for m in reversed(measured.measurements)}
    sums = [[sum(its[name][type_] for name in names) for names, type_ in first.items()] for its in (proxy, losses)]
    spearman, kendall = rank_correlations(*sums)
    what = "tensors" if all(len(names) == 1 for names in first) else "groups of tensors"
    return (
        f"Without measuring (--proxy) the {len(first)} {what} would be ranked alike to {spearman:.2f} (Spearman), "
        f"{kendall:.2f} (Kendall)."
    )
