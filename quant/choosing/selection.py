"""Losses and a size → the recipe that loses least at that size.

Sizes are those of whole files, header and padding included: the plan of a conversion (plan.py) says them to the byte,
and no file made is larger than asked for. Reads no weights.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.choosing.knapsack import Option, Solution, solve
from quant.choosing.losses import Losses, total
from quant.choosing.recipe_file import as_recipe
from quant.header import ALIGNMENT, padded
from quant.imatrix import ImportanceMatrix
from quant.plan import SHARD_BYTES, plan_conversion
from quant.recipes import RecipeError, fitting_type, placed_weights, types
from quant.source import Source
from runtime.ggml import GgmlType
from runtime.levels import LEVELS, Recipe, Search, plain
from runtime.library import file_stem
from runtime.placement import Placement, Wish, place

_QUANTIZED = (GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K, GgmlType.Q8_0)

_NAMELESS = "CHOSEN"

_LONGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class Sized:
    """A recipe's files, and what they are predicted to lose."""

    recipe: Recipe
    n_bytes: int
    """Of the files."""
    tensor_bytes: int
    bits_per_weight: float
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A recipe that was chosen."""

    sized: Sized
    types: Mapping[str, GgmlType]
    """Of every tensor."""
    is_best: bool
    """No other choice of types of that size has a smaller predicted loss."""
    gap: float
    """How much of the loss another choice of that size could save at most, as a fraction of it."""


class Selection:
    """One model's losses, from which recipes of any size are chosen."""

    def __init__(
        self,
        source: Source,
        losses: Losses,
        importance: ImportanceMatrix | None = None,
        search: Search = Search.GGML,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """`losses` have all matrices of the source, at the types that may be chosen (`candidates`).

        Recipes have `search`, with which the losses were found.
        """
        self._source = source
        self._losses = losses
        self._importance = importance
        self._search = search
        self._shard_bytes = shard_bytes
        self._specs = [spec for spec in source.specs if not spec.is_vector]
        self._options = [
            [Option(padded(spec.n_bytes(type_)), loss) for type_, loss in losses[spec.name].items()]
            for spec in self._specs
        ]
        self._least = sum(min(option.n_bytes for option in options) for options in self._options)

    def levels(self) -> tuple[Sized, ...]:
        """The ten levels, made with the same matrix."""
        return tuple(self._sized(plain(level)) for level in LEVELS)

    def of_size(self, n_bytes: int) -> Choice:
        """The recipe of least loss whose files have at most `n_bytes`. Raises RecipeError where none is so small."""
        budget = n_bytes
        while True:
            choice = self._choose(max(budget, self._least))
            excess = choice.sized.n_bytes - n_bytes  # what headers and norms take
            if excess <= 0:
                return choice
            if budget < self._least:
                raise RecipeError(
                    f"{n_bytes:,} bytes are too few for {self._source.name}, whose files have "
                    f"{choice.sized.n_bytes:,} at the smallest types; ask for more"
                )
            budget -= excess

    def of_bits(self, bits: float) -> Choice:
        """The recipe of least loss with at most `bits` per weight over all tensors. Raises RecipeError."""
        n_weights = sum(spec.n_elements for spec in self._source.specs)
        vectors = sum(spec.n_bytes(GgmlType.F32) for spec in self._source.specs if spec.is_vector)
        budget = int(n_weights * bits / 8) - vectors
        if budget < self._least:
            smallest = 8 * (self._least + vectors) / n_weights
            raise RecipeError(
                f"{bits:g} bits per weight are too few for {self._source.name}, which has {smallest:.3f} at the "
                "smallest types; ask for more"
            )
        return self._choose(budget)

    def fitting(self, wish: Wish, devices: Sequence[int], reserve: int) -> Choice:
        """The recipe of least loss, of all whose weights fit the devices with the wished context.

        Raises RecipeError with both numbers where none does.
        """

        def placed(budget: int) -> Placement:
            return place(placed_weights(shape, {**vectors, **self._solve(budget)[0]}), shape, wish, devices, reserve)

        shape = self._source.shape
        vectors = {spec.name: GgmlType.F32 for spec in self._source.specs if spec.is_vector}
        low, high = self._least, sum(max(option.n_bytes for option in options) for options in self._options)
        if not (placement := placed(low)).fits:
            n_bytes = self._choose(low).sized.tensor_bytes
            raise RecipeError(
                f"{self._source.name} with {wish.n_ctx:,} tokens of {wish.kv_type} KV cache fits at no size: at the "
                f"smallest types its weights have {n_bytes:,} bytes, and the fullest device lacks "
                f"{-placement.spare:,}; take a smaller --context or --kv"
            )
        while high - low > max(low >> 14, ALIGNMENT):
            middle = (low + high) // 2
            low, high = (middle, high) if placed(middle).fits else (low, middle)
        return self._choose(low)

    def _solve(self, budget: int) -> tuple[dict[str, GgmlType], Solution]:
        """The best types of the matrices within `budget` bytes."""
        solution = solve(self._options, budget)
        types_ = [list(self._losses[spec.name])[i] for spec, i in zip(self._specs, solution.chosen, strict=True)]
        return {spec.name: type_ for spec, type_ in zip(self._specs, types_, strict=True)}, solution

    def _choose(self, budget: int) -> Choice:
        """The same as a recipe."""
        chosen, solution = self._solve(budget)
        sized = self._sized(as_recipe(_NAMELESS, self._source.shape, self._source.specs, chosen, self._search))
        every = types(self._source.shape, sized.recipe, self._source.specs)
        assert all(every[name] is type_ for name, type_ in chosen.items()), "the expressions say something else"
        return Choice(sized, every, solution.is_best, solution.gap)

    def _sized(self, recipe: Recipe) -> Sized:
        plan = plan_conversion(
            self._source, [recipe], Path(), shard_bytes=self._shard_bytes, importance=self._importance
        ).levels[0]
        chosen = {tensor.spec.name: tensor.type for tensor in plan.tensors}
        return Sized(recipe, plan.n_bytes, plan.tensor_bytes, plan.bits_per_weight, total(self._losses, chosen))


def candidates(source: Source) -> dict[str, tuple[GgmlType, ...]]:
    """The types that each matrix may get, smallest first: what its rows allow of Q2_K to Q8_0, and 16 bits."""
    found = {}
    for spec in source.specs:
        if not spec.is_vector:
            plain_type = GgmlType.BF16 if source.tensors[spec.name].dtype is GgmlType.BF16 else GgmlType.F16
            allowed = {fitting_type(type_, spec.row_length) for type_ in _QUANTIZED} | {plain_type}
            found[spec.name] = tuple(sorted(allowed, key=spec.n_bytes))
    return found


def default_name(source: Source, choice: Choice) -> str:
    """What to call a recipe that nobody named, such as "Demo-4.50bpw"."""
    end = f"-{choice.sized.bits_per_weight:.2f}bpw"
    stem = re.sub(r"[^a-z0-9._-]+", "-", file_stem(source.name), flags=re.IGNORECASE | re.ASCII).strip("-.")
    return (stem[: _LONGEST_NAME - len(end)].rstrip("-.") or "model") + end
