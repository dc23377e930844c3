"""Say which levels fit on which devices with which KV cache type, how they are split, and how fast they are at most."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.concessions import Concession, Room
    from runtime.forecast import Rates
    from runtime.levels import Shape
    from runtime.placement import Placement, Weights, Wish

HELP = "which levels fit the devices, and how"

_HERE = "here"
_MOST_FAILURES = 4  # so many that do not fit are told what would fit instead


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="mistral-large-2411", metavar="MODEL", help="a name or a folder")
    parser.add_argument("--devices", metavar="SIZES", help="80GiB,80GiB, or here (default: --machine)")
    parser.add_argument("--machine", default="workstation", help="a machine of models.yaml (default: workstation)")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="default: what the model was trained for")
    parser.add_argument("--slots", type=int, default=1, metavar="N", help="sequences that share it (default: 1)")
    parser.add_argument("--ubatch", type=int, default=512, metavar="TOKENS", help="tokens computed at once")
    parser.add_argument("--reserve", default="1GiB", metavar="SIZE", help="left free on each device (default: 1GiB)")
    parser.add_argument("--levels", default="all", help="default: all")
    parser.add_argument("--kv", default="all", metavar="TYPES", help="of the KV cache: f16,q8_0,q4_0 (default: all)")
    parser.add_argument("--split-mode", default="layer", choices=("layer", "tensor"), help="default: layer")
    parser.add_argument("--gpu-layers", type=int, default=-1, metavar="N", help="as of `bise chat` (default: all)")
    parser.add_argument("--draft", metavar="FILE", help="a GGUF that guesses, as `bise chat --draft` takes it")
    group = parser.add_argument_group("speed (default: an A100 80GB PCIe, by its data sheet)")
    group.add_argument(
        "--bandwidth", metavar="SIZE", help="of each device's memory, a second (default: 1935GB; here, what NVML says)"
    )
    group.add_argument("--host-bandwidth", default="200GB", metavar="SIZE", help="of the host's (default: 200GB)")
    group.add_argument("--tflops", type=float, default=312.0, metavar="N", help="of each device (default: 312)")
    parser.add_argument("--json", action="store_true", help="print JSON")


@dataclass(frozen=True, slots=True)
class Row:
    """One level with one KV cache type. Bytes; per-device lists in the order of the devices."""

    level: str
    weight_bytes: int
    kv_type: str
    kv_bytes: int
    fits: bool
    spare_bytes: int
    """Left on the fullest device; negative where it does not fit."""
    layers: list[int]
    device_bytes: list[int]
    host_bytes: int
    """In the host's memory: embeddings, layers, KV cache and buffers."""
    draft_device: int | None
    """Where the draft model lies, whose bytes no other value counts; None without one."""
    draft_bytes: int
    tensor_split: list[float]
    largest_context: int
    """Tokens; 0 where not even the shortest context fits."""
    tokens_per_second: tuple[float, float]
    """Upper bounds with an empty and with a full context."""
    placement: "Placement"
    instead: "tuple[Concession, ...]"
    """What fits where this does not, nearest first."""


def run(arguments: argparse.Namespace) -> int:
    from quant.recipes import weights_by_place
    from runtime.catalogue import parse_recipes
    from runtime.concessions import Room
    from runtime.forecast import prompt_seconds
    from runtime.levels import EVERY_LEVEL
    from runtime.library import shipped_catalogue

    shape, title, trained = _shape(arguments.model)
    wishes = _wishes(arguments, trained)
    room = Room(_devices(arguments), _size(arguments.reserve), rates=_rates(arguments))
    recipes = parse_recipes(arguments.levels, shipped_catalogue().recipes)
    every = {recipe.name: weights_by_place(shape, recipe) for recipe in recipes}
    levels = {level: weights_by_place(shape, level) for level in reversed(EVERY_LEVEL)}
    n_host_layers = max(0, shape.n_layers + 1 - arguments.gpu_layers) if arguments.gpu_layers >= 0 else 0
    drafts = _drafts(arguments, shape, wishes, room)
    rows = list(_rows(shape, every, levels, wishes, drafts, room, trained, min(n_host_layers, shape.n_layers)))
    seconds = prompt_seconds(shape, wishes[0].n_ctx, room.devices, room.rates)
    if arguments.json:
        head = {"model": arguments.model, "context": wishes[0].n_ctx, "slots": arguments.slots}
        head |= {"devices": room.devices, "reserve": room.reserve, "prompt_seconds": seconds}
        print(json.dumps({**head, "rows": [asdict(row) for row in rows]}, indent=2))
        return 0
    _print(f"{title} on", wishes[0], room, rows, seconds)
    return 0


