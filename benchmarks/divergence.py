"""How far files diverge from the weights they were made of, and which of two does less, with paired errors.

Takes GGUF files and texts, gives the mean KL divergence of every chunk; keeps them as .npy files, so that a run that
was interrupted goes on. Tokens of a chunk are not independent of each other, so every error here is that of the means
of chunks. Knows nothing of how files are made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant.quality.baselog import BaseLog, BaseLogWriter
from quant.quality.measurement import measure
from quant.quality.statistics import Estimate
from quant.quality.texts import Text, split_chunks
from runtime.events import EngineSettings
from runtime.scoring import ScoringEngine

Divergences = Mapping[str, NDArray[np.float64]]
"""Text → mean KL divergence of each of its chunks, in nats a token, (C,)."""


class Judge:
    """The log-probabilities of one base model on some texts, and what is measured against them."""

    def __init__(
        self, base: Path, texts: Sequence[Text], folder: Path, settings: EngineSettings, max_chunks: int | None
    ) -> None:
        """Read the texts with the base, a GGUF file. What is measured is kept in `folder`, which is of one base."""
        self._texts = texts
        self._folder = folder
        self._settings = settings
        self._max_chunks = max_chunks
        folder.mkdir(parents=True, exist_ok=True)
        scorer = ScoringEngine(base, settings)
        try:
            for text in texts:
                if not self._log(text).exists():
                    chunks = self._chunks(scorer, text)
                    with BaseLogWriter(self._log(text), scorer.n_vocab, chunks) as keep:
                        measure(scorer, chunks, source=base, keep=keep)
        finally:
            scorer.close()

    def divergences(self, name: str, file: Path, say: Callable[[str], None] = lambda _: None) -> Divergences:
        """Of a file, by a `name` that only it has."""
        missing = [text for text in self._texts if not self._kept(name, text).exists()]
        if missing:
            scorer = ScoringEngine(file, self._settings)
            try:
                for text in missing:
                    chunks = self._chunks(scorer, text)
                    with BaseLog(self._log(text)) as base:
                        found = measure(scorer, chunks, source=file, base=base).comparison
                    assert found is not None
                    means = found.kld.reshape(len(chunks), -1).mean(axis=1)
                    np.save(self._kept(name, text), means)
                    say(f"{name} {text.name}: {means.mean():.6f}")
            finally:
                scorer.close()
        return {text.name: np.load(self._kept(name, text)) for text in self._texts}

    def _chunks(self, scorer: ScoringEngine, text: Text) -> NDArray[np.int32]:
        return split_chunks(scorer.tokenize(text.content), scorer.n_ctx, text.name, self._max_chunks)

    def _log(self, text: Text) -> Path:
        return self._folder / f"{text.name}.kld"

    def _kept(self, name: str, text: Text) -> Path:
        return self._folder / f"{name}-{text.name}.npy"


@dataclass(frozen=True, slots=True)
class Change:
    """One file beside another, over all chunks of all texts."""

    share: Estimate
    """(its divergence - the other's) / the other's; below 0 it is the better one."""
    by_text: Mapping[str, Estimate]

    @property
    def is_better(self) -> bool:
        """By more than two paired errors."""
        return self.share.value < -2 * self.share.error


def mean(divergences: Divergences) -> Estimate:
    """Over all chunks of all texts."""
    return _estimate(_all(divergences))


def change(file: Divergences, other: Divergences) -> Change:
    """Paired chunk by chunk."""
    by_text = {name: _change(file[name], other[name]) for name in file}
    return Change(_change(_all(file), _all(other)), by_text)


def _change(file: NDArray[np.float64], other: NDArray[np.float64]) -> Estimate:
    difference, scale = _estimate(file - other), float(other.mean())
    return Estimate(difference.value / scale, difference.error / scale)


def _all(divergences: Divergences) -> NDArray[np.float64]:
    return np.concatenate(list(divergences.values()))


def _estimate(values: NDArray[np.float64]) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5)
