"""Opening a GGUF file: what is told of it, and one clear line for each thing that can be wrong with it."""

import resource
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from runtime.engine import Engine
from runtime.errors import EngineError, ModelFileError
from runtime.events import EngineSettings
from runtime.native import has_amx_kernels
from runtime.opening import survivable
from tests.rpc import apart

SETTINGS = EngineSettings(n_ctx=256, n_batch=64, n_ubatch=32, n_threads=1)


def test_a_loaded_model_says_what_it_is(demo: Path) -> None:
    engine = Engine(demo, SETTINGS)
    info, n_vocab = engine.info(), engine.vocabulary.n_tokens
    engine.close()
    tensors = gguf.GGUFReader(demo).tensors
    assert info.tensor_bytes == sum(tensor.n_bytes for tensor in tensors)
    assert info.n_params == sum(tensor.n_elements for tensor in tensors)
    assert (info.n_layers, info.n_ctx_train, n_vocab) == (8, 2048, 4096)


def test_progress_goes_from_0_to_1(demo: Path) -> None:
    shares: list[float] = []

    def note(share: float) -> bool:
        shares.append(share)
        return True

    Engine(demo, SETTINGS, note).close()
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_cancelled_load_is_an_ordinary_error(demo: Path) -> None:
    with pytest.raises(EngineError, match="loading was cancelled"):
        Engine(demo, SETTINGS, lambda share: share < 0.3)
    Engine(demo, SETTINGS).close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=f"{tmp_path}/no.gguf: no such file; `bise models` lists"):
        Engine(tmp_path / "no.gguf", SETTINGS)


def test_a_folder_is_told_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=f"{tmp_path}: a folder; name the .gguf file in it"):
        Engine(tmp_path, SETTINGS)


def test_a_file_that_is_no_gguf_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for data in (b"", b"PK\x03\x04zip"):
        path.write_bytes(data)
        with pytest.raises(ModelFileError, match=f"{path}: not a GGUF file"):
            Engine(path, SETTINGS)


@pytest.mark.parametrize("kept", [0.9, 0.01, 0.0001])
def test_a_file_that_was_cut_off_is_told_in_one_line(kept: float, demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    shutil.copy(demo, path)
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * kept))
    with pytest.raises(ModelFileError) as error:
        Engine(path, SETTINGS)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def contexts_in_little_memory(path: Path) -> list[str]:
    """The errors of a context of 2 GiB and a small one, where 1 GiB can be had. Runs in its own process."""
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = n_pages * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    errors = []
    for n_ctx in (2**20, 256):
        try:
            Engine(path, replace(SETTINGS, n_ctx=n_ctx)).close()
        except EngineError as error:
            errors.append(str(error))
    return errors


def test_a_context_that_does_not_fit_is_an_ordinary_error(demo: Path) -> None:
    (error,) = apart(contexts_in_little_memory, demo)
    assert error.startswith("a context of 1048576 tokens with a f16 KV cache does not fit (")
    assert error.endswith("); take a smaller --context or a smaller --kv")
    assert "\n" not in error


def test_amx_code_is_not_used_where_the_wheel_holds_it() -> None:
    assert survivable(SETTINGS).use_extra_bufts is not has_amx_kernels()
    off = replace(SETTINGS, use_extra_bufts=False)
    assert survivable(off) is off
