"""What a context's KV cache holds: the conversation in hand. Its other branches, and others, wait in the host's memory.

Cells of others would be looked at and passed over in each decode (three conversations of 600 tokens cost an answer on
two threads 16 %), so none stay: what is left behind is copied out, and copied back when somebody comes back to it,
which takes as long as reading a few tokens. Where most of a branch stays, only the rest is copied. What is too large
for the host, or too slow to copy (over a network), is read again. Knows token ids, and nothing of what they mean.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.hardware import host_memory
from runtime.kv_store import WORTH_TOKENS, KvStore, n_common
from runtime.native_context import HAND, AbortedError, Context

WORTH_KEEPING = 32
"""So many tokens are read again rather than copied."""

_MOST_SHARE = 1 / 4
"""Of the memory that the host has available, for what is copied out at once."""

_MOST_SECONDS = 3.0
"""That copying out may take. Whoever goes to another conversation waits for it."""

_PROBE_TOKENS = 64
"""Copied first where the rest may take too long, to see how fast that is."""


def n_sequences(n_branches: int) -> int:
    """Sequences that a context needs for so many branches."""
    return min(n_branches, 2)


@dataclass(slots=True)
class _Parked:
    """K and V of `ids` behind the first `start`, in llama.cpp's form."""

    ids: list[int]
    start: int
    data: NDArray[np.uint8]
    last_turn: int


class KvCache:
    """The cache of `context`, and at most `n_branches - 1` branches besides. `ids` are always what its cells hold."""

    def __init__(self, context: Context, n_branches: int) -> None:
        self._context, self._n_parked = context, n_branches - 1
        self._ids: list[int] = []
        self._parked: list[_Parked] = []
        self._turn = 0
        self._rate = 0.0  # bytes a second of copying out; 0 before the first

    @property
    def ids(self) -> Sequence[int]:
        """The ids whose K and V the cells have, in order."""
        return self._ids

    def turn_to(self, ids: Sequence[int], store: KvStore | None = None) -> int:
        """Have the cells hold a beginning of `ids`, as long as there is one; its length.

        What they held besides is kept. A beginning in `store` is read where it is longer.
        """
        self._turn += 1
        wanted = np.asarray(ids, np.int32)
        n = n_common(self._ids, wanted)
        if len(self._ids) - n > WORTH_KEEPING and self._n_parked:
            self._park(n)
        self.cut(n)
        while (parked := self._longest(wanted)) is not None:
            self._bring(parked, wanted)
        if store is not None:
            self._restore(store, wanted)
        while len(self._parked) > self._n_parked:
            self._parked.remove(min(self._parked, key=lambda each: each.last_turn))
        return len(self._ids)

    def cut(self, length: int) -> int:
        """Drop what the cells hold beyond `length`; what is left, less where the model cannot forget."""
        if length < self._context.length(HAND):  # more than is credited, after a decode that failed
            if not self._context.forget(HAND, length):
                self._context.forget(HAND, 0)
                length = 0
            del self._ids[length:]
        return length

    def decode(self, ids: Sequence[int], n_rows: int) -> None:
        """Go on by these ids, with logits of the last `n_rows`. Raises AbortedError: what was done is kept."""
        n, start = len(ids), len(self._ids)
        tokens, positions = np.asarray(ids, np.int32), np.arange(start, start + n, dtype=np.int32)
        sequences, outputs = np.full(n, HAND, np.int32), np.zeros(n, np.int8)
        outputs[-n_rows:] = 1
        try:
            self._context.decode(tokens, positions, sequences, outputs)
        except AbortedError:
            self._ids.extend(ids[: self._context.length(HAND) - start])
            raise
        self._ids.extend(ids)

    def keep(self, store: KvStore) -> None:
        """Keep what the cells hold on the disk, if there is room."""
        n_bytes = self._context.state_bytes(HAND) + 4 * len(self._ids)
        store.keep(self._ids, n_bytes, lambda path: self._context.save(HAND, self._ids, path))

    def _park(self, n: int) -> None:
        """Copy out what the cells hold, of which the first `n` stay."""
        start = n if 2 * n >= len(self._ids) else 0
        data = self._copied(start)
        if data is not None:
            self._parked.append(_Parked(list(self._ids), start, data, self._turn))

    def _copied(self, start: int) -> NDArray[np.uint8] | None:
        """What the cells hold behind `start`; None where that is too much, or takes too long."""
        n = len(self._ids)
        n_bytes = self._context.state_bytes(HAND) * (n - start) // n
        if n_bytes > _MOST_SHARE * host_memory()[0]:
            return None
        if n_bytes >= _MOST_SECONDS * self._rate:  # not known yet, or slow the last time
            self._take(max(start, n - _PROBE_TOKENS))
        return self._take(start) if n_bytes < _MOST_SECONDS * self._rate else None

    def _take(self, start: int) -> NDArray[np.uint8] | None:
        began = time.monotonic()
        data = self._context.copy_out(start)
        if data is not None:
            self._rate = len(data) / max(time.monotonic() - began, 1e-6)
        return data

    def _longest(self, wanted: NDArray[np.int32]) -> _Parked | None:
        """What is worth bringing back to come further in `wanted`, and can be: its beginning is in the cells."""
        here = len(self._ids)
        found = [(n_common(each.ids, wanted), i) for i, each in enumerate(self._parked) if each.start <= here]
        length, i = max(found, default=(0, 0))
        return self._parked[i] if length > here + WORTH_KEEPING else None

    def _bring(self, parked: _Parked, wanted: NDArray[np.int32]) -> None:
        """Copy it back, as far as it is wanted. If that is not all, it stays parked."""
        self.cut(parked.start)
        parked.last_turn = self._turn
        n = n_common(parked.ids, wanted)
        brought = self._context.copy_in(parked.data)
        if brought:
            self._ids = list(parked.ids)
            self.cut(n)
        if not brought or n == len(parked.ids):
            self._parked.remove(parked)

    def _restore(self, store: KvStore, wanted: NDArray[np.int32]) -> None:
        """Bring what was kept on the disk, if that has more of `wanted`."""
        kept = store.best(wanted.tolist(), self._context.n_ctx)
        if kept is None or kept.n_common < len(self._ids) + WORTH_TOKENS:
            return
        tried = False

        def load(path: Path) -> list[int] | None:
            nonlocal tried
            tried = True
            return self._context.load(HAND, path)

        restored = store.read(kept.path, load)
        if restored is not None or tried:
            self._ids = restored or []
            self.cut(kept.n_common if restored is not None else 0)
