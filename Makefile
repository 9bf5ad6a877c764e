# Everything runs from .venv, which each command makes for itself. PYTHON=/path/to/python chooses another Python.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Not in the lock files: which build of torch is right depends on the machine, and the default one on Linux brings
# gigabytes for NVIDIA's GPUs. A CPU build of this version that is in .venv already is kept.
TORCH := torch==2.13.0
GPU_PARTS := cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 \
  nvidia-nvshmem-cu13 triton
LOCK = printf '%s\n' $(GPU_PARTS) | $(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 \
  --no-emit-index-url --no-emit-package torch --excludes - --custom-compile-command "make lock" pyproject.toml

.PHONY: demo test test-slow setup lint format lock clean

demo: $(VENV)/.demo  ## a phone call is answered, on this machine
	$(BIN)/personaline download cascade
	$(BIN)/personaline demo

test: $(VENV)/.test  ## the quick tests, types and style
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.test  ## the long ones: whole conversations with the language model
	$(BIN)/personaline download cascade
	$(BIN)/python -m pytest -q -m slow

setup: $(VENV)/.test  ## all that the commands above need
	$(BIN)/personaline download cascade

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/.test  ## pin again what pyproject.toml allows
	$(PIP) install -q uv
	$(LOCK) --extra cascade --extra postgres -o requirements.lock
	$(LOCK) --extra personaplex --extra postgres -c requirements.lock -o requirements-personaplex.lock
	$(LOCK) --extra cascade --extra personaplex --extra postgres --extra test \
	  -c requirements.lock -c requirements-personaplex.lock -o requirements-test.lock

clean:
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and was not found"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q --require-hashes -r requirements.lock
	$(PIP) install -q --no-deps -e .
	@touch $@

$(VENV)/.test: requirements-test.lock requirements-witness.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q --require-hashes -r requirements-test.lock
	$(PIP) install -q $(TORCH)
	$(PIP) install -q --require-hashes --no-deps -r requirements-witness.txt
	$(PIP) install -q --no-deps -e .
	@touch $@ $(VENV)/.demo
