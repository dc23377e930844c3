"""The command line as a user meets it: the installed `bise`, in a process, with a home of its own."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from gguf import GGUFReader

from quant.kernels import best
from tui.cli import main

BISE = str(Path(sys.executable).parent / "bise")
DEMO_MODEL = Path(__file__).parent.parent / "quant/demo/model"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    return {**kept, "HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "XDG_STATE_HOME": str(home / "state")}


def bise(
    environment: Mapping[str, str], *arguments: str | Path, stdin: str | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [BISE, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _one_line_error(run: "subprocess.CompletedProcess[str]") -> str:
    """The error of a run that failed as it should: exit code 1, one line, no traceback."""
    assert run.returncode == 1, (run.returncode, run.stdout, run.stderr)
    lines = [line for line in run.stderr.splitlines() if line.startswith("bise: ")]
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr
    return lines[0]


def test_help_and_usage(environment: dict[str, str]) -> None:
    assert "quantize" in bise(environment, "--help").stdout
    assert bise(environment).returncode == 2
    assert bise(environment, "quantise").returncode == 2
    for verb in ("pull", "imatrix", "quantize", "perplexity", "chat", "ask", "prompt", "models", "plan", "doctor"):
        run = bise(environment, verb, "--help")
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(f"usage: bise {verb}")


def test_help_imports_nothing_heavy(environment: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tui.cli", "--help"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "tui.cli" in imported or "tui.verbs.ask" in imported
    heavy = {"llama_cpp", "textual", "numpy", "mistral_common", "jinja2", "yaml", "gguf", "sentencepiece"}
    assert not imported & (heavy | {"huggingface_hub", "httpx2"})


def test_quantize_makes_the_levels_and_models_lists_them(environment: dict[str, str], tmp_path: Path) -> None:
    run = bise(environment, "quantize", "demo", "--levels", "q4_k_m,Q8_0", "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    made = tmp_path / "Q4_K_M/Demo-Q4_K_M.gguf"
    assert made.read_bytes()[:4] == b"GGUF"
    assert (tmp_path / "Q8_0/Demo-Q8_0.gguf").is_file()
    again = bise(environment, "quantize", DEMO_MODEL, "--levels", "Q4_K_M", "--out", tmp_path)
    assert "already there" in again.stdout, again.stderr
    listed = json.loads(bise(environment, "models", "--json", "--models", tmp_path).stdout)
    demo = next(entry for entry in listed["models"] if entry["model"] == "demo")
    assert demo["levels"] == {
        "Q4_K_M": made.stat().st_size,
        "Q8_0": (tmp_path / "Q8_0/Demo-Q8_0.gguf").stat().st_size,
    }
    assert "Q4_K_M" in bise(environment, "models", "--models", tmp_path).stdout


def test_a_dry_run_writes_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    run = bise(environment, "quantize", "demo", "--dry-run", "--out", tmp_path / "out")
    assert run.returncode == 0
    assert f"to      {tmp_path / 'out'}: Q2_K, " in run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "./nowhere"], ["nowhere", "does not exist"]),
        (["quantize", "demoo"], ["'demoo'", "did you mean 'demo'"]),
        (
            ["quantize", "mistral-large-2411"],
            ["not on this disk", "Mistral Research License", "bise pull mistral-large-2411"],
        ),
        (["quantize", "demo", "--levels", "Q4_K_X"], ["'Q4_K_X' is not a level", "did you mean 'Q4_K_"]),
        (["quantize", "demo", "--shard-size", "big"], ["'big' is not a size"]),
        (["ask", "hi", "--model", "./none.gguf"], ["none.gguf", "no such file"]),
        (["ask", "hi", "--model", "demo", "--level", "Q9"], ["'Q9' is not a level"]),
        (["ask", "hi", "--model", "demo", "--kv", "q5_7"], ["'q5_7' is not a KV cache type"]),
        (["ask", "hi", "--model", "demo", "--preset", "wild"], ["'wild'", "code, factual, creative"]),
        (["ask", "hi", "--model", "demo", "--temperature", "-1"], ["temperature is -1"]),
        (["ask", "hi", "--model", "demo", "--logit-bias", "4096=1"], ["token 4096", "has 4096 tokens"]),
        (["ask", "hi", "--model", "demo", "--rpc", "127.0.0.1:9"], ["no llama.cpp RPC server answers"]),
        (["ask"], ["nothing to ask"]),
        (["ask", "hi", "--logprobs", "3"], ["--logprobs are told as JSON; add --json"]),
        (["ask", "hi", "--logprobs", "-3", "--json"], ["--logprobs -3 is not a number of tokens"]),
        (["chat", "demo"], ["needs a terminal"]),
        (["plan", "smollm2"], ["no shape"]),
        (["plan", "--devices", "lots"], ["'lots' is not a size"]),
        (["plan", "--devices", "8GiB", "--bandwidth", "0"], ["must be above 0"]),
        (["plan", "--kv", "q5_1"], ["'q5_1' is not a KV cache type", "q4_0"]),
        (["plan", "--split-mode", "tensor", "--kv", "q8_0"], ["'q8_0' is not a KV cache type for this", "f16"]),
        (["plan", "--slots", "0"], ["--slots 0 is not a number of sequences"]),
        (["plan", "--context", "9999999"], ["9999999", "131072"]),
        (["plan", "--machine", "laptop"], ["'laptop'", "workstation"]),
    ],
)
def test_bad_input_gets_one_line(environment: dict[str, str], arguments: list[str], words: list[str]) -> None:
    line = _one_line_error(bise(environment, *arguments))
    for word in words:
        assert word in line


def test_ask_answers_on_stdout_alone(environment: dict[str, str]) -> None:
    run = bise(environment, "ask", "Define a horse.", "--model", "demo", "--temperature", "0")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "answers nonsense" in run.stderr
    again = bise(environment, "ask", "--model", "demo", "--temperature", "0", stdin="Define a horse.")
    assert again.stdout == run.stdout, "a question on stdin is the same question"
    other = bise(environment, "ask", "Define this:", "--model", "demo", "--temperature", "0", stdin="a horse")
    assert other.returncode == 0


def test_a_gguf_that_models_yaml_does_not_know(
    environment: dict[str, str], demo_levels: dict[str, Path], tmp_path: Path
) -> None:
    """It is read by its own template and has every preset."""
    path = tmp_path / "unknown.gguf"
    path.symlink_to(demo_levels["Q8_0"])
    settings = (
        "--preset",
        "creative",
        "--max-tokens",
        "5",
        "--seed",
        "3",
        "--dry-breaker",
        "a",
        "--dry-multiplier",
        "1",
    )
    run = bise(
        environment, "ask", "Define a horse.", "--model", path, *settings, "--logit-bias", "7=-inf", "--show-sampling"
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines()[-1] == (
        "sampling: logit bias of 7: -inf → DRY 1 · 1.75^(length − 2) over the last 64 tokens → top-p 0.95 → "
        "temperature 0.8 → draw, seed 3"
    )
    assert run.stdout.strip()
    assert "nonsense" not in run.stderr, "nothing says that this is the demo"


def test_ask_answers_in_the_form_of_a_schema_or_says_that_it_was_cut_off(
    environment: dict[str, str], tmp_path: Path
) -> None:
    schema, question = tmp_path / "schema.json", ("ask", "Define a horse.", "--model", "demo", "--seed", "1")
    schema.write_text(
        '{"properties": {"legs": {"enum": [2, 4]}, "word": {"maxLength": 9}}, "required": ["legs", "word"]}'
    )
    run = bise(environment, *question, "--schema", schema, "--temperature", "1.5")
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["legs"] in (2, 4)
    assert len(answer["word"]) <= 9
    cut = bise(environment, *question, "--schema", schema, "--max-tokens", "3")
    assert cut.returncode == 1
    assert "bise: the answer was cut off after 3 tokens, before its form was complete" in cut.stderr


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--grammar", 'root ::= "a', "line 1, column 10: this text has no closing quote"),
        ("--schema", '{"type": "strin"}', "#/type: 'strin' is not a type"),
        ("--schema", '{"type": ', "not valid JSON: Expecting value: line 1 column 10"),
        ("--schema", "[" * 100_000, "not valid JSON: "),
        ("--grammar", b"\xff", "not text in UTF-8"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_faulty_form_is_refused_with_its_place_before_anything_is_loaded(
    tmp_path: Path,
    option: str,
    text: str | bytes,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "form"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(["ask", "hi", "--model", "demo", option, str(path)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"bise: {path}: {message}")
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_ask_takes_the_model_used_last(environment: dict[str, str], tmp_path: Path) -> None:
    home = {**environment, "XDG_STATE_HOME": str(tmp_path)}
    first = bise(home, "ask", "What is 1+1?", "--max-tokens", "3", "--stats", "--json", "--logprobs", "2")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert (told["answer_tokens"], told["reason"], len(told["tokens"])) == (3, "length", 3)
    assert "".join(token["text"] for token in told["tokens"]) == told["answer"]
    assert all(len(token["likeliest"]) == 2 and token["logprob"] <= 0 for token in told["tokens"])
    assert "nonsense" not in first.stderr, "SmolLM2 is installed, so it comes before the demo"
    assert re.search(
        r"^\d+ prompt tokens \(0 reused\), [\d.]+ tokens/s, first token after [\d.]+ s, 3 answer tokens, "
        r"[\d.]+ tokens/s, context \d+ of \d+, memory [\d.]+ MiB$",
        first.stderr,
        re.MULTILINE,
    )
    bise(home, "ask", "Define a cow.", "--model", "demo")
    assert "nonsense" in bise(home, "ask", "Define a horse.").stderr


def _long_answer(environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """A process that has a long answer before it."""
    question = "Write a very long story about a dragon and a king."
    return subprocess.Popen(
        [BISE, "ask", question, "--model", "smollm2", "--temperature", "0"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(environment: dict[str, str]) -> None:
    with _long_answer(environment) as process:
        assert process.stdout is not None
        start = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (start + rest).strip()
    assert b"Traceback" not in errors


def test_a_reader_that_leaves_ends_the_answer(environment: dict[str, str]) -> None:
    with _long_answer(environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(60) == 1
    assert b"Traceback" not in errors


def test_plan_agrees_with_the_published_sizes(environment: dict[str, str]) -> None:
    run = bise(environment, "plan", "mistral-large-2411", "--devices", "80GiB,80GiB", "--context", "131072", "--json")
    rows = {(row["level"], row["kv_type"]): row for row in json.loads(run.stdout)["rows"]}
    assert len(rows) == 30
    assert rows["Q4_K_M", "f16"]["weight_bytes"] == 73_218_834_432
    assert rows["Q8_0", "q8_0"]["kv_bytes"] == 191_488 * 131_072
    assert {key: rows[key]["fits"] for key in [("Q8_0", "f16"), ("Q8_0", "q8_0"), ("Q6_K", "f16")]} == {
        ("Q8_0", "f16"): False,
        ("Q8_0", "q8_0"): True,
        ("Q6_K", "f16"): True,
    }
    text = bise(environment, "plan", "mistral-large-2411", "--devices", "80GiB,80GiB", "--context", "131072").stdout
    assert "two CUDA GPUs have not been tried" in text
    assert "44+44" in text


def test_plan_says_what_each_device_holds_and_what_fits_instead(environment: dict[str, str]) -> None:
    arguments = ("plan", "--devices", "80GiB,80GiB", "--levels", "Q8_0", "--kv", "f16", "--slots", "2")
    (row,) = json.loads(bise(environment, *arguments, "--json").stdout)["rows"]
    printed = bise(environment, *arguments).stdout
    assert row["device_bytes"] == [
        sum(use[part] for part in ("weights", "kv", "compute", "copied", "unpacked"))
        for use in row["placement"]["uses"]
    ]
    assert len(row["instead"]) == 3
    for each in row["instead"]:
        assert re.search(rf"^  {each['change']} +{re.escape(each['price'])}$", printed, re.MULTILINE), printed
    assert re.search(r"^device 1 +44 +[\d.]+ GiB +22\.0 GiB .* GiB short$", printed, re.MULTILINE), printed
    assert "131,072 tokens of context for 2 sequences," in printed


def test_plan_finds_room_for_a_draft_model(environment: dict[str, str], demo_levels: dict[str, Path]) -> None:
    small = demo_levels["Q2_K"]
    arguments = ("plan", "demo", "--reserve", "1MiB", "--kv", "f16,q8_0", "--json", "--devices")
    rows = json.loads(bise(environment, *arguments, "24MiB,30MiB", "--draft", small).stdout)["rows"]
    held = {row["kv_type"]: row["draft_bytes"] for row in rows}
    assert {row["draft_device"] for row in rows} == {1}
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(small).tensors}
    elements = 2 * 8 * 2 * 32 * 2048  # K and V, layers, heads, width of each, tokens
    on_device = sum(tensors.values()) - tensors["token_embd.weight"]
    for kv_type, width in (("f16", 2), ("q8_0", 34 / 32)):
        assert 0 < held[kv_type] - on_device - width * elements < 12 << 20  # compute buffers
        less = f"24MiB,{(30 << 20) - held[kv_type]}"
        beside = json.loads(bise(environment, *arguments, less).stdout)["rows"]
        for row in (row for row in beside if row["kv_type"] == kv_type):
            row |= {"draft_device": 1, "draft_bytes": held[kv_type]}
            assert row in rows
    assert {row["fits"] for row in rows} == {True, False}
    printed = bise(environment, *arguments[:-2], "--devices", "24MiB,30MiB", "--draft", small).stdout
    assert re.search(r"^the draft model with q8_0: [\d.]+ MiB on device 1, counted in$", printed, re.MULTILINE), printed


def test_plan_refuses_a_draft_model_that_cannot_guess(
    environment: dict[str, str], demo: Path, smollm2: Path, tmp_path: Path
) -> None:
    for devices, file, words in (
        ("8MiB,9MiB", demo, "takes .* MiB more than device 1 has left; take a smaller one, or a shorter --context"),
        ("1GiB", smollm2, "has 49152 tokens and the model 4096"),
        ("1GiB", tmp_path / "none.gguf", "none.gguf: no such file"),
    ):
        line = _one_line_error(bise(environment, "plan", "demo", "--devices", devices, "--draft", file))
        assert re.search(words, line), line


def test_plan_takes_a_folder(environment: dict[str, str]) -> None:
    by_name = json.loads(bise(environment, "plan", "demo", "--devices", "1GiB", "--json").stdout)["rows"]
    by_folder = json.loads(bise(environment, "plan", DEMO_MODEL, "--devices", "1GiB", "--json").stdout)["rows"]
    assert by_folder == by_name


def test_the_doctor_finds_the_engine_well(environment: dict[str, str]) -> None:
    run = bise(environment, "doctor", "--json")
    facts = json.loads(run.stdout)
    assert facts["problems"] == []
    assert run.returncode == 0
    assert list(facts["engine"]) == ["library", "load", "prompt", "steps", "done"]
    assert facts["engine"]["done"]["finite"] is True
    assert facts["kernels"] == best().name
    printed = bise(environment, "doctor").stdout
    assert f"levels are made by kernels of Bise, {best().name}\n" in printed
    assert "all is well" in printed
