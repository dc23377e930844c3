"""One loaded model: token ids in, token ids and logits out.

`Engine` reads a prompt (keeping what the KV cache already holds of it), then draws one token at a time. It knows
nothing of messages or prompt formats; it is purely token ids. `ScoringEngine` gives the logits of whole chunks, batched
as llama-perplexity batches them. Only `abort` may be called from another thread.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.events import EngineSettings
from runtime.fitting import fitted
from runtime.grammar import Grammar
from runtime.kv_store import WORTH_TOKENS, KvStore, n_common
from runtime.native import Model, ModelInfo, Vocabulary, has_amx_kernels
from runtime.native_context import AbortedError, Context, ContextSettings
from runtime.native_devices import devices, register_rpc
from runtime.native_graph import Node, Observer, Tensor
from runtime.native_sampling import Sampler
from runtime.pace import Stride
from runtime.sampling import MAX_SEED, Sampling, describe


def n_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def survivable(settings: EngineSettings) -> EngineSettings:
    """The settings, without weight repacking where the wheel holds AMX code.

    GCC 12 miscompiles ggml's AMX kernels, which end the process at the first prompt; a wheel built with our flags has
    none. `bise doctor` says how to rebuild.
    """
    if settings.use_extra_bufts and has_amx_kernels():
        return replace(settings, use_extra_bufts=False)
    return settings


def open_model(
    path: Path,
    settings: EngineSettings,
    progress: Callable[[float], bool] | None = None,
    *,
    writable: bool = False,
    n_seq: int = 1,
    n_outputs: int = 1,
) -> Model:
    """Load a GGUF file over the devices that are here, RPC servers too. Errors as in `native.Model` and `fitted`.

    `n_seq` and `n_outputs` are what its context will have, which takes memory.
    """
    register_rpc(settings.rpc_servers)
    placed = fitted(path, settings, devices(), n_seq=n_seq, n_outputs=n_outputs)
    return Model(path, survivable(placed), progress, writable=writable)


def n_threads(settings: EngineSettings, model: Model) -> int:
    """What the settings say; else every core, or one where all layers are on GPUs.

    The processor then only looks up embeddings, and threads that wait for each other would take cores for nothing.
    """
    if settings.n_threads is not None:
        return settings.n_threads
    all_there = settings.n_gpu_layers < 0 or settings.n_gpu_layers > model.info().n_layers
    return 1 if all_there and any(device.kind == "gpu" for device in devices()) else n_cores()


class Engine:
    """A model with one sequence in its KV cache. Errors as in `native.Model` and `native_context.Context`."""

    def __init__(self, path: Path, settings: EngineSettings, progress: Callable[[float], bool] | None = None) -> None:
        self._model = open_model(path, settings, progress)
        n_batch = min(settings.n_batch, settings.n_ctx)
        n_ubatch = min(settings.n_ubatch, n_batch)
        try:
            self._context = Context(
                self._model,
                ContextSettings(
                    n_ctx=settings.n_ctx,
                    n_batch=n_batch,
                    n_ubatch=n_ubatch,
                    n_seq_max=1,
                    n_outputs_max=1,
                    n_threads=n_threads(settings, self._model),
                    kv_type=settings.kv_type,
                ),
            )
        except EngineError:
            self._model.close()
            raise
        self.n_ctx = settings.n_ctx
        self._stride = Stride(n_ubatch, n_batch)
        self._cached: list[int] = []  # the ids whose K and V the cache holds, in order
        self._sampler: Sampler | None = None
        self._store: KvStore | None = None
        if settings.kept_kv_bytes > 0:
            try:
                self._store = KvStore.of(path, settings)
            except EngineError:
                self.close()
                raise

    @property
    def vocabulary(self) -> Vocabulary:
        return self._model.vocabulary

    @property
    def context_used(self) -> int:
        """Positions of the KV cache in use."""
        return len(self._cached)

    def info(self) -> ModelInfo:
        return self._model.info()

    def chat_template(self) -> str | None:
        return self._model.chat_template()

    @staticmethod
    def gpu_bytes() -> int | None:
        """What is in use on all GPUs, by whatever program; None where there is none."""
        used = [device.memory_total - device.memory_free for device in devices() if device.kind == "gpu"]
        return sum(used) if used else None

    def read(self, ids: Sequence[int], on_progress: Callable[[int, int, int], None]) -> int:
        """Bring the KV cache to exactly `ids` and return how many of them it already held.

        The common prefix is kept, or read from the disk where more of it was kept there, and the rest decoded; the last
        id always, since its logits are wanted. `on_progress(done, total, reused)` is called every second or so, and
        after each batch. Raises AbortedError (what was read is kept, to the ubatch), EngineError when the prompt leaves
        no room for an answer.
        """
        if not ids:
            raise EngineError("the prompt is empty; write something")
        if len(ids) >= self.n_ctx:
            raise EngineError(
                f"the conversation has {len(ids)} tokens and the context holds {self.n_ctx}; start a new conversation "
                "or raise --context"
            )
        reused = n_common(self._cached, ids[:-1])
        if self._store is not None and self._restore(self._store, ids[:-1], reused):
            reused = n_common(self._cached, ids[:-1])
        if reused < self._context.length(0):  # which may be more than was credited, after a decode that failed
            if not self._context.forget(0, reused):
                self._context.clear()
                reused = 0
            del self._cached[reused:]
        on_progress(reused, len(ids), reused)
        while len(self._cached) < len(ids):
            began = time.monotonic()
            self._decode(ids[len(self._cached) :][: self._stride.tokens])
            self._stride.took(time.monotonic() - began)
            on_progress(len(self._cached), len(ids), reused)
        return reused

    def start_sampling(self, sampling: Sampling, grammar: Grammar | None = None) -> str:
        """Set how `next` draws after what was read so far, and say it in words. A fixed seed repeats the answer.

        What is drawn from then on keeps to the grammar. Raises EngineError for what does not fit the model.
        """
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
        seed = sampling.seed if sampling.seed is not None else secrets.randbelow(MAX_SEED + 1)
        self._sampler = Sampler(sampling, seed, self.vocabulary, n_ctx=self.n_ctx, recent=self._cached, grammar=grammar)
        return f"{'grammar → ' if grammar is not None else ''}{describe(sampling, seed)}"

    def next(self) -> int:
        """Draw the next id from the logits of the last decode. The KV cache does not hold it until `extend`."""
        assert self._sampler is not None, "start_sampling comes first"
        return self._sampler.draw(self.logits())

    def extend(self, token: int) -> None:
        """Decode one more id. Raises AbortedError."""
        self._decode([token])

    def keep(self) -> None:
        """Keep the KV cache on the disk, if the settings give it room there. Without room it is not kept."""
        if self._store is not None:
            n_bytes = self._context.state_bytes(0) + 4 * len(self._cached)
            self._store.keep(self._cached, n_bytes, lambda path: self._context.save(0, self._cached, path))

    def _restore(self, store: KvStore, ids: Sequence[int], n_here: int) -> bool:
        """Bring a kept KV cache with more of `ids` than the `n_here` that are there; whether anything has changed."""
        kept = store.best(ids, self.n_ctx)
        if kept is None or kept.n_common < n_here + WORTH_TOKENS:
            return False
        restored = store.read(kept.path, lambda path: self._context.load(0, path))
        if restored is None:
            self._context.clear()
        self._cached = restored or []
        return True

    def has_room(self) -> bool:
        """Whether the KV cache can take another token."""
        return len(self._cached) < self.n_ctx

    def logits(self) -> NDArray[np.float32]:
        """Logits after the last id, (n_vocab,): a view that the next decode overwrites."""
        row: NDArray[np.float32] = self._context.logits(1)[0]
        return row

    def abort(self, wanted: bool = True) -> None:
        """Ask the running decode to end, or take it back. May be called from any thread."""
        self._context.abort(wanted)

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
        self._context.close()
        self._model.close()

    def _decode(self, ids: Sequence[int]) -> None:
        n, start = len(ids), len(self._cached)
        outputs = np.zeros(n, np.int8)
        outputs[-1] = 1
        try:
            self._context.decode(
                np.asarray(ids, np.int32), np.arange(start, start + n, dtype=np.int32), np.zeros(n, np.int32), outputs
            )
        except AbortedError:
            self._cached.extend(ids[: self._context.length(0) - start])
            raise
        self._cached.extend(ids)


class ScoringEngine:
    """Logits of whole chunks, in llama-perplexity's batches: n_batch // n_ctx chunks decoded together, at least one.

    Which chunks share a batch moves the result in the fifth digit, so equality with llama-perplexity needs its layout
    (llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp:502 and :2012).
    """

    def __init__(
        self,
        path: Path,
        settings: EngineSettings,
        progress: Callable[[float], bool] | None = None,
        *,
        observer: Observer | None = None,
        writable: bool = False,
    ) -> None:
        """`settings.n_ctx` is the length of one chunk. Errors as in `Engine`.

        `observer` watches what is computed, and may replace the weights of a `writable` model (native_graph.py).
        """
        self.n_ctx = settings.n_ctx
        self.n_seq = max(1, settings.n_batch // settings.n_ctx)
        n_cells = self.n_seq * settings.n_ctx
        self._n_batch = min(settings.n_batch, n_cells)
        self._model = open_model(
            path,
            replace(settings, n_ctx=n_cells),
            progress,
            writable=writable,
            n_seq=self.n_seq,
            n_outputs=self._n_batch,
        )
        try:
            self._context = Context(
                self._model,
                ContextSettings(
                    n_ctx=n_cells,
                    n_batch=self._n_batch,
                    n_ubatch=min(settings.n_ubatch, self._n_batch),
                    n_seq_max=self.n_seq,
                    n_outputs_max=0,
                    n_threads=n_threads(settings, self._model),
                    kv_type=settings.kv_type,
                ),
                observer,
            )
        except EngineError:
            self._model.close()
            raise
        self.n_vocab = self._model.vocabulary.n_tokens
        self.bos = self._model.vocabulary.bos
        self.adds_bos = self._model.vocabulary.adds_bos

    @property
    def vocabulary(self) -> Vocabulary:
        return self._model.vocabulary

    def info(self) -> ModelInfo:
        return self._model.info()

    def chat_template(self) -> str | None:
        return self._model.chat_template()

    def tokenize(self, text: str) -> NDArray[np.int32]:
        """Ids of a text, with BOS if the model adds it; text that spells a control token stays text."""
        return self._model.vocabulary.tokenize_array(text, bos=True)

    def logits(self, chunks: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Chunks (S, n_ctx), S ≤ n_seq → logits (S, n_ctx − first, n_vocab) of positions first … n_ctx−1.

        A view that the next call overwrites; of a chunk longer than n_batch, a copy. Raises AbortedError after `abort`.
        """
        rows = []  # of each batch, (rows wanted in it, n_vocab)
        for n_rows in self._decode(chunks, first):
            if n_rows:
                view = self._context.logits(n_rows)
                rows.append(view if chunks.size <= self._n_batch else view.copy())
        joined = rows[0] if len(rows) == 1 else np.concatenate(rows)
        return joined.reshape(len(chunks), self.n_ctx - first, self.n_vocab)

    def read(self, chunks: NDArray[np.int32]) -> None:
        """Compute chunks (S, n_ctx), S ≤ n_seq, for the observer. Raises as `logits`.

        With the logits of every position: one whose logits are not asked for is left out of the last layer's products.
        """
        for _ in self._decode(chunks, 0):
            pass

    def weights(self) -> Mapping[str, Sequence[Tensor]]:
        """Name → weight of a `writable` model, of all that a token is computed with. Valid while this is open.

        There are two of a tied embedding whose output lies on another device. One token in a context of its own finds
        them, so that no Python is called while chunks are computed.
        """
        found = _Weights()
        settings = ContextSettings(
            n_ctx=1, n_batch=1, n_ubatch=1, n_seq_max=1, n_outputs_max=1, n_threads=1, kv_type="f16"
        )
        context = Context(self._model, settings, found)
        try:
            zero = np.zeros(1, np.int32)
            context.decode(zero, zero, zero, np.ones(1, np.int8))
        finally:
            context.close()
        return {name: tuple(tensors.values()) for name, tensors in found.by_address.items()}

    def abort(self) -> None:
        """Ask the running decode to end. May be called from any thread."""
        self._context.abort()

    def close(self) -> None:
        self._context.close()
        self._model.close()

    def _decode(self, chunks: NDArray[np.int32], first: int) -> Iterator[int]:
        """Compute the chunks from an empty cache, batch by batch; gives the rows of logits that each batch has."""
        n_chunks, n_ctx = chunks.shape
        assert n_chunks <= self.n_seq, (n_chunks, self.n_seq)
        assert n_ctx == self.n_ctx, (n_ctx, self.n_ctx)
        tokens = chunks.reshape(-1)
        positions = np.tile(np.arange(n_ctx, dtype=np.int32), n_chunks)
        sequences = np.repeat(np.arange(n_chunks, dtype=np.int32), n_ctx)
        wanted = (positions >= first).astype(np.int8)
        self._context.clear()
        for start in range(0, len(tokens), self._n_batch):
            batch = slice(start, start + self._n_batch)
            self._context.decode(tokens[batch], positions[batch], sequences[batch], wanted[batch])
            yield int(wanted[batch].sum())


class _Weights:
    """An observer that finds all weights and wants nothing."""

    def __init__(self) -> None:
        self.by_address: dict[str, dict[int, Tensor]] = {}
        """Name → address → weight."""

    def wants(self, node: Node) -> bool:
        for source in node.sources:
            if source.is_weight:
                self.by_address.setdefault(source.name, {})[source.address] = source
        return False

    def observe(self, node: Node) -> None:
        raise AssertionError(f"it did not want {node.name}")
