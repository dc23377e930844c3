"""A grammar at work on a vocabulary: which tokens go on with the text so far.

By llama.cpp's grammar sampler, and stricter where it lets through what is no text: bytes that are no UTF-8 (it reads a
lone byte F9 as the beginning of a character) and control tokens that would vanish from the answer.
"""

import codecs
import ctypes
import re
from typing import Any

import numpy as np

from runtime.errors import EngineError
from runtime.grammar import Grammar
from runtime.native import Vocabulary, lib

_SURROGATES = re.compile(rb"\xed[\xa0-\xbf]")


class NativeGrammar:
    """What of a grammar is still to come. Close it before its model. Raises EngineError where llama.cpp refuses it."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        self._vocabulary, self._names_tokens = vocabulary, grammar.names_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")  # a character may span tokens
        self._pointer: Any = lib.llama_sampler_init_grammar(vocabulary.pointer, grammar.text.encode(), b"root")
        if not self._pointer:  # in use, NULL would be a segmentation fault
            raise EngineError("llama.cpp refuses the grammar: it names a token that the model has not")

    def mask(self, candidates: Any) -> None:
        """Give a llama_token_data_array's tokens that llama.cpp refuses the logit -inf."""
        lib.llama_sampler_apply(self._pointer, ctypes.byref(candidates))

    def allows(self, token: int) -> bool:
        """Whether llama.cpp lets the token go on."""
        one = lib.llama_token_data(token, 0.0, 0.0)
        self.mask(lib.llama_token_data_array(ctypes.pointer(one), 1, -1, False))
        return bool(np.isfinite(one.logit))

    def is_text(self, token: int) -> bool:
        """Whether an allowed token adds text to the answer, or ends it, or is one that the grammar names.

        Such a one only where the grammar cannot mean the text that spells it, which llama.cpp does not tell apart.
        """
        if self._vocabulary.ends_answer(token):
            return True
        piece, state = self._vocabulary.piece(token), self._utf8.getstate()
        try:
            self._utf8.decode(piece)
            begun = self._utf8.getstate()[0]
        except UnicodeDecodeError:
            return False
        finally:
            self._utf8.setstate(state)
        if _SURROGATES.match(begun):  # Python would see it at the next byte, when nothing can go on any more
            return False
        return piece != b"" or (self._names_tokens and not self._may_spell(token))

    def _may_spell(self, token: int) -> bool:
        """Whether the grammar can go on with the first character of a control token's name."""
        first = self._vocabulary.text(token)[:1]
        found = (self._vocabulary.tokenize(before + first)[-1] for before in ("a", "\n", " "))  # as a token of its own
        letter = next((token for token in found if self._vocabulary.piece(token) == first.encode()), None)
        return letter is None or self.allows(letter)

    def accept(self, token: int) -> None:
        """Go on by a token that is text and allowed; by any other, llama.cpp would end the process."""
        lib.llama_sampler_accept(self._pointer, token)
        if not self._vocabulary.ends_answer(token):
            self._utf8.decode(self._vocabulary.piece(token))

    def accept_text(self, text: str) -> bool:
        """Go on by a text, in whatever tokens; False where that is refused, and the grammar is then of no use.

        SentencePiece puts a space in front of it, which the grammar must take.
        """
        for token in self._vocabulary.tokenize(text):
            if not (self.is_text(token) and self.allows(token)):
                return False
            self.accept(token)
        return True

    def close(self) -> None:
        if self._pointer:
            lib.llama_sampler_free(self._pointer)
        self._pointer = None
