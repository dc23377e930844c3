"""models.yaml → frozen values.

Takes YAML text, gives a `Catalogue`; every key is checked once, here. An unknown key, level, preset or model is a
`CatalogueError` that names the file, the key and the nearest known one. Knows nothing of what is on disk (library.py).
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from runtime.errors import CatalogueError
from runtime.ggml import GgmlType
from runtime.levels import EVERY_LEVEL, LEVELS, Recipe, Search, Shape, plain, unusable_name
from runtime.patterns import checked_pattern
from runtime.prompts import KINDS
from runtime.sampling import NAMES, Sampling, setting

PRESETS = ("code", "factual", "creative")

TYPES = {type_.name: type_ for type_ in sorted(GgmlType, key=lambda t: t.name) if type_ is not GgmlType.F32}
"""The types that a recipe can give a tensor, by name."""

_ALL = "ALL"

_PREFIXES = "KMGT"
_UNITS = {"b": 1}
_UNITS |= {f"{p.lower()}ib": 1024 ** (i + 1) for i, p in enumerate(_PREFIXES)}
_UNITS |= {f"{p.lower()}{b}": 1000 ** (i + 1) for i, p in enumerate(_PREFIXES) for b in ("b", "")}


@dataclass(frozen=True, slots=True)
class Licence:
    """Under what terms the weights come."""

    name: str
    link: str | None = None
    note: str | None = None
    """One sentence shown before a download and by `bise models`."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model known by name."""

    key: str
    """Its name on the command line."""
    name: str
    """Stem of its file names, and general.name in the GGUF."""
    title: str
    source: str
    """`hub:OWNER/REPOSITORY`, `package:MODULE/PATH`, or a path."""
    prompt: str
    context: int
    """Tokens the model was trained for."""
    licence: Licence
    tokenizer: str | None = None
    levels: tuple[str, ...] = ()
    """The levels it can be made at; none for a model that comes as GGUF."""
    notice: str | None = None
    shape: Shape | None = None
    sampling: Mapping[str, Sampling] = field(default_factory=dict)
    """Preset name → settings: code, factual, creative."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine to plan for."""

    key: str
    title: str
    devices: tuple[int, ...]
    """Memory of each device in bytes."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything models.yaml says."""

    models: Mapping[str, Model]
    machines: Mapping[str, Machine]
    sampling: Mapping[str, Sampling]
    """The presets of a model that models.yaml does not know."""
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    """Levels of one's own, by name."""

    def model(self, key: str) -> Model:
        """The model of that name; raises CatalogueError with the nearest name."""
        if key not in self.models:
            raise CatalogueError(f"no model is called {key!r}{_nearest(key, self.models)}; `bise models` lists them")
        return self.models[key]

    def by_name(self, name: str) -> Model | None:
        """The model whose file-name stem is `name`, in any case."""
        return next((m for m in self.models.values() if m.name.lower() == name.lower()), None)


def parse_bytes(text: str) -> int:
    """A size such as `80GiB`, `24 GB` or `48G` (decimal, as `gguf-split` has it) in bytes. Raises CatalogueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    unit = _UNITS.get(match[2] or "b") if match else None
    if match is None or unit is None:
        raise CatalogueError(f"{text!r} is not a size; write one such as 80GiB or 24GB")
    return int(float(match[1]) * unit)


def parse_levels(wanted: str | Iterable[str], known: tuple[str, ...] = LEVELS) -> tuple[str, ...]:
    """Names separated by commas, in the order of `known`; `all` is the ten. Raises CatalogueError for unknown ones."""
    names = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    names = [name.strip().upper() for name in names if name.strip()]
    for name in names:
        if name not in (*known, "ALL"):
            raise CatalogueError(f"{name!r} is not a level{_nearest(name, known)}; the levels are {', '.join(known)}")
    if not names:
        raise CatalogueError(f"no level given; the levels are {', '.join(known)}, or all")
    return tuple(level for level in known if level in names or ("ALL" in names and level in LEVELS))


def parse_recipes(wanted: str, known: Mapping[str, Recipe]) -> tuple[Recipe, ...]:
    """Names of levels and of `known` recipes, separated by commas, in any case; `all` is the ten.

    Gives each once: the levels, smallest first, then the recipes in their order. A known recipe with a level's name
    stands for the level. Raises CatalogueError for an unknown name.
    """
    every = {level: plain(level) for level in EVERY_LEVEL} | dict(known)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    listed = ", ".join(every)
    if not names:
        raise CatalogueError(f"no level given; the levels and recipes are {listed}, or all")
    upper = {name.upper() for name in every} | {_ALL}
    for name in names:
        if name.upper() not in upper:
            raise CatalogueError(
                f"{name!r} is not a level or recipe{_nearest(name, every)}; the levels and recipes are {listed}"
            )
    chosen = {name.upper() for name in names}
    chosen |= set(LEVELS) if _ALL in chosen else set()
    return tuple(recipe for name, recipe in every.items() if name.upper() in chosen)


def read_recipes(path: Path) -> Mapping[str, Recipe]:
    """The recipes of one file of the form of models.yaml, by name. Raises CatalogueError where it has none."""
    found = _recipes([_read(path)])
    if not found:
        raise CatalogueError(f"{path}: no recipe in it; `bise recipe` writes such files, models.yaml shows their form")
    return found


def recipe_name(text: str) -> str:
    """`text` if it can be a recipe's name. Raises CatalogueError."""
    if why := unusable_name(text):
        raise CatalogueError(f"{text!r} {why}")
    return text


