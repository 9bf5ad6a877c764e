# Everything runs from .venv, which each command makes for itself. PYTHON=/path/to/python chooses another Python.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

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
	$(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-emit-index-url \
	  --custom-compile-command "make lock" --extra cascade --extra postgres pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-emit-index-url \
	  --custom-compile-command "make lock" --extra cascade --extra postgres --extra test pyproject.toml \
	  -c requirements.lock -o requirements-test.lock

clean:
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and was not found"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q --require-hashes -r requirements.lock
	$(PIP) install -q --no-deps -e .
	@touch $@

$(VENV)/.test: requirements-test.lock pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q --require-hashes -r requirements-test.lock
	$(PIP) install -q --no-deps -e .
	@touch $@ $(VENV)/.demo
