# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The studies on a few tiny pictures: their cells, what happens when they are stopped, and their tables."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from clmae.evaluation import plan
from clmae.model_cards.card import write_card

from .processes import script
from .training.runs import pil_dataset

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE = dict(model_size="tiny", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
MASKER = {"masker_objective": "soft", "masker_num_hidden_layers": 1, "masker_num_attention_heads": 2}
TINY = {
    **dict(reference="cl_mae", compared_with="mae", baselines=["random", "raw", "scratch"], measure=True),
    "recipes": {
        "mae": {"label": "MAE", "options": {"family": "mae", "picture_steps": 4}},
        "cl_mae": {"label": "CL-MAE", "options": {"family": "cl_mae"}},
        "calm": {
            **{"label": "Calm", "budgets": ["images"], "protocols": ["knn"]},
            "options": {"family": "cl_mae", "curriculum_shape": "constant"},
        },
    },
    "pretraining": {
        **SHAPE,
        **dict(patch_size=4, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2),
        **dict(eval_split="test", max_eval_samples=8, per_device_train_batch_size=8, learning_rate=1.0e-3),
        **dict(use_cpu=True, disable_tqdm=True, report_to="none", difficulty_steps=2, picture_steps=0),
    },
    "scales": {
        "cpu": {
            **dict(seeds=[0, 1], threads=1, images_seen=32, num_points=2),
            "families": {"cl_mae": MASKER},
            "evaluations": {"photos": {}, "others": {"dataset": "others", "protocols": ["linear"]}},
            "finetuning": {"use_cpu": True, "per_device_train_batch_size": 8, "randaugment_magnitude": 0},
            "protocols": {"finetune-50": {"label_fraction": 0.5, "num_train_epochs": 1}},
            "from_scratch": {"layer_decay": 1.0},
        }
    },
}


@pytest.fixture(scope="module")
def module(benchmark):
    return benchmark("study")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a study and its two datasets: 48 images to learn from and 24 to test on, of two classes."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "study.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    for name, step in (("data", 2), ("others", 3)):
        images = pil_dataset(72, size=20).add_column("label", [i % step % 2 for i in range(72)])
        images = images.cast_column("label", datasets.ClassLabel(2))
        splits = {"train": images.select(range(48)), "test": images.select(range(48, 72))}
        datasets.DatasetDict(splits).save_to_disk(folder / name)
    return folder


@pytest.fixture
def study(module, home, monkeypatch, capsys):
    """`study("run", ...)`: exit code, and what was printed."""
    monkeypatch.chdir(home)
    # Counted in test_compare.py, which takes its time.
    monkeypatch.setattr(plan, "count_step_flops", lambda config, args: 3e6 if config.model_type == "cl_mae" else 1e6)

    def call(command: str, *argv: object, output_dir: str | Path = "out", study: str = "tiny") -> tuple[int, str]:
        options = [study, "--output_dir", str(output_dir), "--dataset", "data"]
        code = module.main([command, *options, *map(str, argv)])
        return code, capsys.readouterr().out

    return call


def cells(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "tiny" / "cpu" / "cells").glob("*.json")}


WANTED = ("--seeds", 0, "--recipes", "mae", "--budgets", "images", "--protocols", "knn", "finetune-50")


