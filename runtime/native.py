"""llama.cpp behind types: the model, its vocabulary, the log. The only import of llama_cpp.

Takes paths and token ids, gives Python values; pointers stay inside. A refused request is a `UserError` with
llama.cpp's own error line in it. Importing this module loads the shared libraries (0.2 s); nothing is written to
the terminal. Knows nothing of prompts, conversations or processes.

Bound against llama-cpp-python 0.3.36 (llama.cpp 0c1e57098): the sizes of the structures passed by value are checked at
import, because a wheel of another version would corrupt memory instead of failing.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError, ModelFileError
from runtime.events import EngineSettings
from runtime.interrupts import Interrupts
from runtime.wheel import VERSION as WHEEL_VERSION

# GNU OpenMP's waiting threads spin for milliseconds by default. On a machine that does anything else besides, they take
# the core from the thread they wait for: reading a prompt was five times slower. With too few they sleep between the
# steps of a token: 1,000 cost an answer 8 % where nothing else was at work, 6,000 a fifth beside one other program. It
# reads this when it is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import llama_cpp.llama_cpp

lib: Any = llama_cpp.llama_cpp
"""The bindings, for the other native modules."""

_LEVEL_WARN, _LEVEL_ERROR, _LEVEL_CONT = 3, 4, 5  # ggml.h, enum ggml_log_level

_STRUCTURE_BYTES = {"llama_model_params": 80, "llama_context_params": 160, "llama_model_quantize_params": 64}

_SPLIT_MODES = {"layer": 1, "tensor": 3}  # llama.h, enum llama_split_mode
_SPLIT_MODE_NONE = 0

_LOAD_MODE_NONE = 0  # llama.h, enum llama_load_mode: no mapping of the file
_VOCAB_SPM = 1
_ATTR_USER_DEFINED = 1 << 4


def function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of llama.cpp or ggml with its C signature, for the other native modules.

    Found through libllama's own handle: opening libggml.so by its path would load a second copy (native_devices.py).
    """
    found = getattr(lib._lib, name)
    found.restype, found.argtypes = result, list(arguments)
    return found


class _Log:
    """The native log: the last lines kept, none printed."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=400)
        self.listener: Callable[[int, str], None] | None = None
        """Also called with each message and its ggml_log_level, from whichever thread wrote it."""
        self._callback = lib.llama_log_callback(self._write)  # a reference: the library keeps only the pointer
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _write(self, level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace")
        if self.listener is not None:
            self.listener(level, line)
        if level == _LEVEL_CONT and self.lines:
            last_level, last = self.lines.pop()
            self.lines.append((last_level, last + line))
        else:
            self.lines.append((level, line))

    def errors(self) -> list[str]:
        """Error lines since the last `clear`, newest last, without llama.cpp's function-name prefixes."""
        return [text.strip() for level, text in self.lines if level == _LEVEL_ERROR and text.strip()]

    def clear(self) -> None:
        self.lines.clear()


def _start() -> _Log:
    for name, expected in _STRUCTURE_BYTES.items():
        actual = ctypes.sizeof(getattr(lib, name))
        if actual != expected:
            raise EngineError(
                f"llama-cpp-python's {name} has {actual} bytes, not {expected}: this is not version "
                f"{WHEEL_VERSION}; run `make setup` again"
            )
    log = _Log()
    lib.llama_backend_init()
    return log


LOG = _start()


def version() -> str:
    """The version of llama-cpp-python that is loaded."""
    return str(llama_cpp.__version__)


def system_info() -> dict[str, str]:
    """The instruction sets and features the CPU backend was built with, as llama.cpp names them."""
    text = lib.llama_print_system_info().decode()
    parts = (part.rpartition(":")[2].partition("=") for part in text.split("|") if "=" in part)
    return {name.strip(): value.strip() for name, _, value in parts}


def has_amx_kernels() -> bool:
    """Whether the wheel holds the AMX code that GCC 12 miscompiles (facts: built without our flags)."""
    return system_info().get("AMX_INT8") == "1"


def supports_gpu() -> bool:
    """Whether the build can put layers on a GPU (or on an RPC device)."""
    return bool(lib.llama_supports_gpu_offload())


def supports_rpc() -> bool:
    """Whether the build has the RPC backend."""
    return bool(lib.llama_supports_rpc())


