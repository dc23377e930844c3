"""Command-line options that say how a model is loaded and how tokens are drawn, and the values they make."""

import argparse
from dataclasses import replace
from math import inf
from pathlib import Path

from runtime import library
from runtime.catalogue import parse_bytes
from runtime.errors import EngineError
from runtime.events import EngineSettings
from runtime.library import ModelFile
from runtime.sampling import NAMES, WHOLE, Sampling

DEFAULT_PRESET = "factual"

_MOST_BRANCHES = 256  # llama.cpp's LLAMA_MAX_SEQ
_DRAFT_OFF, _DRAFT_AUTO, _DRAFT_LOOKUP = "off", "auto", "lookup"
_DRAFTS = (_DRAFT_OFF, _DRAFT_AUTO, _DRAFT_LOOKUP)

_SETTINGS = {
    "temperature": "0 takes the likeliest token",
    "dynamic_temperature": "move it up or down by as much, after the entropy",
    "dynamic_exponent": "of the entropy (default: 1)",
    "top_k": "keep the N likeliest tokens",
    "top_p": "keep the likeliest tokens of together this probability",
    "min_p": "keep tokens at least this likely, relative to the likeliest",
    "typical_p": "keep the most typical tokens of together this probability",
    "top_n_sigma": "keep tokens within N standard deviations of the highest logit",
    "xtc_probability": "how often to leave out all tokens above the threshold but the last",
    "xtc_threshold": "(default: 0.1)",
    "dry_multiplier": "penalty against going on a repetition",
    "dry_base": "what it grows by with each repeated token (default: 1.75)",
    "dry_allowed_length": "repetitions up to this length are free (default: 2)",
    "dry_window": "tokens searched for repetitions, -1 for the whole context (default: 64)",
    "repeat_penalty": "divides the logits of tokens that were there",
    "frequency_penalty": "subtracted for each time a token was there",
    "presence_penalty": "subtracted from every token that was there",
    "penalty_window": "last tokens these three see, -1 for the whole context (default: 64)",
    "mirostat": "1 or 2: hold the surprise, in place of cuts and penalties",
    "mirostat_tau": "the surprise to hold, in bits (default: 5)",
    "mirostat_eta": "how fast it learns (default: 0.1)",
    "seed": "a fixed seed repeats the answer",
    "max_tokens": "longest answer",
}
"""The settings that are one number → what `--help` says of them."""


