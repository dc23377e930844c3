"""Level → the type of every tensor, by llama.cpp's rules. Pure: a shape in, names and types out, no files.

A `TensorSpec` is a tensor of the finished GGUF. The rules are those of `llama-quantize` at default settings
(src/llama-quant.cpp of llama.cpp, commit 0c1e57098), for a dense model of architecture "llama" and without an
importance matrix. Knows nothing of where the weights come from.
"""

from dataclasses import dataclass
from math import prod

from runtime.ggml import GgmlType, block_elements, row_bytes
from runtime.levels import LEVELS, ORIGINAL, Shape
from runtime.placement import Weights

BASE_TYPES = {
    "BF16": GgmlType.BF16,
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
    def is_norm(self) -> bool:
        """A vector of norm weights; every level keeps those in F32."""
        return len(self.shape) == 1

    @property
    def rows(self) -> int:
        return 1 if self.is_norm else self.shape[0]

    @property
    def row_length(self) -> int:
        return self.shape[-1]

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    def n_bytes(self, type_: GgmlType) -> int:
        """Bytes of the tensor stored as `type_`, without padding."""
        return self.rows * row_bytes(type_, self.row_length)


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


def types(shape: Shape, level: str) -> dict[str, GgmlType]:
    """Tensor name → type at a level (one of LEVELS, or ORIGINAL), in the order of `tensors`."""
    assert level in (*LEVELS, ORIGINAL), level
    # llama.cpp counts these tensors as it meets them, and its rules ask the counters, not the names.
    seen = {"attn_v": 0, "ffn_down": 0}
    chosen: dict[str, GgmlType] = {}
    for spec in tensors(shape):
        if spec.is_norm:
            chosen[spec.name] = GgmlType.F32
        elif level == ORIGINAL:
            chosen[spec.name] = GgmlType.BF16
        else:
            wanted = _wanted_type(shape, level, spec, seen.get(spec.kind, 0))
            chosen[spec.name] = _fitting_type(wanted, spec.row_length)
        if spec.kind in seen:
            seen[spec.kind] += 1
    return chosen


def tensor_bytes(shape: Shape, level: str) -> int:
    """Bytes of all tensors at a level: no metadata, no padding."""
    chosen = types(shape, level)
    return sum(spec.n_bytes(chosen[spec.name]) for spec in tensors(shape))


def weights_by_place(shape: Shape, level: str) -> Weights:
    """Bytes of a level's tensors by where they must lie when the model runs: host, each layer, the last device."""
    chosen = types(shape, level)
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


def _wanted_type(shape: Shape, level: str, spec: TensorSpec, index: int) -> GgmlType:
    """The level's choice for a matrix, before its row length is looked at. `index` counts matrices of its kind."""
    base = BASE_TYPES[level]
    match spec.kind:
        case "output":
            return _output_type(base, spec.row_length)
        case "token_embd" if shape.tied:
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


def _fitting_type(wanted: GgmlType, row_length: int) -> GgmlType:
    """`wanted`, or what replaces it where its block does not divide the row."""
    if row_length % block_elements(wanted) == 0:
        return wanted
    smaller = FALLBACKS.get(wanted, wanted)
    return smaller if row_length % block_elements(smaller) == 0 else GgmlType.F16
