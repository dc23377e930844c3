"""What is measured, and in what order: both sides once on a large model, in turn on a small one, memory, and stages.

Each takes folders and gives results; files are removed when they have been compared. Knows nothing of tables.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.accounting import Cost, run_step
from benchmarks.checkpoints import DEMO, checkpoint_bytes, empty_checkpoint, random_checkpoint, weight_files
from benchmarks.results import Anatomy, Comparison, Depth, Model, Repeats, Step
from benchmarks.rival import digests
from quant.disks import free_bytes
from quant.reading.checkpoint import open_checkpoint
from quant.recipes import n_parameters, tensor_bytes
from runtime.errors import UserError
from runtime.levels import LEVELS, ORIGINAL, Shape

SIX = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
"""The levels that most people choose from."""

MISTRAL_LARGE = Shape(n_layers=88, n_embd=12_288, n_ff=28_672, n_heads=96, n_heads_kv=8, head_dim=128, n_vocab=32_768)


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the models are that are measured with."""

    once: Shape | None
    """Both sides once; None is the demo model."""
    repeated: Shape | None
    layered: Shape
    """For memory by number of layers."""
    layers: tuple[int, ...]
    repeats: int


SCALES = {
    "full": Scale(
        once=replace(MISTRAL_LARGE, n_layers=1),
        repeated=Shape(n_layers=2, n_embd=4096, n_ff=4096, n_heads=32, n_heads_kv=8, head_dim=128, n_vocab=4096),
        layered=Shape(n_layers=1, n_embd=12_288, n_ff=2048, n_heads=16, n_heads_kv=8, head_dim=128, n_vocab=4096),
        layers=(1, 2, 4),
        repeats=3,
    ),
    "small": Scale(
        once=Shape(n_layers=1, n_embd=12_288, n_ff=4096, n_heads=32, n_heads_kv=8, head_dim=128, n_vocab=4096),
        repeated=Shape(n_layers=2, n_embd=4096, n_ff=4096, n_heads=32, n_heads_kv=8, head_dim=128, n_vocab=4096),
        layered=Shape(n_layers=1, n_embd=12_288, n_ff=1024, n_heads=8, n_heads_kv=1, head_dim=128, n_vocab=4096),
        layers=(1, 2, 4),
        repeats=3,
    ),
    "demo": Scale(
        once=None,
        repeated=None,
        layered=Shape(n_layers=1, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, head_dim=64, n_vocab=4096),
        layers=(1, 2),
        repeats=1,
    ),
}
"""full: one layer of Mistral Large 2, with its whole vocabulary; small: minutes; demo: seconds, to test this."""


def needed_bytes(folder: Path, scale: Scale, levels: Sequence[str]) -> int:
    """Room that the experiments take below a folder at their worst, besides what is there from an earlier run."""
    shapes = [shape for shape in (scale.once, scale.repeated) if shape is not None]
    kept = sum(0 if weight_files(folder / _name(shape)) else 2 * n_parameters(shape) for shape in shapes)
    passing = [_passing(shape, levels) for shape in (*shapes, replace(scale.layered, n_layers=max(scale.layers)))]
    return kept + max(passing)


def check_room(folder: Path, needed: int) -> None:
    """Raises UserError if the disk has too little."""
    if needed > (free := free_bytes(folder)):
        raise UserError(
            f"the benchmark needs {needed:,} bytes below {folder}, and {free:,} are free; make room, name another "
            "folder (BENCH_DIR), or measure at a smaller scale (BENCH_SCALE=small)"
        )


def model_of(folder: Path) -> Model:
    shape = open_checkpoint(folder).shape
    return Model(shape, n_parameters(shape), checkpoint_bytes(folder))


