"""Log-probabilities of tokens from one row of logits, as the model has them: before any sampler."""

import numpy as np
from numpy.typing import NDArray


def log_probabilities(logits: NDArray[np.float32], token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Logits (n_vocab,) → the token's natural log-probability, and ids and those of the `n_top` likeliest.

    Likeliest first, of equal ones the smaller id. Takes a few float64 rows of memory, whatever `n_top` is.
    """
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    n_top = min(n_top, len(row))
    top = np.flatnonzero(row >= np.partition(row, len(row) - n_top)[len(row) - n_top]) if n_top else np.empty(0, int)
    top = top[np.lexsort((top, -row[top]))][:n_top]
    return float(row[token]), [(int(id_), float(row[id_])) for id_ in top]
