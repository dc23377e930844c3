"""A chain of llama.cpp's samplers, behind a grammar if one is given: a row of logits in, a token id out.

Built as sampling.py plans it. `Sampler` works on any row of logits, so it needs a vocabulary and no context. It looks
at what a chain leaves before it takes it, to refuse what would end the process: a row that leaves nothing to draw.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.grammar import Grammar
from runtime.native import Vocabulary, lib
from runtime.native_grammar import NativeGrammar
from runtime.sampling import WHOLE_CONTEXT, Sampling, chain

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data (llama.h)."""

_MIN_KEEP = 1
_MIROSTAT_M = 100  # tokens it estimates the slope from; llama.cpp 0c1e57098, common/sampling.cpp
_NOTHING_LEFT = "no token is left to draw: the model or the sampling settings rule out every one"
_ZERO = 1e-30  # of the likeliest token's probability; float32 loses what is below 1e-45


class Sampler:
    """Draws tokens as `sampling` says, with `seed`. Close it before its model.

    `recent` is what was read so far, prompt and answer, for the penalties; `n_ctx` is the longest window they can have.
    No token of `forbidden` is drawn. Raises EngineError for a logit bias of a token that the vocabulary has not, or a
    grammar that llama.cpp refuses.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int,
        vocabulary: Vocabulary,
        *,
        n_ctx: int,
        recent: Sequence[int] = (),
        grammar: Grammar | None = None,
        forbidden: Sequence[int] = (),
    ) -> None:
        self._forbidden = list(forbidden)
        self._sampling, self._seed, self._vocabulary, self._n_ctx = sampling, seed, vocabulary, n_ctx
        n_tokens = vocabulary.n_tokens
        for token, _ in sampling.logit_bias:
            if token >= n_tokens:
                raise EngineError(f"logit bias of token {token}: the model has {n_tokens} tokens, 0 to {n_tokens - 1}")
        self._is_greedy = set(chain(sampling)) <= {"logit-bias", "greedy"}
        self._ids = np.arange(n_tokens, dtype=np.int32)
        self._candidates = np.zeros(n_tokens, CANDIDATE)
        self._grammar: NativeGrammar | None = None
        self._chain: Any = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        try:
            if grammar is not None:
                self._grammar = NativeGrammar(grammar, vocabulary)
            for name in chain(sampling):
                sampler = self._build(name)
                lib.llama_sampler_chain_add(self._chain, sampler)
                if name in ("penalties", "dry"):
                    window = sampling.penalty_window if name == "penalties" else sampling.dry_window
                    for token in recent[-self._window(window) :]:
                        lib.llama_sampler_accept(sampler, token)
        except BaseException:
            self.close()
            raise

    def hold_to(self, grammar: Grammar | None, begun: str = "") -> None:
        """Keep to a grammar from now on, of which the text `begun` stands there already; None: to none any more.

        Where the grammar refuses what has begun, nothing is kept to. Raises EngineError as the constructor does.
        """
        if self._grammar is not None:
            self._grammar.close()
            self._grammar = None
        if grammar is not None:
            self._grammar = NativeGrammar(grammar, self._vocabulary)
            if begun and not self._grammar.accept_text(begun):
                self.hold_to(None)

    def names(self) -> list[str]:
        """The samplers that run, by llama.cpp's names."""
        n = lib.llama_sampler_chain_n(self._chain)
        return [lib.llama_sampler_name(lib.llama_sampler_chain_get(self._chain, i)).decode() for i in range(n)]

    def candidates(self, logits: NDArray[np.float32]) -> tuple[NDArray[Any], int]:
        """Run grammar and chain on logits (n_vocab,): the tokens they leave, as CANDIDATE, and which of them is drawn.

        The array is a view that the next call overwrites. Raises EngineError where nothing is left to draw.
        """
        return self._run(logits, masked=self._grammar is not None)

    def draw(self, logits: NDArray[np.float32]) -> int:
        """Draw from logits (n_vocab,), and tell the chain what was drawn. Errors as in `candidates`.

        As in llama.cpp, a token is drawn without the grammar, and only where the grammar refuses that one are all
        tried, which takes far longer. Where nothing is cut, the distribution is the same. (llama.cpp 0c1e57098,
        common/sampling.cpp, `common_sampler_sample`.) Mirostat learns from every token that it draws, so it gets one.
        """
        if self._is_greedy and self._grammar is None:
            return self._likeliest(logits)
        masked = self._grammar is not None and self._sampling.mirostat > 0
        refused: list[int] = []
        while True:
            tokens, selected = self._run(logits, masked=masked, refused=refused)
            token = int(tokens["id"][selected])
            if self._grammar is None or (self._grammar.is_text(token) and (masked or self._grammar.allows(token))):
                break
            if masked:
                refused.append(token)
            masked = True
        if self._grammar is not None:
            self._grammar.accept(token)
        lib.llama_sampler_accept(self._chain, token)
        return token

    def _likeliest(self, logits: NDArray[np.float32]) -> int:
        """What the chain draws that has but a bias before it takes the highest logit, of equal ones the first."""
        if self._sampling.logit_bias:
            logits = logits.copy()
            for biased, bias in self._sampling.logit_bias:
                logits[biased] += np.float32(bias)
        token = int(logits.argmax())
        if not np.isfinite(logits[token]):
            raise EngineError(_NOTHING_LEFT)
        return token

    def _run(
        self, logits: NDArray[np.float32], *, masked: bool, refused: Sequence[int] = ()
    ) -> tuple[NDArray[Any], int]:
        self._candidates["id"], self._candidates["logit"], self._candidates["p"] = self._ids, logits, 0
        self._candidates["logit"][self._forbidden] = -np.inf
        start = self._candidates.ctypes.data
        data = ctypes.cast(start, ctypes.POINTER(lib.llama_token_data))
        left = lib.llama_token_data_array(data, len(self._candidates), -1, False)
        if masked and self._grammar is not None:
            self._grammar.mask(left)
            self._candidates["logit"][list(refused)] = -np.inf
            if not np.isfinite(self._candidates["logit"].max()):
                raise EngineError("no token is left to draw: the model has none with which the grammar could go on")
        lib.llama_sampler_apply(self._chain, ctypes.byref(left))
        first = (ctypes.addressof(left.data.contents) - start) // CANDIDATE.itemsize  # XTC moves it
        tokens = self._candidates[first : first + left.size]
        if not 0 <= left.selected < left.size or not np.isfinite(tokens["logit"][left.selected]):
            raise EngineError(_NOTHING_LEFT)
        return tokens, int(left.selected)

    def close(self) -> None:
        if self._chain is not None:
            lib.llama_sampler_free(self._chain)
            self._chain = None
        if self._grammar is not None:
            self._grammar.close()
            self._grammar = None

    def _window(self, window: int) -> int:
        """llama.cpp keeps an array as long as the window, so it must not be longer than need be."""
        return self._n_ctx if window == WHOLE_CONTEXT else min(window, self._n_ctx)

    def _build(self, name: str) -> Any:
        s = self._sampling
        builders: dict[str, Callable[[], Any]] = {
            "logit-bias": self._logit_bias,
            "penalties": lambda: lib.llama_sampler_init_penalties(
                self._vocabulary.n_tokens,
                self._window(s.penalty_window),
                s.repeat_penalty,
                s.frequency_penalty,
                s.presence_penalty,
            ),
            "dry": self._dry,
            "top-n-sigma": lambda: lib.llama_sampler_init_top_n_sigma(s.top_n_sigma),
            "top-k": lambda: lib.llama_sampler_init_top_k(s.top_k),
            "zeros": lambda: lib.llama_sampler_init_min_p(_ZERO, _MIN_KEEP),
            "typical": lambda: lib.llama_sampler_init_typical(s.typical_p, _MIN_KEEP),
            "top-p": lambda: lib.llama_sampler_init_top_p(s.top_p, _MIN_KEEP),
            "min-p": lambda: lib.llama_sampler_init_min_p(s.min_p, _MIN_KEEP),
            "xtc": lambda: lib.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, _MIN_KEEP, self._seed),
            "temp": lambda: lib.llama_sampler_init_temp(s.temperature),
            "temp-ext": lambda: lib.llama_sampler_init_temp_ext(
                s.temperature, s.dynamic_temperature, s.dynamic_exponent
            ),
            "mirostat": lambda: lib.llama_sampler_init_mirostat(
                self._vocabulary.n_tokens, self._seed, s.mirostat_tau, s.mirostat_eta, _MIROSTAT_M
            ),
            "mirostat-v2": lambda: lib.llama_sampler_init_mirostat_v2(self._seed, s.mirostat_tau, s.mirostat_eta),
            "dist": lambda: lib.llama_sampler_init_dist(self._seed),
            "greedy": lib.llama_sampler_init_greedy,
        }
        sampler = builders[name]()
        if not sampler:  # added to a chain, NULL is a segmentation fault
            raise EngineError(f"llama.cpp refused the sampler {name}; check the sampling settings")
        return sampler

    def _logit_bias(self) -> Any:
        pairs = self._sampling.logit_bias
        array = (lib.llama_logit_bias * len(pairs))(*pairs)
        return lib.llama_sampler_init_logit_bias(self._vocabulary.n_tokens, len(pairs), array)

    def _dry(self) -> Any:
        s = self._sampling
        texts = (ctypes.c_char_p * len(s.dry_breakers))(*(text.encode("utf-8", "replace") for text in s.dry_breakers))
        return lib.llama_sampler_init_dry(
            self._vocabulary.pointer,
            s.dry_multiplier,
            s.dry_base,
            s.dry_allowed_length,
            self._window(s.dry_window),
            texts,
            len(texts),
        )
