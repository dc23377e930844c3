"""Weights + KV cache + compute buffers against the memory of the devices: what fits, and split how. Pure arithmetic.

Takes the bytes of a model's tensors, its shape, and a wish (context, KV type, sequences, split); gives which layers go
to which device, which stay in the host's memory, and what each then holds. llama.cpp's own choice, by free memory and
layer count, is blind to tensor sizes; ours levels the fill of the devices. Knows nothing of levels or files.

The compute buffers follow llama.cpp 0c1e57098 with flash attention, as read from its log on one, two and three RPC
devices: exactly for the shape of Mistral Large 2, up to n_ubatch × 5 × n_embd floats too much for others
(tests/test_placement.py and tests/test_allocation.py ask it again), and on one H200: there CUDA's own context and pools
took 617 MiB besides, which `reserve` is for. They have not been compared with two CUDA devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import inf
from typing import Literal

from runtime.errors import EngineError
from runtime.levels import Shape
from runtime.parts import all_have_a_part, apportioned, n_groups

Split = Literal["layer", "tensor"]
"""Whole layers to each device, or of every tensor a part to each device, which llama.cpp calls experimental."""

Holds = Literal["layers", "last layer", "output"]
"""What a device computes: any layers, the last one alone, or none but the output."""

KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Bytes of one element of the KV cache. q8_0 and q4_0 are blocks of 32 with an F16 scale (ggml-common.h)."""

DEFAULT_RESERVE = 2**30
"""Bytes left free on each device for its driver, which took 617 MiB of an H200."""

_CONTEXT_STEP = 256  # llama.cpp rounds the KV cache up to this many tokens
_PIPELINE_COPIES = 4  # GGML_SCHED_MAX_COPIES: inputs are copied so often when several devices work as a pipeline
_F32, _F16 = 4, 2
_INDICES = 4 + 8 + 8  # of a token, in bytes: its position, and its cells in the K and in the V cache


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model's tensors, by where they must lie."""

    host: int
    """token_embd: stays in the host's memory."""
    layers: tuple[int, ...]
    output: int
    """output and output_norm: go with the last device."""
    block: int = 256
    """Elements of a block of the matrices' types, which cannot be cut; 256 is the most."""

    @property
    def total(self) -> int:
        return self.host + sum(self.layers) + self.output


@dataclass(frozen=True, slots=True)
class Wish:
    """What the model should run with."""

    n_ctx: int
    """Tokens, over all sequences."""
    kv_type: str = "f16"
    n_ubatch: int = 512
    n_seq: int = 1
    """Sequences in the cache."""
    n_outputs: int = 1
    """Most rows of logits of one ubatch: 1 for a chat, every token for measuring."""
    split: Split = "layer"
    unified: bool = False
    """All sequences share the context; else each has its own part."""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What one device holds, in bytes."""

    n_layers: int
    weights: int
    kv: int
    compute: int
    capacity: int
    """Memory of the device without the reserve."""
    copied: int = 0
    """Room for what CUDA copies over of layers on the host to read a prompt: one layer. An H200 took less, a matrix."""
    unpacked: int = 0
    """What CUDA takes beyond `compute` for a layer of a quantized KV cache, which attention unpacks to f16."""
    part: int = 0
    """Where tensors are split: how many of the groups of heads lie here."""

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.copied + self.unpacked

    @property
    def spare(self) -> int:
        """Bytes left; negative where it does not fit."""
        return self.capacity - self.total


@dataclass(frozen=True, slots=True)
class HostUse:
    """What the host's memory holds, in bytes."""

    n_layers: int
    embedding: int
    """token_embd, of which one row a token is read."""
    weights: int
    """Of its layers."""
    kv: int
    compute: int
    """Compute and output buffers."""

    @property
    def total(self) -> int:
        return self.embedding + self.weights + self.kv + self.compute


