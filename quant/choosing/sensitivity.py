"""What measuring found: how far a model's predictions move when some tensors alone are made at a type; and its file.

The file is JSON, written anew after every measurement, so that a run that was interrupted goes on. Measurements hold
for one model file, text, matrix, way of making blocks and version of llama.cpp: `Setting` names them, and a file of
another setting is refused. Measures nothing itself (disturbance.py).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from quant.recipes import TensorSpec
from runtime.errors import OutputError, UserError
from runtime.ggml import GgmlType
from runtime.library import file_stem

FORMAT = 1
"""Rises when a reader of the older form would misread the newer."""


class SensitivityError(UserError):
    """A file of measurements that is missing, damaged, or of something else."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all measurements of a file have in common."""

    model: str
    level: str
    """That was loaded and disturbed."""
    model_sha256: str
    """Of its files (of several: of their SHA-256s)."""
    text: str
    """Names of the texts."""
    text_sha256: str
    context: int
    """Tokens of a chunk, of which the second half is scored."""
    chunks: int
    imatrix_sha256: str
    """Empty without an importance matrix."""
    search: str
    """How blocks were made."""
    llama_cpp: str
    """Commit."""

    @property
    def file_name(self) -> str:
        """A name that only the same setting gives."""
        return f"{file_stem(self.model)}-{hashlib.sha256(repr(self).encode()).hexdigest()[:12]}.json"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One disturbance."""

    tensors: tuple[str, ...]
    """That were made at the type, all others being as they are."""
    type: GgmlType
    klds: tuple[float, ...]
    """Of each chunk the mean KL divergence from the undisturbed model, in nats a token."""
    error: float
    """One standard deviation of the mean of all chunks, tokens taken as independent."""

    @property
    def kld(self) -> float:
        """Mean of all chunks."""
        return sum(self.klds) / len(self.klds)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """All measurements of one setting, in the order they were made."""

    setting: Setting
    measurements: tuple[Measurement, ...] = ()

    def find(self, tensors: Sequence[str], type_: GgmlType) -> Measurement | None:
        return next((m for m in self.measurements if m.tensors == tuple(tensors) and m.type is type_), None)

    def only(self, wanted: Iterable[tuple[Sequence[str], GgmlType]]) -> "Sensitivity":
        """Those measurements alone, which must be there."""
        found = [self.find(names, type_) for names, type_ in wanted]
        return replace(self, measurements=tuple(measurement for measurement in found if measurement is not None))


def groups(specs: Sequence[TensorSpec], together: int = 1) -> tuple[tuple[str, ...], ...]:
    """The matrices that are disturbed at the same time: those of one kind in `together` neighbouring layers."""
    if together < 1:
        raise UserError(f"{together} layers make no group; give 1 or more")
    found: dict[tuple[str, int], list[str]] = {}
    for spec in specs:
        if not spec.is_vector:
            layer = spec.name.split(".")[1] if spec.name.startswith("blk.") else ""
            key = (spec.kind, int(layer) // together) if layer else (spec.name, 0)
            found.setdefault(key, []).append(spec.name)
    return tuple(map(tuple, found.values()))


def save(sensitivity: Sensitivity, path: Path) -> None:
    """Write the file under a temporary name and rename it. Raises OutputError."""
    rows = [
        {"tensors": list(m.tensors), "type": m.type.name, "klds": list(m.klds), "error": m.error}
        for m in sensitivity.measurements
    ]
    # A line each: such a file is read by people, and compared.
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"format": FORMAT, "setting": asdict(sensitivity.setting)}, indent=1)[:-2]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(f'{head},\n "measurements": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def load(path: Path, setting: Setting | None = None) -> Sensitivity:
    """Read a file back. Raises SensitivityError where it is missing, damaged, or of another setting than that given."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SensitivityError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise SensitivityError(
            f"{path}: not a file of measurements; name another, or begin anew with --force"
        ) from None
    try:
        found = _parsed(data)
    except (KeyError, TypeError, ValueError) as error:
        raise SensitivityError(
            f"{path}: not a file of measurements that this Bise reads ({error!r}); name another, or begin anew with "
            "--force"
        ) from None
    if setting is not None:
        for f in fields(Setting):
            ours, theirs = getattr(setting, f.name), getattr(found.setting, f.name)
            if ours != theirs:
                what = f.name.replace("_", " ")
                raise SensitivityError(
                    f"{path} was measured with {what} {_brief(theirs)} and this run has {_brief(ours)}; name another "
                    "file, or begin anew with --force"
                )
    return found


def _parsed(data: Any) -> Sensitivity:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}, not {FORMAT}")
    setting = Setting(**data["setting"])
    for f in fields(Setting):
        if type(getattr(setting, f.name)) is not f.type:
            raise TypeError(f"{f.name} is {getattr(setting, f.name)!r}")
    rows = tuple(
        Measurement(
            tuple(map(str, row["tensors"])), GgmlType[row["type"]], tuple(map(float, row["klds"])), float(row["error"])
        )
        for row in data["measurements"]
    )
    if len({len(row.klds) for row in rows}) > 1 or any(not row.klds for row in rows):
        raise ValueError("measurements of different chunks")
    return Sensitivity(setting, rows)


def _brief(value: object) -> object:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else value or "none"
