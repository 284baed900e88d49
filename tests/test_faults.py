# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/faults.py` and `benchmarks/soak.py`, with a few of their cases."""

from __future__ import annotations

import os
import sys

import pandas as pd
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


@pytest.fixture(scope="module")
def faults(benchmark):
    """The script, with short runs."""
    module = benchmark("faults")
    module.STEPS = 6
    return module


@pytest.fixture(scope="module")
def soak(faults, benchmark):
    """The other one, which imports the first."""
    return benchmark("soak")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["disk", "workers", "ranks", "readonly", "second"])
def test_runs_that_are_stopped_and_hurt_end_with_the_same_weights(faults, name):
    rows = faults.FAULTS[name](0.05, faults.random.Random(0))
    assert all(row["tried"] == row["survived"] > 0 for row in rows), [row["outcomes"] for row in rows]
    assert all(row.get("slowest_end_seconds", 0) < 40 for row in rows)  # after 30, torchrun kills who hangs


@pytest.mark.slow
def test_the_same_answer_and_another(faults, monkeypatch, tmp_path):
    base, parts, tolerances = faults.ARRANGEMENTS["MAE: 4 x 1 images accumulated for 1 x 4"]
    base = dict(base, max_steps=6, save_steps=6)
    arrangements = {"good": (base, parts, tolerances), "bad": (base, dict(learning_rate=2e-2), tolerances)}
    monkeypatch.setattr(faults, "ARRANGEMENTS", arrangements)
    again, other, good, bad = faults.same(0.1, faults.random.Random(0))
    assert (again["survived"], other["survived"], good["survived"], bad["lost"]) == (1, 1, 1, 1)
    assert all(value <= most for value, most in zip(good["differences"], tolerances, strict=True))
    assert bad["differences"][1] > 100 * tolerances[1]
    assert [len(curve) for curve in good["losses"]] == [6, 6]
    faults.loss_figure([good, bad]).savefig(tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 5000


def test_the_table_is_made_in_pieces_and_counts_what_is_lost(faults, monkeypatch, tmp_path):
    counts = {"kill": 1, "same": 2}
    fakes = {name: lambda *_, name=name: [faults.row(name, faults.Counter(x=counts[name]), ("x",))] for name in counts}
    monkeypatch.setattr(faults, "FAULTS", fakes)
    for name, count in (("same", 2), ("kill", 1), ("kill", 5)):
        counts[name] = count
        monkeypatch.setattr(sys, "argv", ["faults.py", name, "--output", str(tmp_path)])
        assert faults.main() == 0
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(zip(table["command"], table["tried"], table["outcomes"], strict=True)) == [
        *(("kill", 5, "x: 5"), ("same", 2, "x: 2"))
    ]
    lost = faults.row("x", faults.Counter({"good": 2, "bad": 1}), ("good",))
    assert (lost["tried"], lost["survived"], lost["lost"]) == (3, 2, 1)
    monkeypatch.setattr(faults, "FAULTS", {"kill": lambda *_: [lost]})
    monkeypatch.setattr(sys, "argv", ["faults.py", "--output", str(tmp_path)])
    assert faults.main() == 1
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[0] == "| fault | tried | survived | lost | outcomes | date | command | seconds |"
    assert len(lines) == 4


@pytest.mark.slow
def test_nothing_grows_over_a_short_soak(soak, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "WINDOW", 5)
    often = dict(eval_steps=10, difficulty_steps=10, save_steps=20, picture_steps=40, contrastive_crop_interval=0.2)
    windows = soak.soak(tmp_path, 80, **often)
    assert list(windows["step"]) == list(range(5, 81, 5))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-60", "checkpoint-80"}
    assert len(list((tmp_path / "pictures").glob("step-*.png"))) == 3
    settled = windows[5:]  # after the first evaluation, checkpoint, refresh and picture
    assert settled["open_files"].nunique() == 1
    assert settled["memory_mib"].iloc[-1] - settled["memory_mib"].iloc[0] < 16  # what drawing keeps at first, twice


def test_what_grows_is_found(soak):
    flat = pd.DataFrame({"step": range(0, 2000, 50), "memory_mib": 900.0, "open_files": 20.0, "step_seconds": 0.01})
    assert list(soak.check(flat)["verdict"]) == ["flat"] * 3
    for name, growth in (("memory_mib", 2e-3), ("open_files", 1e-2), ("step_seconds", 1e-6)):
        rows = soak.check(flat.assign(**{name: flat[name] + growth * flat["step"]})).set_index("quantity")
        assert list(rows.index[rows["verdict"] == "grows"]) == [name]
        assert rows.loc[name, "growth"] == pytest.approx(1000 * growth)
        assert rows.loc[name, "standard error"] == pytest.approx(0, abs=1e-6)
