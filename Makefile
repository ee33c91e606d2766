# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first.
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := $(VENV)/.native
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# One thread a worker: torch's threads spin while they wait, and two teams on the same cores slow each other tenfold.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8

.PHONY: demo test test-slow test-triton-oldest test-triton-latest test-gpu sanitize-gpu lint setup native sanitize wheel clean help

help:
	@echo "make demo       quantize a real encoder, save, load, evaluate, time it (no hub, no GPU)"
	@echo "make test       lint and the tests"
	@echo "make test-slow  the tests that take long"
	@echo "make test-triton-oldest, make test-triton-latest"
	@echo "                the GPU kernels (interpreted, and compiled for sm_90) with other releases of Triton"
	@echo "make test-gpu   the tests that need an NVIDIA GPU; make sanitize-gpu: its kernels under compute-sanitizer"
	@echo "make lint       ruff and mypy"
	@echo "make native     compile what has changed in csrc (the others do so first)"
	@echo "make sanitize   the C++ tests under the address, undefined-behaviour and thread sanitizers"
	@echo "make wheel      build the packages and try them out in fresh environments, with a compiler and without"
	@echo "make clean      delete what was built (not $(VENV))"

setup: $(READY)

native: $(NATIVE)

$(READY): requirements.txt pyproject.toml setup.py .ci/setup
	.ci/setup $(VENV)

$(NATIVE): $(READY) .ci/native $(wildcard csrc/*.h csrc/cpu/*.* csrc/cuda/*/*.*)
	.ci/native $(VENV)

demo: $(NATIVE)
	$(BIN)/qbert compare minilm --task trec --task lee --plot build/demo.png

test: lint $(NATIVE)
	$(PYTEST) -m "not slow"

test-slow: $(NATIVE)
	$(PYTEST) -m slow

test-triton-oldest: $(NATIVE)
	.ci/triton $(VENV) 3.6.0 -m "(interpreter or compile) and not slow"

test-triton-latest: $(NATIVE)
	.ci/triton $(VENV) latest

test-gpu: $(NATIVE)
	$(BIN)/python -m pytest -q -m gpu

# Triton's kernels and the compiled ones. memcheck: every tensor an allocation of its own, so that a step beyond one is seen.
# racecheck's hazards are to be read: it does not see that a barrier orders a copy and the threads that wait for it.
sanitize-gpu: $(NATIVE)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m benchmarks.every_kernel
	compute-sanitizer --tool synccheck --error-exitcode 1 $(BIN)/python -m benchmarks.every_kernel
	compute-sanitizer --tool racecheck $(BIN)/python -m benchmarks.every_kernel

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(READY)
	$(BIN)/python tests/native/build.py

wheel: $(READY)
	.ci/wheel $(VENV)

clean:
	rm -rf build dist *.egg-info qbert/*.so $(NATIVE)
