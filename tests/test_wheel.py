"""The kept wheel: what its name holds, when it is built, what a failed build leaves. Compilers and pip are stubs."""

import json
import os
import stat
import subprocess
import sys
import venv
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from runtime import wheel
from runtime.wheel import NO_AMX, VERSION, Build, BuildError, build_for_this_machine, cache_folder, find_or_build

BUILD = Build(
    version="1.2.3",
    cmake_args=("-DGGML_RPC=ON",),
    compiler_flags=("-mno-amx-tile",),
    compiler="gcc-12.2.0",
    cpu="x86_64-0123abcd",
)

# A Python whose pip writes one wheel, and what it was called with beside it.
PIP = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--wheel-dir") + 1])
folder.mkdir()
(folder / "llama_cpp_python-1.2.3-py3-none-linux_x86_64.whl").write_bytes(b"wheel")
names = ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS")
(folder / "call.json").write_text(json.dumps([sys.argv[1:], {{name: os.environ[name] for name in names}}]))
print("built")
"""

FAILING_PIP = f"""#!{sys.executable}
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--wheel-dir") + 1])
folder.mkdir()
(folder / "half.whl").touch()
print("ERROR: no cmake")
sys.exit(1)
"""


def executable(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def compiler(path: Path, version: str, *, knows_amx: bool) -> str:
    """A compiler that says its version, and refuses AMX flags if it does not know them."""
    refuse = "" if knows_amx else 'case "$*" in *-mno-amx*) exit 1;; esac'
    return executable(path, f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}"\n{refuse}\nexit 0\n')


@pytest.fixture(autouse=True)
def _no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX", "CMAKE_ARGS", "CFLAGS", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)


def test_wheels_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == Path(os.environ["XDG_CACHE_HOME"]) / "bise" / "wheels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(os.environ["HOME"]) / ".cache" / "bise" / "wheels"


def test_the_folders_name_holds_all_that_decides() -> None:
    assert BUILD.folder_name == "llama-cpp-python-1.2.3_DGGML_RPC=ON_mno-amx-tile_gcc-12.2.0_x86_64-0123abcd"
    others = [
        replace(BUILD, version="1.2.4"),
        replace(BUILD, cmake_args=(*BUILD.cmake_args, "-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80;90")),
        replace(BUILD, compiler_flags=()),
        replace(BUILD, compiler="gcc-13.1.0"),
        replace(BUILD, cpu="x86_64-0123abce"),
        replace(BUILD, environment="4567cdef"),
    ]
    names = {build.folder_name for build in (BUILD, *others)}
    assert len(names) == 7
    assert all(len(name) < 255 for name in names)
    assert not set("/ ;") & set("".join(names))


def test_a_wheel_is_built_once_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = find_or_build(BUILD, executable(tmp_path / "python", PIP))
    assert built == cache_folder() / BUILD.folder_name / "llama_cpp_python-1.2.3-py3-none-linux_x86_64.whl"
    assert built.read_bytes() == b"wheel"
    assert json.loads((built.parent / "build.json").read_text())["version"] == "1.2.3"
    assert "building llama-cpp-python==1.2.3 for this machine" in capsys.readouterr().err
    assert find_or_build(BUILD, "/no/python") == built
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in cache_folder().iterdir()) == ["build.log", BUILD.folder_name]


def test_pip_builds_from_source_with_our_flags_behind_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_LTO=ON")
    monkeypatch.setenv("CXXFLAGS", "-O1")
    built = find_or_build(BUILD, executable(tmp_path / "python", PIP))
    arguments, environment = json.loads((built.parent / "call.json").read_text())
    assert arguments[:3] == ["-m", "pip", "wheel"]
    assert arguments[-1] == "llama-cpp-python==1.2.3"
    assert arguments[arguments.index("--no-binary") + 1] == "llama-cpp-python"
    assert environment == {
        "CMAKE_ARGS": "-DGGML_LTO=ON -DGGML_RPC=ON",
        "CFLAGS": "-mno-amx-tile",
        "CXXFLAGS": "-O1 -mno-amx-tile",
    }


def test_a_failed_build_shows_the_log_and_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as error:
        find_or_build(BUILD, executable(tmp_path / "python", FAILING_PIP))
    log = cache_folder() / "build.log"
    assert str(error.value) == (
        f"ERROR: no cmake\nbuilding llama-cpp-python==1.2.3 failed after those lines; all of them: {log}"
    )
    assert log.read_text() == "ERROR: no cmake\n"
    assert list(cache_folder().iterdir()) == [log]
    assert find_or_build(BUILD, executable(tmp_path / "python", PIP)).exists()


def test_a_folder_that_lost_its_wheel_is_built_again(tmp_path: Path) -> None:
    python = executable(tmp_path / "python", PIP)
    find_or_build(BUILD, python).unlink()
    assert find_or_build(BUILD, python).exists()


def test_this_machines_build_is_told_by_its_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", "gcc (Debian 12.2.0-14) 12.2.0", knows_amx=True))
    build = build_for_this_machine()
    assert (build.version, build.compiler, build.compiler_flags) == (VERSION, "gcc-12.2.0", NO_AMX)
    assert build.cmake_args == ("-DGGML_RPC=ON",)
    assert build.environment == ""
    assert build == build_for_this_machine()


def test_a_clang_is_a_clang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", "Debian clang version 14.0.6", knows_amx=True))
    assert build_for_this_machine().compiler == "clang-14.0.6"


def test_flags_the_compiler_does_not_know_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path / "cc", "cc 10.2.1", knows_amx=False) + " -pipe")
    assert build_for_this_machine().compiler_flags == ()


@pytest.mark.parametrize("name", ["CMAKE_ARGS", "CFLAGS", "CXXFLAGS"])
def test_the_users_own_flags_make_another_wheel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build_for_this_machine()
    monkeypatch.setenv(name, "-DX")
    other = build_for_this_machine()
    assert other.folder_name != plain.folder_name
    monkeypatch.setenv(name, "-DY")
    assert build_for_this_machine().folder_name not in (plain.folder_name, other.folder_name)


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_no_compiler_is_one_clear_line(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(BuildError, match=r"no no-such-compiler here: install a C and C\+\+ compiler"):
        build_for_this_machine()


def test_no_cuda_compiler_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cc = compiler(tmp_path / "cc", "gcc 12.2.0", knows_amx=True)
    monkeypatch.setenv("CC", cc)
    monkeypatch.setenv("CXX", cc)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no nvcc here: install the CUDA toolkit"):
        build_for_this_machine(cuda=True)
    compiler(tmp_path / "nvcc", "nvcc", knows_amx=True)
    assert "-DCMAKE_CUDA_ARCHITECTURES=80;90" in build_for_this_machine(cuda=True).cmake_args


def test_the_command_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["wheel"])
    monkeypatch.setenv("CC", "no-such-compiler")
    assert wheel.main() == 1
    assert capsys.readouterr().err.startswith("no no-such-compiler here")


def keep_a_wheel(build: Build) -> None:
    """A wheel that pip installs, in the place of the one that takes minutes."""
    folder = cache_folder() / build.folder_name
    folder.mkdir(parents=True)
    (folder / "build.json").write_text(json.dumps(asdict(build)), encoding="utf-8")
    info = f"llama_cpp_python-{VERSION}.dist-info"
    files = {
        "llama_cpp/__init__.py": "",
        "llama_cpp/lib/libllama.so": "machine code",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"llama_cpp_python-{VERSION}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def test_a_kept_wheel_is_installed_and_its_flags_are_known_afterwards(tmp_path: Path) -> None:
    keep_a_wheel(build_for_this_machine())
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}

    def known() -> Any:
        code = "import json; from runtime.wheel import installed_build; print(json.dumps(installed_build()))"
        run = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return json.loads(run.stdout)

    assert known() is None
    subprocess.run([python, "-m", "runtime.wheel"], env=environment, check=True)
    built = known()
    assert built["compiler_flags"] == list(build_for_this_machine().compiler_flags)
    assert built["version"] == VERSION
    [library] = (tmp_path / "venv").rglob("libllama.so")
    library.write_text("another build")
    assert known() is None, "a library put there by hand was built with unknown flags"
