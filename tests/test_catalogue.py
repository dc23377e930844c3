"""models.yaml: what is shipped, what a user may write, and what is refused, by name and place."""

import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from quant.recipes import types
from runtime.catalogue import load, parse_bytes, parse_levels, parse_override, parse_recipes, parse_type
from runtime.errors import CatalogueError
from runtime.ggml import GgmlType, type_name
from runtime.levels import LEVELS, ORIGINAL, Recipe, Search, plain
from runtime.sampling import Sampling
from tests.checkpoints import MISTRAL_LARGE_2

SHIPPED = Path(__file__).parent.parent / "models.yaml"

MODEL = """
models:
  mine:
    name: Mine
    title: My model
    source: ~/models/mine
    prompt: mistral-v3
    context: 4096
    licence: {name: MIT}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "models.yaml"


def refusal(own: Path, text: str) -> str:
    """The error that a user's file brings about, without the file's name in front."""
    own.write_text(text, encoding="utf-8")
    with pytest.raises(CatalogueError) as error:
        load(SHIPPED, own)
    message = str(error.value)
    assert message.startswith(f"{own}: ")
    assert "\n" not in message
    return message.removeprefix(f"{own}: ")


def test_the_shipped_file_says_what_its_yaml_says() -> None:
    tree = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    catalogue = load(SHIPPED)
    assert list(catalogue.models) == list(tree["models"])
    for key, entry in tree["models"].items():
        model = catalogue.model(key)
        assert (model.key, model.name, model.title, model.source) == (key, *map(entry.get, ("name", "title", "source")))
        assert (model.prompt, model.context, model.tokenizer) == tuple(
            map(entry.get, ("prompt", "context", "tokenizer"))
        )
        assert model.licence.name == entry["licence"]["name"]
        assert model.levels == (LEVELS if entry.get("levels") == "all" else ())
        shape = {} if model.shape is None else {f.name: getattr(model.shape, f.name) for f in fields(model.shape)}
        assert {name: value for name, value in shape.items() if name != "tied"} == entry.get("shape", {})
        for preset, settings in (tree["sampling"] | entry.get("sampling", {})).items():
            assert {name: getattr(model.sampling[preset], name) for name in settings} == settings
    assert catalogue.machines["workstation"].devices == (80 * 2**30, 80 * 2**30)


def test_a_model_is_found_by_the_stem_of_its_files() -> None:
    catalogue = load(SHIPPED)
    assert catalogue.by_name("smollm2-135m-instruct") is catalogue.model("smollm2")
    assert catalogue.by_name("Demo-Q4_K_M") is None


def test_the_values_cannot_be_changed() -> None:
    catalogue = load(SHIPPED)
    for value, name in ((catalogue, "models"), (catalogue.model("demo"), "name"), (catalogue.machines, "devices")):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(value, name, "x")


def test_a_users_file_adds_models_and_machines(own: Path) -> None:
    own.write_text(MODEL + "machines: {laptop: {title: Laptop, devices: [8GB]}}", encoding="utf-8")
    catalogue = load(SHIPPED, own)
    assert set(catalogue.models) == {*load(SHIPPED).models, "mine"}
    assert catalogue.model("mine").context == 4096
    assert catalogue.model("mine").sampling == load(SHIPPED).model("demo").sampling
    assert catalogue.machines["laptop"].devices == (8_000_000_000,)
    assert "workstation" in catalogue.machines


def test_a_users_file_replaces_a_model(own: Path) -> None:
    own.write_text(MODEL.replace("mine:", "demo:"), encoding="utf-8")
    catalogue = load(SHIPPED, own)
    assert catalogue.model("demo").name == "Mine"
    assert list(catalogue.models) == list(load(SHIPPED).models)


def test_a_users_presets_hold_for_the_shipped_models_without_their_own(own: Path) -> None:
    own.write_text("sampling: {code: {temperature: 0.05}}", encoding="utf-8")
    catalogue = load(SHIPPED, own)
    assert catalogue.model("demo").sampling["code"].temperature == 0.05
    assert catalogue.model("demo").sampling["creative"] == load(SHIPPED).model("demo").sampling["creative"]
    assert catalogue.model("smollm2").sampling == load(SHIPPED).model("smollm2").sampling


@pytest.mark.parametrize("text", ["", "{}", "models: {}"])
def test_an_empty_file_of_the_users_changes_nothing(own: Path, text: str) -> None:
    own.write_text(text, encoding="utf-8")
    assert load(SHIPPED, own) == load(SHIPPED)


def test_a_preset_takes_every_setting(own: Path) -> None:
    settings = """{top_n_sigma: 1.5, dry_multiplier: 0.8, dry_breakers: ["."], mirostat: 2, logit_bias: {5: -.inf}}"""
    own.write_text(f"sampling: {{code: {settings}}}", encoding="utf-8")
    assert load(SHIPPED, own).model("demo").sampling["code"] == Sampling(
        top_n_sigma=1.5, dry_multiplier=0.8, dry_breakers=(".",), mirostat=2, logit_bias=((5, float("-inf")),)
    )


def test_no_file_of_the_users_changes_nothing(own: Path) -> None:
    assert load(SHIPPED, own) == load(SHIPPED)


@pytest.mark.parametrize(
    ("old", "new", "place", "near"),
    [
        ("models:", "modles:", "modles", "models"),
        ("context:", "contxt:", "models.mine.contxt", "context"),
        ("{name: MIT}", "{name: MIT, url: x, lnk: y}", "models.mine.licence.url", None),
        ("{name: MIT}", "{name: MIT, lnk: y}", "models.mine.licence.lnk", "link"),
        (
            "licence:",
            "sampling: {cod: {temperature: 1}}\n    licence:",
            "models.mine.sampling.cod",
            "code",
        ),
        (
            "licence:",
            "sampling: {code: {temperatur: 1}}\n    licence:",
            "models.mine.sampling.code.temperatur",
            "temperature",
        ),
        (
            "licence:",
            "sampling: {code: {top_nsigma: 1}}\n    licence:",
            "models.mine.sampling.code.top_nsigma",
            "top_n_sigma",
        ),
        ("licence:", "shape: {n_layer: 1}\n    licence:", "models.mine.shape.n_layer", "n_layers"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest(
    own: Path, old: str, new: str, place: str, near: str | None
) -> None:
    message = refusal(own, MODEL.replace(old, new))
    assert message.startswith(f"{place}: unknown key")
    assert (f", did you mean {near!r}?" in message) == (near is not None)
    assert "; known: " in message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mistral-v3", "mistral-v4", "models.mine.prompt: 'mistral-v4' is not a prompt format, did you mean"),
        ("licence:", "levels: [Q4_K_X]\n    licence:", "models.mine.levels: 'Q4_K_X' is not a level, did you mean"),
        ("licence:", "levels: 4\n    licence:", "models.mine.levels: must be names of levels or all, not 4"),
        ("title: My model", "title: 7", "models.mine.title: must be text, not 7"),
        ("    name: Mine\n", "", "models.mine.name: missing"),
        ("    licence: {name: MIT}\n", "", "models.mine.licence: missing"),
        ("4096", "long", "models.mine.context: must be a whole number above 0, not 'long'"),
        ("4096", "0", "models.mine.context: must be a whole number above 0, not 0"),
        ("4096", "true", "models.mine.context: must be a whole number above 0, not True"),
        ("{name: MIT}", "MIT", "models.mine.licence must be a mapping of keys to values, not 'MIT'"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(own: Path, old: str, new: str, message: str) -> None:
    assert refusal(own, MODEL.replace(old, new)).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampling: {code: {temperature: hot}}", "sampling.code.temperature: must be a number, not 'hot'"),
        ("sampling: {code: {temperature: -1}}", "sampling.code: temperature is -1; it must lie between"),
        ("sampling: {code: {temperature: .nan}}", "sampling.code: temperature is nan; it must lie between"),
        ("sampling: {code: {top_k: 1.5}}", "sampling.code.top_k: must be a whole number, not 1.5"),
        ("sampling: {code: {mirostat: 3}}", "sampling.code: mirostat is 3; it must lie between 0 and 2"),
        ("sampling: {code: {logit_bias: 5}}", "sampling.code.logit_bias: must be a mapping of token ids to numbers"),
        ("sampling: {code: {dry_breakers: x}}", "sampling.code.dry_breakers: must be a list of texts, not 'x'"),
        ("sampling: [code]", "sampling must be a mapping of keys to values, not ['code']"),
        ("models: 5", "models must be a mapping of keys to values, not 5"),
        ("- models", "the file must be a mapping of keys to values, not ['models']"),
        ("machines: {a: {title: A, devices: 80GiB}}", "machines.a.devices: must be a list of sizes"),
        ("machines: {a: {title: A, devices: [80GX]}}", "machines.a.devices: '80GX' is not a size"),
        ("models: {a: [}", "not valid YAML: "),
    ],
)
def test_a_wrong_file_is_told_where(own: Path, text: str, message: str) -> None:
    assert refusal(own, text).startswith(message)


def test_a_file_that_is_not_utf8_is_one_line(own: Path) -> None:
    own.write_bytes(b"models: {\xff: 1}")
    with pytest.raises(CatalogueError, match="not valid YAML"):
        load(SHIPPED, own)


def test_a_missing_catalogue_is_named(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=f"{tmp_path}/none.yaml: No such file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "near"), [("dmo", "demo"), ("mistral-large-2412", "mistral-large-2411"), ("zzz", None)]
)
def test_an_unknown_model_is_told_with_the_nearest_name(key: str, near: str | None) -> None:
    with pytest.raises(CatalogueError) as error:
        load(SHIPPED).model(key)
    did_you_mean = f", did you mean {near!r}?" if near else ""
    assert str(error.value) == f"no model is called {key!r}{did_you_mean}; `bise models` lists them"


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("80GiB", 85_899_345_920),
        (" 24 gb ", 24_000_000_000),
        ("512MiB", 536_870_912),
        ("1.5kib", 1536),
        ("2T", 2_000_000_000_000),
        ("48G", 48_000_000_000),
        ("2P", None),
        ("1TiB", 1_099_511_627_776),
        ("7", 7),
        ("7b", 7),
        ("0GiB", 0),
        ("-1GiB", None),
        ("GiB", None),
        ("1,5GiB", None),
        ("", None),
    ],
)
def test_sizes(text: str, n_bytes: int | None) -> None:
    if n_bytes is not None:
        assert parse_bytes(text) == n_bytes
        return
    with pytest.raises(CatalogueError, match="is not a size; write one such as 80GiB or 24GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("wanted", "levels"),
    [
        ("q8_0, Q2_K", ("Q2_K", "Q8_0")),
        (["Q4_K_M", "Q4_K_M"], ("Q4_K_M",)),
        ("all", LEVELS),
        ("Q4_K_M,all", LEVELS),
    ],
)
def test_levels_come_in_their_own_order(wanted: str | list[str], levels: tuple[str, ...]) -> None:
    assert parse_levels(wanted) == levels


def test_all_is_the_ten_and_not_the_original() -> None:
    assert parse_levels("all", (*LEVELS, ORIGINAL)) == LEVELS
    assert parse_levels("bf16,all", (*LEVELS, ORIGINAL)) == (*LEVELS, ORIGINAL)


def test_an_unknown_level_is_told_with_the_nearest() -> None:
    with pytest.raises(CatalogueError, match=r"'Q4_K_N' is not a level, did you mean 'Q4_K_[SM]'\?; the levels are Q2"):
        parse_levels("Q8_0,Q4_K_N")
    with pytest.raises(CatalogueError, match="'BF16' is not a level; the levels are"):
        parse_levels("BF16")
    with pytest.raises(CatalogueError, match="no level given"):
        parse_levels(" , ")


# Recipes


RECIPES = r"""
recipes:
  Q4_K_M-edges:
    base: q4_k_m
    tensors: {'blk\.(0|87)\..*': Q8_0, 'attn_v': q6_K, '\.': F16}
    output: Q8_0
    embedding: BF16
    note: The outer layers in 8 bits.
  Mine: {base: BF16}
