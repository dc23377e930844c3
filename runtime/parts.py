"""How llama.cpp cuts tensors into parts, one for each device: what can be cut, and into what shares. Pure arithmetic.

Follows llama.cpp 0c1e57098, src/llama-model.cpp, `llama_meta_device_get_split_state`: attention is cut between groups
of heads that share a KV head, the feed-forward network between blocks; the order of the devices turns from layer to
layer, and every boundary is rounded down. A device that is left without a part makes it write out of bounds or
compute NaN (seen over RPC), so nothing may be left to rounding.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import lcm

from runtime.levels import Shape

_WIDTH = 128  # llama.cpp takes blocks together up to so many elements


def n_groups(shape: Shape, block: int, n_devices: int) -> int:
    """Parts that attention can be cut into, where a block of its type has `block` elements."""
    group = shape.n_heads // shape.n_heads_kv * shape.head_dim
    while block < _WIDTH and block * n_devices < group:
        block *= 2
    return shape.n_heads * shape.head_dim // lcm(group, block)


def apportioned(groups: int, capacities: Sequence[int]) -> tuple[int, ...]:
    """Whole groups for each device, one at least, by their memory. As many as devices is the least that can be cut."""
    assert groups >= len(capacities), (groups, capacities)
    parts = [1] * len(capacities)
    for _ in range(groups - len(capacities)):
        after = [(part + 1) / max(capacity, 1) for part, capacity in zip(parts, capacities, strict=True)]
        parts[after.index(min(after))] += 1
    return tuple(parts)


def all_have_a_part(shape: Shape, block: int, shares: Sequence[float]) -> bool:
    """Whether these shares leave every device a part of attention and of the feed-forward network, in every layer."""
    groups, blocks = n_groups(shape, block, len(shares)), shape.n_ff // lcm(block, _WIDTH)
    turns = [(*shares[i:], *shares[:i]) for i in range(len(shares))]
    return all(_least(n, turn) > 0 for n in (groups, blocks) for turn in turns)


def _least(n: int, shares: Sequence[float]) -> int:
    """The fewest of `n` that one of the shares gets, boundaries rounded down and the rest to the last."""
    total = sum(shares) or 1
    ends = [*(int(n * end / total) for end in list(accumulate(shares))[:-1]), n]
    return min(end - start for start, end in zip([0, *ends], ends, strict=False))
