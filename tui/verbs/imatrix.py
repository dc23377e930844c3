"""Collect an importance matrix: which columns of each weight matter, on some text; for `bise quantize --imatrix`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quant.importance.collection import Progress, Report
    from runtime.library import ModelFile
    from tui.progress import ProgressLine

HELP = "which columns of each weight matter, for better levels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tui.choose import add_model_arguments
    from tui.engine_options import add_engine_arguments

    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="a name or a GGUF (default: demo)")
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text, or .jsonl of conversations (default: calibration, the texts that come with Bise)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the matrix (default: in the user's data folder)")
    parser.add_argument("--chunks", type=int, metavar="N", help="only the first N chunks of each text (default: all)")
    parser.add_argument(
        "--merge", nargs="+", type=Path, default=[], metavar="FILE", help="matrices to add; without --text, these alone"
    )
    parser.add_argument("--output", action="store_true", help="collect for output.weight too")
    parser.add_argument("--force", action="store_true", help="begin anew, and replace the file")
    add_model_arguments(parser, level="the best on disk")
    add_engine_arguments(parser, context=512)


def run(arguments: argparse.Namespace) -> int:
    from quant.importance.collection import Collection, collect
    from quant.importance.corpus import BUNDLED, read_texts
    from runtime import library, native
    from runtime.scoring import ScoringEngine
    from tui.engine_options import engine_settings
    from tui.progress import ProgressLine

    wanted = arguments.text if arguments.text is not None else [] if arguments.merge else [BUNDLED]
    with ProgressLine("importance matrix") as line:
        texts = tuple(text for argument in wanted for text in read_texts(argument))
        file = _model_file(arguments, line) if texts else None
        collection = Collection(
            model=file.load(engine_settings(arguments, file)) if file is not None else None,
            texts=texts,
            out=arguments.out or library.data_folder() / "imatrix" / f"{_name(arguments, file)}-imatrix.gguf",
            merged=tuple(arguments.merge),
            chunk_size=arguments.context,
            max_chunks=arguments.chunks,
            output=arguments.output,
            overwrite=arguments.force,
        )
        try:
            report = collect(
                collection,
                lambda path, settings, observer: ScoringEngine(path, settings, observer=observer),
                f"llama-cpp-python {native.version()}",
                lambda progress: _show(line, progress),
                line.say,
            )
        except KeyboardInterrupt:
            line.say("the same command goes on where this one stopped")
            raise
    _tell(report)
    return 0


def _model_file(arguments: argparse.Namespace, line: "ProgressLine") -> "ModelFile":
    """The GGUF to read with: of a model's levels the one named, or the best that is on disk."""
    from runtime import library
    from runtime.levels import ORIGINAL
    from tui.choose import DEMO, choose

    level = arguments.level or (ORIGINAL if arguments.model == DEMO else None)
    file = choose(arguments.model, level, arguments.models, line.say).file
    if level is None and file.level is not None and not Path(arguments.model).expanduser().is_file():
        found = library.find_levels(library.model_stem(file.path), file.path.parent.parent)
        return choose(arguments.model, list(found)[-1], arguments.models, line.say).file
    return file


def _name(arguments: argparse.Namespace, file: "ModelFile | None") -> str:
    from runtime import library

    if file is None:
        return library.model_stem(arguments.merge[0])
    stem = library.model_stem(file.path)
    return f"{stem}-{file.level}" if file.level else stem


def _show(line: "ProgressLine", progress: "Progress") -> None:
    if progress.activity == "read":
        line.show(
            progress.share,
            f"{progress.tokens_per_second:,.0f} tokens/s",
            progress.seconds_left,
            f"chunk {progress.done_chunks} of {progress.total_chunks}  {progress.text}",
        )
    else:
        doing = {"check": "reading the model for its SHA-256", "load": "loading the model"}[progress.activity]
        line.show(progress.share, "", None, doing)


def _tell(report: "Report") -> None:
    from tui.units import duration

    if report.already_there:
        print(f"already there: {report.out}, {report.n_entries} entries of {report.n_chunks:,} chunks")
        return
    earlier = f", {report.resumed_chunks:,} chunks of them by an earlier run" if report.resumed_chunks else ""
    read = f"; {report.n_tokens:,} tokens read{earlier} in {duration(report.seconds)}" if report.n_tokens else ""
    print(f"written: {report.out}, {report.n_entries} entries of {report.n_chunks:,} chunks{read}")
