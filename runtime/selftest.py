"""Tests the engine in the process it runs in: `python -m runtime.selftest [GGUF]` prints one JSON object a stage.

Run by `bise doctor` in a child process, because what is looked for may end the process: a wheel with instructions the
CPU lacks, or GCC 12's AMX code. The stages: `library` (versions, features, devices), `load`, `prompt` (a prompt read at
once), `steps` (the same tokens one by one: another path through the kernels), `done` (both agree).
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from runtime.events import EngineSettings

_TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void."


def main(path: Path | None) -> None:
    """Print the stages as they pass; the last one printed is the last one survived."""
    from runtime import native
    from runtime.engine import Engine
    from runtime.native_devices import devices, has_backend

    found = devices()
    _say(
        "library",
        version=native.version(),
        features={name: value for name, value in native.system_info().items() if value != "0"},
        gpu=native.supports_gpu(),
        rpc=native.supports_rpc(),
        cuda=has_backend("CUDA"),
        errors=native.LOG.errors(),
        amx=native.has_amx_kernels(),
        devices=[asdict(device) for device in found],
    )
    if path is None:
        return
    engine = Engine(path, EngineSettings(n_ctx=256))
    _say("load", description=engine.info().description)
    ids = engine.vocabulary.tokenize(_TEXT, bos=True)[:128]
    engine.read(ids, lambda *_: None)
    at_once = engine.logits().copy()
    _say("prompt", tokens=len(ids))
    engine.read(ids[:1], lambda *_: None)
    for token in ids[1:]:
        engine.extend(token)
    one_by_one = engine.logits().copy()
    _say("steps", tokens=len(ids))
    engine.close()
    spread = float(np.abs(at_once - one_by_one).max() / np.abs(at_once).max())
    _say("done", finite=bool(np.isfinite(at_once).all()), difference=spread)


def _say(stage: str, **facts: object) -> None:
    sys.stdout.write(json.dumps({"stage": stage, **facts}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