@dataclass(frozen=True, slots=True)
class Placement:
    """One way to lay a model over the devices and the host."""

    uses: tuple[DeviceUse, ...]
    host: HostUse
    wish: Wish

    @property
    def fits(self) -> bool:
        return all(use.spare >= 0 for use in self.uses)

    @property
    def spare(self) -> int:
        """Bytes left on the fullest device."""
        return min(use.spare for use in self.uses)

    @property
    def tensor_split(self) -> tuple[float, ...]:
        """llama.cpp's `tensor_split` that gives exactly these layers, or parts of tensors, to these devices.

        llama.cpp puts layer i of n, the output counted as layer n, on the first device whose cumulated share exceeds
        i / (n + 1) (src/llama-model.cpp, `load_tensors`); boundaries between two layers are safe from rounding. Layers
        on the host do not count.
        """
        if self.wish.split == "tensor":
            return tuple(float(use.part) for use in self.uses)
        ends = [max(0.0, end - 0.5) for end in accumulate(use.n_layers for use in self.uses)]
        ends[-1] = sum(use.n_layers for use in self.uses) + 1.0
        return tuple(end - start for start, end in zip([0.0, *ends], ends, strict=False))

    @property
    def n_gpu_layers(self) -> int:
        """llama.cpp's setting: it counts the output as a layer, and puts the first layers on the host."""
        if not self.host.n_layers:
            return -1
        return sum(use.n_layers for use in self.uses) + 1


def kv_bytes(shape: Shape, wish: Wish, n_layers: int | None = None) -> int:
    """Bytes of the K and V caches of that many layers (all by default) at the wished context."""
    if wish.kv_type not in KV_BYTES:
        raise EngineError(f"{wish.kv_type!r} is not a KV cache type; known: {', '.join(KV_BYTES)}")
    layers = shape.n_layers if n_layers is None else n_layers
    return int(2 * layers * shape.kv_width * KV_BYTES[wish.kv_type] * _n_cells(wish))


def _n_cells(wish: Wish) -> int:
    """Tokens the KV cache has room for: the context, rounded up as llama.cpp does, for each sequence."""
    return _cells_of_one(wish) * (1 if wish.unified else wish.n_seq)


