# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The examples run, at their smallest."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image
from transformers import pipeline

import clmae  # noqa: F401 (registers the backbone with transformers)

from .processes import script

ROOT = Path(__file__).parents[1]


def run_example(processes, name, folder):
    sizes = ["--unlabelled", "64", "--labelled", "16", "--test", "16", "--pretraining_epochs", "1", "--epochs", "1"]
    processes.run(script, ROOT / "examples" / f"{name}.py", "--output_dir", folder, *sizes)
    table = pd.read_csv(folder / f"{name}.csv", index_col="encoder")
    assert list(table.index) == ["pretrained", "random"]
    assert table.stack().between(0, 100).all()
    return list(table.columns)


def test_segmentation(tmp_path, processes):
    assert run_example(processes, "segmentation", tmp_path) == ["mIoU"]


def test_detection(tmp_path, processes):
    assert run_example(processes, "detection", tmp_path) == ["AP50", "IoU"]
    detector = pipeline("object-detection", model=str(tmp_path / "pretrained"))
    boxes = detector(Image.new("RGB", (60, 40)), threshold=0)
    assert boxes
    assert {box["label"] for box in boxes} <= set("0123456789")
