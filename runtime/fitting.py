"""A GGUF file and the devices that are here → settings that lay it over them evenly, or a refusal with numbers.

Reads headers only; placement.py does the arithmetic. With no GPU nothing is changed. The
split runs here on llama.cpp RPC devices; it has not yet run on CUDA.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runtime.concessions import Room, gib, nearest, shortage
from runtime.errors import EngineError
from runtime.events import EngineSettings
from runtime.hardware import Device, host_memory
from runtime.levels import Shape
from runtime.library import shards
from runtime.native_file import Header, read_header
from runtime.placement import KV_BYTES, Weights, Wish, place


def fitted(
    path: Path, settings: EngineSettings, devices: Sequence[Device], *, n_seq: int = 1, n_outputs: int = 1
) -> EngineSettings:
    """The settings with a `tensor_split` for several GPUs. Raises EngineError where the model cannot fit them.

    `n_seq` and `n_outputs` as in `Wish`. A `tensor_split` in the settings is left alone, and so are KV types and models
    that placement.py does not know.
    """
    gpus = in_llama_order(devices)
    if not gpus or settings.tensor_split is not None or not settings.n_gpu_layers or settings.kv_type not in KV_BYTES:
        return settings
    read = read_weights(path)
    if read is None:
        return settings
    weights, shape = read
    wish = Wish(settings.n_ctx, settings.kv_type, settings.n_ubatch, n_seq, n_outputs)
    n_host_layers = shape.n_layers + 1 - settings.n_gpu_layers if settings.n_gpu_layers > 0 else 0
    n_host_layers = min(max(n_host_layers, 0), shape.n_layers)
    free = tuple(device.memory_free for device in gpus)
    placement = place(weights, shape, wish, free, reserve=0, n_host_layers=n_host_layers)
    if not placement.fits:
        room = Room(free, reserve=0, host=host_memory()[0])
        found = nearest(weights, shape, wish, room)
        advice = "; or ".join(f"{each.change} ({each.price})" for each in found)
        raise EngineError(
            f"{path.name} with {settings.n_ctx} tokens of {settings.kv_type} KV cache does not fit: "
            f"{shortage(placement, [device.name for device in gpus])}; "
            f"take {advice or f'a smaller level: its weights alone are {gib(weights.total)}'}"
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
