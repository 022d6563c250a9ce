# Everything a developer runs; .ci/run calls the same targets. Another interpreter: make env PYTHON=python3.12
PYTHON ?= python3
# processes that tests run in; 0 is this one
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help env demo check test test-fast bench build

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: .venv/.installed  ## create .venv and install the package with all that its tests need (once)

# torch first and pinned: a later requirement then cannot pull in another build of it
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[dev,report]"
	touch $@

demo: env  ## train the quickstart recipe: real images, sparse clients, bytes counted
	$(BIN)/fedsparse run quickstart

check: env  ## lint, formatting, types, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell

test: env  ## the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-fast: env  ## the test suite without the tests marked slow
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

bench: env  ## a short run of the speed benchmarks: ratios to hand-written loops
	$(BIN)/python docs/benchmarks/speed.py short

build: env  ## wheel and source archive in dist/
	$(BIN)/python -m build --no-isolation
