"""Mistral's tokenizers, by mistral-common: opened for a prompt format, and compared with a GGUF's vocabulary.

A tokenizer is a SentencePiece file (`tokenizer.model`, the formats v1, v3 and v7) or a tekken file (`tekken.json`: the
formats v3-tekken, v7-tekken, v11 and v13), byte-pair encoding behind a list of control tokens. mistral-common brings
those of v1, v3, v3-tekken and v7; the others come with their models. Importing this module takes half a second.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mistral_common.tokens.tokenizers.base import InstructTokenizer, SpecialTokenPolicy, Tokenized, TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerV1,
    InstructTokenizerV3,
    InstructTokenizerV7,
    InstructTokenizerV11,
    InstructTokenizerV13,
)
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from runtime.errors import ModelFileError
from runtime.prompts import Vocabulary

Pieces: TypeAlias = SentencePieceTokenizer | Tekkenizer
Instruct: TypeAlias = InstructTokenizer[Any, Any, Tokenized]

_V1 = ("<s>", "</s>")
_V3 = (
    *(*_V1, "[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
_V7 = (*_V3, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
_V11 = (*_V7, "[ARGS]", "[CALL_ID]")

_CONTROLS = {
    "mistral-v1": _V1,
    "mistral-v3": _V3,
    "mistral-v3-tekken": _V3,
    "mistral-v7": _V7,
    "mistral-v7-tekken": _V7,
    "mistral-v11": _V11,
    "mistral-v13": _V11,
}
"""The control tokens that each format's files must have."""

_TEKKEN = ("mistral-v3-tekken", "mistral-v7-tekken", "mistral-v11", "mistral-v13")

_INSTRUCT = {
    TokenizerVersion.v1: InstructTokenizerV1,
    TokenizerVersion.v3: InstructTokenizerV3,
    TokenizerVersion.v7: InstructTokenizerV7,
    TokenizerVersion.v11: InstructTokenizerV11,
    TokenizerVersion.v13: InstructTokenizerV13,
}


@dataclass(frozen=True, slots=True)
class MistralVocabulary:
    """A format's tokenizer, its tokens told as a GGUF's are (prompts.Vocabulary)."""

    version: TokenizerVersion
    instruct: Instruct
    pieces: Pieces
    name: str
    """Of the file, for messages."""
    adds_bos: bool = True

    @property
    def n_tokens(self) -> int:
        return self.pieces.n_words

    @property
    def bos(self) -> int:
        return self.pieces.bos_id

    @property
    def eos(self) -> int:
        return self.pieces.eos_id

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        if special:
            raise NotImplementedError("Mistral's tokenizers read no control tokens out of text")
        return self.pieces.encode(text, bos=bos, eos=False)

    def text(self, token: int) -> str:
        """SentencePiece's own writing, `▁` for a space and `<0x0A>` for a byte; of tekken GPT-2's, `Ġ` for a space."""
        if isinstance(self.pieces, SentencePieceTokenizer) or self.is_control(token):
            return self.pieces.id_to_piece(token)
        return "".join(_GPT2[byte] for byte in self.piece(token))

    def piece(self, token: int) -> bytes:
        if self.is_control(token):
            return b""
        if isinstance(self.pieces, Tekkenizer):
            return self.pieces.id_to_byte_piece(token, SpecialTokenPolicy.IGNORE)
        text = self.pieces.id_to_piece(token)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()

    def is_control(self, token: int) -> bool:
        return self.pieces.is_special(token)

    def is_user_defined(self, token: int) -> bool:
        return not 0 <= token < self.n_tokens  # none of them is


