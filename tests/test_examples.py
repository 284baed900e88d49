# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The examples run, at their smallest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_segmentation(tmp_path):
    sizes = ["--unlabelled", "64", "--labelled", "16", "--test", "16", "--pretraining_epochs", "1", "--epochs", "1"]
    command = [sys.executable, str(ROOT / "examples" / "segmentation.py"), "--output_dir", str(tmp_path), *sizes]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "miou.csv", index_col="encoder")
    assert list(table.index) == ["pretrained", "random"]
    assert table["mIoU"].between(0, 100).all()
