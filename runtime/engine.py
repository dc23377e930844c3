"""One loaded model that answers: token ids in, token ids and logits out.

`Engine` reads a prompt (keeping what the KV cache already holds of it), then draws one token at a time. With each it
may compute guesses at the next ones (speculation.py); every token is drawn from logits all the same, and guesses that
were not drawn are dropped. It knows nothing of messages or prompt formats; it is purely token ids. Only `abort` may be
called from another thread.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.concessions import gib
from runtime.draft_model import DraftModel
from runtime.drafting import MOST_DRAFTS
from runtime.errors import EngineError
from runtime.events import EngineSettings
from runtime.grammar import Grammar
from runtime.kv_cache import KvCache, n_sequences
from runtime.kv_store import KvStore
from runtime.native import Model, ModelInfo, Vocabulary
from runtime.native_context import AbortedError, Context, ContextSettings
from runtime.native_devices import devices
from runtime.native_sampling import Sampler
from runtime.opening import n_threads, open_model
from runtime.pace import Stride
from runtime.sampling import MAX_SEED, Sampling, describe
from runtime.speculation import Speculation


class Engine:
    """A model with a KV cache. Errors as in `native.Model` and `native_context.Context`."""

    def __init__(self, path: Path, settings: EngineSettings, progress: Callable[[float], bool] | None = None) -> None:
        n_batch = min(settings.n_batch, settings.n_ctx)
        n_ubatch = min(settings.n_ubatch, n_batch)
        speculates = settings.drafts != "off"
        self._most_drafts = min(MOST_DRAFTS, n_ubatch - 1) if speculates else 0
        n_branches = settings.n_branches
        n_outputs = max(1 + self._most_drafts, n_sequences(n_branches))
        self._model, self._draft_model = _open(path, settings, progress, n_outputs)
        if not self._model.forgets:
            self._most_drafts, n_branches = 0, 1
        try:
            self._context = Context(
                self._model,
                ContextSettings(
                    n_ctx=settings.n_ctx,
                    n_batch=n_batch,
                    n_ubatch=n_ubatch,
                    n_seq_max=n_sequences(n_branches),
                    n_outputs_max=n_outputs,
                    n_threads=n_threads(settings, self._model),
                    kv_type=settings.kv_type,
                    unified=True,
                ),
            )
        except EngineError:
            self._close_models()
            raise
        self._speculation = Speculation(settings.n_ctx, self._draft_model) if self._most_drafts else None
        self.n_ctx = settings.n_ctx
        self._stride = Stride(n_ubatch, n_batch)
        self._cache = KvCache(self._context, n_branches)
        self._n_drafts = 0  # so many of its last ids are guesses that are not drawn yet
        self._rows: NDArray[np.float32] | None = None  # logits of the last decode
        self._row = 0  # where `next` draws from
        self._drafter: Speculation | None = None  # of the answer that is being drawn
        self.n_drafted = 0
        """Guesses computed since `start_sampling`."""
        self.n_accepted = 0
        """Of these, how many were drawn."""
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
        return len(self._cache.ids) - self._n_drafts

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
        self._drop_drafts()
        reused = self._cache.turn_to(ids[:-1], self._store)
        on_progress(reused, len(ids), reused)
        while (done := len(self._cache.ids)) < len(ids):
            began = time.monotonic()
            self._decode(ids[done:][: self._stride.tokens], 1)
            self._stride.took(time.monotonic() - began)
            on_progress(len(self._cache.ids), len(ids), reused)
        return reused

    def start_sampling(
        self,
        sampling: Sampling,
        grammar: Grammar | None = None,
        *,
        drafting: bool = True,
        forbidden: Sequence[int] = (),
    ) -> str:
        """Set how `next` draws after what was read so far, and say it in words. A fixed seed repeats the answer.

        To the last bit without `drafting`: kernels round a token otherwise in a batch than alone. What is drawn from
        then on keeps to the grammar, and no token is `forbidden`. Raises EngineError for what does not fit the model,
        AbortedError.
        """
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
        seed = sampling.seed if sampling.seed is not None else secrets.randbelow(MAX_SEED + 1)
        self._drop_drafts()
        recent = self._cache.ids
        self._sampler = Sampler(
            sampling, seed, self.vocabulary, n_ctx=self.n_ctx, recent=recent, grammar=grammar, forbidden=forbidden
        )
        self.n_drafted = self.n_accepted = 0
        self._drafter = self._speculation if drafting else None
        if self._drafter is not None:
            self._drafter.start(recent)
        return f"{'grammar → ' if grammar is not None else ''}{describe(sampling, seed)}"

    def hold_to(self, grammar: Grammar | None, begun: str = "") -> None:
        """In the middle of an answer, keep to a grammar from the next token on, or to none (native_sampling.py)."""
        assert self._sampler is not None, "start_sampling comes first"
        self._sampler.hold_to(grammar, begun)

    def next(self) -> int:
        """Draw the next id from the logits of the last decode. The KV cache does not hold it until `extend`."""
        assert self._sampler is not None, "start_sampling comes first"
        return self._sampler.draw(self.logits())

    def extend(self, token: int) -> None:
        """Go on by one more id, which is computed unless it was guessed. Raises AbortedError."""
        if self._context.aborting:
            raise AbortedError
        if self._drafter is not None:
            self._drafter.drawn(token)
        if self._n_drafts and self._cache.ids[-self._n_drafts] == token:
            self._n_drafts -= 1
            self._row += 1
            self.n_accepted += 1
            return
        self._drop_drafts()
        if self._drafter is None:
            self._decode([token], 1)
            return
        room = self.n_ctx - len(self._cache.ids) - 1
        drafts = self._drafter.drafts(min(self._most_drafts, room))
        began = time.monotonic()
        self._decode([token, *drafts], 1 + len(drafts))
        self._drafter.took(1 + len(drafts), time.monotonic() - began)
        self.n_drafted += len(drafts)

    def keep(self) -> None:
        """Keep the KV cache on the disk, if the settings give it room there. Without room it is not kept."""
        self._drop_drafts()
        if self._store is not None:
            self._cache.keep(self._store)

    def has_room(self) -> bool:
        """Whether the KV cache can take another token."""
        return self.context_used < self.n_ctx

    def logits(self) -> NDArray[np.float32]:
        """Logits after the last id, (n_vocab,): a view that the next decode overwrites."""
        assert self._rows is not None, "read comes first"
        row: NDArray[np.float32] = self._rows[self._row]
        return row

    def abort(self, wanted: bool = True) -> None:
        """Ask the running decode to end, or take it back. May be called from any thread."""
        self._context.abort(wanted)
        if self._draft_model is not None:
            self._draft_model.abort(wanted)

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
        self._context.close()
        self._close_models()

    def _close_models(self) -> None:
        if self._draft_model is not None:
            self._draft_model.close()
        self._model.close()

    def _drop_drafts(self) -> None:
        """Take what was computed and not drawn out of the KV cache."""
        if self._n_drafts:
            self._cache.cut(self.context_used)
            self._n_drafts = 0

    def _decode(self, ids: Sequence[int], n_rows: int) -> None:
        """Compute ids, and logits behind each of the last `n_rows`: of these all but the first are drafts."""
        self._rows = None  # a view that the decode overwrites
        end = len(self._cache.ids) + len(ids) - n_rows + 1
        try:
            self._cache.decode(ids, n_rows)
        finally:
            self._n_drafts = max(0, len(self._cache.ids) - end)
        self._rows, self._row = self._context.logits(n_rows), 0  # waits for GPUs


def _open(
    path: Path, settings: EngineSettings, progress: Callable[[float], bool] | None, n_outputs: int
) -> tuple[Model, DraftModel | None]:
    """The model, and the draft model, which is placed first: the large one can be split around it."""
    n_seq = n_sequences(settings.n_branches)
    if settings.draft_model is None:
        return open_model(path, settings, progress, n_seq=n_seq, n_outputs=n_outputs, unified=True), None
    draft = DraftModel(settings.draft_model, settings)
    try:
        rest = replace(settings, rpc_servers=())  # they are devices by now
        model = open_model(path, rest, progress, n_seq=n_seq, n_outputs=n_outputs, unified=True)
    except EngineError as error:
        draft.close()
        raise EngineError(f"{error}; or leave out --draft, whose model takes {gib(draft.n_bytes)}") from None
    except BaseException:
        draft.close()
        raise
    try:
        draft.check(model.vocabulary)
    except EngineError:
        model.close()
        draft.close()
        raise
    return model, draft
