# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The examples run, at their smallest."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from .processes import script

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_segmentation(tmp_path, processes):
    sizes = ["--unlabelled", "64", "--labelled", "16", "--test", "16", "--pretraining_epochs", "1", "--epochs", "1"]
    processes.run(script, ROOT / "examples" / "segmentation.py", "--output_dir", tmp_path, *sizes)
    table = pd.read_csv(tmp_path / "miou.csv", index_col="encoder")
    assert list(table.index) == ["pretrained", "random"]
    assert table["mIoU"].between(0, 100).all()
