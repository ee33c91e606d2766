# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first.
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# One thread a worker: torch's threads spin while they wait, and two teams on the same cores slow each other tenfold.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8

.PHONY: demo test test-slow lint setup clean help

help:
	@echo "make demo       quantize a real encoder, save, load, evaluate, time it (no hub, no GPU)"
	@echo "make test       lint and the tests"
	@echo "make test-slow  the tests that take long"
	@echo "make lint       ruff and mypy"

setup: $(READY)

$(READY): requirements.txt pyproject.toml setup.py .ci/setup $(wildcard csrc/*/*.cpp csrc/*/*.h)
	.ci/setup $(VENV)

demo: $(READY)
	$(BIN)/qbert compare minilm --task trec --task lee --plot build/demo.png

test: lint
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info qbert/*.so
