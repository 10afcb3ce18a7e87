# What people and CI run: the very same targets. Needs Python 3.11 or newer, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One BLAS thread in tests: results and times do not depend on how many cores are idle.
TEST_ENV := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MPLBACKEND=Agg

.PHONY: help install quickstart test long lint type docs bench evidence clean

help:
	@echo "make quickstart  install and run the main job on the embedded pair"
	@echo "make test        run the tests (fetches 93 MB of weights once)"
	@echo "make long        run the tests that take minutes"
	@echo "make lint type   ruff, the layers of the imports, and mypy"
	@echo "make docs        the documentation as a site, in site/index.html"
	@echo "make bench       speed, as ratios in one run"
	@echo "make evidence    measure data/results anew, in about two and a half hours"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

# A second run gets a new folder, for a run folder is never overwritten.
QUICKSTART_PATH ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
QUICKSTART_ARGS ?=

quickstart: $(STAMP)
	$(BIN)/hlm quickstart --output-path $(QUICKSTART_PATH) $(QUICKSTART_ARGS)

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest

long: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -m long

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

type: $(STAMP)
	$(BIN)/mypy
	$(BIN)/mypy cli.py

# Strict: a broken link or a docstring that cannot be read fails. Nothing is fetched.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: $(STAMP)
	$(BIN)/python -m benchmarks.engine --repeats 3
	$(BIN)/python -m benchmarks.truncation
	$(BIN)/python -m benchmarks.analysis
	$(BIN)/python -m benchmarks.growth

# What has a result already is left out: remove data/results/NAME to measure NAME anew.
evidence: $(STAMP)
	$(BIN)/python -m benchmarks.evidence
	$(BIN)/python -m paper_figs.report.findings

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
