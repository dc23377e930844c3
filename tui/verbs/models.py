"""List the models that models.yaml names, and what of them is on this disk."""

import argparse
import json
from pathlib import Path

HELP = "what models.yaml knows, what is on disk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=Path, metavar="DIR", help="where levels lie (default: the user's data folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from runtime import library
    from tui.units import gigabytes

    catalogue = library.shipped_catalogue()
    folder = arguments.models or library.models_folder()
    entries = []
    for model in catalogue.models.values():
        weights = library.checkpoint_folder(model)
        packaged = library.packaged_file(model)
        levels = library.find_levels(model.name, folder, catalogue.recipes)
        entries.append(
            {
                "model": model.key,
                "title": model.title,
                "source": model.source,
                "licence": model.licence.name,
                "context": model.context,
                "weights": str(weights) if weights else None,
                "file": str(packaged) if packaged else None,
                "levels": {level: library.file_bytes(path) for level, path in levels.items()},
            }
        )
    if arguments.json:
        print(json.dumps({"folder": str(folder), "models": entries}, indent=2))
        return 0
    width = max(len(str(entry["model"])) for entry in entries)
    for entry, model in zip(entries, catalogue.models.values(), strict=True):
        if entry["file"]:
            state = f"ready, {gigabytes(Path(str(entry['file'])).stat().st_size)}"
        elif entry["weights"]:
            state = "weights on disk"
        else:
            state = "weights not on disk" if model.levels else "not installed"
        print(f"{model.key:<{width}}  {model.title}; {state}")
        found = library.find_levels(model.name, folder, catalogue.recipes)
        if found:
            sizes = "  ".join(f"{level} {gigabytes(library.file_bytes(path))}" for level, path in found.items())
            print(f"{'':<{width}}  levels: {sizes}")
        note = f" {model.licence.note}" if model.licence.note else ""
        print(f"{'':<{width}}  licence: {model.licence.name}.{note}")
    print(f"\nlevels are looked for in {folder}")
    return 0