"""

KNOWN = {"Mine": Recipe("Mine", "BF16"), "b": Recipe("b", "Q2_K")}


def test_recipes_are_read_with_their_patterns_in_order(own: Path) -> None:
    own.write_text(RECIPES, encoding="utf-8")
    recipes = load(SHIPPED, own).recipes
    assert list(recipes) == [*load(SHIPPED).recipes, "Q4_K_M-edges", "Mine"]
    edges = recipes["Q4_K_M-edges"]
    patterns = ((r"blk\.(0|87)\..*", GgmlType.Q8_0), ("attn_v", GgmlType.Q6_K), (r"\.", GgmlType.F16))
    assert edges == Recipe("Q4_K_M-edges", "Q4_K_M", patterns, GgmlType.Q8_0, GgmlType.BF16)
    assert edges.note == "The outer layers in 8 bits."
    assert recipes["Mine"] == Recipe("Mine", "BF16")


def test_the_example_in_the_shipped_file_is_a_recipe(own: Path) -> None:
    comment = re.search(r"^#   recipes:\n(#     .*\n)+", SHIPPED.read_text(encoding="utf-8"), re.MULTILINE)
    assert comment is not None
    lines = [re.sub(r" {6,}\S.*$", "", line[4:]) for line in comment[0].splitlines()]
    own.write_text("\n".join(lines), encoding="utf-8")
    recipe = load(SHIPPED, own).recipes["Q4_K_M-EDGES"]
    assert recipe.search is Search.BEST
    assert set(types(MISTRAL_LARGE_2, recipe).values()) == {
        *(GgmlType.F32, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.Q8_0)
    }


def test_a_users_recipe_replaces_the_shipped_one_of_that_name_in_any_case(own: Path, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped.yaml"
    shipped.write_text("recipes: {Mine: {base: Q2_K}, Other: {base: Q2_K}}", encoding="utf-8")
    own.write_text("recipes: {MINE: {base: Q6_K}}", encoding="utf-8")
    assert load(shipped, own).recipes == {"Other": Recipe("Other", "Q2_K"), "MINE": Recipe("MINE", "Q6_K")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("recipes:", "receipts:", "receipts: unknown key, did you mean 'recipes'?; known: "),
        ("output:", "outputs:", "recipes.Q4_K_M-edges.outputs: unknown key, did you mean 'output'?; known: base, "),
        ("base: q4_k_m", "base: Q4_K", "recipes.Q4_K_M-edges.base: 'Q4_K' is not a level, did you mean 'Q4_K_"),
        ("    base: q4_k_m\n", "", "recipes.Q4_K_M-edges.base: missing"),
        (
            "output: Q8_0",
            "output: Q8_1",
            "recipes.Q4_K_M-edges.output: 'Q8_1' is not a type, did you mean 'Q8_0'?; the",
        ),
        ("output: Q8_0", "output:", "recipes.Q4_K_M-edges.output: missing"),
        (
            "embedding: BF16",
            "embedding: F32",
            "recipes.Q4_K_M-edges.embedding: 'F32' is not a type; the types are BF16, F16",
        ),
        ("q6_K", "6", "recipes.Q4_K_M-edges.tensors.attn_v: must be text, not 6"),
        ("q6_K", "Q4_K_M", "recipes.Q4_K_M-edges.tensors.attn_v: 'Q4_K_M' is not a type, did you mean 'Q4_K'?"),
        ("'attn_v'", "'(attn_v'", "recipes.Q4_K_M-edges.tensors: '(attn_v' is not a regular expression: missing )"),
        ("'attn_v'", "'(.+)+v'", "recipes.Q4_K_M-edges.tensors: '(.+)+v' repeats a group that repeats something"),
        ("{'blk", "['blk", "not valid YAML: "),
        ("note: The", "note: 7 #", "recipes.Q4_K_M-edges.note: must be text, not 7"),
        ("Mine: {base: BF16}", "Mine: Q4_K_M", "recipes.Mine must be a mapping of keys to values, not 'Q4_K_M'"),
        ("Mine:", "q4_k_m-EDGES:", "recipes.q4_k_m-EDGES: the same name as 'Q4_K_M-edges'"),
        ("Mine:", '"a\\nb":', r"recipes.'a\nb': cannot end the names of files"),
    ],
)
def test_a_wrong_recipe_is_named_with_its_place(own: Path, old: str, new: str, message: str) -> None:
    assert refusal(own, RECIPES.replace(old, new, 1)).startswith(message)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a b", "a,b", "a=b", "-a", "a-", ".a", "ä", "\N{KELVIN SIGN}", "a" * 65]
)
def test_a_recipes_name_can_end_the_name_of_a_file(own: Path, name: str) -> None:
    message = refusal(own, f'recipes: {{"{name}": {{base: Q4_K_M}}}}')
    assert message.startswith(f"recipes.{name}: cannot end the names of files; a recipe's name has up to 64 letters")


@pytest.mark.parametrize(
    "name", ["Q4_K_M", "q8_0", "Bf16", "f16", "F32", "all", "My-q4_k_m", "my.BF16", "a-00001-of-00002"]
)
def test_a_recipe_is_taken_for_no_level_and_no_shard(own: Path, name: str) -> None:
    message = refusal(own, f"recipes: {{{name}: {{base: Q4_K_M}}}}")
    assert message.startswith(f"recipes.{name}: would be taken for a level or a shard; choose a name that is")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("all", LEVELS),
        ("b, mine,ALL,q8_0", (*LEVELS, "Mine", "b")),
        ("MINE,bf16,f16,q2_k,B,Q2_K", ("Q2_K", "F16", "BF16", "Mine", "b")),
    ],
)
def test_recipes_come_after_the_levels_in_any_case_and_once(wanted: str, names: tuple[str, ...]) -> None:
    recipes = parse_recipes(wanted, KNOWN)
    assert tuple(recipe.name for recipe in recipes) == names
    assert recipes == tuple(KNOWN.get(name, plain(name)) for name in names)


def test_a_known_recipe_stands_for_the_level_of_its_name() -> None:
    changed = Recipe("Q4_K_M", "Q4_K_M", output=GgmlType.Q8_0)
    assert parse_recipes("q4_k_m,Q6_K", {"Q4_K_M": changed}) == (changed, plain("Q6_K"))


def test_an_unknown_recipe_is_told_with_the_nearest() -> None:
    for wanted, near in {"mne": "Mine", "q4_k_n": "Q4_K_[SM]"}.items():
        with pytest.raises(
            CatalogueError, match=rf"'{wanted}' is not a level or recipe, did you mean '{near}'\?; the "
        ):
            parse_recipes(f"Q8_0,{wanted}", KNOWN)
    with pytest.raises(CatalogueError, match=r"no level given; the levels and recipes are Q2_K, .*, BF16, Mine, b, or"):
        parse_recipes(" , ", KNOWN)


@pytest.mark.parametrize("type_", [type_ for type_ in GgmlType if type_ is not GgmlType.F32])
def test_a_type_is_named_in_any_case_and_as_ggml_does(type_: GgmlType) -> None:
    for text in (type_.name, type_.name.lower(), type_name(type_), f" {type_.name} "):
        assert parse_type(text) is type_


@pytest.mark.parametrize(
    ("text", "near"),
    [("Q4_K_M", "Q4_K"), ("q8", "Q8_0"), ("F32", None), ("IQ4_XS", "Q4_K"), ("", None), ("int", None)],
)
def test_an_unknown_type_is_told_with_the_nearest(text: str, near: str | None) -> None:
    with pytest.raises(CatalogueError) as error:
        parse_type(text)
    did_you_mean = f", did you mean {near!r}?" if near else ""
    listed = "BF16, F16, Q2_K, Q3_K, Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0"
    assert str(error.value) == f"{text!r} is not a type{did_you_mean}; the types are {listed}"


@pytest.mark.parametrize(
    ("text", "pattern", "type_"),
    [
        ("ffn_down=Q6_K", "ffn_down", GgmlType.Q6_K),
        (r"blk\.(?=1)1?\.=q8_0", r"blk\.(?=1)1?\.", GgmlType.Q8_0),
        (r"^blk\.([0-9]|1[0-9])\.(attn|ffn)_.*\.weight$= bf16 ", r"^blk\.([0-9]|1[0-9])\.(attn|ffn)_.*\.weight$", None),
        (r"(\(\w+\))?[)(*+]+(a|b)*=Q4_0", r"(\(\w+\))?[)(*+]+(a|b)*", GgmlType.Q4_0),
    ],
)
def test_an_override_is_an_expression_and_a_type(text: str, pattern: str, type_: GgmlType | None) -> None:
    assert parse_override(text) == (pattern, type_ or GgmlType.BF16)


@pytest.mark.filterwarnings("default")  # as they are outside of pytest
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_down", "'ffn_down' is not REGEX=TYPE, such as 'ffn_down=Q6_K'"),
        ("=Q6_K", "'=Q6_K' is not REGEX=TYPE"),
        ("ffn_down=", "'ffn_down=' is not REGEX=TYPE"),
        ("ffn_down=Q6", "'Q6' is not a type, did you mean 'Q6_K'?"),
        ("*=Q8_0", "'*' is not a regular expression: nothing to repeat at position 0"),
        ("a{99999999999}=Q8_0", "'a{99999999999}' is not a regular expression: the repetition number is too large"),
        ("[[a]=Q8_0", "'[[a]' is not a regular expression: Possible nested set at position 1"),
        ("a\n(=Q8_0", r"'a\n(' is not a regular expression: "),
        ("[(-\n]=Q8_0", r"'[(-\n]' is not a regular expression: bad character range (-\n at position 1"),
        (r"((\w+\.)x)*=Q8_0", r"'((\\w+\\.)x)*' repeats a group that repeats something, which can take for ever; "),
        (r"([a-z]{1,9}|_){2,}=Q8_0", "'([a-z]{1,9}|_){2,}' repeats a group that repeats something"),
    ],
)
def test_a_wrong_override_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(CatalogueError) as error:
        parse_override(text)
    assert str(error.value).startswith(message)
    assert str(error.value).isprintable()


_PIECES = (*r"().*+?{}[]^$\|=19-,", "blk", r"\.", "(?:", "(?P<n>", "\n", "\x1b", "é", "=Q8_0")


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.lists(st.sampled_from(_PIECES)).map("".join))
def test_any_override_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        pattern, type_ = parse_override(text)
    except CatalogueError as error:
        assert str(error).isprintable()  # noqa: PT017  either is right
        return
    re.search(pattern, "blk.10.attn_output.weight")  # comes to an end
    assert (text.rstrip(), type_) == (f"{pattern}=Q8_0", GgmlType.Q8_0)
