"""Recipes that are chosen: their files' sizes to the byte, their expressions, and `bise recipe` as a user meets it."""

import json
import math
import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest

from quant.choosing import recipe_file
from quant.choosing.selection import Selection, candidates, default_name
from quant.choosing.sensitivity import load
from quant.inputs import described_source, open_source
from quant.plan import plan_conversion
from quant.recipes import RecipeError, TensorSpec, tensors, types, weights_by_place
from quant.source import Source
from runtime.catalogue import read_recipes
from runtime.errors import CatalogueError, OutputError
from runtime.ggml import GgmlType
from runtime.levels import LEVELS, Shape
from runtime.library import find_model_file, shipped_catalogue
from runtime.placement import Wish, place
from tests.checkpoints import DEMO, DEMO_SHAPE
from tests.gguf_files import SMALL, write_model
from tests.test_cli import BISE
from tui.cli import main

GIB = 2**30


def _losses(source: Source, seed: int = 1) -> dict[str, dict[GgmlType, float]]:
    """Of uneven tensors, falling by 4 a bit."""
    rng = random.Random(seed)
    shapes = {spec.name: spec for spec in source.specs}
    losses = {}
    for name, its in candidates(source).items():
        spec, sensitivity = shapes[name], math.exp(rng.gauss(0, 1.5))
        losses[name] = {
            type_: 0.0
            if type_ in (GgmlType.BF16, GgmlType.F16)
            else sensitivity * 4 ** (-8 * spec.n_bytes(type_) / spec.n_elements)
            for type_ in its
        }
    return losses


@pytest.fixture(scope="module")
def demo_source() -> Source:
    return open_source(DEMO, "Demo")


@pytest.fixture(scope="module")
def large() -> Selection:
    """The 123B model, known by its shape alone."""
    source = described_source(shipped_catalogue().model("mistral-large-2411"))
    return Selection(source, _losses(source))


@pytest.mark.parametrize("level", LEVELS)
def test_at_a_levels_size_it_is_predicted_to_lose_less(level: str, demo_source: Source) -> None:
    selection = Selection(demo_source, _losses(demo_source))
    plain = next(sized for sized in selection.levels() if sized.recipe.name == level)
    choice = selection.of_size(plain.n_bytes)
    plan = plan_conversion(demo_source, [choice.sized.recipe], Path("x")).levels[0]
    assert plan.n_bytes == choice.sized.n_bytes <= plain.n_bytes
    assert plan.n_bytes > 0.995 * plain.n_bytes
    assert choice.sized.loss < plain.loss
    assert choice.is_best


def test_sizes_are_kept_to_the_byte(demo_source: Source) -> None:
    selection = Selection(demo_source, _losses(demo_source))
    sizes = []
    for n_bytes in range(5_000_000, 5_000_600, 97):
        choice = selection.of_size(n_bytes)
        assert choice.sized.n_bytes <= n_bytes
        sizes.append(choice.sized.loss)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("bits", [2.8, 4.5, 8.0, 16.0])
def test_bits_are_over_all_tensors(bits: float, demo_source: Source) -> None:
    choice = Selection(demo_source, _losses(demo_source)).of_bits(bits)
    n_weights = sum(spec.n_elements for spec in demo_source.specs)
    chosen = types(demo_source.shape, choice.sized.recipe, demo_source.specs)
    n_bytes = sum(spec.n_bytes(chosen[spec.name]) for spec in demo_source.specs)
    assert 0.99 * bits < 8 * n_bytes / n_weights <= bits
    assert choice.sized.bits_per_weight == 8 * n_bytes / n_weights
    assert default_name(demo_source, choice) == f"Demo-{8 * n_bytes / n_weights:.2f}bpw"


