"""Evaluation texts, and the chunks of tokens that are scored.

Takes the name of a bundled text or the path of a UTF-8 file, gives its content; takes token ids, gives chunks
(C, n_ctx) laid out as llama-perplexity lays them out. Knows nothing of models: who tokenizes is the caller's matter.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError

BUNDLED = ("prose", "code", "definitions")
"""Texts held out of the demo model's training, in quant/demo/eval."""

_FOLDER = Path(__file__).resolve().parent.parent / "demo" / "eval"


class TextError(UserError):
    """An evaluation text that is missing, not UTF-8, or too short to score."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text to score. One trailing newline of its file is dropped, as llama-perplexity does."""

    name: str
    content: str
    n_bytes: int
    """Of the file."""
    sha256: str
    """Of the file."""


def read_text(argument: str) -> Text:
    """A bundled text by its name, any other by its path; its name is then the file's, without the ending.

    Raises TextError for a file that is missing, unreadable or not UTF-8.
    """
    path = _FOLDER / f"{argument}.txt" if argument in BUNDLED else Path(argument).expanduser()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        known = ", ".join(BUNDLED)
        raise TextError(f"{argument}: no such text; name one that comes with Bise ({known}) or a UTF-8 file") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}: not UTF-8: byte {error.start} of {len(data)} is 0x{data[error.start]:02x}; convert the file first"
        ) from None
    return Text(path.stem, content.removesuffix("\n"), len(data), hashlib.sha256(data).hexdigest())


def split_chunks(tokens: NDArray[np.int32], n_ctx: int, name: str, max_chunks: int | None = None) -> NDArray[np.int32]:
    """Token ids (N,) → whole chunks (C, n_ctx), the first `max_chunks` of them; the rest of the text is not scored.

    Like llama-perplexity it takes at least two chunks' worth of tokens (llama.cpp 0c1e57098,
    tools/perplexity/perplexity.cpp:477 and :490). Raises TextError for less, with the text's `name`.
    """
    if len(tokens) < 2 * n_ctx:
        raise TextError(
            f"{name} has {len(tokens)} tokens and a context of {n_ctx} needs at least {2 * n_ctx}; take a longer text "
            "or a smaller context"
        )
    n_chunks = len(tokens) // n_ctx
    if max_chunks is not None:
        n_chunks = min(n_chunks, max_chunks)
    return tokens[: n_chunks * n_ctx].reshape(n_chunks, n_ctx)


def model_input(chunks: NDArray[np.int32], bos: int, adds_bos: bool) -> NDArray[np.int32]:
    """What the model reads, (C, n_ctx): each chunk's first token gives way to BOS if the model wants one.

    That token is never scored (llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp:566).
    """
    if not adds_bos:
        return chunks
    read = chunks.copy()
    read[:, 0] = bos
    return read


def first_scored(n_ctx: int) -> int:
    """The first position of a chunk whose logits count: half of it is context only.

    Positions first … n_ctx−2 predict tokens first+1 … n_ctx−1, so a chunk scores n_ctx − 1 − first tokens.
    """
    return n_ctx // 2


def n_scored(n_ctx: int) -> int:
    """Tokens scored in one chunk: 255 at 512."""
    return n_ctx - 1 - first_scored(n_ctx)
