"""Weights + KV cache + compute buffers against the memory of the devices: what fits, and split how. Pure arithmetic.

Takes the bytes of a model's tensors, its shape, and a wish (context, KV type, ubatch); gives which layers go to which
device and what each then holds. llama.cpp's own choice, by free memory and layer count, is blind to tensor sizes; ours
levels the fill of the devices. Knows nothing of levels or files.

The compute buffers follow llama.cpp 0c1e57098 with flash attention and one output row, as read from its log for the
exact shape of Mistral Large 2 on one, two and three RPC devices (tests/test_placement.py asks it again). They have not
been compared with a CUDA device, whose own context takes memory besides: that is what `reserve` is for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

from runtime.errors import EngineError
from runtime.levels import Shape

KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Bytes of one element of the KV cache. q8_0 and q4_0 are blocks of 32 with an F16 scale (ggml-common.h)."""

DEFAULT_RESERVE = 2**30
"""Bytes left free on each device for its driver: an assumption, not measured on CUDA."""

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

    @property
    def total(self) -> int:
        return self.host + sum(self.layers) + self.output


@dataclass(frozen=True, slots=True)
class Wish:
    """What the model should run with."""

    n_ctx: int
    kv_type: str = "f16"
    n_ubatch: int = 512


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What one device holds, in bytes."""

    n_layers: int
    weights: int
    kv: int
    compute: int
    capacity: int
    """Memory of the device without the reserve."""

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute

    @property
    def spare(self) -> int:
        """Bytes left; negative where it does not fit."""
        return self.capacity - self.total


@dataclass(frozen=True, slots=True)
class Placement:
    """One way to lay a model over the devices."""

    uses: tuple[DeviceUse, ...]

    @property
    def fits(self) -> bool:
        return all(use.spare >= 0 for use in self.uses)

    @property
    def spare(self) -> int:
        """Bytes left on the fullest device."""
        return min(use.spare for use in self.uses)

    @property
    def tensor_split(self) -> tuple[float, ...]:
        """llama.cpp's `tensor_split` that gives exactly these layers to these devices.

        llama.cpp puts layer i of n, the output counted as layer n, on the first device whose cumulated share exceeds
        i / (n + 1) (src/llama-model.cpp, `load_tensors`); boundaries between two layers are safe from rounding.
        """
        ends = [max(0.0, end - 0.5) for end in accumulate(use.n_layers for use in self.uses)]
        ends[-1] = sum(use.n_layers for use in self.uses) + 1.0
        return tuple(end - start for start, end in zip([0.0, *ends], ends, strict=False))


def kv_bytes(shape: Shape, wish: Wish, n_layers: int | None = None) -> int:
    """Bytes of the K and V caches of that many layers (all by default) at the wished context."""
    if wish.kv_type not in KV_BYTES:
        raise EngineError(f"{wish.kv_type!r} is not a KV cache type; known: {', '.join(KV_BYTES)}")
    layers = shape.n_layers if n_layers is None else n_layers
    return int(2 * layers * shape.kv_width * KV_BYTES[wish.kv_type] * _n_cells(wish))


def _n_cells(wish: Wish) -> int:
    """Tokens the KV cache has room for: the context, rounded up as llama.cpp does."""
    return -(-wish.n_ctx // _CONTEXT_STEP) * _CONTEXT_STEP


def compute_bytes(shape: Shape, wish: Wish, index: int, n_devices: int) -> int:
    """Bytes of the compute buffer of device `index`: the attention mask, one layer's activations, its input copies.

    Exact for an f16 cache; with a quantized one llama.cpp takes up to n_ubatch × n_embd floats less.
    """
    copies = _PIPELINE_COPIES if n_devices > 1 else 1
    n_ubatch = min(wish.n_ubatch, wish.n_ctx)
    mask = copies * _n_cells(wish) * n_ubatch * _F16
    activations = n_ubatch * _F32 * 3 * (shape.n_embd + shape.n_ff)
    inputs = copies * n_ubatch * _INDICES
    if n_devices > 1:
        inputs += n_ubatch * _F32 * shape.n_embd * copies * (1 if index == 0 else 2)
    return mask + activations + inputs


def place(
    weights: Weights, shape: Shape, wish: Wish, devices: Sequence[int], reserve: int = DEFAULT_RESERVE
) -> Placement:
    """The contiguous split of the layers over all devices that fills the fullest of them least.

    `devices` are bytes of memory each, of which `reserve` stays free. The result may not fit: ask `fits`.
    """
    n_layers = len(weights.layers)
    capacities = [max(0, device - reserve) for device in devices]
    before = [0, *accumulate(weights.layers)]
    kv_layer = kv_bytes(shape, wish, 1)
    buffers = [compute_bytes(shape, wish, device, len(devices)) for device in range(len(devices))]

    def use(device: int, start: int, end: int) -> DeviceUse:
        last = device == len(devices) - 1
        return DeviceUse(
            n_layers=end - start,
            weights=before[end] - before[start] + (weights.output if last else 0),
            kv=(end - start) * kv_layer,
            compute=buffers[device] if end > start or last else 0,
            capacity=capacities[device],
        )

    def fill(device: int, start: int, end: int) -> float:
        last = device == len(devices) - 1
        n_bytes = before[end] - before[start] + (end - start) * kv_layer
        n_bytes += (buffers[device] if end > start or last else 0) + (weights.output if last else 0)
        return n_bytes / capacities[device] if capacities[device] else inf

    # best[end]: the least possible fill of the fullest device, and the boundaries, for layers before `end`.
    best: list[tuple[float, tuple[int, ...]]] = [(fill(0, 0, end), (0, end)) for end in range(n_layers + 1)]
    for device in range(1, len(devices)):
        best = [
            min((max(best[start][0], fill(device, start, end)), (*best[start][1], end)) for start in range(end + 1))
            for end in range(n_layers + 1)
        ]
    ends = best[n_layers][1]
    return Placement(tuple(use(i, start, end) for i, (start, end) in enumerate(pairwise(ends))))


def largest_context(
    weights: Weights,
    shape: Shape,
    wish: Wish,
    devices: Sequence[int],
    limit: int,
    reserve: int = DEFAULT_RESERVE,
) -> int:
    """The longest context up to `limit` that fits, in steps of 256 tokens; 0 where not even the first step does."""

    def fits(n_ctx: int) -> bool:
        return place(weights, shape, Wish(n_ctx, wish.kv_type, wish.n_ubatch), devices, reserve).fits

    low, high = 0, limit // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * _CONTEXT_STEP):
            low = middle
        else:
            high = middle - 1
    return low * _CONTEXT_STEP