def _wishes(arguments: argparse.Namespace, trained: int) -> "list[Wish]":
    """One for each KV type. Raises CatalogueError for a value outside its range."""
    from runtime.errors import CatalogueError
    from runtime.placement import KV_BYTES, Wish

    context = trained if arguments.context is None else arguments.context
    if not 0 < context <= trained:
        raise CatalogueError(f"--context {context} is not between 1 and the {trained} tokens the model was trained for")
    if arguments.ubatch < 1:
        raise CatalogueError(f"--ubatch {arguments.ubatch} is not a number of tokens; 512 is usual")
    if not 0 < arguments.slots <= context:
        raise CatalogueError(f"--slots {arguments.slots} is not a number of sequences for {context} tokens")
    known = [kv for kv in KV_BYTES if kv == "f16" or arguments.split_mode == "layer"]
    types = known if arguments.kv == "all" else arguments.kv.split(",")
    for kv_type in types:
        if kv_type not in known:
            raise CatalogueError(f"{kv_type!r} is not a KV cache type for this; known: {', '.join(known)}")
    slots, split = arguments.slots, arguments.split_mode
    return [Wish(context, kv, arguments.ubatch, n_seq=slots, n_outputs=slots, split=split) for kv in types]


def _rates(arguments: argparse.Namespace) -> "Rates":
    from runtime.errors import CatalogueError
    from runtime.forecast import A100_BANDWIDTH, Rates
    from runtime.nvidia import cards

    known = [card.bandwidth for card in cards() if card.bandwidth] if arguments.devices == _HERE else []
    bandwidth = _size(arguments.bandwidth) if arguments.bandwidth else min(known, default=A100_BANDWIDTH)
    rates = Rates(bandwidth, _size(arguments.host_bandwidth), int(arguments.tflops * 10**12))
    if min(rates.bandwidth, rates.host_bandwidth, rates.flops) <= 0:
        raise CatalogueError("--bandwidth, --host-bandwidth and --tflops must be above 0")
    return rates


def _size(text: str) -> int:
    from runtime.catalogue import parse_bytes

    return parse_bytes(text)


def _rows(
    shape: "Shape",
    every: "Mapping[str, Weights]",
    levels: "Mapping[str, Weights]",
    wishes: "Sequence[Wish]",
    drafts: Sequence[tuple[int, int] | None],
    whole: "Room",
    trained: int,
    n_host_layers: int,
) -> Iterator[Row]:
    from runtime.concessions import nearest
    from runtime.forecast import tokens_per_second
    from runtime.placement import largest_context, place

    for level, weights in every.items():
        smaller = {name: less for name, less in levels.items() if less.total < weights.total}
        for wish, draft in zip(wishes, drafts, strict=True):
            room = whole if draft is None else _beside(whole, *draft)
            devices, reserve = room.devices, room.reserve
            longest = trained if draft is None else wish.n_ctx  # the draft model's cache would grow as well
            placement = place(weights, shape, wish, devices, reserve, n_host_layers=n_host_layers)
            yield Row(
                level=level,
                weight_bytes=weights.total,
                kv_type=wish.kv_type,
                kv_bytes=sum(use.kv for use in placement.uses) + placement.host.kv,
                fits=placement.fits,
                spare_bytes=placement.spare,
                layers=[use.n_layers for use in placement.uses],
                device_bytes=[use.total for use in placement.uses],
                host_bytes=placement.host.total,
                draft_device=draft[0] if draft else None,
                draft_bytes=draft[1] if draft else 0,
                tensor_split=list(placement.tensor_split),
                largest_context=largest_context(
                    weights, shape, wish, devices, longest, reserve, n_host_layers=n_host_layers
                ),
                tokens_per_second=(
                    tokens_per_second(placement, 0, room.rates),
                    tokens_per_second(placement, wish.n_ctx, room.rates),
                ),
                placement=placement,
                instead=() if placement.fits else nearest(weights, shape, wish, room, smaller),
            )


