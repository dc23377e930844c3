"""Command-line options that say how a model is loaded and how tokens are drawn, and the values they make."""

import argparse
from dataclasses import replace

from runtime.errors import EngineError
from runtime.events import EngineSettings, Sampling
from runtime.library import ModelFile

DEFAULT_PRESET = "factual"


def add_engine_arguments(parser: argparse.ArgumentParser, *, context: int | None = None) -> None:
    """`context` is for verbs that read in chunks: the tokens of one where nothing else is said."""
    group = parser.add_argument_group("engine")
    default = "default: the model's, at most 8192" if context is None else f"length of a chunk (default: {context})"
    group.add_argument("--context", type=int, default=context, metavar="TOKENS", help=default)
    group.add_argument(
        "--kv", default="f16", metavar="TYPE", help="KV cache type: f16, bf16, q8_0 or q4_0 (default: f16)"
    )
    group.add_argument("--gpu-layers", type=int, default=-1, metavar="N", help="layers on the GPUs (default: all)")
    group.add_argument("--threads", type=int, metavar="N", help="default: every core")
    group.add_argument(
        "--rpc",
        default="",
        metavar="HOST:PORT,…",
        help="llama.cpp RPC servers to use as devices; the protocol has no authentication",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--preset", default=DEFAULT_PRESET, help="code, factual or creative (default: factual)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repeat-penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int, metavar="N", help="a fixed seed repeats the answer")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")


def engine_settings(arguments: argparse.Namespace, file: ModelFile) -> EngineSettings:
    """Raises EngineError for a setting outside its range."""
    n_ctx = file.context if arguments.context is None else arguments.context
    if n_ctx < 1:
        raise EngineError(f"--context {n_ctx} is not a number of tokens")
    if arguments.threads is not None and arguments.threads < 1:
        raise EngineError(f"--threads {arguments.threads} is not a number of threads")
    return EngineSettings(
        n_ctx=n_ctx,
        kv_type=arguments.kv,
        n_gpu_layers=arguments.gpu_layers,
        n_threads=arguments.threads,
        rpc_servers=tuple(server for server in arguments.rpc.split(",") if server),
    )


def presets(arguments: argparse.Namespace, file: ModelFile) -> dict[str, Sampling]:
    """The model's presets with the command line's own settings on top of each. Raises EngineError."""
    known = file.sampling
    if arguments.preset not in known:
        raise EngineError(f"no sampling preset is called {arguments.preset!r}; known: {', '.join(known)}")
    given = {
        name: getattr(arguments, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "max_tokens")
        if getattr(arguments, name) is not None
    }
    try:
        return {name: replace(sampling, **given) for name, sampling in known.items()}
    except ValueError as error:
        raise EngineError(f"{error}") from None
