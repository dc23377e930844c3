"""The rival of the runtime: bare loops over llama_decode, as llama-bench runs them, on the wheel that Bise runs on.

A process of its own: `python -m benchmarks.raw_runtime MODEL N_CTX N_THREADS` loads the model and answers requests, one
JSON object a line. It draws no token, makes no text and sends nothing while it measures; llama-bench does not either
(llama.cpp 0c1e57098, tools/llama-bench/llama-bench.cpp, test_prompt and test_gen).
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

N_BATCH, N_UBATCH = 2048, 512
"""llama-bench's, and Bise's."""


class RawRuntime:
    """A loaded model, and how long that took."""

    def __init__(self, path: Path, n_ctx: int, n_threads: int) -> None:
        import llama_cpp.llama_cpp as lib

        import runtime.native  # noqa: F401  takes llama.cpp's log, which would go to the terminal

        self._lib: Any = lib
        began = time.perf_counter()
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, N_BATCH, N_UBATCH
        params.n_threads = params.n_threads_batch = n_threads
        self._context = lib.llama_init_from_model(self._model, params)
        assert self._context, path
        self.load_seconds = time.perf_counter() - began
        self._n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._random = np.random.default_rng(1)

    def run(self, n_prompt: int, n_answer: int) -> dict[str, float]:
        """Seconds of reading a prompt of random ids from an empty cache, and of as many single ids behind it."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        ids = (ctypes.c_int32 * (n_prompt + n_answer))(*self._random.integers(0, self._n_vocab, n_prompt + n_answer))
        began = time.perf_counter()
        for first in range(0, n_prompt, N_BATCH):
            self._decode(ids, first, min(N_BATCH, n_prompt - first))
        self._lib.llama_synchronize(self._context)
        read = time.perf_counter()
        for i in range(n_prompt, n_prompt + n_answer):
            self._decode(ids, i, 1)
            self._lib.llama_synchronize(self._context)
        return {"prompt_seconds": read - began, "answer_seconds": time.perf_counter() - read}

    def _decode(self, ids: Any, first: int, n: int) -> None:
        at = ctypes.cast(ctypes.addressof(ids) + 4 * first, ctypes.POINTER(ctypes.c_int32))
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(at, n))
        assert status == 0, status


def main(path: str, n_ctx: str, n_threads: str) -> None:
    raw = RawRuntime(Path(path), int(n_ctx), int(n_threads))
    _tell({"load_seconds": raw.load_seconds})
    for line in sys.stdin:
        _tell(raw.run(**json.loads(line)))


def _tell(found: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
