# Everything goes through two commands: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
RUN ?= runs/digits
DEMO_BUDGET ?= 75s
STAMP = $(VENV)/.set-up
EXTRAS ?= dev,docs,dashboard,bayes,tables,trees,compress,transformers,peft

.PHONY: help setup demo test lint format docs bench wheel clean

help:
	@echo "make demo    set up, search a network for scikit-learn's digits, write the report"
	@echo "make test    set up, run every test"
	@echo "make setup   make .venv with the versions of constraints.txt"
	@echo "make lint | docs | bench | wheel | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Espalier needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]" -c constraints.txt
	@touch $@

demo: setup
	rm -rf $(RUN)
	$(BIN)/espalier search --task digits --family mobilenet --max latency_ms=70% --max params=30k \
	  --budget $(DEMO_BUDGET) --seed 0 --workers 2 --out $(RUN)

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff format --check src tests benchmarks docs/examples
	$(BIN)/ruff check src tests benchmarks docs/examples
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format src tests benchmarks docs/examples
	$(BIN)/ruff check --fix src tests benchmarks docs/examples

docs: setup
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/catalogue.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

wheel: setup
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) site dist runs .mypy_cache .ruff_cache .pytest_cache