def _drafts(
    arguments: argparse.Namespace, shape: "Shape", wishes: "Sequence[Wish]", room: "Room"
) -> list[tuple[int, int] | None]:
    """For each wish the device on which the draft model lies, and its bytes; None without one."""
    from runtime.fitting import draft_place
    from runtime.library import find_model_file, models_folder, shipped_catalogue

    if arguments.draft is None:
        return [None] * len(wishes)
    path = find_model_file(arguments.draft, None, shipped_catalogue(), models_folder()).path
    return [draft_place(path, shape.n_vocab, wish, room.devices, room.reserve) for wish in wishes]


def _beside(room: "Room", device: int, n_bytes: int) -> "Room":
    """What is left of a room where something lies on one device."""
    return replace(room, devices=tuple(size - n_bytes * (i == device) for i, size in enumerate(room.devices)))


def _print(head: str, wish: "Wish", room: "Room", rows: Sequence[Row], seconds: float) -> None:
    from tui.units import duration, gib

    devices = " + ".join(gib(device) for device in room.devices)
    slots = f" for {wish.n_seq} sequences" if wish.n_seq > 1 else ""
    print(f"{head} {devices}, {wish.n_ctx:,} tokens of context{slots},")
    mode = ", every tensor split" if wish.split == "tensor" else ""
    print(f"ubatch {wish.n_ubatch}, {gib(room.reserve)} left free on each device{mode}\n")
    _print_table(rows)
    _print_drafts(rows)
    if len(rows) == 1:
        _print_devices(rows[0].placement, room.reserve)
    _print_instead([row for row in rows if not row.fits])
    print("\nMemory is computed from the shape. On one H200 it was so; two CUDA GPUs have not been tried.")
    print(
        f"tokens/s: upper bounds with an empty and a full context, of {room.rates.bandwidth / 1e9:,.0f} GB/s a device "
        f"and {room.rates.host_bandwidth / 1e9:,.0f} of the host; an H200 reached 22 % of its own at Q2_K, 41 % at "
        "Q4_K_M."
    )
    print(
        f"A prompt of {wish.n_ctx:,} tokens takes at least {duration(seconds)} at {room.rates.flops / 1e12:,.0f} "
        "TFLOPS a device."
    )


def _print_table(rows: Sequence[Row]) -> None:
    from tui.units import gib

    width = max(7, *(len(row.level) for row in rows))
    layers = [_layers(row.placement) for row in rows]
    wide = max(6, *map(len, layers))
    form = f"{{:<{width}}} {{:>9}}  {{:<4}} {{:>9}}  {{:<4}} {{:>14}}  {{:<{wide}}}  {{:>15}}  {{:>9}}"
    columns = ("weights", "KV", "KV cache", "fits", "fullest device", "layers", "longest context", "tokens/s")
    print(form.format("level", *columns))
    previous = ""
    for row, split in zip(rows, layers, strict=True):
        spare = f"{gib(row.spare_bytes)} left" if row.spare_bytes >= 0 else f"{gib(-row.spare_bytes)} short"
        level, size = (row.level, gib(row.weight_bytes)) if row.level != previous else ("", "")
        longest = f"{row.largest_context:,}" if row.largest_context else "none"
        fits = "yes" if row.fits else "no"
        speed = "{:.1f}–{:.1f}".format(*row.tokens_per_second)
        print(form.format(level, size, row.kv_type, gib(row.kv_bytes), fits, spare, split, longest, speed))
        previous = row.level


