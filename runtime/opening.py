"""A GGUF file → a loaded model, laid over the devices that are here; and how many threads compute on it."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from runtime.events import EngineSettings
from runtime.fitting import fitted
from runtime.native import Model, has_amx_kernels
from runtime.native_devices import devices, register_rpc


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
    unified: bool = False,
) -> Model:
    """Load a GGUF file over the devices that are here, RPC servers too. Errors as in `native.Model` and `fitted`.

    `n_seq`, `n_outputs` and `unified` are what its context will have, which takes memory.
    """
    register_rpc(settings.rpc_servers)
    placed = fitted(path, settings, devices(), n_seq=n_seq, n_outputs=n_outputs, unified=unified)
    return Model(path, survivable(placed), progress, writable=writable)


def n_threads(settings: EngineSettings, model: Model) -> int:
    """What the settings say; else every core, or one where all layers are on GPUs.

    The processor then only looks up embeddings, and threads that wait for each other would take cores for nothing.
    """
    if settings.n_threads is not None:
        return settings.n_threads
    all_there = settings.n_gpu_layers < 0 or settings.n_gpu_layers > model.info().n_layers
    return 1 if all_there and any(device.kind == "gpu" for device in devices()) else n_cores()
