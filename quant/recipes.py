"""Recipe → the type of every tensor, by llama.cpp's rules. Pure: a shape in, names and types out, no files.

A `TensorSpec` is a tensor of the finished GGUF. The rules are those of `llama-quantize` at default settings
(src/llama-quant.cpp of llama.cpp, commit 0c1e57098), for a dense model of architecture "llama"; an importance matrix
changes none of them at these levels. Knows nothing of where the weights come from.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

from quant.kernels import SEARCHED
from runtime.errors import UserError
from runtime.ggml import GgmlType, block_elements, row_bytes
from runtime.levels import LEVELS, UNQUANTIZED, Recipe, Search, Shape, plain
from runtime.placement import Weights

BASE_TYPES = {
    "BF16": GgmlType.BF16,
    "F16": GgmlType.F16,
    "Q2_K": GgmlType.Q2_K,
    "Q3_K_S": GgmlType.Q3_K,
    "Q3_K_M": GgmlType.Q3_K,
    "Q3_K_L": GgmlType.Q3_K,
    "Q4_K_S": GgmlType.Q4_K,
    "Q4_K_M": GgmlType.Q4_K,
    "Q5_K_S": GgmlType.Q5_K,
    "Q5_K_M": GgmlType.Q5_K,
    "Q6_K": GgmlType.Q6_K,
    "Q8_0": GgmlType.Q8_0,
}
"""The type a level gives a matrix that no rule below singles out."""

FALLBACKS = {
    GgmlType.Q2_K: GgmlType.Q4_0,
    GgmlType.Q3_K: GgmlType.Q4_0,
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
}
"""Blocks of 256 elements → the type with blocks of 32 that replaces them where 256 does not divide a row."""


class RecipeError(UserError):
    """A recipe that this model cannot follow."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of the GGUF file: its name and its shape as numpy writes it, (rows, row_length) or (length,)."""

    name: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The name without layer number and ending: "attn_q" of "blk.3.attn_q.weight"."""
        return self.name.removesuffix(".weight").rpartition(".")[2]

    @property
    def is_vector(self) -> bool:
        """Weights of a norm, a bias, rotary factors: every level keeps those in F32."""
        return len(self.shape) == 1

    @property
    def rows(self) -> int:
        return 1 if self.is_vector else self.shape[0]

    @property
    def row_length(self) -> int:
        return self.shape[-1]

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    def n_bytes(self, type_: GgmlType) -> int:
        """Bytes of the tensor stored as `type_`, without padding."""
        return self.rows * row_bytes(type_, self.row_length)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a tensor's blocks are made: equal encodings of equal weights are equal bytes."""

    type: GgmlType
    search: Search = Search.GGML

    @classmethod
    def of(cls, type_: GgmlType, search: Search) -> Self:
        """Where no other search is known for a type, ggml's."""
        return cls(type_, search if type_ in SEARCHED else Search.GGML)


def tensors(shape: Shape) -> tuple[TensorSpec, ...]:
    """Every tensor of a model, in the order `llama-quantize` writes them: by layer, then by name."""
    matrix = (shape.n_vocab, shape.n_embd)
    specs = [] if shape.tied else [TensorSpec("output.weight", matrix)]
    specs += [TensorSpec("output_norm.weight", (shape.n_embd,)), TensorSpec("token_embd.weight", matrix)]
    query_width = shape.n_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_k": (shape.kv_width, shape.n_embd),
        "attn_norm": (shape.n_embd,),
        "attn_output": (shape.n_embd, query_width),
        "attn_q": (query_width, shape.n_embd),
        "attn_v": (shape.kv_width, shape.n_embd),
        "ffn_down": (shape.n_embd, shape.n_ff),
        "ffn_gate": (shape.n_ff, shape.n_embd),
        "ffn_norm": (shape.n_embd,),
        "ffn_up": (shape.n_ff, shape.n_embd),
    }
    for i in range(shape.n_layers):
        specs += [TensorSpec(f"blk.{i}.{kind}.weight", dims) for kind, dims in layer.items()]
    return tuple(specs)


def n_parameters(shape: Shape) -> int:
    """Weights of the model, norms included."""
    return sum(spec.n_elements for spec in tensors(shape))


def types(shape: Shape, recipe: Recipe | str, specs: Sequence[TensorSpec] | None = None) -> dict[str, GgmlType]:
    """Tensor name → type by a recipe, or at a plain level; in the order of `specs` (by default those of the shape).

    Raises RecipeError where an exception names no tensor, or a type that a tensor's rows do not allow.
    """
    if isinstance(recipe, str):
        recipe = plain(recipe)
    assert recipe.base in (*LEVELS, *UNQUANTIZED), recipe
    specs = tensors(shape) if specs is None else specs
    tied = all(spec.kind != "output" for spec in specs)
    # llama.cpp counts these tensors as it meets them, and its rules ask the counters, not the names.
    seen = {"attn_v": 0, "ffn_down": 0}
    chosen: dict[str, GgmlType] = {}
    for spec in specs:
        if spec.is_vector:
            chosen[spec.name] = GgmlType.F32
            continue
        if recipe.base in UNQUANTIZED:
            chosen[spec.name] = BASE_TYPES[recipe.base]
        else:
            wanted = _wanted_type(shape, recipe.base, spec, seen.get(spec.kind, 0), tied)
            chosen[spec.name] = fitting_type(wanted, spec.row_length)
        if spec.kind in seen:
            seen[spec.kind] += 1
    return chosen | _exceptions(recipe, specs)


