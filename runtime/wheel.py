"""Builds the llama-cpp-python wheel with Bise's flags, keeps and installs it: `python -m runtime.wheel`.

pip's own wheel cache ignores build flags, so it would hand out a wheel built without ours. Built wheels lie in the
user's cache folder under a name that holds version, flags, compiler and CPU, and are installed from there. Needs only
the standard library, since it runs before anything is installed. `--cuda` builds for NVIDIA GPUs (not yet run).
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VERSION = "0.3.36"
"""The one version of llama-cpp-python that runtime/native.py is written against."""

LLAMA_CPP_COMMIT = "0c1e57098"
"""The llama.cpp inside that version."""

NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
"""GCC 12 miscompiles ggml's AMX kernels: its `_tile_loadconfig` tells the compiler of 8 of 64 configuration bytes."""

_CPU_CMAKE = ("-DGGML_RPC=ON",)
_CUDA_CMAKE = ("-DGGML_RPC=ON", "-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80;90")


class BuildError(Exception):
    """The wheel cannot be built; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Build:
    """All that decides what is in the wheel."""

    version: str
    cmake_args: tuple[str, ...]
    compiler_flags: tuple[str, ...]
    compiler: str
    """Such as gcc-12.2.0."""
    cpu: str
    """Architecture and a digest of the CPU's features: ggml is built for the machine it is built on."""
    environment: str = ""
    """Digest of the user's own CMAKE_ARGS, CFLAGS and CXXFLAGS, which are passed on; empty where there are none."""

    @property
    def folder_name(self) -> str:
        flags = "_".join(
            re.sub(r"[^A-Za-z0-9._=-]+", "+", flag.lstrip("-")) for flag in (*self.cmake_args, *self.compiler_flags)
        )
        parts = (f"llama-cpp-python-{self.version}", flags, self.compiler, self.cpu, self.environment)
        return "_".join(part for part in parts if part)


def cache_folder() -> Path:
    """Where built wheels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bise" / "wheels"


def build_for_this_machine(*, cuda: bool = False) -> Build:
    """The build this machine needs. Raises BuildError without a C and C++ compiler."""
    cc, cxx = os.environ.get("CC", "cc"), os.environ.get("CXX", "c++")
    for command in (cc, cxx):
        if shutil.which(command.split()[0]) is None:
            raise BuildError(
                f"no {command} here: install a C and C++ compiler (Debian: apt install gcc g++ cmake make)"
            )
    if cuda and shutil.which("nvcc") is None:
        raise BuildError("no nvcc here: install the CUDA toolkit, or build without CUDA=1")
    own = [os.environ.get(name, "") for name in ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS")]
    return Build(
        version=VERSION,
        cmake_args=_CUDA_CMAKE if cuda else _CPU_CMAKE,
        compiler_flags=NO_AMX if _accepts(cc, NO_AMX) else (),
        compiler=_compiler_name(cc),
        cpu=f"{platform.machine()}-{_digest(_cpu_features())}",
        environment=_digest("\n".join(own).encode()) if any(own) else "",
    )


def find_or_build(build: Build, python: str = sys.executable) -> Path:
    """The kept wheel of that build, made first by that Python's pip if it is not there. Raises BuildError."""
    folder = cache_folder() / build.folder_name
    if kept := sorted(folder.glob("*.whl")):
        return kept[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as work:
        wheels = Path(work) / "wheels"
        _run_pip(python, build, wheels, folder.parent / "build.log")
        (wheels / "build.json").write_text(json.dumps(asdict(build), indent=2) + "\n", encoding="utf-8")
        if not any(folder.glob("*.whl")):  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)  # left without a wheel by something else
            wheels.rename(folder)
    return next(iter(sorted(folder.glob("*.whl"))))


def install(wheel: Path) -> None:
    """Install a kept wheel for the Python that runs this, and note there what it was built with. Raises BuildError."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    if subprocess.run(command, check=False).returncode != 0:
        raise BuildError(f"pip could not install {wheel}; what it said stands above")
    importlib.invalidate_caches()
    built = json.loads((wheel.parent / "build.json").read_text(encoding="utf-8"))
    _note_path().write_text(json.dumps({**built, "library": _library_digest()}, indent=2) + "\n", encoding="utf-8")


def installed_build() -> dict[str, Any] | None:
    """What the installed llama-cpp-python was built with; None where it did not come from `install`."""
    try:
        note: dict[str, Any] = json.loads(_note_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if note.get("library") == _library_digest() else None


def _note_path() -> Path:
    return Path(sys.prefix) / "llama-cpp-python-build.json"


def _library_digest() -> str:
    """Tells the installed library from one that was put in its place by hand."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return ""
    libraries = sorted((Path(spec.origin).parent / "lib").glob("*.so"))
    return _digest(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in libraries))


def _run_pip(python: str, build: Build, wheels: Path, log: Path) -> None:
    flags = " ".join(build.compiler_flags)
    environment = {
        **os.environ,
        "CMAKE_ARGS": " ".join((os.environ.get("CMAKE_ARGS", ""), *build.cmake_args)).strip(),
        "CFLAGS": f"{os.environ.get('CFLAGS', '')} {flags}".strip(),
        "CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} {flags}".strip(),
    }
    requirement = f"llama-cpp-python=={build.version}"
    command = [python, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
    _say(f"building {requirement} for this machine, once: about 4 minutes on 2 cores (log: {log})")
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--wheel-dir", str(wheels), requirement], stdout=output, stderr=output, env=environment
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=30)
                    break
                except subprocess.TimeoutExpired:
                    _say(f"  still building, {time.monotonic() - started:.0f} s")
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise BuildError("\n".join((*tail, f"building {requirement} failed after those lines; all of them: {log}")))
    _say(f"  built in {time.monotonic() - started:.0f} s")


def _accepts(compiler: str, flags: tuple[str, ...]) -> bool:
    """Whether the compiler knows the flags (they are x86-64's, and GCC's from version 11 on)."""
    run = subprocess.run(
        [*compiler.split(), *flags, "-E", "-x", "c", "-"], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    return run.returncode == 0


def _compiler_name(compiler: str) -> str:
    text = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False).stdout
    first = text.splitlines()[0] if text else compiler
    version = re.findall(r"\d+\.\d+(?:\.\d+)?", first)
    name = "clang" if "clang" in first.lower() else "gcc"
    return f"{name}-{version[-1] if version else 'unknown'}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def _cpu_features() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return " ".join(sorted(features.partition(":")[2].split())).encode()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> int:
    """Install the wheel for this machine, built first if it is not kept."""
    parser = argparse.ArgumentParser(prog="python -m runtime.wheel", description="Build and install llama-cpp-python.")
    parser.add_argument("--cuda", action="store_true", help="for NVIDIA GPUs (compute capability 8.0 and 9.0)")
    arguments = parser.parse_args()
    try:
        install(find_or_build(build_for_this_machine(cuda=arguments.cuda)))
    except BuildError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("interrupted; nothing was kept")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
