"""What a benchmark found, as values and as JSON. Bytes and seconds throughout; ratios are llama.cpp's over ours."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.accounting import Cost
from runtime.levels import Shape

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One process: what it made, of how many bytes, at what cost."""

    name: str
    """BF16 for the intermediate file, a level, or how many levels at once."""
    cost: Cost
    input_bytes: int
    """Size of the files it had to read, once each."""
    output_bytes: int
    """Size of the files it made."""

    @property
    def flushed_seconds(self) -> float:
        """Until what it made was on the disk."""
        return self.cost.seconds + self.cost.flush_seconds


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same levels by both sides."""

    levels: tuple[str, ...]
    ours: Step
    rival: tuple[Step, ...]
    """BF16 GGUF first, then the levels."""
    reference: Step | None = None
    """Ours once more, with ggml's kernels in place of our own; None where that was not measured."""

    @property
    def ratio(self) -> float:
        """Of wall time: above 1 we are faster."""
        return sum(step.cost.seconds for step in self.rival) / self.ours.cost.seconds

    @property
    def ratios(self) -> dict[str, float]:
        """`cpu` hears less of what else the machine does; `flushed` waits for both sides' files to be on the disk;
        `levels_only` forgives llama.cpp the BF16 GGUF; `reference` and `reference_cpu` are of `reference`."""
        seconds = sum(step.cost.seconds for step in self.rival)
        cpu_seconds = sum(step.cost.cpu_seconds for step in self.rival)
        extra: dict[str, float] = {}
        if self.reference is not None:
            extra["reference"] = seconds / self.reference.cost.seconds
            extra["reference_cpu"] = cpu_seconds / self.reference.cost.cpu_seconds
        return {
            "wall": self.ratio,
            "cpu": cpu_seconds / self.ours.cost.cpu_seconds,
            "flushed": sum(step.flushed_seconds for step in self.rival) / self.ours.flushed_seconds,
            "levels_only": sum(step.cost.seconds for step in self.rival[1:]) / self.ours.cost.seconds,
            "read": sum(step.input_bytes for step in self.rival) / self.ours.input_bytes,
            "written": sum(step.output_bytes for step in self.rival) / self.ours.output_bytes,
            **extra,
        }


@dataclass(frozen=True, slots=True)
class Model:
    """What was converted."""

    shape: Shape
    n_weights: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Repeats:
    """Both sides in turn, several times."""

    model: Model
    levels: tuple[str, ...]
    pairs: tuple[Comparison, ...]

    @property
    def spread(self) -> dict[str, tuple[float, float, float]]:
        """Name of a ratio → lowest, median, highest, pair by pair."""
        found = [pair.ratios for pair in self.pairs]
        values = {name: [ratios[name] for ratios in found] for name in found[0]}
        return {name: (min(ratios), median(ratios), max(ratios)) for name, ratios in values.items()}


@dataclass(frozen=True, slots=True)
class Depth:
    """The memory of converting a model of so many layers."""

    model: Model
    cost: Cost


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where the threads' time went in one conversion: stage → seconds, cpu_seconds, queued_seconds, calls, of all."""

    levels: tuple[str, ...]
    cost: Cost
    stages: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class SideSpeed:
    """One build of the kernels, on one core."""

    build: str
    weights_per_second: float
    """Median of the rounds."""
    ratios: tuple[float, float, float]
    """To ggml in the same round: lowest, median, highest."""


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """The same blocks by ggml and by every build."""

    name: str
    """A type, or how many levels."""
    rows: str
    """F32, or BF16 that is widened first."""
    importance: bool
    ggml_weights_per_second: float
    builds: tuple[SideSpeed, ...]


@dataclass(frozen=True, slots=True)
class CoreSpeed:
    """Six levels by the best build on one core and on all."""

    build: str
    importance: bool
    cores: int
    one_core: float
    """Weights of the source a second, of wall time."""
    all_cores: float
    wall_ratios: tuple[float, float, float]
    """All cores to one: lowest, median, highest. Other work on the machine makes it smaller."""
    cpu_ratios: tuple[float, float, float]
    """The same by CPU time: what the cores lose to each other alone."""


@dataclass(frozen=True, slots=True)
class KernelSpeeds:
    """Everything about the kernels."""

    types: tuple[KernelSpeed, ...]
    longer: tuple[KernelSpeed, ...]
    """The longer search by the widest build, with means where there is a matrix, beside ggml's own kernels."""
    levels: tuple[KernelSpeed, ...]
    cores: tuple[CoreSpeed, ...]


@dataclass(frozen=True, slots=True)
class KernelResults:
    """What is measured of the kernels, and where. Its file is kernels.json."""

    machine: Mapping[str, Any]
    load_after: tuple[float, ...]
    scale: str
    speeds: KernelSpeeds

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class Results:
    """What is measured of the converter, and where. Its file is speed.json."""

    machine: Mapping[str, Any]
    load_after: tuple[float, ...]
    scale: str
    threads: int
    model: Model
    comparisons: tuple[Comparison, ...]
    repeats: Repeats
    depths: tuple[Depth, ...]
    anatomy: Anatomy
    n_compared: int
    """Tensors whose SHA-256 was the same on both sides; one that differs ends the run."""

    def to_json(self) -> str:
        content = {"format": FORMAT, **asdict(self)}
        for shown, found in zip(content["comparisons"], self.comparisons, strict=True):
            shown["ratios"] = found.ratios
        for shown, found in zip(content["repeats"]["pairs"], self.repeats.pairs, strict=True):
            shown["ratios"] = found.ratios
        content["repeats"]["spread"] = self.repeats.spread
        return json.dumps(content, indent=1) + "\n"