def opened(kind: str, path: Path | None) -> MistralVocabulary:
    """The tokenizer of a format: the file at `path`, of any name, or mistral-common's own.

    Raises ModelFileError for a file that is not the format's tokenizer, and where a format needs one and has none.
    """
    version = TokenizerVersion(kind.removeprefix("mistral-").removesuffix("-tekken"))
    if path is not None:
        pieces, name = _read(kind, version, path), str(path)
    else:
        pieces, name = _packaged(kind), f"mistral-common's tokenizer for {kind}"
    # SentencePiece gives `<unk>` for a piece it does not have, without a word: such a file is refused here.
    missing = [control for control in _CONTROLS[kind] if not pieces.is_special(control)]
    if missing:
        alike = [other for other in _CONTROLS if (other in _TEKKEN) == (kind in _TEKKEN)]
        fits = [other for other in alike if all(map(pieces.is_special, _CONTROLS[other]))]
        raise ModelFileError(
            f"{name} has no control token {missing[0]}, which {kind} writes; "
            f"take {' or '.join(fits) or 'template'} as `prompt` in models.yaml"
        )
    return MistralVocabulary(version, _INSTRUCT[version](pieces), pieces, name)


def check_same(ours: MistralVocabulary, vocabulary: Vocabulary) -> None:
    """Raise ModelFileError unless every id means the same in the tokenizer and in the GGUF.

    Control tokens that no format writes may differ in name and type: Mistral gave reserved ids such as `[control_8]`
    new names from release to release.
    """
    advice = "set `tokenizer` or `prompt` in models.yaml to the model's own"
    if ours.n_tokens != vocabulary.n_tokens:
        raise ModelFileError(f"{ours.name} has {ours.n_tokens} tokens, the GGUF {vocabulary.n_tokens}; {advice}")
    for token in range(ours.n_tokens):
        own, theirs = ours.text(token), vocabulary.text(token)
        control = ours.is_control(token), vocabulary.is_control(token)
        if own == theirs and control[0] == control[1]:
            continue
        if any(control) and own not in _V11 and theirs not in _V11:
            continue
        kinds = ["control token" if is_control else "text" for is_control in control]
        raise ModelFileError(
            f"token {token} is {own!r} ({kinds[0]}) in {ours.name}, but {theirs!r} ({kinds[1]}) in the GGUF; {advice}"
        )


def _packaged(kind: str) -> Pieces:
    match kind:
        case "mistral-v1":
            found = MistralTokenizer.v1()
        case "mistral-v3":
            found = MistralTokenizer.v3()
        case "mistral-v3-tekken":
            found = MistralTokenizer.v3(is_tekken=True)
        case "mistral-v7":
            found = MistralTokenizer.v7()
        case _:
            raise ModelFileError(f"{kind} needs the model's own tekken.json; name it as `tokenizer` in models.yaml")
    pieces = found.instruct_tokenizer.tokenizer
    assert isinstance(pieces, SentencePieceTokenizer | Tekkenizer)
    return pieces


def _read(kind: str, version: TokenizerVersion, path: Path) -> Pieces:
    """The tokenizer in a file. mistral-common would guess from its name, `.model` as v1."""
    if not path.is_file():
        raise ModelFileError(f"{path}: no such tokenizer file; correct `tokenizer` in models.yaml or leave it out")
    wanted = "a tekken.json" if kind in _TEKKEN else "a tokenizer.model of SentencePiece"
    try:
        if kind not in _TEKKEN:
            return SentencePieceTokenizer(path, tokenizer_version=version)
        pieces = Tekkenizer.from_file(path)
    except Exception as error:  # it is read without checks: a file can raise anything
        raise ModelFileError(
            f"{path}: not {wanted}, as {kind} wants it; name one, or another `prompt` in models.yaml"
        ) from error
    if pieces.version != version:
        suffix = "-tekken" if pieces.version in (TokenizerVersion.v3, TokenizerVersion.v7) else ""
        raise ModelFileError(
            f"{path}: a tokenizer of {pieces.version.value}, not {version.value}; "
            f"take mistral-{pieces.version.value}{suffix} as `prompt` in models.yaml"
        )
    return pieces


def _gpt2() -> list[str]:
    """Of each byte the character that GPT-2 writes for it: its own where it can be seen, else one from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


_GPT2 = _gpt2()
