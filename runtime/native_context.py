"""A llama.cpp context behind types: batches in, logits out, the KV cache, sampler chains, abort.

Takes token ids, gives NumPy views and ids. Everything here must be called from one thread, but for `Context.abort`.
Knows nothing of prompts, conversations or processes.
"""

import ctypes
import ctypes.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.interrupts import Interrupts
from runtime.native import LOG, Model, lib
from runtime.native_graph import Observer, Watch

KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2, "bf16": 30}
"""Names of KV cache types → ggml_type (ggml.h)."""

HAND, ASIDE = 0, 1
"""Sequences: the one that goes on, and one that holds cells only while they are copied."""

_ABORTED = 2
_NO_SLOT = 1


class AbortedError(Exception):
    """A decode was aborted on request; the positions already computed are kept."""


class FullError(EngineError):
    """The KV cache has no room for a batch; it is as it was."""


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """The shape of a context. Lengths in tokens."""

    n_ctx: int
    """Positions of the KV cache, over all sequences."""
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_outputs_max: int
    """Most rows of logits one ubatch can give; 0 is n_batch. With fewer than n_seq_max llama.cpp ends the process."""
    n_threads: int
    kv_type: str
    unified: bool = False
    """All sequences share n_ctx and may share cells; else each has its own part."""