class Vocabulary:
    """The tokens of a loaded model. Valid while its `Model` is open."""

    def __init__(self, pointer: Any) -> None:
        self.pointer = pointer
        """The native handle, for native_sampling.py."""
        self.n_tokens = int(lib.llama_vocab_n_tokens(pointer))
        self.bos = int(lib.llama_vocab_bos(pointer))
        """Id of the beginning-of-sequence token, -1 if there is none."""
        self.eos = int(lib.llama_vocab_eos(pointer))
        self.adds_bos = bool(lib.llama_vocab_get_add_bos(pointer))
        self.is_spm = lib.llama_vocab_type(pointer) == _VOCAB_SPM
        """SentencePiece: a word's leading space is part of its token, and text starts with a dummy space."""

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Token ids of `text`. `special` lets text spell control tokens; `bos` adds BOS if the model wants one."""
        return [int(i) for i in self.tokenize_array(text, special=special, bos=bos)]

    def tokenize_array(self, text: str, *, special: bool = False, bos: bool = False) -> NDArray[np.int32]:
        """The same as an int32 array, for long texts. A token spans at least one byte, so one call is enough."""
        data = text.encode("utf-8", "surrogatepass")
        ids = np.empty(len(data) + 16, np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        n = lib.llama_tokenize(self.pointer, data, len(data), pointer, len(ids), bos, special)
        if n < 0:
            raise EngineError(f"a text of {len(data)} bytes cannot be tokenized")
        return ids[:n]

    def piece(self, token: int, *, strip_space: bool = False, special: bool = False) -> bytes:
        """The bytes a token stands for; control tokens are empty unless `special`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = lib.llama_token_to_piece(self.pointer, token, buffer, size, int(strip_space), special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def text(self, token: int) -> str:
        """The token as the GGUF stores it, such as `▁the` or `[INST]`."""
        raw = lib.llama_vocab_get_text(self.pointer, token)
        return raw.decode("utf-8", "replace") if raw is not None else ""

    def is_control(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_control(self.pointer, token))

    def is_user_defined(self, token: int) -> bool:
        return bool(lib.llama_vocab_get_attr(self.pointer, token) & _ATTR_USER_DEFINED)

    def ends_answer(self, token: int) -> bool:
        """Whether the model ends its turn with this token (EOS, EOT and their kin)."""
        return bool(lib.llama_vocab_is_eog(self.pointer, token))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What llama.cpp says of a loaded model."""

    description: str
    n_params: int
    tensor_bytes: int
    n_ctx_train: int
    n_layers: int


class Model:
    """A GGUF file, loaded. Close it after every context on it.

    `progress` is called with the share loaded, 0 to 1, and cancels the load by returning False (EngineError).
    `writable` keeps the weights in memory of their own, as they stand in the file, so that native_graph.py can read and
    replace them; by default they are mapped from the file, and some types repacked for speed.
    Raises ModelFileError for a file that is missing, cut off or not a model, EngineError when memory is short.
    """

    def __init__(
        self,
        path: Path,
        settings: EngineSettings,
        progress: Callable[[float], bool] | None = None,
        *,
        vocab_only: bool = False,
        writable: bool = False,
    ) -> None:
        check_gguf(path)
        params = lib.llama_model_default_params()
        params.n_gpu_layers = settings.n_gpu_layers
        params.split_mode = _SPLIT_MODES[settings.split_mode]
        if settings.main_gpu is not None:
            params.split_mode, params.main_gpu = _SPLIT_MODE_NONE, settings.main_gpu
        params.use_extra_bufts = settings.use_extra_bufts and not writable
        if writable:
            params.load_mode = _LOAD_MODE_NONE
        params.vocab_only = vocab_only
        keep: list[object] = []  # what the library only points at
        if settings.tensor_split is not None:
            split = (ctypes.c_float * lib.llama_max_devices())(*settings.tensor_split)
            params.tensor_split = split
            keep.append(split)
        cancelled, interrupts = False, Interrupts()
        if progress is not None:

            def report(fraction: float, _: object) -> bool:
                nonlocal cancelled
                cancelled = interrupts.came or not progress(float(fraction))
                return not cancelled

            params.progress_callback = lib.llama_progress_callback(report)
            keep.append(params.progress_callback)
        LOG.clear()
        with interrupts.held():
            self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        del keep
        if not self._model:
            if cancelled:
                raise EngineError("loading was cancelled")
            raise _load_error(path)
        self.vocabulary = Vocabulary(lib.llama_model_get_vocab(self._model))

    @property
    def pointer(self) -> Any:
        """The native handle, for native_context.py."""
        if self._model is None:
            raise EngineError("the model is closed")
        return self._model

    def info(self) -> ModelInfo:
        buffer = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self.pointer, buffer, len(buffer))
        return ModelInfo(
            description=buffer.value.decode("utf-8", "replace"),
            n_params=int(lib.llama_model_n_params(self.pointer)),
            tensor_bytes=int(lib.llama_model_size(self.pointer)),
            n_ctx_train=int(lib.llama_model_n_ctx_train(self.pointer)),
            n_layers=int(lib.llama_model_n_layer(self.pointer)),
        )

    @property
    def forgets(self) -> bool:
        """Whether the last tokens can be taken back: a recurrent model has one state for all it has read."""
        return not (lib.llama_model_is_recurrent(self.pointer) or lib.llama_model_is_hybrid(self.pointer))

    def chat_template(self) -> str | None:
        """The Jinja template in the file, if it has one."""
        raw = lib.llama_model_chat_template(self.pointer, None)
        return raw.decode("utf-8", "replace") if raw else None

    def close(self) -> None:
        if self._model is not None:
            lib.llama_model_free(self._model)
            self._model = None


def check_gguf(path: Path) -> None:
    """Raise ModelFileError unless `path` is a readable file that starts like GGUF."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; `bise models` lists what is on disk") from None
    except IsADirectoryError:
        raise ModelFileError(f"{path}: a folder; name the .gguf file in it (of shards, the first)") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise ModelFileError(f"{path}: not a GGUF file (starts with {magic!r}); make one with `bise quantize`")


def _load_error(path: Path) -> Exception:
    """The cause of a failed load, from the log: the first error line is the root, later ones repeat it."""
    lines = LOG.errors()
    cause = next((line for line in lines if "error" in line.lower() or "fail" in line.lower()), "unknown cause")
    for prefix in ("llama_model_load: ", "llama_model_load_from_file_impl: ", "error loading model: "):
        cause = cause.removeprefix(prefix)
    text = " ".join(lines)
    if "alloc" in text or "out of memory" in text:
        return EngineError(f"{path.name}: not enough memory to load it ({cause}); `bise plan` says which level fits")
    if any(sign in text for sign in ("not within the file bounds", "corrupted", "gguf_init", "failed to read")):
        return ModelFileError(f"{path}: cut off or damaged ({cause}); copy it again or remake it with `bise quantize`")
    return ModelFileError(f"{path}: llama.cpp cannot load it: {cause}")