def _layers(placement: "Placement") -> str:
    """Such as `44+44`, or `host 12+38+38`."""
    if placement.wish.split == "tensor":
        return "parts"
    host = placement.host.n_layers
    return "+".join([*([f"host {host}"] if host else []), *(str(use.n_layers) for use in placement.uses)])


def _print_devices(placement: "Placement", reserve: int) -> None:
    """What each device and the host hold."""
    from tui.units import gib

    form = "{:<9} {:>6} {:>10} {:>10} {:>10} {:>10}  {}"
    print("\n" + form.format("", "layers", "weights", "KV cache", "compute", "reserve", "").rstrip())
    for i, use in enumerate(placement.uses):
        spare = f"{gib(use.spare)} left" if use.spare >= 0 else f"{gib(-use.spare)} short"
        parts = (use.weights, use.kv, use.compute + use.copied + use.unpacked, reserve)
        print(form.format(f"device {i}", use.n_layers, *map(gib, parts), spare))
    host = placement.host
    print(
        form.format("host", host.n_layers, gib(host.embedding + host.weights), gib(host.kv), gib(host.compute), "", "")
    )


def _print_drafts(rows: Sequence[Row]) -> None:
    """Where the draft model lies, and what it takes with each KV type."""
    from tui.units import gib

    taken = {row.kv_type: (row.draft_device, row.draft_bytes) for row in rows if row.draft_device is not None}
    for kv_type, (device, n_bytes) in taken.items():
        print(f"the draft model with {kv_type}: {gib(n_bytes)} on device {device}, counted in")


def _print_instead(rows: Sequence[Row]) -> None:
    """The nearest that fits for each row that does not."""
    if len(rows) > _MOST_FAILURES:
        print(f"\n{len(rows)} of these do not fit; name one with --levels and --kv to see what fits in its place")
        return
    for row in rows:
        print(f"\n{row.level} with {row.kv_type} does not fit; the nearest that does:")
        for each in row.instead:
            print(f"  {each.change:<18} {each.price}")
        if not row.instead:
            print("  nothing by one change: take more memory, or a smaller level and a shorter context")


def _devices(arguments: argparse.Namespace) -> tuple[int, ...]:
    from runtime.errors import CatalogueError
    from runtime.hardware import parse_devices
    from runtime.library import shipped_catalogue

    if arguments.devices == _HERE:
        return _devices_here()
    if arguments.devices:
        return parse_devices(arguments.devices)
    machines = shipped_catalogue().machines
    if arguments.machine not in machines:
        raise CatalogueError(f"no machine is called {arguments.machine!r}; known: {', '.join(machines)}")
    return machines[arguments.machine].devices


def _devices_here() -> tuple[int, ...]:
    """The free memory of each GPU of this machine, in llama.cpp's order."""
    from runtime.errors import EngineError
    from runtime.fitting import in_llama_order
    from runtime.native_devices import devices

    free = tuple(device.memory_free for device in in_llama_order(devices()))
    if not free:
        raise EngineError("llama.cpp can use no GPU here (`bise doctor` says why); name sizes, such as 80GiB,80GiB")
    return free


def _shape(argument: str) -> "tuple[Shape, str, int]":
    """MODEL → its shape, its title, and the context it was trained for."""
    from quant.reading.checkpoint import open_checkpoint
    from quant.reading.gguf_source import find_gguf, open_gguf
    from runtime.errors import CatalogueError
    from runtime.library import find_checkpoint, shipped_catalogue

    catalogue = shipped_catalogue()
    if argument in catalogue.models:
        model = catalogue.models[argument]
        if model.shape is None:
            raise CatalogueError(f"models.yaml gives no shape for {argument}, so its memory cannot be planned")
        return model.shape, model.title, model.context
    path, _, name = find_checkpoint(argument, catalogue)
    if (file := find_gguf(path)) is not None:
        source = open_gguf(file)
        context = source.metadata["llama.context_length"].data
        assert isinstance(context, int), context
        return source.shape, source.name, context
    checkpoint = open_checkpoint(path)
    return checkpoint.shape, name, checkpoint.config.context
