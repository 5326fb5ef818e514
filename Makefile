# Two commands do everything on a machine that has Python 3.11, pip, make and git:
#
#     make walkthrough     d parameters / d their earlier version, computed in three ways
#     make test            formatter, linter, type checker, tests, doctests
#
# Both create `.venv` first if it is missing, and bring it up to date when pyproject.toml or
# constraints.txt changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where torch comes from, if not from pip's own configuration; for instance
# TORCH_PIP_ARGS="--index-url ...".
TORCH_PIP_ARGS ?=
# One process per core; torch then gets one thread in each.
WORKERS ?= 2
# Workers, and the processes that tests start, import the same files: who forbids Python to keep its
# bytecode compiles them a hundred times.
export PYTHONDONTWRITEBYTECODE :=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Build isolation is off below, so that the build backend is pinned like everything else.
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Peers that the benchmarks, the bridge's tests and the migration pages compare with. Without their
# dependencies: they must not move torch.
PEERS := higher jaxopt torchopt
# pip 24.1 and later refuses the metadata of this one; its migration page is skipped where it is
# missing.
OLD_PEERS := betty-ml
RUN_READY := $(VENV)/.ready-run
DEV_READY := $(VENV)/.ready-dev

.DEFAULT_GOAL := help
.PHONY: help walkthrough test lint format types pytest typed untyped slow compiled fuzz mutants errors coverage bench docs setup clean

help:  ## what can be asked for
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 22

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "innerloop needs Python 3.11: set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What the package and its examples need: enough for the walk-through.
$(RUN_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(TORCH_PIP_ARGS) torch
	$(PIP) hatchling
	$(PIP) --no-build-isolation --editable '.[examples]'
	@touch $@

# Everything else: tests, documentation, benchmarks.
$(DEV_READY): $(RUN_READY)
	$(PIP) --no-build-isolation --editable '.[dev,bench]'
	$(PIP) --no-deps $(PEERS)
	$(PIP) --no-deps $(OLD_PEERS) || echo "$(OLD_PEERS) needs pip < 24.1: going on without"
	@touch $@

setup: $(DEV_READY)  ## create .venv with everything in it

walkthrough: $(RUN_READY)  ## the walk-through: closed form, autograd and finite differences side by side
	$(BIN)/innerloop walkthrough

test: lint  ## formatter, linter, type checker, tests and doctests
	$(MAKE) --no-print-directory --jobs=2 types typed  # mypy uses one core
	$(MAKE) --no-print-directory untyped

lint: $(DEV_READY)  ## formatter and linter, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(DEV_READY)  ## formatter and linter, mending what they can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(DEV_READY)  ## type checker
	$(BIN)/mypy

pytest: typed untyped  ## tests and doctests alone; PYTEST_ARGS="-k sgd" passes arguments on

typed: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --types=first $(PYTEST_ARGS)

untyped: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) $(PYTEST_ARGS)

slow: $(DEV_READY)  ## the tests that take more than ten seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and traced" $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --types=all -m "slow and not compiled" $(PYTEST_ARGS)

compiled: $(DEV_READY)  ## every test that generates code, with inductor: most of an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) -m "compiled and not traced" $(PYTEST_ARGS)

fuzz: $(DEV_READY)  ## random trainings against finite differences of plain torch; FUZZ_ARGS="--seed 3"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases 20000 $(FUZZ_ARGS)

mutants: $(DEV_READY)  ## small mistakes in derivatives and rules: do the tests notice? MUTANTS_ARGS="--seed 1"
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py $(MUTANTS_ARGS)

errors: $(DEV_READY)  ## docs/errors.md, written from the errors that the code raises
	$(BIN)/python scripts/errors_page.py

coverage: $(DEV_READY)  ## which lines and branches no test reaches
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --cov --cov-report=term $(PYTEST_ARGS)

bench: $(DEV_READY)  ## times and memory against other libraries; rewrites the tables of docs/benchmarks.md
	$(BIN)/innerloop bench --out docs/benchmarks.md $(BENCH_ARGS)

docs: $(DEV_READY)  ## the documentation, in docs/_build/html; a warning is an error (needs npm)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

clean:  ## caches and build outputs; .venv stays
	rm -rf docs/_build .mutants .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* dist
