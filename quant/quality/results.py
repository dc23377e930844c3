"""The result file: what was measured, and all that is needed to measure it again. JSON, one object.

`results` holds a row for each level and text; beside it stand settings, machine, versions, and the SHA-256 of every
model file and text. Reading checks every key and type, so what is returned is whole. Writing replaces the file at
once, so it is valid at any moment. Knows nothing of how the figures are computed or shown.
"""

import hashlib
import json
import os
import platform
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.quality.statistics import Divergence
from runtime import __version__
from runtime.errors import OutputError, UserError
from runtime.events import EngineSettings
from runtime.hardware import cpu_model

SCHEMA = 1
"""Raised whenever a reader of the old form would misread the new one."""


class ResultsError(UserError):
    """A result file that cannot be read, or belongs to another measurement."""


@dataclass(frozen=True, slots=True)
class Row:
    """One level on one text."""

    model: str
    level: str
    text: str
    context: int
    """Tokens in a chunk."""
    chunks: int
    tokens: int
    """Scored ones; the model read chunks · context."""
    ppl: float
    ppl_error: float
    kld_mean: float | None
    """Nats a token; None for the base itself, and where there was no base."""
    kld_error: float | None
    same_top: float | None
    """Share from 0 to 1 of tokens where level and base find the same token likeliest."""
    file_bytes: int
    bits_per_weight: float
    """Of all tensors together."""
    prompt_tokens_per_second: float
    """Tokens read in the engine, without the time of our statistics."""
    statistics: Divergence | None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file on disk, and its content."""

    name: str
    n_bytes: int
    modified_ns: int
    """With n_bytes it tells that a file is unchanged, without reading 100 GB again."""
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """The files of one level, in the order of their shards."""

    level: str
    files: tuple[FileRecord, ...]

    @property
    def content(self) -> tuple[str, ...]:
        """What makes two models the same."""
        return tuple(file.sha256 for file in self.files)


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One evaluation text, by its file's content."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Environment:
    """Machine and software: figures of two environments differ in the fifth digit, and in speed."""

    bise: str
    llama_cpp_python: str
    llama_cpp: str
    """Commit."""
    system_info: Mapping[str, str]
    """Instruction sets and features, as llama.cpp names them."""
    python: str
    numpy: str
    platform: str
    cpu: str
    devices: tuple[str, ...]
    """What the layers lay on."""


@dataclass(frozen=True, slots=True)
class Run:
    """One start of the program that added to this file."""

    date: str
    """ISO 8601, UTC."""
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Results:
    """The whole file."""

    schema: int
    model: str
    base: str | None
    """The level that the others are compared with."""
    settings: EngineSettings
    max_chunks: int | None
    """Only so many chunks of each text were read; None is all."""
    environment: Environment
    runs: tuple[Run, ...]
    models: tuple[ModelRecord, ...]
    texts: tuple[TextRecord, ...]
    results: tuple[Row, ...]

    def row(self, level: str, text: str) -> Row | None:
        return next((row for row in self.results if (row.level, row.text) == (level, text)), None)

    def record(self, level: str) -> ModelRecord | None:
        return next((model for model in self.models if model.level == level), None)


def this_environment(
    llama_cpp_python: str, llama_cpp: str, system_info: Mapping[str, str], devices: tuple[str, ...]
) -> Environment:
    """This machine with this Python; what only the engine knows is passed in."""
    return Environment(
        bise=__version__,
        llama_cpp_python=llama_cpp_python,
        llama_cpp=llama_cpp,
        system_info=dict(system_info),
        python=platform.python_version(),
        numpy=np.__version__,
        platform=platform.platform(),
        cpu=cpu_model(),
        devices=devices,
    )


def hash_file(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> FileRecord:
    """Read a file once for its SHA-256; `on_bytes` is told how many bytes are done, every 64 MiB."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            while n := file.readinto(buffer):
                digest.update(memoryview(buffer)[:n])
                done += n
                if done % (1 << 26) == 0:
                    on_bytes(done)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    return FileRecord(path.name, status.st_size, status.st_mtime_ns, digest.hexdigest())


def save(results: Results, path: Path) -> None:
    """Write the file under a temporary name and rename it. Raises OutputError."""
    text = json.dumps(asdict(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def load(path: Path) -> Results:
    """Read a file back. Raises ResultsError for one that is missing, damaged, or of another schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ResultsError(f"{path}: not a result file: {error}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ResultsError(f"{path}: a result file of schema {schema}, and this Bise reads {SCHEMA}; measure again")
    try:
        results: Results = _value(Results, data, "the file")
    except _MismatchError as error:
        raise ResultsError(f"{path}: damaged: {error}") from None
    return results


class _MismatchError(Exception):
    """A value of the file that is not what its field says."""


def _value(kind: Any, data: Any, where: str) -> Any:
    """JSON data → a value of the annotated type: dataclass, tuple, mapping, union with None, choice or scalar."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if data is None else _value(arguments[0], data, where)
    if origin is typing.Literal:
        _expect(data in arguments, where, f"one of {', '.join(arguments)}")
        return data
    if is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        right = isinstance(data, dict) and needed <= data.keys() <= hints.keys()
        _expect(right, where, f"the keys {', '.join(hints)}")  # a setting that came later has its default
        return kind(**{name: _value(hints[name], each, f"{name} of {where}") for name, each in data.items()})
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list")
        return tuple(_value(arguments[0], item, f"item {i} of {where}") for i, item in enumerate(data))
    if origin is Mapping:
        _expect(isinstance(data, dict), where, "an object")
        return {key: _value(arguments[1], item, f"{key} of {where}") for key, item in data.items()}
    number = isinstance(data, int | float) and not isinstance(data, bool)
    _expect(number if kind is float else type(data) is kind, where, f"of type {kind.__name__}")
    return float(data) if kind is float else data


def _expect(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise _MismatchError(f"{where} is not {what}")
