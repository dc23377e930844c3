"""A model whose every probability is known: it stands in for the engine where the judge's figures must be exact."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.events import EngineSettings
from runtime.native import ModelInfo

N_VOCAB = 11
BOS = 0


class CountingModel:
    """After token t comes t + 1 (after the last, 0) with the probability that the model's file holds.

    The other tokens share the rest of it. A text is digits: "7" is token 8. Like the engine, the model gives a view
    into one buffer, which the next call overwrites.
    """

    n_vocab = N_VOCAB
    n_seq = 2
    bos = BOS
    adds_bos = True

    def __init__(self, likelihood: float, n_ctx: int, on_decode: Callable[[], None]) -> None:
        self.n_ctx = n_ctx
        self.closed = False
        self._on_decode = on_decode
        self._buffer = np.empty((self.n_seq, n_ctx, N_VOCAB), np.float32)
        probabilities = np.full((N_VOCAB, N_VOCAB), (1 - likelihood) / (N_VOCAB - 1))
        probabilities[np.arange(N_VOCAB), (np.arange(N_VOCAB) + 1) % N_VOCAB] = likelihood
        self._logits = (np.log(probabilities) + 3).astype(np.float32)

    def info(self) -> ModelInfo:
        return ModelInfo("counting", n_params=1000, tensor_bytes=500, n_ctx_train=64, n_layers=1)

    def tokenize(self, text: str) -> NDArray[np.int32]:
        return np.array([BOS, *(int(digit) + 1 for digit in text)], np.int32)

    def logits(self, chunks: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        assert not self.closed
        assert (chunks[:, 0] == BOS).all(), "each chunk begins with BOS"
        self._on_decode()
        view = self._buffer[: len(chunks), first:]
        view[:] = self._logits[chunks[:, first:]]
        return view

    def close(self) -> None:
        self.closed = True


@dataclass
class CountingModels:
    """Opens files that hold a likelihood, and counts what is asked of them."""

    opened: list[str] = field(default_factory=list)
    """Stems of the files, in order."""
    models: list[CountingModel] = field(default_factory=list)
    n_decodes: int = 0
    interrupt_at: int | None = None
    """The decode at which the user presses Ctrl-C."""

    def __call__(self, path: Path, settings: EngineSettings) -> CountingModel:
        self.opened.append(path.stem)
        self.models.append(CountingModel(float(path.read_text()), settings.n_ctx, self._count))
        return self.models[-1]

    def _count(self) -> None:
        self.n_decodes += 1
        if self.n_decodes == self.interrupt_at:
            raise KeyboardInterrupt
