# Every target creates the virtual environment it needs: make, Python >= 3.10, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=4
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-all lint bench clean

help:            ## Show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) -e '.[test,lint]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(INSTALL) -e '.[test,bench]'
	@touch $@

demo: $(VENV)/.test     ## Fit eight schools; table, verdict, picture and NetCDF file in out/
	$(BIN)/python examples/eight_schools.py --out out

test: $(VENV)/.test     ## Run the tests, less the slow ones
	$(PYTEST)

test-all: $(VENV)/.test ## Run every test
	$(PYTEST) -m "slow or not slow"

lint: $(VENV)/.lint     ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench   ## Time flows and inner loop against Pyro, Zuko, normflows and NumPyro
	$(BIN)/python benchmarks/flows.py
	$(BIN)/python benchmarks/inner_loop.py

clean:           ## Remove the virtual environment and outputs
	rm -rf $(VENV) out .pytest_cache .ruff_cache .mypy_cache
