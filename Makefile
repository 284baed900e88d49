# make demo: pretrain, judge and draw a small CL-MAE   make test: lint and test   make install: .venv alone
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Threads that spin while they wait take the processor from each other when the machine has other work: on two busy cores
# that made training ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install test demo

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

demo: install
	$(BIN)/python recipes/demo.py
