"""The engine's process with a llama.cpp that has a fault: `broken(FAULT)` is the command of a `Worker` that runs it.

What is replaced is llama.cpp's own functions, by ones that really die or hang; all of ours is the true code.
"""

import ctypes
import mmap
import platform
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

_UD2 = b"\x0f\x0b"  # x86's instruction that is none


def broken(fault: str) -> tuple[str, ...]:
    """`sigill` and `sigsegv` die in prompts read with repacked weights, `hopeless` in any; `hangs` never ends one.

    `early` dies when it is to load with repacking, `amx` says that it holds AMX code and dies as `sigill`. `slow` takes
    three seconds for a prompt, and half of one to make a context. `poor` may take 512 MiB more than it has when a model
    is loaded.
    """
    return (sys.executable, "-P", str(Path(__file__)), fault)


def _illegal_instruction() -> None:
    if platform.machine() != "x86_64":
        signal.raise_signal(signal.SIGILL)
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_UD2)
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


def _break(fault: str) -> None:
    import llama_cpp.llama_cpp as lib

    load, begin, decode = lib.llama_model_load_from_file, lib.llama_init_from_model, lib.llama_decode
    repacked = False

    def loading(path: bytes, params: Any) -> Any:
        nonlocal repacked
        repacked = bool(params.use_extra_bufts)
        if fault == "early" and repacked:
            _illegal_instruction()
        if fault == "poor":
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + (512 << 20), resource.RLIM_INFINITY))
        return load(path, params)

    def beginning(model: Any, params: Any) -> Any:
        if fault == "slow":
            time.sleep(0.5)
        return begin(model, params)

    def decoding(context: Any, batch: Any) -> Any:
        if batch.n_tokens > 1:
            if fault == "hopeless" or (fault in ("sigill", "amx") and repacked):
                _illegal_instruction()
            elif fault == "sigsegv" and repacked:
                ctypes.string_at(0)
            elif fault == "slow":
                time.sleep(3)
            elif fault == "hangs":
                ctypes.PyDLL(None).pause()  # with the interpreter's lock, so that nothing else runs either
        return decode(context, batch)

    if fault == "amx":
        lib.llama_print_system_info = lambda: b"CPU : AVX2 = 1 | AMX_INT8 = 1 |"
    lib.llama_model_load_from_file, lib.llama_init_from_model, lib.llama_decode = loading, beginning, decoding


if __name__ == "__main__":
    from runtime.engine_process import main

    _break(sys.argv[1])
    main(int(sys.argv[2]), int(sys.argv[3]))
