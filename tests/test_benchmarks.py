# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The study scripts run, from start to report."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from .training.runs import pil_dataset

ROOT = Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch, tmp_path, capsys):
    """`study("run", …)`: what the script prints, in a folder of its own."""
    path = ROOT / "benchmarks" / "study.py"
    spec = importlib.util.spec_from_file_location("study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> str:
        monkeypatch.setattr(sys, "argv", ["study.py", *map(str, argv)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def test_curriculum_study(tmp_path, study):
    images = pil_dataset(48, size=40).add_column("label", [i % 2 for i in range(48)])
    images.to_parquet(tmp_path / "data" / "train.parquet")
    for steps in (1, 2):
        for setting in ("authors", "default"):
            options = ("--setting", setting, "--dataset", "data", "--max_steps", steps, "--results", "results")
            study("run", "curriculum", *options)
    for setting in ("authors", "default"):
        (result,) = (tmp_path / "results").glob(f"cpu-{setting}-*-2.json")
        rows = json.loads(result.read_text())["rows"]
        assert [row["step"] for row in rows] == [0, 2]
        assert rows[0].keys() >= {"difficulty", "keep_spread", "alignment_tokens", "alignment_attention"}
    printed = study("report", "curriculum", "--results", "results")
    assert printed.splitlines()[2].startswith("| default | normalised | 2 | 0 | ")
    assert (tmp_path / "results" / "table.md").read_text() == printed.removesuffix("\n")
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {"cpu-difficulty.png", "cpu-causes.png"}


def test_cmae_study(tmp_path, study):
    images = pil_dataset(48, size=40).add_column("label", [i % 2 for i in range(48)])
    images.to_parquet(tmp_path / "data" / "train.parquet")
    for setting in ("mae", "learned"):
        study("run", "cmae", "--setting", setting, "--dataset", "data", "--max_steps", 1, "--results", "results")
    printed = study("report", "cmae", "--results", "results")
    assert "| random-mask loss | position accuracy |" in printed.splitlines()[0]
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:4]] == ["| MAE", "| all, learned masks"]


def test_report_without_runs(study):
    with pytest.raises(SystemExit, match="`--results` nothing holds no runs"):
        study("report", "curriculum", "--results", "nothing")
