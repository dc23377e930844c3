"""The names of the levels and the shape of a model: the two words that every floor shares.

A *level* is a named recipe of GGUF tensor types, as llama.cpp's `llama-quantize` names them. A *shape* is all that is
needed to know every tensor of a Mistral-shaped model without its weights. Knows nothing of files.
"""

from dataclasses import dataclass

LEVELS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
"""The ten levels Bise makes, smallest first."""

ORIGINAL = "BF16"
"""The unquantized level: the checkpoint's own weights, the base of every comparison."""


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
