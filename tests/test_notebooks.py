# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The notebooks run from their first cell to their last, with fewer epochs, and are stored without outputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORTER = {
    "num_train_epochs=20": "num_train_epochs=1",
    "range(60)": "range(3)",
    "digits.target)):": "digits.target[:400])):",
    "!clmae": f"!{sys.executable} -m clmae",
}


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def run_cells(cells):
    """As a Jupyter kernel does, until one fails."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    for cell in cells:
        shell.run_cell(cell).raise_error()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(tmp_path, processes, path):
    # As in the repository, so that relative paths mean the same.
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for text, replacement in SHORTER.items():
        cells = [cell.replace(text, replacement) for cell in cells]
    # IPython does not fail where a command of the shell does.
    cells = [cell + "\nassert _exit_code == 0" * ("!" in cell) for cell in cells]
    environment = {"PYTHONPATH": paths, "IPYTHONDIR": str(tmp_path / "ipython")}
    processes.run(run_cells, cells, folder=folder, environment=environment)
