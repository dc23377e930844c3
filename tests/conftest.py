"""What several test modules need once: the demo model as GGUF files."""

from pathlib import Path

import pytest

from quant.convert import make_levels
from runtime.levels import LEVELS, ORIGINAL
from tests.checkpoints import DEMO


@pytest.fixture(scope="session")
def demo_levels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo at the ten levels and in BF16, made in one run: level → file."""
    return make_levels(DEMO, "Demo", (*LEVELS, ORIGINAL), tmp_path_factory.mktemp("demo"), threads=2)