def test_what_is_too_small_is_refused_with_both_numbers(demo_source: Source) -> None:
    selection = Selection(demo_source, _losses(demo_source))
    with pytest.raises(
        RecipeError, match=r"1,000,000 bytes are too few for Demo, whose files have 3,\d{3},\d{3}"
    ) as error:
        selection.of_size(1_000_000)
    smallest = int(str(error.value).split("have ")[1].split(" ")[0].replace(",", ""))
    assert selection.of_size(smallest).sized.n_bytes == smallest
    with pytest.raises(RecipeError, match="too few"):
        selection.of_size(smallest - 1)
    with pytest.raises(
        RecipeError, match=r"^2 bits per weight are too few for Demo, which has 2\.\d{3} at the smallest"
    ):
        selection.of_bits(2)


def test_rows_that_256_does_not_divide_get_what_they_can(tmp_path: Path) -> None:
    source = open_source(write_model(tmp_path / "Small-BF16.gguf", SMALL), "Small")
    assert candidates(source)["blk.0.ffn_down.weight"] == (
        GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0, GgmlType.BF16,
    )  # fmt: skip
    assert Selection(source, _losses(source)).of_bits(5.0).is_best


def test_the_123_billion_parameters_get_70_gigabytes(large: Selection) -> None:
    choice = large.of_size(70_000_000_000)
    assert 69_990_000_000 < choice.sized.n_bytes <= 70_000_000_000
    assert choice.is_best
    assert len(choice.sized.recipe.tensors) <= 7 * 7


def test_what_fits_two_cards_fills_them(large: Selection) -> None:
    shape = shipped_catalogue().model("mistral-large-2411").shape
    assert shape is not None
    wish, devices = Wish(131_072), [80 * GIB, 80 * GIB]
    choice = large.fitting(wish, devices, GIB)
    placement = place(weights_by_place(shape, choice.sized.recipe), shape, wish, devices, GIB)
    assert placement.fits
    assert placement.spare < 2 * GIB  # less than a layer is left
    assert choice.sized.loss < large.of_size(choice.sized.n_bytes - 3 * GIB).sized.loss


def test_what_fits_nowhere_is_refused_with_both_numbers(large: Selection) -> None:
    words = (
        "131,072 tokens of f16 KV cache fits at no size: at the smallest types its weights have "
        r"4\d,\d{3},\d{3},\d{3} bytes, and the fullest device lacks \d+,"
    )
    with pytest.raises(RecipeError, match=words):
        large.fitting(Wish(131_072), [40 * GIB], GIB)


def _random_types(shape: Shape, seed: int) -> tuple[tuple[TensorSpec, ...], dict[str, GgmlType]]:
    rng, specs = random.Random(seed), tensors(shape)
    usual = (GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.BF16)
    return specs, {spec.name: rng.choice(usual) for spec in specs if not spec.is_vector}


@pytest.mark.parametrize("seed", range(3))
def test_expressions_say_what_was_chosen_and_a_file_keeps_them(seed: int, tmp_path: Path) -> None:
    """Twelve layers, so that 1 must not mean 10 and 11 too."""
    shape = Shape(n_layers=12, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, head_dim=64, n_vocab=512)
    specs, chosen = _random_types(shape, seed)
    recipe = recipe_file.as_recipe("Mine", shape, specs, chosen)
    found = types(shape, recipe, specs)
    assert {name: found[name] for name in chosen} == chosen
    content = recipe_file.text(recipe, ["made of: this & that"])
    recipe_file.write(tmp_path / "a" / "mine.yaml", content)
    assert read_recipes(tmp_path / "a" / "mine.yaml") == {"Mine": recipe}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.yaml"]


def test_a_plain_level_is_its_own_base() -> None:
    specs = tensors(DEMO_SHAPE)
    for level in LEVELS:
        assert recipe_file.as_recipe("X", DEMO_SHAPE, specs, types(DEMO_SHAPE, level)).base == level


def test_another_recipe_of_that_name_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    recipe_file.write(path, "a\n")
    recipe_file.write(path, "a\n")
    with pytest.raises(OutputError, match=r"r\.yaml: another recipe of that name is there"):
        recipe_file.write(path, "b\n")
    recipe_file.write(path, "b\n", replace=True)
    assert path.read_text() == "b\n"


