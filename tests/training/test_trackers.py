# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What a local trackio database gets; in an environment of its own (`make test-app`)."""

from __future__ import annotations

import json
import sqlite3

import pytest

from .runs import logged, tiny_trainer


@pytest.mark.slow
def test_trackio_gets_what_is_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed: `make test-app` runs this")
    trainer = tiny_trainer(
        tmp_path / "out", "cl_mae-error", report_to="trackio", max_steps=3, difficulty_steps=1, project="p"
    )
    trainer.train()
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics")]
    for name in ("reconstruction_loss", "prediction_loss", "mask_difficulty"):
        values = [row[f"train/{name}"] for row in rows if f"train/{name}" in row]
        assert values == list(logged(trainer, name).values())
