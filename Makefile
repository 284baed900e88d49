# make test: lint, types and all tests   make test-app: those that need gradio or trackio   make quick: the fast tests
# make types: mypy   make docs: the documentation site -> outputs/site   make demo: CL-MAE on handwritten digits
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Threads that spin while they wait take the processor from each other when the machine has other work: on two busy cores
# that made training ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install test test-app quick types docs demo

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e ".[dev]"
	-@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1  # pip would do it in one process
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

# gradio needs an older Pillow than the other tests run with: a second environment, which finds the rest in the first.
test-app: install
	$(PYTHON) -m venv $(VENV)-app
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		$$($(VENV)-app/bin/python -c "import site; print(site.getsitepackages()[0])")/main.pth
	$(VENV)-app/bin/python -m pip install --quiet --disable-pip-version-check "gradio>=6" "playwright>=1.50" "trackio>=0.20"
	PYTHONPATH=. $(VENV)-app/bin/python -m pytest -rs tests/clmae/test_app.py tests/training/test_trackers.py -k "TestPage or trackio"

quick: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

types: install
	$(BIN)/python -m mypy

docs: install
	$(BIN)/mkdocs build

demo: install
	$(BIN)/python recipes/demo.py
