"""The command line: parses, hands over to a verb (verbs/), and turns errors into exit codes.

Exit codes: 0 done, 1 a UserError (one line on stderr), 2 wrong usage, 130 interrupted. Heavy imports happen inside the
verbs, so that `bise --help` answers at once.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from runtime import __version__
from runtime.errors import UserError
from tui.verbs import (
    ask,
    chat,
    doctor,
    imatrix,
    models,
    perplexity,
    plan,
    prompt,
    pull,
    quantize,
    recipe,
    tools,
    verify,
    worker,
)

_VERBS = (pull, imatrix, recipe, quantize, verify, perplexity, chat, ask, prompt, tools, worker, models, plan, doctor)
_GUARDED = (imatrix, recipe, perplexity)
"""Have llama.cpp compute, in their own process."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="bise",
        description="Make, judge and use quantized Mistral Large 2 on your own machine.",
        epilog="MODEL is a name that `bise models` lists, a folder of safetensors, or a GGUF file.",
    )
    top.add_argument("--version", action="version", version=f"bise {__version__}")
    verbs = top.add_subparsers(metavar="VERB", required=True)
    for verb in _VERBS:
        name = verb.__name__.rpartition(".")[2]
        sub = verbs.add_parser(name, help=verb.HELP, description=verb.__doc__)
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return top


def program() -> int:
    """`bise`: as `main`, with verbs that compute in this process put in a child, whose death is told in one line."""
    parsed = parser().parse_args()
    if parsed.run in [verb.run for verb in _GUARDED]:
        from tui.guard import guarded

        return guarded(lambda: _run(parsed))
    return _run(parsed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `bise` with these arguments (by default the process's own) in this process, and return the exit code."""
    return _run(parser().parse_args(arguments))


def _run(parsed: argparse.Namespace) -> int:
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except UserError as error:
        print(f"bise: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bise: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(program())