class Bench:
    """A folder to measure in, and how."""

    def __init__(self, folder: Path, threads: int, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._threads = threads
        self._say = say

    def checkpoint(self, shape: Shape | None) -> Path:
        """Random weights of a shape, written once; the demo for None."""
        if shape is None:
            return DEMO
        self._say(f"weights: {2 * n_parameters(shape) / 1e9:.2f} GB")
        return random_checkpoint(self._folder / _name(shape), shape, self._threads)

    def compare(
        self,
        checkpoint: Path,
        selections: Sequence[Sequence[str]],
        *,
        cold: bool,
        ours_first: bool = False,
        reference: bool = False,
    ) -> tuple[tuple[Comparison, ...], int]:
        """Every selection of levels by both sides, and how many tensors were found the same.

        The rival makes each level once, for it gains nothing from others; we make each selection in one run, and with
        `reference` in one more by ggml's kernels. Raises UserError where a tensor differs.
        """
        levels = tuple(dict.fromkeys(level for selection in selections for level in selection))
        rival: dict[str, Step] = {}
        theirs: dict[str, Mapping[str, str]] = {}
        ours: list[list[tuple[Step, dict[str, Mapping[str, str]]]]] = []
        for side in (True, False) if ours_first else (False, True):
            if side:
                kinds = (False, True) if reference else (False,)
                ours = [
                    [self._ours(checkpoint, chosen, cold=cold, reference=kind) for kind in kinds]
                    for chosen in selections
                ]
            else:
                rival, theirs = self._rival(checkpoint, levels, cold=cold)
        compared = sum(
            same_tensors(made[level], theirs[level], level) for runs in ours for _, made in runs for level in made
        )
        comparisons = tuple(
            Comparison(
                tuple(chosen),
                runs[0][0],
                (rival[ORIGINAL], *(rival[level] for level in chosen)),
                runs[1][0] if reference else None,
            )
            for chosen, runs in zip(selections, ours, strict=True)
        )
        return comparisons, compared

    def repeat(self, checkpoint: Path, levels: Sequence[str], repeats: int) -> tuple[Repeats, int]:
        """Both sides in turn; every other time we begin."""
        pairs: list[Comparison] = []
        compared = 0
        for i in range(repeats):
            found, n_tensors = self.compare(checkpoint, [levels], cold=False, ours_first=i % 2 == 1, reference=True)
            pairs += found
            compared += n_tensors
        return Repeats(model_of(checkpoint), tuple(levels), tuple(pairs)), compared

    def depth(self, shape: Shape, levels: Sequence[str]) -> Depth:
        """Memory of our conversion. The weights are zeros: they take no room, and memory does not depend on them."""
        folder = empty_checkpoint(self._folder / "layers", shape)
        try:
            step, _ = self._ours(folder, levels, cold=False)
            return Depth(model_of(folder), step.cost)
        finally:
            shutil.rmtree(folder)

    def anatomy(self, checkpoint: Path, levels: Sequence[str]) -> Anatomy:
        out = self._folder / "bise"
        try:
            cost, found = self._step(
                {"kind": "stages", "folder": str(checkpoint), "target": str(out), "levels": list(levels)},
                "stages",
                weight_files(checkpoint),
            )
            return Anatomy(tuple(levels), cost, found["stages"])
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _rival(
        self, checkpoint: Path, levels: Sequence[str], *, cold: bool
    ) -> tuple[dict[str, Step], dict[str, Mapping[str, str]]]:
        original, target = self._folder / "llama.cpp-BF16.gguf", self._folder / "llama.cpp.gguf"
        steps: dict[str, Step] = {}
        made: dict[str, Mapping[str, str]] = {}
        try:
            cost, _ = self._step(
                {"kind": "write_bf16", "folder": str(checkpoint), "target": str(original)},
                "llama.cpp BF16",
                weight_files(checkpoint) if cold else (),
            )
            n_bytes = original.stat().st_size
            steps[ORIGINAL] = Step(ORIGINAL, cost, checkpoint_bytes(checkpoint), n_bytes)
            for level in levels:
                cost, _ = self._step(
                    {"kind": "quantize", "source": str(original), "target": str(target), "level": level},
                    f"llama.cpp {level}",
                    [original] if cold else (),
                )
                steps[level] = Step(level, cost, n_bytes, target.stat().st_size)
                made[level] = digests(target)
                target.unlink()
            return steps, made
        finally:
            original.unlink(missing_ok=True)
            target.unlink(missing_ok=True)

    def _ours(
        self, checkpoint: Path, levels: Sequence[str], *, cold: bool, reference: bool = False
    ) -> tuple[Step, dict[str, Mapping[str, str]]]:
        out = self._folder / "bise"
        name = f"{len(levels)} levels" if len(levels) > 1 else levels[0]
        try:
            cost, found = self._step(
                {
                    "kind": "convert",
                    "folder": str(checkpoint),
                    "target": str(out),
                    "levels": list(levels),
                    "reference": reference,
                },
                f"Bise {name}{' by ggml' if reference else ''}",
                weight_files(checkpoint) if cold else (),
            )
            paths = {level: Path(path) for level, path in found["made"].items()}
            n_bytes = sum(path.stat().st_size for path in paths.values())
            return Step(name, cost, checkpoint_bytes(checkpoint), n_bytes), {
                level: digests(path) for level, path in paths.items()
            }
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _step(self, task: dict[str, Any], name: str, cold: Sequence[Path]) -> tuple[Cost, dict[str, Any]]:
        cost, found = run_step({**task, "threads": self._threads}, cold)
        self._say(f"{name}: {cost.seconds:.1f} s")
        return cost, found


def same_tensors(ours: Mapping[str, str], theirs: Mapping[str, str], level: str) -> int:
    """Digests of both sides (rival.py) → how many tensors there are. Raises UserError where one differs."""
    for name in {**theirs, **ours}:
        if ours.get(name) != theirs.get(name):
            raise UserError(f"{name} of {level} differs: ours is {ours.get(name)}, llama.cpp's {theirs.get(name)}")
    return len(ours)


def _name(shape: Shape) -> str:
    """The folder of a shape's weights."""
    return f"weights-{shape.n_layers}x{shape.n_embd}x{shape.n_ff}-{shape.n_heads}-{shape.n_vocab}"


def _passing(shape: Shape, levels: Sequence[str]) -> int:
    """Bytes of what is made of a shape at a time: all levels, or the BF16 GGUF and one level."""
    sizes = [tensor_bytes(shape, level) for level in levels]
    return round(1.01 * max(sum(sizes), tensor_bytes(shape, ORIGINAL) + max(sizes)))


__all__ = ["LEVELS", "SCALES", "SIX", "Bench", "Scale", "check_room", "model_of", "needed_bytes"]