def parse_type(text: str) -> GgmlType:
    """A type that a tensor can be given, as `Q4_K` or `q4_K`. Raises CatalogueError."""
    type_ = TYPES.get(text.strip().upper())
    if type_ is None:
        raise CatalogueError(f"{text!r} is not a type{_nearest(text, TYPES)}; the types are {', '.join(TYPES)}")
    return type_


def parse_override(text: str) -> tuple[str, GgmlType]:
    """`REGEX=TYPE`, which tensors by their names get which type, in its two parts. Raises CatalogueError."""
    pattern, _, type_ = text.rpartition("=")
    if not pattern or not type_:
        raise CatalogueError(f"{text!r} is not REGEX=TYPE, such as 'ffn_down=Q6_K'")
    return checked_pattern(pattern), parse_type(type_)


def load(shipped: Path, *own: Path) -> Catalogue:
    """Read the shipped models.yaml and, where they exist, the user's own files on top of it. Raises CatalogueError.

    The user's models, machines and recipes are added, or replace those of the same name in a file before; the user's
    presets hold for every model that has none of its own.
    """
    files = [_read(shipped), *(_read(path) for path in own if path.exists())]
    shared = {key: preset for file in files for key, preset in _presets(file.section("sampling")).items()}
    return Catalogue(
        models={key: _model(key, node, shared) for file in files for key, node in file.section("models").items()},
        machines={key: _machine(key, node) for file in files for key, node in file.section("machines").items()},
        sampling=shared,
        recipes=_recipes(files),
    )


def _read(path: Path) -> "_Node":
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatalogueError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    node = _Node(path, "", tree if tree is not None else {})
    node.only("sampling", "machines", "recipes", "models")
    return node


def _model(key: str, node: "_Node", shared: Mapping[str, Sampling]) -> Model:
    node.only(*(f.name for f in fields(Model) if f.name != "key"))
    prompt = node.text("prompt")
    if prompt not in KINDS:
        node.fail("prompt", f"{prompt!r} is not a prompt format{_nearest(prompt, KINDS)}; known: {', '.join(KINDS)}")
    licence = node.child("licence")
    licence.only(*(f.name for f in fields(Licence)))
    levels: tuple[str, ...] = ()
    if "levels" in node:
        value = node.tree["levels"]
        if not isinstance(value, str | list):
            node.fail("levels", f"must be names of levels or all, not {value!r}")
        try:
            levels = parse_levels(value if isinstance(value, str) else [str(v) for v in value])
        except CatalogueError as error:
            node.fail("levels", str(error))
    return Model(
        key=key,
        name=node.text("name"),
        title=node.text("title"),
        source=node.text("source"),
        prompt=prompt,
        context=node.number("context"),
        licence=Licence(licence.text("name"), licence.optional("link"), licence.optional("note")),
        tokenizer=node.optional("tokenizer"),
        levels=levels,
        notice=node.optional("notice"),
        shape=_shape(node.child("shape")) if "shape" in node else None,
        sampling={**shared, **_presets(node.section("sampling"))},
    )


def _shape(node: "_Node") -> Shape:
    node.only(*(f.name for f in fields(Shape)))
    tied = node.tree.get("tied", False)
    if not isinstance(tied, bool):
        node.fail("tied", f"must be true or false, not {tied!r}")
    return Shape(**{f.name: node.number(f.name) for f in fields(Shape) if f.name != "tied"}, tied=tied)


def _machine(key: str, node: "_Node") -> Machine:
    node.only("title", "devices")
    devices = node.tree.get("devices")
    if not isinstance(devices, list) or not devices:
        node.fail("devices", "must be a list of sizes such as [80GiB, 80GiB]")
    try:
        sizes = tuple(parse_bytes(str(device)) for device in devices)
    except CatalogueError as error:
        node.fail("devices", str(error))
    return Machine(key, node.text("title"), sizes)