def test_cells_straight_and_stopped(study, home, monkeypatch):
    code, printed = study("run", *WANTED)
    assert code == 0
    assert "mae-4-steps-seed-0-photos-finetune-50, top-1: " in printed
    straight = cells(home / "out")
    name = "mae-4-steps-seed-0-photos"
    assert straight.keys() == {f"{name}-knn-step-2", f"{name}-knn", f"{name}-finetune-50"}
    assert straight[f"{name}-finetune-50"]["settings"]["num_train"] == 24

    paths = list((home / "out").rglob("cells/*"))
    before = [path.stat().st_mtime_ns for path in paths]
    cell = ("--recipe", "mae", "--budget", "images", "--seed", 0, "--protocol", "knn")
    code, printed = study("cell", *cell)
    assert (code, printed.split(";")[0]) == (0, "2 of 2 results are there")
    assert before == [path.stat().st_mtime_ns for path in paths]

    steps, step = 0, Trainer.training_step

    def training_step(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps in (3, 6):  # of 4 while pretraining, then of 3 while fine-tuning
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    assert [study("run", *WANTED, output_dir="stopped")[0] for _ in range(3)] == [75, 75, 0]
    stopped = cells(home / "stopped")
    assert {k: v["accuracies"] for k, v in stopped.items()} == {k: v["accuracies"] for k, v in straight.items()}
    runs = [home / out / "tiny" / "cpu" / "runs" / "mae-4-steps-seed-0" for out in ("out", "stopped")]
    weights = [load_file(run / "model" / "model.safetensors") for run in runs]
    assert all(weights[0][name].equal(value) for name, value in weights[1].items())
    # What is left is enough for a card, and for the other dataset's point of the curve.
    assert {path.name for path in runs[1].iterdir()} == {"model", "pictures", "points"}
    assert "pictures/step-000004.png" in write_card(runs[1] / "model").read_text()


def test_two_processes_do_each_cell_once(study, home, tmp_path, processes):
    options = ["--seeds", "0", "--recipes", "mae", "cl_mae", "--budgets", "images", "--protocols", "knn"]
    argv = [BENCHMARKS / "study.py", "run", "tiny", "--output_dir", tmp_path, "--dataset", "data", *options]
    started = [processes.start(script, *argv, folder=home) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    printed = "".join(process.stdout for process in started)
    lines = [line for line in printed.splitlines() if "pretraining in" in line or "%" in line]
    assert len(lines) == 2 + len(cells(tmp_path)) == 6


def test_table(study, home, module):
    for seeds in ((0,), (1,)):
        code, _ = study("run", "--budgets", "images", "--protocols", "knn", "linear", "finetune-50", "--seeds", *seeds)
        assert code == 0
    found = cells(home / "out")
    assert found["scratch-seed-1-photos-finetune-50"]["settings"]["parameters"]["layer_decay"] == 1.0
    assert found["raw-seed-0-photos-knn"]["accuracies"] != found["random-seed-0-photos-knn"]["accuracies"]
    code, printed = study("table", "--results", home / "results")
    assert code == 0
    text = (home / "results" / "cpu.md").read_text()
    assert printed == f"{text}\n"
    assert text.startswith("Made by `benchmarks/study.py run tiny --scale cpu`, 0.0 hours")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    # Equal compute was not run, but the reference is the same under both.
    budgets = ("Equal images seen", "Equal compute")
    datasets = ("mean of the datasets", "photos", "others")
    assert titles == [f"## {budget}, {dataset}" for dataset in datasets for budget in budgets]
    images = text.split("## Equal images seen, photos")[1].split("##")[0]
    assert "| Q2 | Q4 | mask_difficulty | s / step |" in images
    table = pd.read_csv(home / "results" / "cpu.csv", keep_default_na=False)
    (line,) = table.query("final and budget == 'images' and recipe == 'mae' and column == 'k = 20'").to_dict("records")
    values = [found[f"mae-4-steps-seed-{seed}-photos-knn"]["accuracies"]["k = 20"] for seed in (0, 1)]
    assert (line["n"], line["mean"], line["values"]) == (2, pytest.approx(sum(values) / 2), "{:g} {:g}".format(*values))
    less = images.split("Less MAE under the same seed:")[1]
    assert [row.split(" | ")[0] for row in less.strip().splitlines()[2:5]] == ["| CL-MAE", "| Calm", "| random encoder"]
    names = {path.name for path in (home / "results").iterdir()}
    assert names == {"cpu.csv", "cpu.md", "cpu.png", "cpu-curves.png"}


def test_difficulty_by_quarter(module):
    log = [{"step": 25 * i, "mask_difficulty": 0.1 * i} for i in range(9)]
    found = module.difficulty_by_quarter([{"step": 3, "loss": 1.0}, *log])
    quarters = [found[f"Q{i}"] for i in range(1, 5)]
    assert quarters == pytest.approx([0.15, 0.35, 0.55, 0.75])  # of two measurements each, the first one left out
    assert found["mask_difficulty"] == pytest.approx(0.8)
    assert module.difficulty_by_quarter([{"step": 3, "loss": 1.0}]) == {}


def test_time_runs_out(module):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), module.stopping(1e-3):
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before
    with module.stopping(1e-3):
        pass
    time.sleep(0.1)  # the alarm is off


def test_wrong_use(study, home, module, tmp_path):
    with pytest.raises(SystemExit, match=r"`--scale` is 'tpu'; .*study\.yaml has cpu, .*gpu"):
        module.main(["run", "transfer_study", "--scale", "tpu"])
    with pytest.raises(SystemExit, match="`study` is 'mnist'"):
        module.main(["run", "mnist"])
    options = ("--seed", 0, "--protocol", "knn")
    with pytest.raises(SystemExit, match=r"no such cell; the rows are mae \(images\)"):
        study("cell", "--recipe", "calm", "--budget", "compute", *options, output_dir=tmp_path)
    with pytest.raises(SystemExit, match="holds no such study"):
        study("table", output_dir=tmp_path / "other")
    assert study("run", *WANTED)[0] == 0
    changed = yaml.safe_load((home / "tiny" / "study.yaml").read_text())
    changed["scales"]["cpu"]["protocols"]["finetune-50"]["label_fraction"] = 0.4
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "study.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    with pytest.raises(ValueError, match=r"finetuning\.finetune-50\.label_fraction: 0\.5 there, 0\.4 now"):
        study("run", *WANTED, study=str(tmp_path / "tiny"))


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [
        # 3 seeds of 5 pretrainings in full (CMAE counted as dear as MAE), 2 by frozen features and 2 by probes
        # alone, all with probes at 3 earlier points on 5 datasets; and the baselines.
        ("transfer_study", "cpu", 3 * (5 * (17 + 30) + 2 * (14 + 30) + 2 * (10 + 30) + 14 + 3) + 14),
        ("transfer_study", "cpu-confirmation", 3 * 3 * (17 + 30)),
        ("transfer_study", "cpu-long", 3 * (17 + 30)),
        ("transfer_study", "gpu", 3 * (5 * (17 + 30) + 2 * (14 + 30) + 2 * (10 + 30) + 14 + 3) + 14),
        ("curriculum", "cpu", 3 * 6 * 2),
        ("curriculum", "cpu-600", 3 * 5 * 2),
        ("curriculum", "cpu-4000", 3 * 2),
        ("curriculum", "gpu", 3 * 6 * 2),
    ],
)
def test_the_studies_as_they_are(module, study, home, name, scale, expected):
    settings = module.read_settings(name, scale)
    for part in ("pretraining", "finetuning"):
        settings.setdefault(part, {})["use_cpu"] = True  # bf16 is refused where there is no GPU
    settings["pretraining"] |= {"eval_split": None, "num_held_out": 8, "max_train_samples": None}
    settings["pretraining"]["per_device_train_batch_size"] = 8
    settings["images_seen"] = 4096
    for fields in settings["evaluations"].values():
        fields |= {"dataset": "data", "test_split": None}
    plan = module.read_plan(settings, "data", home)
    assert len(plan.cells(plan.rows(), settings["seeds"])) == expected
    shapes = {(r.config.hidden_size, r.config.num_hidden_layers, r.args.learning_rate) for r in plan.recipes.values()}
    assert len(shapes) == 1
    if "cl_cmae" in plan.recipes:
        assert plan.recipes["cl_cmae"].config.learned_masks
        assert plan.recipes["cl_mae_authors"].config.soft_masking == "tokens"
        assert "finetune-rsscn7" in plan.evaluations["rsscn7"].protocols


def test_near_duplicates(benchmark, tmp_path):
    module = benchmark("transfer_study.duplicates")
    images = pil_dataset(24, size=40)
    copies = [image.convert("RGB").resize((60, 60)) for image in images.select(range(3))["image"]]
    for i, copy in enumerate(copies):
        copy.save(tmp_path / f"{i}.jpg", quality=50)
    split = datasets.Dataset.from_dict({"image": [str(tmp_path / f"{i}.jpg") for i in range(3)]})
    others = images.select(range(12, 24))
    queries = datasets.concatenate_datasets([split.cast_column("image", datasets.Image()), others])
    similarity = module.most_similar(
        module.thumbnails(queries, "train"), module.thumbnails(images.select(range(12)), "train")
    )
    assert (similarity >= 0.98).tolist() == [True] * 3 + [False] * 12
