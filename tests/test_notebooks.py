# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The notebooks run from their first cell to their last, with fewer epochs, and are stored without outputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbclient
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


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(tmp_path, monkeypatch, path):
    # As in the repository, so that relative paths mean the same.
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for text, replacement in SHORTER.items():
            cell.source = cell.source.replace(text, replacement)
        if "!" in cell.source:  # IPython does not fail where a command of the shell does
            cell.source += "\nassert _exit_code == 0"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
