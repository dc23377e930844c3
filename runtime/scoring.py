"""One loaded model that measures: chunks of token ids in, their logits out, batched as llama-perplexity batches them.

Knows nothing of prompts or answers. Only `abort` may be called from another thread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.events import EngineSettings
from runtime.native import ModelInfo, Vocabulary
from runtime.native_context import Context, ContextSettings
from runtime.native_graph import Node, Observer, Tensor
from runtime.opening import n_threads, open_model


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
