"""A chosen recipe in words: which layers get which type, what it should cost beside the levels, what it was made of.

Takes what quant/choosing gives, gives text. Knows nothing of arguments.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tui.units import gigabytes

if TYPE_CHECKING:
    from quant.choosing.disturbance import Progress as Disturbing
    from quant.choosing.selection import Choice, Sized
    from quant.choosing.sensitivity import Sensitivity
    from quant.imatrix import ImportanceMatrix
    from quant.recipes import TensorSpec
    from quant.source import Source
    from tui.progress import ProgressLine

_FORM = "{:<{w}}  {:>9}  {:>11}  {}"


def describe(choice: "Choice", levels: "Sequence[Sized]", specs: "Sequence[TensorSpec]", *, measured: bool) -> str:
    """The choice by kinds of tensors, then its size and predicted loss between those of the nearest levels."""
    from quant.choosing.recipe_file import by_kind

    lines = []
    for kind, layers in by_kind(specs, choice.types).items():
        parts = [f"{type_.name} {ranges(layers[type_])}".rstrip() for type_ in sorted(layers, key=layers.__getitem__)]
        lines.append(f"{kind:<12} {'   '.join(parts)}")
    width = max(len(sized.recipe.name) for sized in (choice.sized, *levels))
    unit = "nats" if measured else "relative"
    lines += ["", _FORM.format("", "size", "bits/weight", f"predicted loss, {unit}", w=width)]
    for sized in sorted([*neighbours(choice, levels), choice.sized], key=lambda sized: sized.n_bytes):
        bits, loss = f"{sized.bits_per_weight:.3f}", f"{sized.loss:.4g}"
        lines.append(_FORM.format(sized.recipe.name, gigabytes(sized.n_bytes), bits, loss, w=width))
    lines.append("")
    lines.append(
        "No other choice of types in that size has a smaller predicted loss."
        if choice.is_best
        else f"Another choice of types in that size might save {choice.gap:.2%} of the predicted loss at most."
    )
    return "\n".join(lines)


def neighbours(choice: "Choice", levels: "Sequence[Sized]") -> "list[Sized]":
    """The two levels at most that are not larger, and the two that are larger."""
    order = sorted(levels, key=lambda level: level.n_bytes)
    smaller = [level for level in order if level.n_bytes <= choice.sized.n_bytes]
    return [*smaller[-2:], *[level for level in order if level not in smaller][:2]]


def as_json(choice: "Choice", levels: "Sequence[Sized]", path: Path) -> dict[str, Any]:
    """What `--json` prints."""

    def figures(sized: "Sized") -> dict[str, Any]:
        return {
            "name": sized.recipe.name,
            "file_bytes": sized.n_bytes,
            "bits_per_weight": sized.bits_per_weight,
            "predicted_loss": sized.loss,
        }

    return {
        **figures(choice.sized),
        "file": str(path),
        "is_best": choice.is_best,
        "gap": choice.gap,
        "types": {name: type_.name for name, type_ in choice.types.items()},
        "levels": [figures(level) for level in levels],
    }


def comments(
    choice: "Choice",
    source: "Source",
    wish: str,
    importance: "ImportanceMatrix | None",
    sensitivity: "tuple[Path, Sensitivity] | None",
) -> list[str]:
    """What the recipe was made of, for the head of its file: no date and no path, so that the same makes the same."""
    from quant.provenance import described

    weights = described(source).get("sha256")
    lines = [
        f"Chosen by `bise recipe` for {source.name}, {wish}: {choice.sized.n_bytes:,} bytes, "
        f"{choice.sized.bits_per_weight:.3f} bits per weight.",
        f"weights      {f'SHA-256 {weights}' if weights else source.kind}",
        f"imatrix      {f'SHA-256 {importance.sha256}' if importance is not None else 'none'}",
    ]
    if sensitivity is None:
        return [*lines, "sensitivity  not measured: by the weights and the matrix alone (--proxy)"]
    path, its = sensitivity
    setting = its.setting
    return [
        *lines,
        f"sensitivity  {path.name}: {len(its.measurements):,} measurements on {setting.level}, "
        f"{setting.chunks:,} chunks of {setting.context:,} tokens",
        f"texts        {setting.text}, SHA-256 {setting.text_sha256}",
        f"predicted    {choice.sized.loss:.4g} nats a token of KL divergence",
    ]


def ranges(numbers: Sequence[int]) -> str:
    """0-3,7: numbers in order, neighbours joined."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def show_measuring(line: "ProgressLine", state: "Disturbing") -> None:
    """How far measuring is."""
    tensor = state.tensors[0].removesuffix(".weight") if state.tensors else "the undisturbed model"
    more = f" and {len(state.tensors) - 1} more" if len(state.tensors) > 1 else ""
    rate = f"{state.tokens_per_second:,.0f} tokens/s" if state.tokens_per_second else ""
    line.show(
        state.done / state.total,
        rate,
        state.seconds_left,
        f"measurement {state.done + 1}/{state.total}  {tensor}{more} {state.type}",
    )
