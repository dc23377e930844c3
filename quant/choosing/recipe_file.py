"""Chosen types → a recipe of few regular expressions; a recipe → a file of the form of models.yaml, and where it lies.

The file says in comments what the choice was made of. The same choice makes the same bytes. Chooses nothing.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from quant.recipes import TensorSpec, types
from runtime.errors import OutputError
from runtime.ggml import GgmlType
from runtime.levels import LEVELS, Recipe, Search, Shape


def as_recipe(
    name: str,
    shape: Shape,
    specs: Sequence[TensorSpec],
    chosen: Mapping[str, GgmlType],
    search: Search = Search.GGML,
) -> Recipe:
    """The recipe that gives every matrix among `specs` its type in `chosen`, and says so of each kind of tensor.

    Its base is the level that agrees about the most weights; it names the file's type and decides nothing.
    """
    matrices = [spec for spec in specs if not spec.is_vector]

    def agreement(level: str) -> int:
        plain = types(shape, level, specs)
        return sum(spec.n_elements for spec in matrices if plain[spec.name] is chosen[spec.name])

    tensors: list[tuple[str, GgmlType]] = []
    for kind, layers in by_kind(matrices, chosen).items():
        if kind in ("output", "token_embd"):
            continue
        *rarer, usual = sorted(layers, key=lambda type_: (len(layers[type_]), type_))
        end = rf"\.{re.escape(kind)}\.weight"
        tensors += [(rf"blk\.({'|'.join(map(str, layers[type_]))}){end}", type_) for type_ in rarer]
        tensors.append((end, usual))
    return Recipe(
        name,
        max(LEVELS, key=agreement),
        tuple(tensors),
        output=chosen.get("output.weight"),
        embedding=chosen.get("token_embd.weight"),
        search=search,
    )


def by_kind(specs: Iterable[TensorSpec], chosen: Mapping[str, GgmlType]) -> dict[str, dict[GgmlType, list[int]]]:
    """Kind → type → the layers whose matrix of that kind has it; of a matrix outside of layers, none."""
    found: dict[str, dict[GgmlType, list[int]]] = {}
    for spec in specs:
        if not spec.is_vector:
            layers = found.setdefault(spec.kind, {}).setdefault(chosen[spec.name], [])
            if spec.name.startswith("blk."):
                layers.append(int(spec.name.split(".")[1]))
    return found


def text(recipe: Recipe, comments: Iterable[str]) -> str:
    """The file. What JSON quotes, YAML reads as the same text."""
    lines = [f"# {comment}".rstrip() for comment in comments]
    lines += ["", "recipes:", f"  {json.dumps(recipe.name)}:", f"    base: {recipe.base}"]
    if recipe.output is not None:
        lines.append(f"    output: {recipe.output.name}")
    if recipe.embedding is not None:
        lines.append(f"    embedding: {recipe.embedding.name}")
    if recipe.tensors:
        lines.append("    tensors:")
        lines += [f"      {json.dumps(pattern)}: {type_.name}" for pattern, type_ in recipe.tensors]
    if recipe.search is not Search.GGML:
        lines.append(f"    search: {recipe.search}")
    if recipe.note:
        lines.append(f"    note: {json.dumps(recipe.note, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def write(path: Path, content: str, *, replace: bool = False) -> None:
    """Write a recipe's file. Raises OutputError where another recipe's is there and `replace` is not set."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if not replace and path.exists() and path.read_text("utf-8", "replace") != content:
            raise OutputError(f"{path}: another recipe of that name is there; choose one with --name, or --force")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
