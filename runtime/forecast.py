"""How fast a placement can be at most: tokens a second by memory bandwidth, a prompt's first token by arithmetic.

Takes a placement and the figures of data sheets; gives upper bounds, not expectations: nothing is counted but the bytes
that every token reads, or the multiplications that every prompt takes. Kernels, launches, transfers and waiting come on
top. Pure arithmetic; nothing of it has been compared with a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.levels import Shape
from runtime.placement import Placement

A100_BANDWIDTH = 1_935 * 10**9
"""Bytes a second of an A100 80GB PCIe, by NVIDIA's data sheet: the slowest of its 80 GB cards from A100 to H100."""

A100_FLOPS = 312 * 10**12
"""Operations a second of its tensor cores in BF16, dense, by the same."""

HOST_BANDWIDTH = 200 * 10**9
"""Bytes a second of a host with 8 channels of DDR4-3200: an assumption."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What the devices and the host can do."""

    bandwidth: int = A100_BANDWIDTH
    """Bytes a second of each device's memory."""
    host_bandwidth: int = HOST_BANDWIDTH
    flops: int = A100_FLOPS
    """Operations a second of each device."""


def tokens_per_second(placement: Placement, n_tokens: int, rates: Rates) -> float:
    """The most tokens a second with `n_tokens` in the KV cache: all weights and the cache so far are read for each.

    Layers are computed one after the other, wherever they lie; parts of tensors at the same time on all devices.
    """
    filled = min(1.0, n_tokens / placement.wish.n_ctx)
    devices = [(use.weights + use.kv * filled) / rates.bandwidth for use in placement.uses]
    host = (placement.host.weights + placement.host.kv * filled) / rates.host_bandwidth
    seconds = host + (max(devices) if placement.wish.split == "tensor" else sum(devices))
    return 1 / seconds if seconds else 0.0


def prompt_operations(shape: Shape, n_tokens: int) -> int:
    """Multiplications and additions that a prompt takes: its matrix products and its attention, which is causal."""
    width = shape.n_heads * shape.head_dim
    matrices = 2 * shape.n_embd * (width + shape.kv_width) + 3 * shape.n_embd * shape.n_ff
    products = 2 * shape.n_layers * matrices * n_tokens + 2 * shape.n_embd * shape.n_vocab  # the last token's logits
    attention = 2 * 2 * shape.n_layers * width * n_tokens * (n_tokens + 1) // 2
    return products + attention


def prompt_seconds(shape: Shape, n_tokens: int, devices: Sequence[int], rates: Rates) -> float:
    """The least seconds to the first token of the answer, with every device at work all the time."""
    return prompt_operations(shape, n_tokens) / (rates.flops * len(devices))
