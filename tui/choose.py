"""Which model a verb means: the one named, the one used last, or a sensible first one.

Takes command-line arguments, gives a `ModelFile` and what the user should know of the choice in one line. Makes the
demo's levels if need be.
"""

import argparse
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime import library
from runtime.catalogue import Catalogue, Model, parse_recipes
from runtime.errors import CatalogueError
from runtime.levels import EVERY_LEVEL
from runtime.library import ModelFile

DEMO = "demo"
_FIRST_CHOICE = "smollm2"


@dataclass(frozen=True, slots=True)
class Choice:
    """A model to talk to."""

    file: ModelFile
    notice: str | None
    """One line the user should see before the first turn."""


def add_model_arguments(parser: argparse.ArgumentParser, *, level: str = "Q4_K_M, else the smallest on disk") -> None:
    """--level and --models, for verbs that load a model. `level` says what is loaded where none is named."""
    parser.add_argument("--level", metavar="LEVEL", help=f"such as Q4_K_M (default: {level})")
    parser.add_argument("--models", type=Path, metavar="DIR", help="where levels lie (default: the user's data folder)")


def choose(model: str | None, level: str | None, models: Path | None, say: Callable[[str], None]) -> Choice:
    """The model to talk to. `say` hears of work that takes a moment. Raises UserError."""
    catalogue = library.shipped_catalogue()
    folder = models or library.models_folder()
    wanted_level = parse_recipes(level, catalogue.recipes)[0].name if level else None
    if model is None:
        model, wanted_level = _usual(catalogue, wanted_level)
    if model == DEMO:
        wanted_level = wanted_level or "Q4_K_M"
        ensure_levels(catalogue.model(DEMO), (wanted_level,), folder, say)
    file = library.find_model_file(model, wanted_level, catalogue, folder)
    return Choice(file, file.model.notice if file.model else None)


def ensure_levels(model: Model, levels: tuple[str, ...], folder: Path, say: Callable[[str], None]) -> None:
    """Make the missing ones of a packaged model's levels: it is small enough to do so unasked. Recipes are not made."""
    from quant.convert import make_levels

    found = library.find_levels(model.name, folder)
    missing = [level for level in EVERY_LEVEL if level in levels and level not in found]
    if missing:
        weights = library.checkpoint_folder(model)
        if weights is None:
            raise CatalogueError(f"the weights of {model.key} are missing from this installation; install Bise again")
        say(f"making {', '.join(missing)} of {model.key} in {folder}")
        make_levels(weights, model.name, missing, folder)


def remember(choice: Choice) -> None:
    """Keep it as the model used last."""
    path = _last_path()
    with contextlib.suppress(OSError):  # a convenience: a full or read-only disk must not stand in the way of a chat
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model": choice.file.key, "level": choice.file.level}) + "\n", encoding="utf-8")


def _usual(catalogue: Catalogue, level: str | None) -> tuple[str, str | None]:
    """The model used last if it is still there, else SmolLM2 where it is installed, else the demo."""
    try:
        last = json.loads(_last_path().read_text(encoding="utf-8"))
        key, last_level = str(last["model"]), last["level"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not ours: the first choice stands
        key, last_level = "", None
    if key in catalogue.models or (key and Path(key).is_file()):
        return key, level or (str(last_level) if last_level and key in catalogue.models else None)
    first = catalogue.models.get(_FIRST_CHOICE)
    if first is not None and library.packaged_file(first) is not None:
        return _FIRST_CHOICE, level
    return DEMO, level


def _last_path() -> Path:
    import platformdirs

    return platformdirs.user_state_path("bise") / "last-model.json"