def _exceptions(recipe: Recipe, specs: Sequence[TensorSpec]) -> dict[str, GgmlType]:
    """Tensor name → type where the recipe overrules the level. The embedding and output types come first, as in
    `llama-quantize`. Raises RecipeError."""
    named = {"output.weight": recipe.output, "token_embd.weight": recipe.embedding}
    unused = {pattern for pattern, _ in recipe.tensors}
    chosen: dict[str, GgmlType] = {}
    for spec in specs:
        matching = [(pattern, type_) for pattern, type_ in recipe.tensors if re.search(pattern, spec.name)]
        unused -= {pattern for pattern, _ in matching}
        if spec.is_vector:
            continue
        explicit = named.get(spec.name)
        wanted = explicit if explicit is not None else matching[0][1] if matching else None
        if wanted is None:
            continue
        if spec.row_length % block_elements(wanted):
            raise RecipeError(
                f"{spec.name} cannot be {wanted.name}: its rows have {spec.row_length:,} weights, which blocks of "
                f"{block_elements(wanted)} do not divide; name another type for it"
            )
        chosen[spec.name] = wanted
    if unused:
        raise RecipeError(f"no tensor's name matches {min(unused)!r}; names are such as blk.0.ffn_down.weight")
    if recipe.output is not None and all(spec.name != "output.weight" for spec in specs):
        raise RecipeError("this model has no output.weight: its embedding is its output; give the embedding's type")
    return chosen


def tensor_bytes(shape: Shape, recipe: Recipe | str) -> int:
    """Bytes of all tensors by a recipe: no metadata, no padding."""
    chosen = types(shape, recipe)
    return sum(spec.n_bytes(chosen[spec.name]) for spec in tensors(shape))


def weights_by_place(shape: Shape, recipe: Recipe | str) -> Weights:
    """Bytes of a recipe's tensors by where they must lie when the model runs: host, each layer, the last device."""
    return placed_weights(shape, types(shape, recipe))


def placed_weights(shape: Shape, chosen: Mapping[str, GgmlType]) -> Weights:
    """The same of tensors whose types are known."""
    host = output = 0
    layers = [0] * shape.n_layers
    for spec in tensors(shape):
        n_bytes = spec.n_bytes(chosen[spec.name])
        if spec.name.startswith("blk."):
            layers[int(spec.name.split(".")[1])] += n_bytes
        elif spec.name == "token_embd.weight":
            host += n_bytes
            output += n_bytes if shape.tied else 0  # llama.cpp puts a second copy on the last device
        else:
            output += n_bytes
    return Weights(host, tuple(layers), output)


def _wanted_type(shape: Shape, level: str, spec: TensorSpec, index: int, tied: bool) -> GgmlType:
    """The level's choice for a matrix, before its row length is looked at. `index` counts matrices of its kind."""
    base = BASE_TYPES[level]
    match spec.kind:
        case "output":
            return _output_type(base, spec.row_length)
        case "token_embd" if tied:
            return _output_type(base, spec.row_length)
        case "attn_v":
            return _attn_v_type(shape, level, index)
        case "ffn_down":
            return _ffn_down_type(shape.n_layers, level, index)
        case "attn_output":
            return {"Q2_K": GgmlType.Q3_K, "Q3_K_M": GgmlType.Q4_K, "Q3_K_L": GgmlType.Q5_K}.get(level, base)
    return base


def _output_type(base: GgmlType, row_length: int) -> GgmlType:
    """The matrix that makes logits is worth more bits than the rest, at any level."""
    if base is GgmlType.Q8_0 or row_length % block_elements(base) != 0:
        return GgmlType.Q8_0
    return GgmlType.Q6_K


def _attn_v_type(shape: Shape, level: str, index: int) -> GgmlType:
    chosen = BASE_TYPES[level]
    match level:
        case "Q2_K":
            chosen = GgmlType.Q4_K if shape.n_heads // shape.n_heads_kv >= 4 else GgmlType.Q3_K
        case "Q3_K_M":
            chosen = GgmlType.Q5_K if index < 2 else GgmlType.Q4_K
        case "Q3_K_L":
            chosen = GgmlType.Q5_K
        case "Q4_K_S" if index < 4:
            chosen = GgmlType.Q5_K
        case "Q4_K_M" | "Q5_K_M" if _gets_more_bits(index, shape.n_layers):
            chosen = GgmlType.Q6_K
    # llama.cpp knows Llama 2 70B by its 80 layers and its shared value heads, which make attn_v small and precious.
    is_70b = shape.n_layers == 80 and shape.n_heads != shape.n_heads_kv
    return GgmlType.Q5_K if is_70b and chosen in (GgmlType.Q3_K, GgmlType.Q4_K) else chosen


def _ffn_down_type(n_layers: int, level: str, index: int) -> GgmlType:
    match level:
        case "Q2_K":
            return GgmlType.Q3_K
        case "Q3_K_M":
            return GgmlType.Q5_K if index < n_layers // 16 else GgmlType.Q4_K
        case "Q3_K_L":
            return GgmlType.Q5_K
        case "Q4_K_S" if index < n_layers // 8:
            return GgmlType.Q5_K
        case "Q4_K_M" | "Q5_K_M" if _gets_more_bits(index, n_layers):
            return GgmlType.Q6_K
    return BASE_TYPES[level]


def _gets_more_bits(index: int, n_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between (`use_more_bits`)."""
    eighth = n_layers // 8
    return index < eighth or index >= 7 * n_layers // 8 or (index - eighth) % 3 == 2


def fitting_type(wanted: GgmlType, row_length: int) -> GgmlType:
    """`wanted`, or what replaces it where its block does not divide the row."""
    if row_length % block_elements(wanted) == 0:
        return wanted
    smaller = FALLBACKS.get(wanted, wanted)
    return smaller if row_length % block_elements(smaller) == 0 else GgmlType.F16
