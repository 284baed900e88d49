# make test: lint, types and all tests   make quick: the fast tests   make types: mypy
# make docs: the documentation site -> outputs/site   make demo: a small CL-MAE
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Threads that spin while they wait take the processor from each other when the machine has other work: on two busy cores
# that made training ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install test quick types docs demo

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

quick: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

types: install
	$(BIN)/python -m mypy

docs: install
	$(BIN)/mkdocs build

demo: install
	$(BIN)/python recipes/demo.py
