# `make demo` and `make test` set up what they need in .venv; nothing else has to be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint format clean

help:  ## show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

demo: $(VENV)/.installed  ## watch the example model read pictures and answer questions
	$(BIN)/mllama-jax demo

test: $(VENV)/.installed-dev  ## run the test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

lint: $(VENV)/.installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
# The folders as they lie in the installed package.
	rm -rf build/typed && mkdir -p build/typed/mllama_jax
	ln -s $(CURDIR)/mllama_jax/* $(CURDIR)/convert $(CURDIR)/train build/typed/mllama_jax
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## repair style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# llama-models is Meta's reference; its own requirements bring a whole server, which no test needs.
$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llama-models==0.3.0
	@touch $@ $(VENV)/.installed