class Context:
    """The KV cache and compute buffers of one loaded model. Raises EngineError when they do not fit in memory."""

    def __init__(self, model: Model, settings: ContextSettings, observer: Observer | None = None) -> None:
        """`observer` watches every decode (native_graph.py)."""
        if settings.kv_type not in KV_TYPES:
            raise EngineError(f"{settings.kv_type!r} is not a KV cache type; known: {', '.join(KV_TYPES)}")
        assert settings.n_outputs_max == 0 or settings.n_outputs_max >= settings.n_seq_max, settings
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = settings.n_ctx, settings.n_batch, settings.n_ubatch
        params.n_seq_max, params.n_outputs_max = settings.n_seq_max, settings.n_outputs_max
        params.n_threads = params.n_threads_batch = settings.n_threads
        params.type_k = params.type_v = KV_TYPES[settings.kv_type]
        params.kv_unified = settings.unified
        params.no_perf = True
        # The flag is read by llama.cpp between graph nodes. A Python callback there would take the interpreter's lock
        # hundreds of times a token; libc's atoi on one byte we own answers 0 or 1 without it.
        self._abort_flag = ctypes.create_string_buffer(b"0")
        atoi = ctypes.cast(ctypes.CDLL(None).atoi, ctypes.c_void_p)
        params.abort_callback = ctypes.cast(atoi, lib.ggml_abort_callback)
        params.abort_callback_data = ctypes.cast(self._abort_flag, ctypes.c_void_p)
        self._watch = Watch(observer, self.abort) if observer is not None else None
        if self._watch is not None:
            params.cb_eval = self._watch.callback
        self._settings = settings
        self._n_vocab = model.vocabulary.n_tokens
        LOG.clear()
        with Interrupts().held():
            self._context = lib.llama_init_from_model(model.pointer, params)
        if not self._context:
            cause = (LOG.errors() or ["unknown cause"])[0]
            raise EngineError(
                f"a context of {settings.n_ctx} tokens with a {settings.kv_type} KV cache does not fit ({cause}); "
                "take a smaller --context or a smaller --kv"
            )
        self._memory = lib.llama_get_memory(self._context)
        self._logits_place = (0, 0)
        self._logits: NDArray[np.float32]
        self._batch = lib.llama_batch_init(settings.n_batch, 0, 1)
        self._tokens = _view(self._batch.token, settings.n_batch)
        self._positions = _view(self._batch.pos, settings.n_batch)
        self._outputs = _view(self._batch.logits, settings.n_batch)
        for i in range(settings.n_batch):
            self._batch.n_seq_id[i] = 1

    @property
    def n_ctx(self) -> int:
        """Positions the KV cache really has (llama.cpp rounds up)."""
        return int(lib.llama_n_ctx(self._context))

    def decode(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        outputs: NDArray[np.int8],
    ) -> None:
        """Compute one batch of at most n_batch tokens; row i is asked for where `outputs[i]` is not 0. All are (T,).

        Raises AbortedError, FullError, and whatever the observer raises.
        """
        n = len(tokens)
        assert 0 < n <= self._settings.n_batch, (n, self._settings.n_batch)
        self._tokens[:n], self._positions[:n], self._outputs[:n] = tokens, positions, outputs
        for i, sequence in enumerate(sequences.tolist()):
            self._batch.seq_id[i][0] = sequence
        self._batch.n_tokens = n
        LOG.clear()
        status = self._watched_decode() if self._watch is not None else lib.llama_decode(self._context, self._batch)
        if status == _ABORTED:
            raise AbortedError
        if status == _NO_SLOT:
            raise FullError(f"the KV cache of {self.n_ctx} tokens is full; start a new conversation or raise --context")
        if status != 0:
            cause = (LOG.errors() or ["no reason given"])[-1]
            raise EngineError(f"llama_decode failed with {status} on {n} tokens: {cause}")

    def _watched_decode(self) -> int:
        assert self._watch is not None
        try:
            with self._watch.watching():
                return int(lib.llama_decode(self._context, self._batch))
        finally:
            if self._watch.stopped:
                self.abort(False)

    def logits(self, n_outputs: int) -> NDArray[np.float32]:
        """Rows asked for in the last decode, (n_outputs, n_vocab): a view that the next decode overwrites."""
        pointer = lib.llama_get_logits(self._context)
        place = ctypes.addressof(pointer.contents), n_outputs
        if place != self._logits_place:  # the array costs more than a sampler
            self._logits_place = place
            self._logits = np.ctypeslib.as_array(pointer, (n_outputs, self._n_vocab))
        return self._logits

    def forget(self, sequence: int, from_position: int) -> bool:
        """Drop a sequence's positions from there on; False where the model's memory cannot (it is then unchanged)."""
        return bool(lib.llama_memory_seq_rm(self._memory, sequence, from_position, -1))

    def copy_out(self, start: int) -> NDArray[np.uint8] | None:
        """K and V of the sequence HAND from position `start` on, in the host's memory; None where that has no room.

        Needs two sequences in unified cells, of which ASIDE is empty.
        """
        lib.llama_memory_seq_cp(self._memory, HAND, ASIDE, start, -1)
        try:
            data = np.empty(self.state_bytes(ASIDE), np.uint8)
            n_bytes = lib.llama_state_seq_get_data(self._context, _bytes(data), len(data), ASIDE)
            return data if n_bytes == len(data) else None
        except MemoryError:
            return None
        finally:
            self.forget(ASIDE, 0)

    def copy_in(self, data: NDArray[np.uint8]) -> bool:
        """Put what `copy_out` gave behind what HAND has, which ends where it began; False where there is no room."""
        LOG.clear()
        done = bool(lib.llama_state_seq_set_data(self._context, _bytes(data), len(data), ASIDE) == len(data))
        if done:
            lib.llama_memory_seq_cp(self._memory, ASIDE, HAND, -1, -1)
        self.forget(ASIDE, 0)
        return done

    def clear(self) -> None:
        """Empty the KV cache."""
        lib.llama_memory_clear(self._memory, False)

    def length(self, sequence: int) -> int:
        """Positions a sequence has in the KV cache."""
        return int(lib.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def state_bytes(self, sequence: int) -> int:
        """What `save` writes, but for the ids and a header."""
        return int(lib.llama_state_seq_get_size(self._context, sequence))

    def save(self, sequence: int, tokens: Sequence[int], path: Path) -> bool:
        """Write a sequence's part of the KV cache, whose ids are `tokens`; False where that failed."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        return bool(lib.llama_state_seq_save_file(self._context, os.fsencode(path), sequence, ids, len(tokens)))

    def load(self, sequence: int, path: Path) -> list[int] | None:
        """Replace a sequence's part of the KV cache by a saved one and give its ids.

        None where the file does not fit: what the cache holds is then unknown. A damaged one may end the process.
        """
        ids, n_ids = (ctypes.c_int32 * self._settings.n_ctx)(), ctypes.c_size_t(0)
        LOG.clear()
        if (
            lib.llama_state_seq_load_file(
                self._context, os.fsencode(path), sequence, ids, len(ids), ctypes.byref(n_ids)
            )
            and self.length(sequence) == n_ids.value
        ):
            return list(ids[: n_ids.value])
        return None

    def abort(self, wanted: bool = True) -> None:
        """Ask the running decode to end, or take it back. May be called from any thread."""
        self._abort_flag[0] = b"1" if wanted else b"0"

    @property
    def aborting(self) -> bool:
        """Whether `abort` was asked for."""
        return self._abort_flag[0] == b"1"

    def close(self) -> None:
        if self._context is not None:
            lib.llama_batch_free(self._batch)
            lib.llama_free(self._context)
            self._context = None


def _bytes(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _view(pointer: Any, n: int) -> NDArray[Any]:
    """A batch's field as an array of its n elements."""
    return np.ctypeslib.as_array(pointer, (n,))
