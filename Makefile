# `make` prints what a person can do here. Everything happens in .venv, which is made when it is needed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
TESTS ?= tests
# Tests switch gradients off for their whole process, so they run beside each other in processes, never in threads.
WORKERS ?= 2

.PHONY: help run explain-demo test test-all check format bench docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.run  ## Train a small net on scikit-learn's digits under `gradctl run`; prints the summary and where the report is
	@$(BIN)/gradctl run examples/digits.py

explain-demo: $(VENV)/.run  ## Let `gradctl explain` find the line that keeps half of a small net from learning
	@$(BIN)/gradctl explain examples/explain_demo/train.py || [ $$? -eq 1 ]  # 1: it has found something, as it should

test: $(VENV)/.test  ## Run the fast tests, browser tests included (needs Debian's chromium)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	  echo "make test: the report is tested in a browser, and chromium was not found."; \
	  echo "           Install it (Debian: apt-get install chromium), or run all other tests: $(BIN)/pytest -m 'not slow and not browser'"; \
	  exit 1; }
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(PYTEST_ARGS) $(TESTS)

test-all: $(VENV)/.test  ## Run every test, the slow ones too
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS) $(TESTS)

check: $(VENV)/.check  ## Check format, lint, types, layers and spelling; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(VENV)/.check  ## Format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.bench  ## Run the benchmarks; results go to benchmarks/results
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/off.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/explain.py
	$(BIN)/python benchmarks/explain_peers.py
	$(BIN)/python benchmarks/freeze.py
	$(BIN)/python benchmarks/custom_grad.py
	$(BIN)/python benchmarks/derivatives.py
	$(BIN)/python benchmarks/check.py
	$(BIN)/python benchmarks/step.py

docs: $(VENV)/.docs  ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:  ## Remove the environment, caches, built pages and run directories
	rm -rf $(VENV) build dist docs/_build gradctl-runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of packages: remade when the requirements change, and only as large as the target needs.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing gradctl and what the example needs into $(VENV) (once; some minutes) ..."
	$(PIP) -e '.[examples]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing gradctl and what its tests need into $(VENV) (once; some minutes) ..."
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.check: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[test,check]'
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[test,bench]'
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[docs]'
	@touch $@
