# Every target creates the virtual environment it needs: make, Python >= 3.10, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=4
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-all lint docs bench dist clean

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

$(VENV)/.docs: $(VENV)/.test
	$(INSTALL) -e '.[test,docs]'
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

docs: $(VENV)/.docs     ## Build the documentation, running its code, into build/docs/html
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html $(SPHINXOPTS) \
		-d build/docs/doctrees docs build/docs/html
	$(BIN)/python docs/_extensions/check_site.py build/docs/html

bench: $(VENV)/.bench   ## Measure every table, or some: make bench TABLE="flows loo" OPTIONS=--quick
	$(BIN)/python benchmarks/run.py $(TABLE) $(OPTIONS)

dist: $(BIN)/python     ## Build wheel and sdist into dist/, and try the wheel in an empty environment
	$(INSTALL) build
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist
	@test -z "$$(find dist -size +3M)" || { echo "dist/ holds files of more than 3 MB"; exit 1; }
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && OMP_NUM_THREADS=1 wheel/bin/python -I ../tests/smoke.py

clean:           ## Remove the virtual environment and outputs
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .mypy_cache
