"""The project tells the truth about itself: version, changelog, help texts, locks, addresses."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from runtime import __version__
from runtime.wheel import VERSION
from tui.cli import parser

ROOT = Path(__file__).parent.parent


def _locked(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", pin) for pin in pins), pins
    return {pin.partition("==")[0].lower().replace("_", "-"): pin.partition("==")[2] for pin in pins}


def test_the_version_is_the_changelogs_newest() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
    assert metadata.version("bise") == __version__


def test_every_dependency_is_locked_at_a_version_it_allows() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = _locked("requirements.lock") | {"llama-cpp-python": VERSION}
    for text in project["dependencies"]:
        requirement = Requirement(text)
        version = locked[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), (text, version)
    assert set(project["optional-dependencies"]["dev"]) <= set(_locked("requirements-dev.lock"))


def test_the_readme_shows_the_real_help() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- help -->\n```\n(.*?)```", readme, re.DOTALL)
    assert shown is not None
    listed = dict(re.findall(r"^    (\w+) +(\S.*)$", shown[1], re.MULTILINE))
    verbs = next(action for action in parser()._actions if action.choices)
    real = {choice.dest: choice.help for choice in verbs._choices_actions}  # type: ignore[attr-defined]
    assert listed == real


def test_the_readme_names_no_file_that_is_not_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#: ]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_the_architecture_tree_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", readme, re.DOTALL)
    assert tree is not None
    named = set(re.findall(r"^ {2,}(\w+\.py) +\S", tree[1], re.MULTILINE))
    there = {
        path.name
        for floor in ("runtime", "quant", "tui", "benchmarks")
        for path in (ROOT / floor).rglob("*.py")
        if "demo" not in path.parts and path.name != "__init__.py"
    }
    assert there - named == set(), "modules that the README's tree lacks"
    assert named - there == set(), "modules that the README's tree names and that are gone"


def test_no_file_names_a_package_registry() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted", "deb." + "debian", "npm" + "js."]
    left_out = {
        ".git",
        ".venv",
        "demo-out",
        "bench-out",
        "quality-out",
        "__pycache__",
        ".mypy_cache",
        ".ruff_cache",
        ".pytest_cache",
    }
    files = [path for path in ROOT.rglob("*") if not left_out & set(path.relative_to(ROOT).parts)]
    for path in files:
        if path.is_file() and path.suffix not in {".safetensors", ".model", ".txt", ".jsonl"}:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [host for host in hosts if host in text], path


@pytest.mark.parametrize(("floor", "above"), [("runtime", ("quant", "tui")), ("quant", ("tui",))])
def test_no_floor_imports_one_above(floor: str, above: tuple[str, ...]) -> None:
    pattern = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(above)})\b", re.MULTILINE)
    for path in (ROOT / floor).rglob("*.py"):
        if "demo" not in path.parts:
            assert not pattern.search(path.read_text(encoding="utf-8")), path


def test_only_native_imports_llama_cpp() -> None:
    pattern = re.compile(r"^\s*(?:from|import) llama_cpp\b", re.MULTILINE)
    importers = {
        str(path.relative_to(ROOT))
        for floor in ("runtime", "quant", "tui")
        for path in (ROOT / floor).rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    }
    assert importers == {"runtime/native.py"}


def test_no_module_is_longer_than_400_lines() -> None:
    for floor in ("runtime", "quant", "tui", "benchmarks"):
        for path in (ROOT / floor).rglob("*.py"):
            if "demo" not in path.parts:
                n_lines = len(path.read_text(encoding="utf-8").splitlines())
                assert n_lines <= 400, f"{path}: {n_lines} lines"