def _recipes(files: Iterable["_Node"]) -> dict[str, Recipe]:
    """A later file's recipe replaces one of the same name in any case; one file has each name once."""
    found: dict[str, Recipe] = {}
    for file in files:
        section = file.section("recipes")
        own: dict[str, Recipe] = {}
        for name, node in section.items():
            if (same := next((other for other in own if other.upper() == name.upper()), None)) is not None:
                section.fail(name, f"the same name as {same!r}; names are known in any case")
            own[name] = _recipe(name, node)
        replaced = {name.upper() for name in own}
        found = {name: recipe for name, recipe in found.items() if name.upper() not in replaced} | own
    return found


def _recipe(name: str, node: "_Node") -> Recipe:
    node.only("base", "tensors", "output", "embedding", "search", "note")
    if why := unusable_name(name):
        raise CatalogueError(f"{node.file}: {node.place}: {why}")
    base = node.text("base")
    if base.upper() not in EVERY_LEVEL:
        node.fail("base", f"{base!r} is not a level{_nearest(base, EVERY_LEVEL)}; known: {', '.join(EVERY_LEVEL)}")
    tensors = node.section("tensors")
    output, embedding = (_own_type(node, key) if key in node else None for key in ("output", "embedding"))
    return Recipe(
        name,
        base.upper(),
        tuple((_own_pattern(tensors, pattern), _own_type(tensors, pattern)) for pattern in tensors.tree),
        output,
        embedding,
        _search(node),
        node.optional("note") or "",
    )


def _search(node: "_Node") -> Search:
    text = node.optional("search") or Search.GGML
    if text not in (known := [*Search]):
        node.fail("search", f"{text!r} is not a search{_nearest(text, known)}; known: {', '.join(known)}")
    return Search(text)


def _own_type(node: "_Node", key: str) -> GgmlType:
    text = node.text(key)
    try:
        return parse_type(text)
    except CatalogueError as error:
        node.fail(key, str(error))


def _own_pattern(node: "_Node", key: str) -> str:
    try:
        return checked_pattern(key)
    except CatalogueError as error:
        raise CatalogueError(f"{node.file}: {node.place}: {error}") from None


def _presets(node: "_Node") -> dict[str, Sampling]:
    node.only(*PRESETS)
    return {key: _sampling(child) for key, child in node.items()}


def _sampling(node: "_Node") -> Sampling:
    node.only(*NAMES)
    settings: dict[str, Any] = {}
    for key, value in node.tree.items():
        try:
            settings[key] = setting(key, value)
        except ValueError as error:
            node.fail(key, str(error))
    try:
        return Sampling(**settings)
    except ValueError as error:
        raise CatalogueError(f"{node.file}: {node.place}: {error}") from None


class _Node:
    """A mapping in the YAML tree that knows where it stands."""

    def __init__(self, file: Path, place: str, tree: Any) -> None:
        self.file, self.place = file, place
        if not isinstance(tree, dict):
            raise CatalogueError(f"{file}: {place or 'the file'} must be a mapping of keys to values, not {tree!r}")
        self.tree: dict[str, Any] = {str(key): value for key, value in tree.items()}

    def __contains__(self, key: str) -> bool:
        return key in self.tree

    def fail(self, key: str, why: str) -> NoReturn:
        raise CatalogueError(f"{self.file}: {self._path(key)}: {why}")

    def only(self, *known: str) -> None:
        for key in self.tree:
            if key not in known:
                self.fail(key, f"unknown key{_nearest(key, known)}; known: {', '.join(known)}")

    def child(self, key: str) -> "_Node":
        if key not in self.tree:
            self.fail(key, "missing")
        return _Node(self.file, self._path(key), self.tree[key])

    def section(self, key: str) -> "_Node":
        """The child, or an empty one where the key is left out."""
        return self.child(key) if key in self.tree else _Node(self.file, self._path(key), {})

    def items(self) -> Iterable[tuple[str, "_Node"]]:
        return [(key, self.child(key)) for key in self.tree]

    def text(self, key: str) -> str:
        value = self.optional(key)
        if value is None:
            self.fail(key, "missing")
        return value

    def optional(self, key: str) -> str | None:
        value = self.tree.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(key, f"must be text, not {value!r}")
        return value

    def number(self, key: str) -> int:
        value = self.tree.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(key, f"must be a whole number above 0, not {value!r}")
        return value

    def _path(self, key: str) -> str:
        shown = key if key.isprintable() else repr(key)
        return f"{self.place}.{shown}" if self.place else shown


def _nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` where a known word is near in any case, else nothing."""
    by_upper = {name.upper(): name for name in known}
    near = difflib.get_close_matches(word.upper(), by_upper, n=1, cutoff=0.5)
    return f", did you mean {by_upper[near[0]]!r}?" if near else ""
