"""What fits instead of a wish that does not: the nearest concessions, each with its price. Pure arithmetic.

A concession changes one thing: a smaller KV type, a shorter context, a smaller level, or layers on the host. What is
nearest is counted in steps: one for each KV type or level below the wished, and one for each halving of the context, or
of the speed that forecast.py bounds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log2

from runtime.errors import EngineError
from runtime.forecast import Rates, tokens_per_second
from runtime.levels import Shape
from runtime.placement import (
    DEFAULT_RESERVE,
    KV_BYTES,
    Placement,
    Weights,
    Wish,
    fewest_host_layers,
    largest_context,
    place,
)


@dataclass(frozen=True, slots=True)
class Concession:
    """One change to a wish that makes it fit."""

    change: str
    """The option that makes it, such as `--kv q8_0`, or the level."""
    price: str
    """What is given up, in numbers."""
    steps: float


@dataclass(frozen=True, slots=True)
class Room:
    """Where a model is to lie."""

    devices: tuple[int, ...]
    """Bytes of memory of each."""
    reserve: int = DEFAULT_RESERVE
    host: int | None = None
    """Bytes that the host has free; None where that is not known."""
    rates: Rates = field(default_factory=Rates)


def nearest(
    weights: Weights, shape: Shape, wish: Wish, room: Room, smaller: Mapping[str, Weights] | None = None, n: int = 3
) -> tuple[Concession, ...]:
    """The `n` nearest concessions, nearest first; () where the wish fits, or no single one helps.

    `smaller` are levels below the wished one, by name, the largest first. Of each kind there is one at most.
    """
    try:
        if place(weights, shape, wish, room.devices, room.reserve).fits:
            return ()
    except EngineError:  # tensors that cannot be split so
        return ()
    found = (
        _smaller_kv(weights, shape, wish, room),
        _smaller_level(weights, shape, wish, room, smaller or {}),
        _shorter_context(weights, shape, wish, room),
        _layers_on_host(weights, shape, wish, room),
    )
    return tuple(sorted((each for each in found if each is not None), key=lambda each: each.steps)[:n])


def _smaller_kv(weights: Weights, shape: Shape, wish: Wish, room: Room) -> Concession | None:
    types = list(KV_BYTES)
    if wish.split == "tensor" or wish.kv_type not in types:
        return None
    for steps, kv_type in enumerate(types[types.index(wish.kv_type) + 1 :], 1):
        if place(weights, shape, replace(wish, kv_type=kv_type), room.devices, room.reserve).fits:
            bits = [f"{8 * KV_BYTES[name]:g}" for name in (kv_type, wish.kv_type)]
            return Concession(
                f"--kv {kv_type}", f"{bits[0]} bits for each number of the KV cache, not {bits[1]}", steps
            )
    return None


def _smaller_level(
    weights: Weights, shape: Shape, wish: Wish, room: Room, smaller: Mapping[str, Weights]
) -> Concession | None:
    for steps, (name, less) in enumerate(smaller.items(), 1):
        if place(less, shape, wish, room.devices, room.reserve).fits:
            price = (
                f"{gib(less.total)} of weights, not {gib(weights.total)} ({1 - less.total / weights.total:.0%} less)"
            )
            return Concession(name, price, steps)
    return None


def _shorter_context(weights: Weights, shape: Shape, wish: Wish, room: Room) -> Concession | None:
    longest = largest_context(weights, shape, wish, room.devices, wish.n_ctx, room.reserve)
    if not longest:
        return None
    lost = wish.n_ctx - longest
    price = f"{lost:,} tokens less ({lost / wish.n_ctx:.0%})"
    return Concession(f"--context {longest}", price, log2(wish.n_ctx / longest))


def _layers_on_host(weights: Weights, shape: Shape, wish: Wish, room: Room) -> Concession | None:
    if wish.split == "tensor":
        return None
    split = fewest_host_layers(weights, shape, wish, room.devices, room.reserve)
    if split is None or (room.host is not None and split.host.total > room.host):
        return None
    fastest, whole = (
        tokens_per_second(each, 0, room.rates) for each in (split, place(weights, shape, wish, room.devices, 0))
    )
    layers = "1 layer" if split.host.n_layers == 1 else f"{split.host.n_layers} layers"
    price = (
        f"{layers} and {gib(split.host.total)} in the host's memory, at most {fastest:.1f} tokens/s, not {whole:.1f}"
    )
    return Concession(f"--gpu-layers {split.n_gpu_layers}", price, log2(whole / fastest))


def shortage(placement: Placement, names: Sequence[str] = ()) -> str:
    """What the fullest device lacks, in one phrase."""
    index, use = min(enumerate(placement.uses), key=lambda pair: pair[1].spare)
    name = names[index] if names else f"device {index}"
    return f"{name} would hold {gib(use.total)} and has room for {gib(use.capacity)}"


def gib(n_bytes: float) -> str:
    """Binary units, as graphics cards are sold."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