def _cells_of_one(wish: Wish) -> int:
    """Tokens of one sequence, or of all that share them (src/llama-context.cpp, `n_ctx_seq`)."""
    return _rounded_up(_rounded_up(wish.n_ctx) // (1 if wish.unified else wish.n_seq))


def _rounded_up(n_tokens: int) -> int:
    return -(-n_tokens // _CONTEXT_STEP) * _CONTEXT_STEP


def compute_bytes(
    shape: Shape, wish: Wish, index: int, n_devices: int, *, pipelined: bool = True, holds: Holds = "layers"
) -> int:
    """Bytes of the compute buffer of device `index`: the attention mask, one layer's activations, its input copies.

    The last device computes the rows of logits, where they need more than a layer. Exact for an f16 cache; with a
    quantized one llama.cpp takes up to n_ubatch × n_embd floats less.
    """
    n_ubatch = min(wish.n_ubatch, wish.n_ctx)
    n_rows = min(n_ubatch, max(wish.n_outputs, wish.n_seq))
    copies = _PIPELINE_COPIES if pipelined and n_devices > 1 else 1
    logits = _F32 * n_rows * (shape.n_vocab + shape.n_embd) if index == n_devices - 1 else 0
    if holds == "output":
        return logits + (_F32 * n_rows * shape.n_embd * copies if copies > 1 else 0)
    mask = copies * _cells_of_one(wish) * n_ubatch * _F16
    activations = n_ubatch * _F32 * 3 * (shape.n_embd + shape.n_ff)
    inputs = copies * n_ubatch * _INDICES
    if holds == "last layer":  # behind its attention only the rows that are asked for are computed
        attention = n_ubatch * _F32 * 4 * shape.n_embd
        activations = max(attention, activations * n_rows // n_ubatch)
    if copies == 1:
        return max(mask + activations, logits) + inputs
    row = n_ubatch * _F32 * shape.n_embd
    inputs += row * copies * (1 if index == 0 or holds == "last layer" else 2)
    return mask + inputs + max(activations, logits + (row if logits else 0))


def unpacked_bytes(shape: Shape, wish: Wish) -> int:
    """Bytes that CUDA takes beyond `compute_bytes` where a quantized cache is long: K and V of a layer in f16.

    They lie beside what attention computes, so they count where both are more than the feed-forward network takes.
    Measured on an H200 for the 123B's shape at 8,192 to 131,072 tokens (tests/test_placement.py).
    """
    if wish.kv_type in ("f16", "bf16"):
        return 0
    n_ubatch = min(wish.n_ubatch, wish.n_ctx)
    attention = n_ubatch * _F32 * 4 * shape.n_embd + 2 * _F16 * shape.kv_width * _n_cells(wish)
    return max(0, attention - n_ubatch * _F32 * 3 * (shape.n_embd + shape.n_ff))


def host_bytes(shape: Shape, wish: Wish, n_devices: int, n_host_layers: int) -> int:
    """Bytes of the host's compute and output buffers, from the same log."""
    n_ubatch = min(wish.n_ubatch, wish.n_ctx)
    copies = _PIPELINE_COPIES if n_devices > 1 and not n_host_layers and wish.split == "layer" else 1
    row = n_ubatch * _F32 * shape.n_embd
    mask = copies * (_cells_of_one(wish) * n_ubatch * _F16 + n_ubatch * _INDICES)
    layer = n_ubatch * _F32 * 3 * (shape.n_embd + shape.n_ff) if n_host_layers else copies * row
    return mask + layer + row + _F32 * wish.n_seq * shape.n_vocab


def place(
    weights: Weights,
    shape: Shape,
    wish: Wish,
    devices: Sequence[int],
    reserve: int = DEFAULT_RESERVE,
    *,
    n_host_layers: int = 0,
) -> Placement:
    """The contiguous split of the layers over all devices that fills the fullest of them least.

    `devices` are bytes of memory each, of which `reserve` stays free; the first `n_host_layers` layers stay in the
    host's memory, with their part of the KV cache. The result may not fit: ask `fits`.
    """
    assert 0 <= n_host_layers <= len(weights.layers), n_host_layers
    capacities = [max(0, device - reserve) for device in devices]
    host = HostUse(
        n_layers=n_host_layers,
        embedding=weights.host,
        weights=sum(weights.layers[:n_host_layers]),
        kv=kv_bytes(shape, wish, n_host_layers),
        compute=host_bytes(shape, wish, len(devices), n_host_layers),
    )
    copied = max(weights.layers[:n_host_layers], default=0)
    rest = replace(weights, layers=weights.layers[n_host_layers:])
    if wish.split == "tensor":
        check_tensor_split(weights, shape, wish, [1] * len(capacities), n_host_layers)
        return Placement(_parts(rest, shape, wish, capacities), host, wish)
    uses = _ranges(rest, shape, wish, capacities, pipelined=not n_host_layers)
    return Placement((replace(uses[0], copied=copied), *uses[1:]), host, wish)


def _ranges(
    weights: Weights, shape: Shape, wish: Wish, capacities: Sequence[int], *, pipelined: bool
) -> tuple[DeviceUse, ...]:
    """Whole layers on each device: the split with the least fill of the fullest one."""
    n_layers, n_devices = len(weights.layers), len(capacities)
    before = [0, *accumulate(weights.layers)]
    kv_layer, unpacked = kv_bytes(shape, wish, 1), unpacked_bytes(shape, wish)
    every: tuple[Holds, ...] = ("layers", "last layer", "output")
    buffers = {
        (i, holds): compute_bytes(shape, wish, i, n_devices, pipelined=pipelined, holds=holds)
        for i in range(n_devices)
        for holds in every
    }

    def compute(device: int, start: int, end: int) -> int:
        if end == start:
            return buffers[device, "output"] if device == n_devices - 1 else 0
        return buffers[device, "last layer" if start == n_layers - 1 else "layers"]

    def use(device: int, start: int, end: int) -> DeviceUse:
        last = device == n_devices - 1
        return DeviceUse(
            n_layers=end - start,
            weights=before[end] - before[start] + (weights.output if last else 0),
            kv=(end - start) * kv_layer,
            compute=compute(device, start, end),
            capacity=capacities[device],
            unpacked=unpacked if end > start else 0,
        )

    def fill(device: int, start: int, end: int) -> float:
        last = device == n_devices - 1
        n_bytes = before[end] - before[start] + (end - start) * kv_layer + (weights.output if last else 0)
        n_bytes += compute(device, start, end) + (unpacked if end > start else 0)
        return n_bytes / capacities[device] if capacities[device] else inf

    # best[end]: the least possible fill of the fullest device, and the boundaries, for layers before `end`.
    best: list[tuple[float, tuple[int, ...]]] = [(fill(0, 0, end), (0, end)) for end in range(n_layers + 1)]
    for device in range(1, n_devices):
        best = [
            min((max(best[start][0], fill(device, start, end)), (*best[start][1], end)) for start in range(end + 1))
            for end in range(n_layers + 1)
        ]
    return tuple(use(i, start, end) for i, (start, end) in enumerate(pairwise(best[n_layers][1])))


def _parts(weights: Weights, shape: Shape, wish: Wish, capacities: Sequence[int]) -> tuple[DeviceUse, ...]:
    """Of every tensor and of the KV cache a part on each device, as its memory is to the others'.

    Each device has a compute buffer as large as one device alone would have (read from the log of llama.cpp's `Meta`
    device over two and three RPC devices).
    """
    whole, n_layers = sum(weights.layers) + weights.output, len(weights.layers)
    kv = kv_bytes(shape, wish, n_layers)
    compute = compute_bytes(shape, wish, 0, 1)
    groups = n_groups(shape, weights.block, len(capacities))
    parts = apportioned(groups, capacities)
    if not all_have_a_part(shape, weights.block, parts):  # a share too small for the feed-forward network's blocks
        parts = (1,) * len(capacities)
    return tuple(
        DeviceUse(n_layers, whole * part // sum(parts), kv * part // sum(parts), compute, own, part=part)
        for part, own in zip(parts, capacities, strict=True)
    )


def check_tensor_split(
    weights: Weights, shape: Shape, wish: Wish, shares: Sequence[float], n_host_layers: int = 0
) -> None:
    """Raises EngineError where llama.cpp cannot, or should not, split tensors so."""
    if wish.kv_type not in ("f16", "bf16"):
        raise EngineError(
            f"--split-mode tensor needs a KV cache that is not quantized, and --kv is {wish.kv_type}; take --kv f16, "
            "or --split-mode layer"
        )
    if n_host_layers:
        raise EngineError("--split-mode tensor needs all layers on the GPUs; leave out --gpu-layers")
    if not all_have_a_part(shape, weights.block, shares):
        groups = n_groups(shape, weights.block, len(shares))
        raise EngineError(
            f"--split-mode tensor needs a part of every tensor for each of {len(shares)} devices; here attention has "
            f"at most {groups}, and these shares leave one without; take fewer or more even ones, or --split-mode layer"
        )


def largest_context(
    weights: Weights,
    shape: Shape,
    wish: Wish,
    devices: Sequence[int],
    limit: int,
    reserve: int = DEFAULT_RESERVE,
    *,
    n_host_layers: int = 0,
) -> int:
    """The longest context up to `limit` that fits, in steps of 256 tokens; 0 where not even the first step does."""

    def fits(n_ctx: int) -> bool:
        longer = replace(wish, n_ctx=n_ctx)
        return place(weights, shape, longer, devices, reserve, n_host_layers=n_host_layers).fits

    low, high = 0, limit // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * _CONTEXT_STEP):
            low = middle
        else:
            high = middle - 1
    return low * _CONTEXT_STEP


def fewest_host_layers(
    weights: Weights, shape: Shape, wish: Wish, devices: Sequence[int], reserve: int = DEFAULT_RESERVE
) -> Placement | None:
    """The placement with as few layers on the host as make the rest fit; None where not even the output fits."""
    low, high = 0, len(weights.layers)
    if not place(weights, shape, wish, devices, reserve, n_host_layers=high).fits:
        return None
    while low < high:
        middle = (low + high) // 2
        if place(weights, shape, wish, devices, reserve, n_host_layers=middle).fits:
            high = middle
        else:
            low = middle + 1
    return place(weights, shape, wish, devices, reserve, n_host_layers=low)
