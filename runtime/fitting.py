"""A GGUF file and the devices that are here → settings that lay it over them evenly, or a refusal with numbers.

Reads headers only; placement.py does the arithmetic. With no GPU nothing is changed. The
split runs here on llama.cpp RPC devices; it has not yet run on CUDA.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runtime.errors import EngineError
from runtime.events import EngineSettings
from runtime.hardware import Device
from runtime.levels import Shape
from runtime.library import shards
from runtime.native_file import Header, read_header
from runtime.placement import KV_BYTES, Weights, Wish, largest_context, place


def fitted(path: Path, settings: EngineSettings, devices: Sequence[Device]) -> EngineSettings:
    """The settings with a `tensor_split` for several GPUs. Raises EngineError where the model cannot fit them.

    Settings that place the layers themselves (`tensor_split`, or fewer layers than all) are left alone, and so are KV
    types and models that placement.py does not know.
    """
    gpus = in_llama_order(devices)
    if not gpus or settings.tensor_split is not None or settings.n_gpu_layers >= 0 or settings.kv_type not in KV_BYTES:
        return settings
    read = read_weights(path)
    if read is None:
        return settings
    weights, shape = read
    wish = Wish(settings.n_ctx, settings.kv_type, settings.n_ubatch)
    free = [device.memory_free for device in gpus]
    placement = place(weights, shape, wish, free, reserve=0)
    if not placement.fits:
        names = ", ".join(f"{device.name} {_gib(device.memory_free)}" for device in gpus)
        need = sum(use.total for use in placement.uses)
        longest = largest_context(weights, shape, wish, free, settings.n_ctx, reserve=0)
        advice = f"at most --context {longest} fits" if longest else "take a smaller level, or --gpu-layers"
        raise EngineError(
            f"{path.name} with {settings.n_ctx} tokens of {settings.kv_type} KV cache needs {_gib(need)}, free are "
            f"{names}; {advice}"
        )
    return replace(settings, tensor_split=placement.tensor_split) if len(gpus) > 1 else settings


def in_llama_order(devices: Sequence[Device]) -> list[Device]:
    """The GPUs in the order of llama.cpp's `tensor_split`: RPC devices first (src/llama.cpp, prepare_model_devices)."""
    gpus = [device for device in devices if device.kind == "gpu"]
    return sorted(gpus, key=lambda device: not device.name.startswith("RPC"))


def read_weights(path: Path) -> tuple[Weights, Shape] | None:
    """Tensor bytes and shape from the headers of a GGUF file and its further shards; None for an unknown layout."""
    headers = [read_header(shard) for shard in shards(path)]
    shape = _shape(headers[0])
    if shape is None:
        return None
    tensors = {name: n_bytes for header in headers for name, n_bytes in header.tensors.items()}
    host, output, layers = 0, 0, [0] * shape.n_layers
    for name, n_bytes in tensors.items():
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        if layer.isdecimal() and int(layer) < shape.n_layers:
            layers[int(layer)] += n_bytes
        elif name == "token_embd.weight":
            host += n_bytes
        else:
            output += n_bytes
    if "output.weight" not in tensors:  # tied: llama.cpp puts a second copy of the embeddings on the last device
        output += host
    return Weights(host, tuple(layers), output), shape


def _shape(header: Header) -> Shape | None:
    """The shape from the metadata keys `<architecture>.…`; None where one is missing or differs by layer."""
    architecture = header.texts.get("general.architecture", "")

    def number(key: str) -> int:
        return header.numbers.get(f"{architecture}.{key}", 0)

    n_layers, n_embd, n_ff, n_heads = map(
        number, ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    )
    if not (n_layers and n_embd and n_ff and n_heads):
        return None
    return Shape(
        n_layers=n_layers,
        n_embd=n_embd,
        n_ff=n_ff,
        n_heads=n_heads,
        n_heads_kv=number("attention.head_count_kv") or n_heads,
        head_dim=number("attention.key_length") or n_embd // n_heads,
        n_vocab=number("vocab_size") or header.lengths.get("tokenizer.ggml.tokens", 0),
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