def test_a_file_without_recipes_is_no_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("sampling: {}\n")
    with pytest.raises(CatalogueError, match=r"r\.yaml: no recipe in it"):
        read_recipes(tmp_path / "r.yaml")


# The verb, in this process: a new one takes seconds to import what it needs


@dataclass
class Verb:
    """`bise recipe demo` on the demo's BF16 file."""

    models: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        code = main(["recipe", "demo", "--models", str(self.models), "--threads", "1", *map(str, arguments)])
        return code, *self.capsys.readouterr()

    def chosen(self, *arguments: str | Path) -> dict[str, Any]:
        """What `--json` prints."""
        code, stdout, stderr = self(*arguments, "--json")
        assert code == 0, stderr
        found: dict[str, Any] = json.loads(stdout)
        return found


@pytest.fixture
def verb(demo: Path, capsys: pytest.CaptureFixture[str]) -> Verb:
    return Verb(demo.parent.parent, capsys)


def test_a_recipe_is_chosen_made_and_found_by_its_name(verb: Verb, tmp_path: Path) -> None:
    chosen = verb.chosen("--like", "Q3_K_M", "--proxy")
    name = chosen["name"]
    assert main(["quantize", "demo", "--recipe", name, "--out", str(tmp_path), "--quiet"]) == 0
    path = tmp_path / name / f"Demo-{name}.gguf"
    level = next(its for its in chosen["levels"] if its["name"] == "Q3_K_M")
    assert path.stat().st_size == chosen["file_bytes"] <= level["file_bytes"]
    assert {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors} == chosen["types"]
    assert [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == [name]
    assert main(["models", "--json", "--models", str(tmp_path)]) == 0
    listed = json.loads(verb.capsys.readouterr().out)["models"]
    assert next(entry for entry in listed if entry["model"] == "demo")["levels"] == {name: path.stat().st_size}
    assert find_model_file("demo", name, shipped_catalogue(), tmp_path).path == path


def test_a_recipe_file_is_made_and_says_what_it_is_of(verb: Verb, tmp_path: Path) -> None:
    code, stdout, _ = verb("--bits", "3.5", "--proxy", "--out", tmp_path / "r.yaml", "--name", "Mine")
    assert code == 0
    assert f"bise quantize demo --recipe {tmp_path / 'r.yaml'}`" in stdout
    assert any(line.split()[:1] == ["Mine"] for line in stdout.splitlines())
    comments = [line for line in (tmp_path / "r.yaml").read_text().splitlines() if line.startswith("#")]
    assert "Demo, at most 3.5 bits per weight" in comments[0]
    assert any(re.fullmatch("# weights      SHA-256 [0-9a-f]{64}", line) for line in comments)
    assert str(tmp_path) not in "".join(comments)
    out = ("--out", str(tmp_path), "--quiet")
    assert main(["quantize", "demo", "--levels", "Q2_K", "--recipe", str(tmp_path / "r.yaml"), *out]) == 0
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir()) == ["Mine", "Q2_K"]


def test_what_is_to_fit_a_device_fits_it(verb: Verb, tmp_path: Path) -> None:
    wish, device = Wish(512, "q8_0"), 14 << 20
    fit = ("--fit", "14MiB", "--context", "512", "--kv", "q8_0", "--reserve", "0")
    chosen = verb.chosen(*fit, "--proxy", "--out", tmp_path / "r.yaml")
    recipe = read_recipes(tmp_path / "r.yaml")[chosen["name"]]
    placement = place(weights_by_place(DEMO_SHAPE, recipe), DEMO_SHAPE, wish, [device], 0)
    assert placement.fits
    assert placement.spare < 10_000
    assert "to fit 14MiB with 512 tokens of q8_0 KV cache" in (tmp_path / "r.yaml").read_text()


