"""What the engine's options on the command line become, and which are refused."""

import argparse
from pathlib import Path

import pytest

from runtime.errors import EngineError, UserError
from runtime.events import EngineSettings
from runtime.library import ModelFile
from tui.choose import add_model_arguments
from tui.engine_options import add_engine_arguments, engine_settings

FILE = ModelFile(Path("a.gguf"), "a.gguf", "A", None, None, {})


ALONE = ("--draft=off", "--branches=1")


def settings(*arguments: str) -> EngineSettings:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    add_engine_arguments(parser)
    return engine_settings(parser.parse_args(arguments), FILE)


def test_what_is_not_given_is_the_engines_default() -> None:
    assert settings() == EngineSettings(n_ctx=FILE.context, drafts="auto", n_branches=4)


def test_what_is_given_arrives() -> None:
    given = settings(
        "--context=512", "--tensor-split=1,2.5", "--split-mode=tensor", "--ubatch=4096", "--draft=off", "--branches=1"
    )
    assert given == EngineSettings(n_ctx=512, tensor_split=(1.0, 2.5), split_mode="tensor", n_ubatch=4096, n_batch=4096)
    assert settings("--main-gpu", "1", "--gpu-layers", "3").main_gpu == 1
    assert settings("--keep-kv", "2GiB").kept_kv_bytes == 2 << 30


def test_a_draft_model_is_named_like_any_model(tmp_path: Path) -> None:
    path = tmp_path / "small-Q4_K_M.gguf"
    path.write_bytes(b"GGUF")
    given = settings("--draft", str(path))
    assert (given.drafts, given.draft_model) == ("always", path)
    assert (settings("--draft=lookup").drafts, settings("--draft=off").drafts) == ("always", "off")
    with pytest.raises(UserError, match="no such file"):
        settings("--draft", str(tmp_path / "other.gguf"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tensor-split", "1,x", "--tensor-split 1,x is not a list of shares; write one for each GPU, such as 1,3"),
        ("--tensor-split", "1,-1", "--tensor-split 1,-1 is not a list of shares"),
        ("--tensor-split", "nan", "--tensor-split nan is not a list of shares"),
        ("--ubatch", "0", "--ubatch 0 is not a number of tokens"),
        ("--threads", "0", "--threads 0 is not a number of threads"),
        ("--branches", "0", "--branches 0 is not a number from 1 to 256"),
        ("--context", "0", "--context 0 is not a number of tokens"),
    ],
)
def test_what_is_out_of_range_is_refused(option: str, value: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        settings(f"{option}={value}")
