"""Ask one question and print the answer as it comes. Text on stdin is added to the question, so pipes work."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tui import each, tool_use
from tui.choose import add_model_arguments
from tui.engine_options import add_engine_arguments, add_sampling_arguments

if TYPE_CHECKING:
    from runtime.events import Finished, Likelihood, Notice, Piece, ReplyEvent, Silent
    from runtime.grammar import Grammar
    from runtime.messages import Tool, ToolChoice
    from runtime.tool_loop import Called

HELP = "one answer on stdout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="*", metavar="QUESTION", help="left out, it is read from stdin")
    parser.add_argument("--model", metavar="MODEL", help="default: the one used last, else SmolLM2, else the demo")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--stats", action="store_true", help="tokens and speed on stderr at the end")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--schema", type=Path, metavar="FILE", help="answer in JSON that is valid under this JSON schema")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="answer in the form of this GBNF grammar")
    parser.add_argument("--json", action="store_true", help="the answer and what is known of it, as JSON at the end")
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="log-probabilities of each token and of the K likeliest; needs --json"
    )
    parser.add_argument("--show-sampling", action="store_true", help="how tokens were drawn, with the seed, on stderr")
    add_model_arguments(parser)
    add_engine_arguments(parser)
    add_sampling_arguments(parser)
    tool_use.add_arguments(parser)
    each.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from runtime.errors import EngineError
    from runtime.events import Finished, LoadProgress, Notice, Piece, Silent
    from runtime.messages import Message
    from runtime.session import Session
    from runtime.tool_loop import Called, Calling
    from tui.choose import choose, remember
    from tui.engine_options import engine_settings, presets
    from tui.progress import ProgressLine
    from tui.units import gigabytes
    from tui.widgets.printable import printable

    each.check(arguments)
    question = _question(arguments.question) if arguments.each is None else ""
    if arguments.each is None and not question.strip():
        raise EngineError('nothing to ask; write it behind `bise ask`, as in: bise ask "Why is the sky blue?"')
    if arguments.logprobs is not None and not arguments.json:
        raise EngineError("--logprobs are told as JSON; add --json")
    if arguments.logprobs is not None and arguments.logprobs < 0:
        raise EngineError(f"--logprobs {arguments.logprobs} is not a number of tokens")
    grammar = _grammar(arguments)
    with ProgressLine("loading" if arguments.each is None else "answering") as line:
        choice = choose(arguments.model, arguments.level, arguments.models, line.say)
        if choice.notice:
            line.say(choice.notice)
        sampling = presets(arguments, choice.file)[arguments.preset]
        load = choice.file.load(engine_settings(arguments, choice.file))
        if arguments.each is not None:
            return each.run(arguments, load, sampling, grammar, line)
        toolbox = tool_use.opened(arguments, line.say)
        session = Session(load)
        try:
            for load_event in session.load():
                if isinstance(load_event, LoadProgress):
                    rate = load_event.bytes_per_second
                    speed = f"{gigabytes(rate)}/s" if rate is not None else ""
                    line.show(load_event.fraction, speed, load_event.seconds_left)
                elif isinstance(load_event, Notice | Silent):
                    line.say(_said(load_event))
        except BaseException:
            session.close()
            tool_use.close(toolbox)
            raise
    remember(choice)
    messages = [Message("user", question)]
    if arguments.system:
        messages.insert(0, Message("system", arguments.system))
    show = printable if sys.stdout.isatty() else str  # an answer must not steer the terminal; a pipe gets every byte
    finished = None
    pieces: list[Piece] = []
    done: list[Called] = []

    def reply(messages: "Sequence[Message]", tools: "Sequence[Tool]", choice: "ToolChoice") -> "Iterator[ReplyEvent]":
        return session.reply(
            messages, sampling, logprobs=arguments.logprobs, grammar=grammar, tools=tools, tool_choice=choice
        )

    try:
        for event in tool_use.events(arguments, toolbox, reply, messages):
            if isinstance(event, Piece):
                pieces.append(event)
                if not arguments.json:
                    sys.stdout.write(show(event.text))
                    sys.stdout.flush()
            elif isinstance(event, Finished):
                finished = event
            elif isinstance(event, Notice | Silent):
                print(_said(event), file=sys.stderr)
            elif isinstance(event, Calling):
                if pieces and not arguments.json:
                    sys.stdout.write("\n")
                    sys.stdout.flush()
                pieces.clear()
                for call in event.calls:
                    print(f"bise: calls {tool_use.described(call)}", file=sys.stderr)
            elif isinstance(event, Called):
                done.append(event)
                print(f"bise: {tool_use.outcome(event.call, event.result)}", file=sys.stderr)
        if arguments.json and finished is not None:
            sys.stdout.write(_json(pieces, finished, done))
        sys.stdout.write("\n")
        sys.stdout.flush()
    except KeyboardInterrupt:
        print()
        raise
    finally:
        session.close()
        tool_use.close(toolbox)
    if finished is not None:
        _report(finished, stats=arguments.stats)
        if arguments.show_sampling:
            print(f"sampling: {finished.sampling}", file=sys.stderr)
        if grammar is not None and finished.reason != "end":
            raise EngineError(
                f"the answer was cut off after {finished.answer_tokens} tokens, before its form was complete; raise "
                "--max-tokens or --context, or bound the form (in a schema: maxLength, maxItems)"
            )
    return 0


def _question(words: list[str]) -> str:
    """The words, and what stdin holds where it is a pipe or a file."""
    parts = [" ".join(words)] if words else []
    if not sys.stdin.isatty() and (not words or _has_input()):
        parts.append(sys.stdin.buffer.read().decode("utf-8", "replace"))
    return "\n\n".join(part for part in parts if part.strip())


def _has_input() -> bool:
    """Whether stdin is a pipe or a file: a service's closed or inherited stdin must not be waited for."""
    import os
    import stat

    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _said(event: "Notice | Silent") -> str:
    from runtime.events import Notice

    if isinstance(event, Notice):
        return f"bise: {event.text}"
    return f"bise: no sign of the engine for {event.seconds:.0f} s; Ctrl-C ends it"


