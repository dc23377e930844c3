"""Show what a model would be given for a conversation: the text with its control tokens, or the token ids.

The file has messages as OpenAI's chat API has them: a list, or an object with "messages" and "tools". A last message
of the assistant's is one that the model goes on with. For Mistral Large 2 no weights are needed."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.catalogue import Catalogue, Model
    from runtime.prompts import Prompter, Vocabulary

HELP = "what a model would be given for a conversation"

_CONTROL_STYLE = "\x1b[36m", "\x1b[39m"  # cyan, and the terminal's own colour


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tui.choose import add_model_arguments

    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--messages", metavar="FILE", required=True, help="JSON, `-` for stdin")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--ids", action="store_true", help="the token ids on one line")
    form.add_argument("--json", action="store_true", help="each token: id, text, and whether it is a control token")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    import json

    from runtime.openai_form import conversation
    from tui.widgets.printable import counted, printable

    messages, tools = conversation(_read(arguments.messages))
    with _form(arguments) as (form, vocabulary):  # both are no more behind it
        ids = form.encode(messages, tools)
        told = [(token, _text(token, vocabulary), vocabulary.is_control(token)) for token in ids]
        runs = _runs(ids, vocabulary)
        controls = {vocabulary.text(token) for token in range(vocabulary.n_tokens) if vocabulary.is_control(token)}
        marks_turns_by_text = form.marks_turns_by_text
    if arguments.ids:
        print(*ids)
    elif arguments.json:
        print(json.dumps([{"id": id_, "text": text, "control": control} for id_, text, control in told]))
    else:
        terminal = sys.stdout.isatty()
        begin, end = _CONTROL_STYLE if terminal and not os.environ.get("NO_COLOR") else ("", "")
        for text, control in runs:
            shown = printable(text) if terminal else text
            sys.stdout.write(f"{begin}{shown}{end}" if control else shown)
        sys.stdout.write("\n")
    sys.stdout.flush()
    for text in sorted(text for text in controls if any(text in run for run, control in runs if not control)):
        _say(f"{printable(text)} also stands in it as plain text, which is no control token")
    if marks_turns_by_text:
        _say("this format tells turns apart by plain text: a message can pretend to be several")
    print(counted(len(ids), "token"), file=sys.stderr)
    return 0


def _read(file: str) -> Any:
    """The JSON of a file, or of stdin. Raises ConversationError."""
    import json

    from runtime.openai_form import ConversationError

    name = "stdin" if file == "-" else file
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return json.loads(raw.decode("utf-8-sig"))
    except OSError as error:
        raise ConversationError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConversationError(f"{name}: not text in UTF-8") from None
    except RecursionError:
        raise ConversationError(f"{name}: nested too deeply") from None
    except ValueError as error:
        raise ConversationError(f"{name}: not valid JSON: {error}") from None


@contextmanager
def _form(arguments: argparse.Namespace) -> "Iterator[tuple[Prompter, Vocabulary]]":
    """The model's prompt format and its vocabulary."""
    from runtime import library, native
    from runtime.events import EngineSettings
    from runtime.prompts import packaged_vocabulary, prompter
    from tui.choose import choose

    catalogue = library.shipped_catalogue()
    model = catalogue.models.get(arguments.model)
    folder = arguments.models or library.models_folder()
    if model is not None and arguments.level is None and _needs_no_file(model, folder, catalogue):
        tokenizer = library.tokenizer_file(model)
        vocabulary = packaged_vocabulary(model.prompt, tokenizer)
        whose = str(tokenizer) if tokenizer is not None else f"mistral-common's own for {model.prompt}"
        _say(f"no level of {model.key} is in {folder}; the vocabulary is {whose}")
        yield prompter(model.prompt, vocabulary, template=None, tokenizer=tokenizer), vocabulary
        return
    load = choose(arguments.model, arguments.level, arguments.models, _say).file.load(EngineSettings(n_ctx=64))
    opened = native.Model(load.path, load.settings, vocab_only=True)
    try:
        template = opened.chat_template()
        yield prompter(load.prompt, opened.vocabulary, template=template, tokenizer=load.tokenizer), opened.vocabulary
    finally:
        opened.close()


def _needs_no_file(model: "Model", folder: Path, catalogue: "Catalogue") -> bool:
    """Whether the model's prompt can be told without its GGUF, and there is none to compare with."""
    from runtime import library

    made = library.packaged_file(model) or library.find_levels(model.name, folder, catalogue.recipes)
    return model.prompt != "template" and not made


def _runs(ids: Sequence[int], vocabulary: "Vocabulary") -> list[tuple[str, bool]]:
    """The prompt cut into control tokens and the text between them: text, whether it is a control token."""
    runs: list[tuple[str, bool]] = []
    pieces: list[bytes] = []
    for token in ids:
        if not vocabulary.is_control(token):
            pieces.append(vocabulary.piece(token))  # a character may span tokens
            continue
        runs.append((b"".join(pieces).decode("utf-8", "replace"), False))
        runs.append((vocabulary.text(token), True))
        pieces.clear()
    runs.append((b"".join(pieces).decode("utf-8", "replace"), False))
    return [(text, control) for text, control in runs if text]


def _text(token: int, vocabulary: "Vocabulary") -> str:
    return (
        vocabulary.text(token) if vocabulary.is_control(token) else vocabulary.piece(token).decode("utf-8", "replace")
    )


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