def test_what_was_measured_is_kept_and_gone_on_with(verb: Verb, tmp_path: Path) -> None:
    """Eight layers at a time, one type, one chunk: nine measurements."""
    kept = tmp_path / "s.json"
    text = tmp_path / "text.txt"
    text.write_text((DEMO.parent / "eval" / "prose.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    measuring: list[str | Path] = ["--bits", "4.5", "--search", "ggml", "--sensitivity", kept, "--texts", text]
    measuring += ["--together", "8", "--types", "Q3_K"]
    first = verb.chosen("--out", tmp_path / "a.yaml", "--chunks", "1", *measuring)
    lines = kept.read_text().splitlines()
    rows = [line for line in lines if '"klds"' in line]
    assert len(rows) == 9
    cut = "\n".join(line for line in lines if line not in rows[4:]).replace("},\n ]", "}\n ]")
    kept.write_text(cut.replace('"klds": [', '"klds": [1', 1))  # to see that it is not measured again
    second = verb.chosen("--out", tmp_path / "b.yaml", "--chunks", "1", *measuring)
    again = [line for line in kept.read_text().splitlines() if '"klds"' in line]
    assert (len(again), again[1:4], again[4:]) == (9, rows[1:4], rows[4:])
    assert again[0] != rows[0]
    assert second["predicted_loss"] > first["predicted_loss"]
    recipe = read_recipes(tmp_path / "a.yaml")[first["name"]]
    assert {name: type_.name for name, type_ in types(DEMO_SHAPE, recipe).items()} == first["types"]
    code, _, stderr = verb("--chunks", "2", *measuring)
    assert (code, stderr.count("\n")) == (1, 1), stderr
    assert "was measured with chunks 1 and this run has 2" in stderr


def test_ctrl_c_ends_it_and_keeps_what_was_measured(demo: Path, tmp_path: Path) -> None:
    kept = tmp_path / "s.json"
    command = [BISE, "recipe", "demo", "--bits", "4.5", "--models", str(demo.parent.parent), "--sensitivity", str(kept)]
    process = subprocess.Popen(
        [*command, "--chunks", "2", "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not kept.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, ""), stderr
    assert "the same command goes on where this one stopped" in stderr
    assert 0 < len(load(kept).measurements) < 116
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--target-size 1M", "1,000,000 bytes are too few for Demo"),
        ("--target-size big", "'big' is not a size"),
        ("--bits 2", "2 bits per weight are too few"),
        ("--like Q4_K_X", "'Q4_K_X' is not a level"),
        ("--like Q4_K_M,Q6_K", "names 2 levels; name one"),
        ("--fit 1MiB --reserve 0", "fits at no size"),
        ("--fit 80GiB --context 9999", "--context 9999 is not between 1 and the 2048 tokens"),
        ("--fit 80GiB --kv q9", "'q9' is not a KV cache type"),
        ("--bits 4.5 --name Q4_K_M", "would be taken for a level"),
        ("--bits 4.5 --name a/b", "cannot end the names of files"),
        ("--bits 4.5 --types Q9_K", "'Q9_K' is not a type"),
        ("--bits 4.5 --types Q2_K,BF16", "--types BF16 disturbs nothing"),
        ("--bits 4.5 --together 0", "0 layers make no group"),
        ("--bits 4.5 --chunks 0", "0 chunks measure nothing"),
        ("--bits 4.5 --imatrix nowhere.gguf", "nowhere.gguf: no such file"),
        ("--bits 4.5 --texts nowhere.txt", "nowhere.txt"),
        ("--bits 4.5 --threads 0", "0 threads"),
        ("--bits 4.5 --proxy --threads 0", "0 threads"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(
    arguments: str, words: str, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = verb(*arguments.split())
    assert (code, stdout, stderr.count("\n")) == (1, "", 1), stderr
    assert words in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["--bits", "4", "--like", "Q6_K"]])
def test_one_size_must_be_given(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["recipe", "demo", *arguments])
    assert "usage: bise recipe" in capsys.readouterr().err