def _grammar(arguments: argparse.Namespace) -> "Grammar | None":
    """What `--schema` or `--grammar` name. Raises GrammarError with the file and the place in it."""
    import json

    from runtime.errors import GrammarError
    from runtime.grammar import Grammar
    from runtime.json_schema import grammar_of

    path: Path | None = arguments.schema or arguments.grammar
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        return grammar_of(json.loads(text)) if arguments.schema else Grammar(text)
    except OSError as error:
        raise GrammarError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise GrammarError(f"{path}: not text in UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise GrammarError(f"{path}: not valid JSON: {error}") from None
    except GrammarError as error:
        raise GrammarError(f"{path}: {error}") from None


def _report(finished: "Finished", *, stats: bool) -> None:
    if finished.reason == "context":
        print(f"bise: stopped, the context of {finished.n_ctx} tokens is full; raise --context", file=sys.stderr)
    if stats:
        print(", ".join(_figures(finished)), file=sys.stderr)


def _figures(finished: "Finished") -> list[str]:
    from tui.units import gib

    figures = [
        f"{finished.prompt_tokens} prompt tokens ({finished.reused_tokens} reused), "
        f"{finished.prompt_tokens_per_second:.1f} tokens/s",
        f"{finished.answer_tokens} answer tokens, {finished.tokens_per_second:.1f} tokens/s",
        f"context {finished.context_used} of {finished.n_ctx}",
    ]
    if finished.drafted_tokens:
        figures.insert(2, f"{finished.accepted_tokens} of {finished.drafted_tokens} guessed tokens right")
    if finished.first_token_seconds is not None:
        figures.insert(1, f"first token after {finished.first_token_seconds:.2f} s")
    if finished.memory_bytes is not None:
        figures.append(f"memory {gib(finished.memory_bytes)}")
    if finished.gpu_bytes is not None:
        figures.append(f"in use on GPUs {gib(finished.gpu_bytes)}")
    return figures


def _json(pieces: "list[Piece]", finished: "Finished", done: "list[Called]") -> str:
    """The answer as one JSON object; `tokens` where log-probabilities were asked for, `calls` where there were some."""
    import json

    drawn = [token for piece in pieces for token in piece.drawn]
    tokens = [{**_likelihood(d.token), "likeliest": [_likelihood(other) for other in d.likeliest]} for d in drawn]
    whole = {
        "answer": "".join(piece.text for piece in pieces),
        "reason": finished.reason,
        "prompt_tokens": finished.prompt_tokens,
        "reused_tokens": finished.reused_tokens,
        "answer_tokens": finished.answer_tokens,
        "prompt_seconds": finished.prompt_seconds,
        "answer_seconds": finished.answer_seconds,
        "first_token_seconds": finished.first_token_seconds,
        "memory_bytes": finished.memory_bytes,
        "gpu_bytes": finished.gpu_bytes,
        "drafted_tokens": finished.drafted_tokens,
        "accepted_tokens": finished.accepted_tokens,
        "sampling": finished.sampling,
        **({"tokens": tokens} if drawn else {}),
        **({"calls": list(map(tool_use.as_json, done))} if done else {}),
    }
    return json.dumps(whole)


def _likelihood(token: "Likelihood") -> dict[str, object]:
    """JSON has no infinity: what cannot be is -9999, as in OpenAI's API."""
    text = token.text.decode("utf-8", "replace")
    return {"id": token.id, "text": text, "bytes": list(token.text), "logprob": max(token.logprob, -9999.0)}
