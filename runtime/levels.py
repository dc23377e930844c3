"""The names of the levels, recipes and the shape of a model: the words that every floor shares.

A *level* is a named recipe of GGUF tensor types, as llama.cpp's `llama-quantize` names them. A *shape* is all that is
needed to know every tensor of a Mistral-shaped model without its weights. Knows nothing of files.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from runtime.ggml import GgmlType

LEVELS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
"""The ten levels Bise makes, smallest first."""

ORIGINAL = "BF16"
"""The level of the checkpoint's own weights, the base of every comparison."""

UNQUANTIZED = (ORIGINAL, "F16")
"""Levels of plain numbers of 16 bits."""

EVERY_LEVEL = (*LEVELS, "F16", ORIGINAL)
"""All that Bise makes without a recipe of one's own."""


class Search(StrEnum):
    """How the blocks of a tensor are looked for. The size is the same either way."""

    GGML = "ggml"
    """As llama.cpp does it: its bytes."""
    BEST = "best"
    """Longer, from ggml's answer on: less error in the same format."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which type every tensor gets: a level's rules, and what is to differ from them.

    The rules decide about every tensor first, so that an exception changes no other tensor. (In llama.cpp a tensor that
    `--tensor-type` names is not counted, which shifts what the layers after it get.)
    """

    name: str
    """Names the folder and the files: a level's own name, or one's own."""
    base: str
    """The level whose rules hold."""
    tensors: tuple[tuple[str, GgmlType], ...] = ()
    """Regular expression → type; the first that is found in a tensor's name holds."""
    output: GgmlType | None = None
    """Type of output.weight."""
    embedding: GgmlType | None = None
    """Type of token_embd.weight."""
    search: Search = Search.GGML
    note: str = field(default="", compare=False)
    """What it is for, in a sentence."""

    @property
    def exceptions(self) -> str:
        """What differs from the base, as one line; empty for a plain level."""
        parts = [f"{pattern}={type_.name}" for pattern, type_ in self.tensors]
        parts += [f"output={self.output.name}"] if self.output is not None else []
        parts += [f"embedding={self.embedding.name}"] if self.embedding is not None else []
        parts += [f"search={self.search}"] if self.search is not Search.GGML else []
        return ", ".join(parts)


_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9._-]{0,62}[a-z0-9_])?", re.IGNORECASE | re.ASCII)
_MISLEADING = re.compile(
    rf"(?:.*[.-])?(?:{'|'.join((*EVERY_LEVEL, 'F32', 'ALL'))})|.*-\d{{5}}-of-\d{{5}}", re.IGNORECASE
)


def unusable_name(name: str) -> str:
    """Why a recipe cannot be called so; empty if it can."""
    if not _NAME.fullmatch(name):
        return (
            "cannot end the names of files; a recipe's name has up to 64 letters, digits and '_', with '-' and '.' "
            "between them"
        )
    if _MISLEADING.fullmatch(name):
        return (
            f"would be taken for a level or a shard; choose a name that is no level's, such as {name.split('-')[0]}-OWN"
        )
    return ""


def plain(level: str) -> Recipe:
    """The recipe that is a level's rules and nothing else."""
    return Recipe(level, level)


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a dense Mistral- or Llama-shaped transformer."""

    n_layers: int
    n_embd: int
    """Hidden size: width of the residual stream."""
    n_ff: int
    """Rows of ffn_gate and ffn_up."""
    n_heads: int
    n_heads_kv: int
    head_dim: int
    n_vocab: int
    tied: bool = False
    """The output matrix is the embedding matrix; there is no output.weight."""

    @property
    def kv_width(self) -> int:
        """Elements of one layer's K (or V) for one token."""
        return self.n_heads_kv * self.head_dim
