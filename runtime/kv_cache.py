"""What a context's KV cache holds: several branches of conversations that share cells, of which one is in hand.

A branch is a sequence of llama.cpp's. One that goes on from another shares the cells of their common prefix, and takes
cells of its own only behind it. What the branch in hand needs it gets: where cells run out, those that were not used
for longest are dropped. Cells of other branches are looked at and passed over in each decode, so that one to which
nobody came back for some replies is dropped as well. Knows token ids, and nothing of what they mean.
"""

from collections.abc import Sequence

import numpy as np

from runtime.kv_store import WORTH_TOKENS, KvStore, n_common
from runtime.native_context import AbortedError, Context, FullError

WORTH_KEEPING = 32
"""A branch that would lose no more tokens than this is cut rather than kept beside the new one."""

MOST_TURNS = 8
"""Turns after which a branch is dropped that was in hand in none of them."""


class _Branch:
    def __init__(self, sequence: int, turn: int) -> None:
        self.sequence = sequence
        self.ids: list[int] = []
        self.last_turn = turn


class KvCache:
    """The branches of `context`, at most `n_branches`. The ids of the one in hand are always what its cells hold."""

    def __init__(self, context: Context, n_branches: int) -> None:
        self._context, self._n_branches = context, n_branches
        self._branches = [_Branch(0, 0)]
        self._here = self._branches[0]
        self._turn = 0

    @property
    def ids(self) -> Sequence[int]:
        """The ids whose K and V the branch in hand has, in order."""
        return self._here.ids

    def turn_to(self, ids: Sequence[int], store: KvStore | None = None) -> int:
        """Take in hand a branch that is a beginning of `ids`, as long as there is one; its length.

        One kept in `store` is read where it has more of them.
        """
        self._turn += 1
        source, length = self._nearest(ids)
        if store is not None:
            self._restore(store, ids, length)
            source, length = self._nearest(ids)
        if len(source.ids) - length > WORTH_KEEPING and self._n_branches > 1:
            branch = self._new(source)
            if length:
                self._context.share(source.sequence, branch.sequence, length)
            branch.ids = source.ids[:length]
            source = branch
        self._here = source
        self._here.last_turn = self._turn
        for branch in list(self._branches):
            if self._turn - branch.last_turn > MOST_TURNS:
                self._drop(branch)
        return self.cut(length)

    def cut(self, length: int) -> int:
        """Drop what the branch in hand holds beyond `length`; what is left, less where the model cannot forget."""
        here = self._here
        if length < self._context.length(here.sequence):  # more than is credited, after a decode that failed
            if not self._context.forget(here.sequence, length):
                self._context.forget(here.sequence, 0)
                length = 0
            del here.ids[length:]
        return length

    def decode(self, ids: Sequence[int], n_rows: int) -> None:
        """Go on by these ids, with logits of the last `n_rows`. Raises AbortedError: what was done is kept."""
        here, n, start = self._here, len(ids), len(self._here.ids)
        tokens, positions = np.asarray(ids, np.int32), np.arange(start, start + n, dtype=np.int32)
        sequences, outputs = np.full(n, here.sequence, np.int32), np.zeros(n, np.int8)
        outputs[-n_rows:] = 1
        while True:
            try:
                self._context.decode(tokens, positions, sequences, outputs)
            except FullError:
                if not self._drop_oldest():
                    raise
            except AbortedError:
                here.ids.extend(ids[: self._context.length(here.sequence) - start])
                raise
            else:
                here.ids.extend(ids)
                return

    def keep(self, store: KvStore) -> None:
        """Keep the branch in hand on the disk, if there is room."""
        here = self._here
        n_bytes = self._context.state_bytes(here.sequence) + 4 * len(here.ids)
        store.keep(here.ids, n_bytes, lambda path: self._context.save(here.sequence, here.ids, path))

    def _nearest(self, ids: Sequence[int]) -> tuple[_Branch, int]:
        """The branch with the longest beginning of `ids`, and how long that is; of equal ones the least beyond it."""
        wanted = np.asarray(ids, np.int32)
        lengths = [(n_common(branch.ids, wanted), -len(branch.ids), i) for i, branch in enumerate(self._branches)]
        length, _, i = max(lengths)
        return self._branches[i], length

    def _restore(self, store: KvStore, ids: Sequence[int], n_here: int) -> None:
        """Bring a kept branch, if there is one with more of `ids` than the `n_here` that are there."""
        kept = store.best(ids, self._context.n_ctx)
        if kept is None or kept.n_common < n_here + WORTH_TOKENS:
            return
        before, branch = self._here, self._new(self._here)
        self._here = branch
        while sum(len(each.ids) for each in self._branches) + kept.n_ids > self._context.n_ctx and self._drop_oldest():
            pass
        restored = store.read(kept.path, lambda path: self._context.load(branch.sequence, path))
        branch.ids = restored or []
        if restored is None:
            self._context.forget(branch.sequence, 0)
            self._here = before if before in self._branches else branch

    def _new(self, source: _Branch) -> _Branch:
        """An empty branch; where there are too many, in the place of the one used longest ago but for `source`."""
        if self._n_branches == 1:
            self.cut(0)
            return self._here
        if len(self._branches) == self._n_branches:
            self._drop_oldest(source)
        used = {branch.sequence for branch in self._branches}
        branch = _Branch(next(i for i in range(self._n_branches) if i not in used), self._turn)
        self._branches.append(branch)
        return branch

    def _drop_oldest(self, but: _Branch | None = None) -> bool:
        """Drop the branch used longest ago, but for this one or the one in hand; False where there is none."""
        others = [branch for branch in self._branches if branch is not (but or self._here)]
        if not others:
            return False
        self._drop(min(others, key=lambda branch: branch.last_turn))
        return True

    def _drop(self, branch: _Branch) -> None:
        self._context.forget(branch.sequence, 0)
        self._branches.remove(branch)