def add_engine_arguments(parser: argparse.ArgumentParser, *, context: int | None = None) -> None:
    """`context` is for verbs that read in chunks: the tokens of one where nothing else is said."""
    group = parser.add_argument_group("engine")
    default = "default: the model's, at most 8192" if context is None else f"length of a chunk (default: {context})"
    group.add_argument("--context", type=int, default=context, metavar="TOKENS", help=default)
    group.add_argument(
        "--kv", default="f16", metavar="TYPE", help="KV cache type: f16, bf16, q8_0 or q4_0 (default: f16)"
    )
    group.add_argument("--gpu-layers", type=int, default=-1, metavar="N", help="layers on the GPUs (default: all)")
    group.add_argument(
        "--split-mode",
        default="layer",
        choices=("layer", "tensor"),
        help="over several GPUs: whole layers (default), or a part of every tensor, which is experimental",
    )
    group.add_argument("--tensor-split", metavar="A,B,…", help="shares of the GPUs (default: by free memory and bytes)")
    group.add_argument("--main-gpu", type=int, metavar="N", help="the whole model on this GPU, counted from 0")
    group.add_argument("--ubatch", type=int, default=512, metavar="TOKENS", help="computed at once (default: 512)")
    group.add_argument("--threads", type=int, metavar="N", help="default: every core, or 1 if all layers are on GPUs")
    if context is None:
        group.add_argument(
            "--keep-kv",
            metavar="SIZE",
            help="keep what was read of conversations on the disk, at most so much, such as 20GiB (default: nothing)",
        )
        group.add_argument(
            "--branches",
            type=int,
            default=4,
            metavar="N",
            help="conversations, or branches of one, whose KV caches are kept: one in its place, the others in the "
            "host's memory (default: 4)",
        )
        group.add_argument(
            "--draft",
            default=_DRAFT_AUTO,
            metavar="HOW",
            help="guess next tokens and compute several at once: by what followed before in the text, where the "
            "temperature is above 0 (auto, the default) or always (lookup); besides by a small MODEL of the same "
            "vocabulary; or not (off); with --seed none are",
        )
    group.add_argument(
        "--rpc",
        default="",
        metavar="HOST:PORT,…",
        help="llama.cpp RPC servers to use as devices; the protocol has no authentication",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--preset", default=DEFAULT_PRESET, help="code, factual or creative (default: factual)")
    for name, help_ in _SETTINGS.items():
        type_ = int if name in WHOLE else float
        group.add_argument(f"--{name.replace('_', '-')}", type=type_, metavar="N", help=help_)
    group.add_argument(
        "--dry-breaker",
        dest="dry_breakers",
        action="append",
        metavar="TEXT",
        help='no repetition reaches across it; may be given again (default: newline : " *)',
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="ID=BIAS",
        help="added to a token's logit, -inf forbids it; may be given again",
    )


def engine_settings(arguments: argparse.Namespace, file: ModelFile | None) -> EngineSettings:
    """`file` says how much context to begin with, where the verb has no default of its own.

    Raises EngineError for a setting outside its range, CatalogueError for a size or draft model that is none.
    """
    n_ctx = file.context if file is not None and arguments.context is None else arguments.context
    if n_ctx < 1:
        raise EngineError(f"--context {n_ctx} is not a number of tokens")
    if arguments.threads is not None and arguments.threads < 1:
        raise EngineError(f"--threads {arguments.threads} is not a number of threads")
    if arguments.ubatch < 1:
        raise EngineError(f"--ubatch {arguments.ubatch} is not a number of tokens; 512 is usual")
    n_branches = getattr(arguments, "branches", 1)
    if not 1 <= n_branches <= _MOST_BRANCHES:
        raise EngineError(f"--branches {n_branches} is not a number from 1 to {_MOST_BRANCHES}")
    draft = getattr(arguments, "draft", _DRAFT_OFF)
    return EngineSettings(
        n_ctx=n_ctx,
        n_batch=max(2048, arguments.ubatch),
        n_ubatch=arguments.ubatch,
        split_mode=arguments.split_mode,
        tensor_split=_shares(arguments.tensor_split),
        main_gpu=arguments.main_gpu,
        kv_type=arguments.kv,
        n_gpu_layers=arguments.gpu_layers,
        n_threads=arguments.threads,
        rpc_servers=tuple(server for server in arguments.rpc.split(",") if server),
        drafts="off" if draft == _DRAFT_OFF else "auto" if draft == _DRAFT_AUTO else "always",
        n_branches=n_branches,
        draft_model=_model_file(draft, arguments.models) if draft not in _DRAFTS else None,
        kept_kv_bytes=parse_bytes(kept) if (kept := getattr(arguments, "keep_kv", None)) else 0,
    )


def _model_file(model: str, models: Path | None) -> Path:
    """The file of a model as `--model` names it. Raises CatalogueError."""
    return library.find_model_file(model, None, library.shipped_catalogue(), models or library.models_folder()).path


def _shares(text: str | None) -> tuple[float, ...] | None:
    """`1,3` → shares. Raises EngineError."""
    if text is None:
        return None
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share < inf for share in shares):
        raise EngineError(f"--tensor-split {text} is not a list of shares; write one for each GPU, such as 1,3")
    return shares


def presets(arguments: argparse.Namespace, file: ModelFile) -> dict[str, Sampling]:
    """The model's presets with the command line's own settings on top of each. Raises EngineError."""
    known = file.sampling
    if arguments.preset not in known:
        raise EngineError(f"no sampling preset is called {arguments.preset!r}; known: {', '.join(known)}")
    given = {name: value for name in NAMES if (value := getattr(arguments, name)) is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    try:
        return {name: replace(sampling, **given) for name, sampling in known.items()}
    except ValueError as error:
        raise EngineError(f"{error}") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, such as 1234=-5 or 1234=-inf") from None
