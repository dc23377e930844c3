"""A GGUF file and the devices that are here → settings that lay it over them evenly, or a refusal with numbers.

Reads headers only; placement.py does the arithmetic. With no GPU nothing is changed. The split runs here on llama.cpp
RPC devices; on CUDA only one device has been tried.
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
from runtime.placement import KV_BYTES, Split, Weights, Wish, check_tensor_split, place

RESERVE = 2**29
"""Bytes left of what is free on each GPU, for what CUDA takes while it computes. An H200 took 617 MiB beside what was
planned; a part of it is the driver's context, which is gone from the free memory already."""


def fitted(
    path: Path,
    settings: EngineSettings,
    devices: Sequence[Device],
    *,
    n_seq: int = 1,
    n_outputs: int = 1,
    unified: bool = False,
) -> EngineSettings:
    """The settings with a `tensor_split` for several GPUs. Raises EngineError where the model cannot fit them.

    `n_seq`, `n_outputs` and `unified` as in `Wish`. A `tensor_split` in the settings is left alone, but for what
    llama.cpp cannot do; so are KV types and models that placement.py does not know.
    """
    gpus = _chosen(settings, devices)
    if not gpus or not settings.n_gpu_layers:
        return settings
    kv_type = "f16" if settings.kv_type == "bf16" else settings.kv_type  # of the same size
    read = read_weights(path) if kv_type in KV_BYTES else None
    if read is None:
        return settings
    weights, shape = read
    split: Split = "tensor" if settings.split_mode == "tensor" else "layer"
    wish = Wish(settings.n_ctx, kv_type, settings.n_ubatch, n_seq, n_outputs, split, unified)
    n_host_layers = shape.n_layers + 1 - settings.n_gpu_layers if settings.n_gpu_layers > 0 else 0
    n_host_layers = min(max(n_host_layers, 0), shape.n_layers)
    if settings.tensor_split is not None:
        if split == "tensor":
            check_tensor_split(weights, shape, wish, settings.tensor_split, n_host_layers)
        return settings
    free = tuple(device.memory_free for device in gpus)
    placement = place(weights, shape, wish, free, RESERVE, n_host_layers=n_host_layers)
    if not placement.fits:
        room = Room(free, RESERVE, host=host_memory()[0])
        found = nearest(weights, shape, wish, room)
        advice = "; or ".join(f"{each.change} ({each.price})" for each in found)
        raise EngineError(
            f"{path.name} with {settings.n_ctx} tokens of {settings.kv_type} KV cache does not fit: "
            f"{shortage(placement, [device.name for device in gpus])}; "
            f"take {advice or f'a smaller level: its weights alone are {gib(weights.total)}'}"
        )
    return replace(settings, tensor_split=placement.tensor_split) if len(gpus) > 1 else settings


def _chosen(settings: EngineSettings, devices: Sequence[Device]) -> list[Device]:
    """The GPUs that the settings ask for. Raises EngineError where there are none such."""
    gpus = in_llama_order(devices)
    names = ", ".join(device.name for device in gpus) or "no GPU"
    if settings.split_mode not in ("layer", "tensor"):
        raise EngineError(f"--split-mode {settings.split_mode} is not known; take layer or tensor")
    if settings.split_mode == "tensor":
        if not gpus:
            raise EngineError("--split-mode tensor splits over GPUs, and there are none; take --split-mode layer")
        if sum(device.kind == "gpu" for device in devices) == 1:
            raise EngineError(f"--split-mode tensor needs two GPUs, and {names} is the only one; leave it out")
        # llama.cpp's order is another one here: that of ggml's registry (src/llama.cpp, llama_prepare_model_devices)
        gpus = [device for device in devices if device.kind == "gpu"]
    if settings.tensor_split is not None and gpus:
        shares = settings.tensor_split
        if len(shares) != len(gpus) or min(shares) < 0 or not sum(shares) > 0:
            told = ",".join(f"{share:g}" for share in shares)
            raise EngineError(f"--tensor-split {told} must give each of the {len(gpus)} devices a share: {names}")
    if settings.main_gpu is None:
        return gpus
    if settings.split_mode == "tensor" or settings.tensor_split is not None:
        raise EngineError("--main-gpu puts the whole model on one device; leave out --split-mode and --tensor-split")
    if not 0 <= settings.main_gpu < len(gpus):
        raise EngineError(f"--main-gpu {settings.main_gpu} is none of the devices, which count from 0: {names}")
    return [gpus[settings.main_gpu]]


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
    bits = {
        round(8 * tensors.get(f"blk.{i}.{name}.weight", 0) / n_elements, 2)
        for i in range(shape.n_layers)
        for name, n_elements in (
            ("attn_output", shape.n_heads * shape.head_dim * shape.n_embd),
            ("ffn_down", shape.n_ff * shape.n_embd),
        )
    }
    block = 1 if bits <= {16, 32} else 32 if bits <= {8.5, 16, 32} else 256  # Q8_0 has 8.5 bits in blocks of 32
    return Weights(host, tuple(layers), output, block), shape


def draft_place(path: Path, n_vocab: int, wish: Wish, devices: Sequence[int], reserve: int) -> tuple[int, int]:
    """Where a draft model lies and what it holds there, by the bytes of each device: its index, and bytes.

    Whole on the device with most memory, before the model that it guesses for (draft_model.py), whose wish it shares.
    Raises EngineError where it fits none, or cannot guess for that vocabulary.
    """
    read = read_weights(path)
    if read is None:
        raise EngineError(f"the draft model {path.name} has a layout whose memory cannot be planned; leave out --draft")
    weights, shape = read
    if shape.n_vocab != n_vocab:
        raise EngineError(
            f"the draft model {path.name} has {shape.n_vocab} tokens and the model {n_vocab}; it needs the same "
            "vocabulary"
        )
    capacity, i = max((n_bytes, i) for i, n_bytes in enumerate(devices))
    (use,) = place(weights, shape, replace(wish, split="layer"), (capacity,), reserve).uses
    if use.spare < 0:
        raise EngineError(
            f"the draft model {path.name} with {wish.n_ctx:,} tokens of {wish.kv_type} KV cache takes "
            f"{gib(use.total)}, {gib(-use.spare)} more than device {i} has left; take a smaller one, or a shorter "
            "--context, or leave out --draft"
        )
    return i, use.total


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
