"""llama.cpp's own quantizer and loader, as the judge of ours."""

from ctypes import byref
from pathlib import Path

import llama_cpp.llama_cpp as lib

import runtime.native  # noqa: F401  takes llama.cpp's log, which would go to the terminal
from quant.metadata import FILE_TYPES


def llama_quantize(source: Path, target: Path, level: str) -> Path:
    """`llama-quantize SOURCE TARGET LEVEL` at default settings."""
    settings = lib.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[level]
    settings.nthread = 2
    assert lib.llama_model_quantize(str(source).encode(), str(target).encode(), byref(settings)) == 0
    return target


def llama_loads(path: Path) -> tuple[int, str]:
    """Load a model with all its weights, checked; give its parameter count and llama.cpp's description of it."""
    settings = lib.llama_model_default_params()
    settings.check_tensors = True
    model = lib.llama_model_load_from_file(str(path).encode(), settings)
    assert model, f"llama.cpp does not load {path}"
    try:
        text = bytes(200)
        n_bytes = lib.llama_model_desc(model, text, len(text))
        return lib.llama_model_n_params(model), text[:n_bytes].decode()
    finally:
        lib.llama_model_free(model)
