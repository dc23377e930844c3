"""A small model that guesses what a larger one of the same vocabulary will say.

It takes the likeliest token each time, says how likely it finds it, and keeps a KV cache of its own. Which guesses are
wanted and what becomes of them is not its business. Only `abort` may be called from another thread.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.errors import EngineError, UserError
from runtime.events import EngineSettings
from runtime.fitting import in_llama_order
from runtime.hardware import Device
from runtime.kv_cache import KvCache, n_sequences
from runtime.native import Vocabulary
from runtime.native_context import Context, ContextSettings
from runtime.native_devices import devices, register_rpc
from runtime.opening import n_threads, open_model


class DraftModel:
    """A loaded draft model. Raises as `Engine`, and EngineError for another vocabulary (`check`)."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        """`settings` are the large model's: context, KV type, threads. On GPUs it lies whole on the emptiest."""
        register_rpc(settings.rpc_servers)
        gpu = emptiest(devices()) if settings.main_gpu is None else settings.main_gpu
        n_gpu_layers = 0 if gpu is None or settings.n_gpu_layers == 0 else -1
        placed = replace(
            settings, rpc_servers=(), tensor_split=None, split_mode="layer", main_gpu=gpu, n_gpu_layers=n_gpu_layers
        )
        try:
            n_seq = n_sequences(settings.n_branches)
            self._model = open_model(path, placed, n_seq=n_seq, n_outputs=n_seq, unified=True)
        except UserError as error:
            raise EngineError(f"the draft model: {error}; or leave out --draft") from None
        self._n_batch = min(settings.n_batch, settings.n_ctx)
        try:
            self._context = Context(
                self._model,
                ContextSettings(
                    n_ctx=settings.n_ctx,
                    n_batch=self._n_batch,
                    n_ubatch=min(settings.n_ubatch, self._n_batch),
                    n_seq_max=n_seq,
                    n_outputs_max=n_seq,
                    n_threads=n_threads(placed, self._model),
                    kv_type=settings.kv_type,
                    unified=True,
                ),
            )
        except EngineError as error:
            self._model.close()
            raise EngineError(f"the draft model {path.name}: {error}; or leave out --draft") from None
        self.path = path
        self.n_bytes = self._model.info().tensor_bytes
        self.seconds = 0.0
        """What a guess takes, of late; 0 before the first."""
        self._ids: list[int] = []
        self._cache = KvCache(self._context, settings.n_branches if self._model.forgets else 1)  # guesses are in it too
        self._n_true = 0  # so many of its ids are the text's

    def check(self, vocabulary: Vocabulary) -> None:
        """Raise EngineError unless every id stands for the same text. Unused control tokens may differ."""
        own = self._model.vocabulary
        if own.n_tokens != vocabulary.n_tokens:
            raise EngineError(
                f"{self.path.name} has {own.n_tokens} tokens and the model {vocabulary.n_tokens}; a draft model needs "
                "the same vocabulary"
            )
        for token in range(own.n_tokens):
            if own.text(token) != vocabulary.text(token) and not vocabulary.is_control(token):
                raise EngineError(
                    f"{self.path.name} has {own.text(token)!r} for token {token} and the model "
                    f"{vocabulary.text(token)!r}; a draft model needs the same vocabulary"
                )

    def start(self, ids: Sequence[int]) -> None:
        """Read a text but for its last token, keeping what is there of it. Raises AbortedError."""
        self._ids = list(ids)
        self._n_true = self._cache.turn_to(ids[:-1])
        self._read(len(ids) - 1)

    def push(self, token: int) -> None:
        """The text goes on by a token."""
        at = len(self._ids)
        if self._n_true == at < len(self._cache.ids) and self._cache.ids[at] == token:
            self._n_true += 1
        self._ids.append(token)

    def guess(self, n: int, wanted: Callable[[float], bool]) -> list[int]:
        """At most `n` tokens that come next; `wanted` hears each one's probability and says whether to go on."""
        began = time.monotonic()
        self._read(len(self._ids) - 1)
        guesses: list[int] = []
        token = self._ids[-1]
        while len(guesses) < n:
            self._cache.decode([token], 1)
            self._n_true = len(self._ids)
            row = self._context.logits(1)[0]
            token = int(row.argmax())
            guesses.append(token)
            if not wanted(float(1 / np.exp(row - row[token]).sum())):
                break
        if guesses:
            seconds = (time.monotonic() - began) / len(guesses)
            self.seconds = self.seconds + (seconds - self.seconds) / 8 if self.seconds else seconds
        return guesses

    def abort(self, wanted: bool) -> None:
        self._context.abort(wanted)

    def close(self) -> None:
        self._context.close()
        self._model.close()

    def _read(self, n: int) -> None:
        """Have the KV cache hold the first `n` ids and no more."""
        self._n_true = self._cache.cut(min(self._n_true, n))
        while self._n_true < n:
            try:
                self._cache.decode(self._ids[self._n_true : n][: self._n_batch], 1)
            finally:
                self._n_true = len(self._cache.ids)


def emptiest(devices: Sequence[Device]) -> int | None:
    """The GPU of this machine with most memory left, by its place in llama.cpp's order; None where there is none."""
    own = [(gpu.memory_free, i) for i, gpu in enumerate(in_llama_order(devices)) if not gpu.name.startswith("RPC")]
    return max(own)[1] if own else None
