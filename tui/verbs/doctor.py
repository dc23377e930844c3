"""Say what is installed, which devices there are, and whether the engine works; tests it in a child process."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

HELP = "versions, devices, build flags, a self-test"

_PACKAGES = ("llama-cpp-python", "gguf", "numpy", "sentencepiece", "mistral-common", "textual")
_SECONDS = 120
_TOLERANCE = 0.05  # of the largest logit; one by one and at once take different kernels, which round differently


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from quant.kernels import best
    from runtime import __version__, library
    from runtime.errors import UserError
    from runtime.hardware import cpu_model, host_memory
    from runtime.nvidia import cards
    from runtime.wheel import installed_build
    from tui.choose import DEMO, ensure_levels

    facts: dict[str, Any] = {"bise": __version__, "python": platform.python_version(), "platform": platform.platform()}
    facts["packages"] = {name: _version(name) for name in _PACKAGES}
    facts["build"] = installed_build()
    facts["kernels"] = best().name
    available, total = host_memory()
    facts["cpu"] = {
        "model": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": total,
        "available": available,
    }
    facts["cards"] = [asdict(card) for card in cards()]
    catalogue = library.shipped_catalogue()
    model = None
    problems = []
    try:
        ensure_levels(catalogue.model(DEMO), ("Q4_K_M",), library.models_folder(), lambda _: None)
        model = library.find_levels(catalogue.model(DEMO).name, library.models_folder())["Q4_K_M"]
    except UserError as error:
        problems.append(str(error))
    stages, end = _self_test(model)
    facts["engine"] = stages
    problems += _engine_problems(stages, end, expected=model is not None)
    problems += _gpu_problems(stages)
    facts["problems"] = problems
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 1 if problems else 0


def _self_test(model: Path | None) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The stages the child passed, and how it ended if not well."""
    command = [sys.executable, "-P", "-m", "runtime.selftest", *([str(model)] if model else [])]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        child = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        output, errors, code = child.stdout, child.stderr, child.returncode
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        errors, code = f"no end after {_SECONDS} s", 1
    stages = {fact.pop("stage"): fact for fact in map(json.loads, output.splitlines())}
    if code == 0:
        return stages, None
    if code < 0:
        return stages, f"ended by {signal.Signals(-code).name}"
    last = [line for line in errors.splitlines() if line.strip()]
    return stages, last[-1] if last else f"ended with exit code {code}"


def _engine_problems(stages: dict[str, dict[str, Any]], end: str | None, *, expected: bool) -> list[str]:
    if end is not None and "libcuda.so" in end:
        return [f"llama-cpp-python was built for CUDA and finds no NVIDIA driver ({end}); install the driver"]
    if end is not None:
        reached = next(reversed(stages), "nothing")
        return [
            f"the engine's self-test failed after stage {reached!r}: {end}; rebuild llama-cpp-python with `make setup` "
            "(its flags avoid AMX code that GCC 12 miscompiles)"
        ]
    problems = []
    if stages["library"]["amx"]:
        problems.append(
            "llama-cpp-python was built with AMX code, which GCC 12 miscompiles; Bise runs without weight repacking, "
            "which is slower; rebuild it with `make setup`"
        )
    if expected and (not stages["done"]["finite"] or stages["done"]["difference"] > _TOLERANCE):
        problems.append(
            f"the engine computes wrongly: a prompt read at once and token by token differ by "
            f"{stages['done']['difference']:.1%} of the largest logit; rebuild llama-cpp-python with `make setup`"
        )
    return problems


def _gpu_problems(stages: dict[str, dict[str, Any]]) -> list[str]:
    """A GPU that is here and not used."""
    from runtime.nvidia import look, why_unusable

    if "library" not in stages:
        return []
    library = stages["library"]
    n_cuda = sum(device["name"].startswith("CUDA") for device in library["devices"])
    problem = why_unusable(look(), cuda_build=library["cuda"], n_cuda=n_cuda, errors=library["errors"])
    return [problem] if problem is not None else []


def _print(facts: dict[str, Any]) -> None:
    from tui.units import gib

    print(f"bise {facts['bise']}, Python {facts['python']}, {facts['platform']}")
    for name, version in facts["packages"].items():
        print(f"  {name} {version}")
    cpu = facts["cpu"]
    print(f"CPU: {cpu['model']}, {cpu['cores']} cores, {gib(cpu['available'])} of {gib(cpu['memory'])} free")
    if (build := facts["build"]) is not None:
        flags = " ".join((*build["cmake_args"], *build["compiler_flags"]))
        print(f"llama-cpp-python built by {build['compiler']} with {flags}")
    else:
        print("llama-cpp-python was not built by `make setup`: its flags are not known")
    own = "" if facts["kernels"] == "ggml" else "kernels of Bise, "
    print(f"levels are made by {own}{facts['kernels']}")
    stages = facts["engine"]
    if "library" in stages:
        found = stages["library"]
        print("CPU code for: " + ", ".join(k if v == "1" else f"{k}={v}" for k, v in found["features"].items()))
        for device in found["devices"]:
            memory = f"{gib(device['memory_free'])} of {gib(device['memory_total'])} free"
            print(f"device {device['name']} ({device['kind']}): {device['description']}, {memory}")
        for card in facts["cards"]:
            print(f"card {card['name']}: {_links(card)}")
        if not any(device["kind"] == "gpu" for device in found["devices"]):
            print("no GPU: models run on the CPU")
        print(f"RPC backend: {'yes' if found['rpc'] else 'no'}")
    if "done" in stages:
        done = stages["done"]
        print(
            f"engine: {stages['load']['description']} loaded; {stages['prompt']['tokens']} tokens at once and one by "
            f"one differ by {done['difference']:.2%} of the largest logit"
        )
    for problem in facts["problems"]:
        print(f"PROBLEM: {problem}")
    if not facts["problems"]:
        print("all is well")


def _links(card: dict[str, Any]) -> str:
    """What NVML says of a card beside its memory."""
    parts = [f"PCIe {card['pcie']}"] if card["pcie"] else []
    parts += [f"{card['nvlinks']} NVLinks"] if card["nvlinks"] else []
    parts += [f"at most {card['power_limit']:.0f} W"] if card["power_limit"] else []
    parts += [f"{card['bandwidth'] / 1e9:,.0f} GB/s of memory bandwidth"] if card["bandwidth"] else []
    return ", ".join(parts) or "NVML says no more of it"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
