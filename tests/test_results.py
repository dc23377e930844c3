"""The result file: read back as it was written, its form held fast, and refused when it is damaged."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from quant.quality.results import (
    SCHEMA,
    Environment,
    FileRecord,
    ModelRecord,
    Results,
    ResultsError,
    Row,
    Run,
    TextRecord,
    hash_file,
    load,
    save,
    this_environment,
)
from quant.quality.statistics import Distribution, Divergence, Estimate
from runtime import __version__
from runtime.errors import OutputError
from runtime.events import EngineSettings

ONE = Estimate(1.0, 0.5)
SPREAD = Distribution(ONE, {"0": 0.0, "100": 2.0})
STATISTICS = Divergence(ONE, ONE, None, ONE, ONE, ONE, SPREAD, SPREAD, ONE, ONE)
BASE_ROW = Row("Demo", "BF16", "prose", 512, 98, 24990, 21.5, 0.35, None, None, None, 19, 16.0, 1e3, None)
RESULTS = Results(
    schema=SCHEMA,
    model="Demo",
    base="BF16",
    settings=EngineSettings(n_ctx=512, tensor_split=(0.5, 0.5), rpc_servers=("box:50052",)),
    max_chunks=None,
    environment=Environment("0.1.0", "0.3.36", "0c1e57098", {"AVX2": "1"}, "3.11", "2.0", "Linux", "a CPU", ("CPU",)),
    runs=(Run("2026-01-01T00:00:00+00:00", ("bise", "perplexity")),),
    models=(ModelRecord("BF16", (FileRecord("a.gguf", 3, 5, "ab"),)),),
    texts=(TextRecord("prose", 7, "cd"),),
    results=(BASE_ROW, Row("Demo", "Q8_0", "prose", 512, 98, 9, 21.6, 0.3, 1.0, 0.5, 1.0, 9, 8.5, 2e3, STATISTICS)),
)


def keys(data: Any) -> Any:
    """The form of JSON data: keys, without the values."""
    if isinstance(data, dict):
        return {key: keys(value) for key, value in data.items()}
    return [keys(item) for item in data[:1]] if isinstance(data, list) else None


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    save(RESULTS, path)
    assert load(path) == RESULTS
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_a_setting_that_came_later_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(RESULTS, path)
    data = json.loads(path.read_text(encoding="utf-8"))
    for name in ("split_mode", "main_gpu", "drafts", "n_branches", "draft_model", "kept_kv_bytes"):
        del data["settings"][name]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert load(path) == RESULTS


def test_a_row_is_found_by_level_and_text() -> None:
    assert RESULTS.row("BF16", "prose") is BASE_ROW
    assert RESULTS.row("BF16", "code") is None
    assert RESULTS.record("BF16") is RESULTS.models[0]


def test_the_form_is_that_of_its_schema(tmp_path: Path) -> None:
    """Other programs read this file: a change here is a change of SCHEMA."""
    save(RESULTS, tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    estimate = {"value": None, "error": None}
    spread = {"mean": estimate, "percentiles": {"0": None, "100": None}}
    assert data["schema"] == 1
    assert list(data) == [
        *("schema", "model", "base", "settings", "max_chunks", "environment", "runs", "models", "texts", "results")
    ]
    assert list(data["settings"]) == [
        *("n_ctx", "n_batch", "n_ubatch", "n_threads", "kv_type", "n_gpu_layers", "tensor_split", "split_mode"),
        *("main_gpu", "rpc_servers", "use_extra_bufts", "drafts", "n_branches", "draft_model", "kept_kv_bytes"),
    ]
    assert list(data["environment"]) == [
        *("bise", "llama_cpp_python", "llama_cpp", "system_info", "python", "numpy", "platform", "cpu", "devices")
    ]
    assert list(data["results"][1]) == [
        *("model", "level", "text", "context", "chunks", "tokens", "ppl", "ppl_error", "kld_mean", "kld_error"),
        *("same_top", "file_bytes", "bits_per_weight", "prompt_tokens_per_second", "statistics"),
    ]
    assert keys(data["results"][1]["statistics"]) == {
        **dict.fromkeys(("ppl", "ppl_base"), estimate),
        "correlation": None,
        **dict.fromkeys(("ln_ratio", "ratio", "difference"), estimate),
        **dict.fromkeys(("kld", "p_diff"), spread),
        **dict.fromkeys(("p_diff_rms", "same_top"), estimate),
    }
    assert keys(data["models"]) == [
        {"level": None, "files": [dict.fromkeys(("name", "n_bytes", "modified_ns", "sha256"))]}
    ]
    assert keys(data["texts"]) == [dict.fromkeys(("name", "n_bytes", "sha256"))]
    assert keys(data["runs"]) == [{"date": None, "command": [None]}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema=2), "a result file of schema 2, and this Bise reads 1"),
        (lambda data: data.clear(), "a result file of schema None"),
        (lambda data: data.pop("texts"), "damaged: the file is not the keys schema, model"),
        (lambda data: data["results"][0].update(ppl="low"), "damaged: ppl of item 0 of results .* of type float"),
        (lambda data: data["results"][0].update(tokens=1.5), "tokens of item 0 .* of type int"),
        (lambda data: data["results"][0].update(ppl=True), "ppl of item 0 .* of type float"),
        (lambda data: data.update(results={}), "results of the file is not a list"),
        (lambda data: data["settings"].update(drafts="now"), "drafts of settings .* is not one of off, auto, always"),
        (lambda data: data["environment"].update(system_info=[]), "system_info of .* is not an object"),
        (lambda data: data["models"][0]["files"][0].update(extra=1), "item 0 of files of item 0 of models"),
    ],
)
def test_a_damaged_file_says_where(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "r.json"
    save(RESULTS, path)
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ResultsError, match=message):
        load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_what_is_no_result_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=r"r\.json: (not )?a result file"):
        load(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="No such file"):
        load(tmp_path / "r.json")


def test_a_file_that_cannot_be_written_is_one_line_and_the_old_one_stays(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        save(RESULTS, tmp_path / "file" / "r.json")


def test_an_infinite_figure_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    save(RESULTS, path)
    broken = Row("Demo", "Q8_0", "prose", 512, 98, 9, float("inf"), 0.3, None, None, None, 9, 8.5, 2e3, None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(Results(**{**{f: getattr(RESULTS, f) for f in RESULTS.__slots__}, "results": (broken,)}), path)
    assert load(path) == RESULTS
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    data = os.urandom(1000) * (1 << 17)  # 131 MB: told of at 64 MiB
    path.write_bytes(data)
    told: list[int] = []
    record = hash_file(path, told.append)
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert (record.name, record.n_bytes, record.modified_ns) == ("a.gguf", len(data), path.stat().st_mtime_ns)
    assert told == [1 << 26]
    with pytest.raises(ResultsError, match="No such file"):
        hash_file(tmp_path / "b.gguf")


def test_the_environment_names_this_machine() -> None:
    environment = this_environment("0.3.36", "0c1e57098", {"AVX2": "1"}, ("CPU",))
    assert environment.bise == __version__
    assert environment.cpu
    assert environment.platform
    assert (environment.llama_cpp, environment.devices) == ("0c1e57098", ("CPU",))
