# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/faults.py`, with a few of its cases."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


@pytest.fixture(scope="module")
def faults():
    """The script."""
    path = Path(__file__).parents[1] / "benchmarks" / "faults.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    module = sys.modules["faults"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["faults"]


@pytest.mark.parametrize("name", ["images", "configs"])
def test_mutated_files_give_something_or_the_error_that_says_why_not(faults, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["faults.py", name, "--scale", "0.05", "--output", str(tmp_path)])
    assert faults.main() == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert sum(row["tried"] for row in rows) >= 300
    assert all(row["tried"] == row["survived"] == sum(row["outcomes"].values()) for row in rows)
    assert all(len(row["outcomes"]) > 1 for row in rows)  # some are harmless, some are not
    assert (tmp_path / "results.md").read_text().startswith("| fault | tried | survived | lost |")


def test_runs_that_are_stopped_and_damaged_end_with_the_same_weights(faults, monkeypatch):
    monkeypatch.setattr(faults, "STEPS", 8)
    for name in ("kill", "disk"):
        rows = faults.FAULTS[name](0.05, faults.random.Random(0))
        assert all(row["tried"] and row["survived"] == row["tried"] for row in rows), rows


def test_what_is_lost_is_counted(faults, monkeypatch):
    def crash(kind, first, count):
        os._exit(1)

    assert faults.in_processes(crash, "x", 3).total() == 3
    found = faults.row("x", faults.Counter({"good": 2, "bad": 1}), ("good",))
    assert (found["tried"], found["survived"], found["lost"]) == (3, 2, 1)
