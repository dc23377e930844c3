"""Compiles the kernels beside their source, once for each instruction set, when Bise is installed.

Hatchling runs this as a build hook (pyproject.toml). Without a C++ compiler nothing is built and the installation goes
on: blocks are then made by ggml, to the same bytes. Imports nothing of Bise, which is not installed yet.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
"""Contraction of multiply and add would change the bits; and a root that may set errno is a call of the C library."""

X86_FLAGS: Mapping[int, tuple[str, ...]] = {
    4: (),
    8: ("-mavx2",),
    16: ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
}
"""Lanes → what the compiler may use."""


def compile_kernels(folder: Path) -> list[Path]:
    """Build what this compiler can, into `folder`; the libraries. Says on stderr what it cannot."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        sys.stderr.write("bise: no C++ compiler found; ggml will make the blocks, to the same bytes, slower\n")
        return []
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    made = []
    for lanes, flags in X86_FLAGS.items() if is_x86 else [(4, ())]:
        target = folder / f"kernels-{lanes}.so"
        command = [compiler, *FLAGS, *flags, f"-DLANES={lanes}", str(HERE / "kernels.cpp"), "-o", str(target)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode == 0:
            made.append(target)
        else:
            target.unlink(missing_ok=True)
            sys.stderr.write(f"bise: {' '.join(command)} failed:\n{run.stderr}\n")
    return made


class KernelsBuildHook(BuildHookInterface[Any]):
    """What hatchling calls before it makes a wheel, an editable one too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        if self.target_name == "wheel" and compile_kernels(HERE):
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
