# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The CIFAR-10 study on a few tiny pictures: its cells, what happens when it is stopped, and its table."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import datasets
import pytest
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from clmae.evaluation import compare
from clmae.model_cards.card import write_card

from .training.runs import pil_dataset

FOLDER = Path(__file__).parents[1] / "benchmarks" / "cifar10_study"
TINY = {
    "reference": "cl_mae",
    "compared_with": "mae",
    "recipes": {
        "mae": {"label": "MAE", "options": {"family": "mae"}},
        "cl_mae": {"label": "CL-MAE", "options": {"family": "cl_mae"}},
    },
    "pretraining": {
        **dict(model_size="tiny", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16),
        **dict(patch_size=4, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2),
        **dict(eval_split="test", max_eval_samples=8, per_device_train_batch_size=8, learning_rate=1.0e-3),
        **dict(use_cpu=True, disable_tqdm=True, report_to="none", difficulty_steps=0, picture_steps=4),
    },
    "scales": {
        "cpu": {
            **dict(seeds=[0, 1], threads=1, images_seen=32, num_points=2, pretraining={}, judging={}),
            "families": {"mae": {}, "cl_mae": {"masker_num_hidden_layers": 1, "masker_num_attention_heads": 2}},
            "finetuning": {"use_cpu": True, "per_device_train_batch_size": 8, "randaugment_magnitude": 0},
            "protocols": {"finetune-50": {"label_fraction": 0.5, "num_train_epochs": 1}},
            "from_scratch": {"layer_decay": 1.0},
        }
    },
}


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("cifar10_study", FOLDER / "study.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cifar10_study"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cifar10_study"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a study and its images: 48 to learn from and 24 to be judged on, of two classes."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    images = pil_dataset(72, size=20).add_column("label", [i % 2 for i in range(72)])
    images = images.cast_column("label", datasets.ClassLabel(2))
    splits = {"train": images.select(range(48)), "test": images.select(range(48, 72))}
    datasets.DatasetDict(splits).save_to_disk(folder / "data")
    return folder


@pytest.fixture
def study(module, home, monkeypatch, capsys):
    """`study("run", …)`: exit code, and what was printed."""
    monkeypatch.chdir(home)
    # Counted in test_compare.py, which takes its time.
    monkeypatch.setattr(compare, "count_step_flops", lambda config, args: 3e6 if config.model_type == "cl_mae" else 1e6)

    def call(command: str, *argv: object, output_dir: str | Path = "out") -> tuple[int, str]:
        data = [] if command == "table" else ["--dataset", "data"]
        options = ["--scale", "cpu", "--study", "study.yaml", "--output_dir", str(output_dir), *data]
        code = module.main([command, *options, *map(str, argv)])
        return code, capsys.readouterr().out

    return call


def cells(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "cpu" / "cells").glob("*.json")}


def test_cells_straight_and_stopped(study, home, monkeypatch):
    wanted = ("--seeds", 0, "--recipes", "mae", "--budgets", "images", "--protocols", "knn", "finetune-50")
    code, printed = study("run", *wanted)
    assert code == 0
    assert "[2/2] mae images seed 0: finetune-50, top-1: " in printed
    straight = cells(home / "out")
    assert straight.keys() == {"mae-images-seed-0-knn", "mae-images-seed-0-finetune-50"}
    training = straight["mae-images-seed-0-knn"]["training"]
    assert (training["steps"], training["images_seen"], training["flops"]) == (4, 32, 4e6)
    assert training["seconds"] > 0
    assert "CPU" in training["device"]
    assert [point["images_seen"] for point in training["points"]] == [16]
    assert straight["mae-images-seed-0-finetune-50"]["settings"]["num_train"] == 24

    paths = list((home / "out").rglob("cells/*"))
    before = [path.stat().st_mtime_ns for path in paths]
    cell = ("--recipe", "mae", "--budget", "images", "--seed", 0, "--protocol", "knn")
    code, printed = study("cell", *cell)
    assert (code, printed.split(";")[0]) == (0, "1 of 1 cells are done")
    assert before == [path.stat().st_mtime_ns for path in paths]

    steps, step = 0, Trainer.training_step

    def training_step(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps in (3, 6):  # of 4 while pretraining, then of 3 while fine-tuning
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    assert [study("run", *wanted, output_dir="stopped")[0] for _ in range(3)] == [75, 75, 0]
    stopped = cells(home / "stopped")
    assert {k: v["accuracies"] for k, v in stopped.items()} == {k: v["accuracies"] for k, v in straight.items()}
    weights = [load_file(next((home / out).rglob("model/model.safetensors"))) for out in ("out", "stopped")]
    assert all(weights[0][name].equal(value) for name, value in weights[1].items())

    # What is left is small, and enough for a card.
    run = home / "stopped" / "cpu" / "runs" / training["run"]
    assert {path.name for path in run.iterdir()} == {"log.txt", "model", "pictures", "timing.json", "training.json"}
    assert "pictures/step-000004.png" in write_card(run / "model").read_text()
    assert json.loads((run / "model" / "trainer_state.json").read_text())["global_step"] == 4


def test_baselines(study, home):
    code, _ = study("run", "--recipes", "random", "raw", "scratch", "--protocols", "knn", "finetune-50", "--seeds", 1)
    assert code == 0
    found = cells(home / "out")
    assert {"random-seed-1-knn", "scratch-seed-1-finetune-50"} <= found.keys()
    assert not any(name.startswith("raw") for name in found)  # which has no other seed than the first
    assert found["scratch-seed-1-finetune-50"]["settings"]["parameters"]["layer_decay"] == 1.0
    assert study("cell", "--recipe", "raw", "--seed", 0, "--protocol", "knn")[0] == 0
    raw = cells(home / "out")["raw-seed-0-knn"]
    assert raw["training"] is None
    assert raw["accuracies"] != found["random-seed-1-knn"]["accuracies"]


@pytest.fixture
def made_up(home, tmp_path):
    """A folder of results: MAE under both budgets, two seeds; the reference, one; a recipe that is too dear; raw."""
    more = {
        "dear": {"label": "Dear", "options": {"family": "cl_mae"}},
        "calm": {"label": "Calm", "ablation_of": "cl_mae", "options": {"family": "cl_mae"}},
    }
    content = {**TINY, "recipes": {**TINY["recipes"], **more}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    steps = {"mae": (4, 12), "cl_mae": (4, 4), "dear": (4, 2), "calm": (4, 9)}
    sides = {name: {"steps": dict(zip(("images", "compute"), n, strict=True))} for name, n in steps.items()}
    (tmp_path / "cpu" / "cells").mkdir(parents=True)
    (tmp_path / "cpu" / "plan.json").write_text(json.dumps({"recipes": sides, "num_images": 48}))

    def write(row, budget, seed, protocol, **accuracies):
        training = None
        if budget:
            cost = {"images_seen": 32 if budget == "images" else 96, "flops": 2e15, "seconds": 60.0 + seed}
            point = {"images_seen": 16, "flops": 1e15, "accuracies": {"knn": {"k = 5": 9.0, "k = 20": 20.0 + seed}}}
            training = {**cost, "steps": 4, "device": "CPU (1 thread)", "points": [point]}
            training["mask_difficulty"] = None if row == "mae" else 0.9
        cell = dict(row=row, budget=budget, seed=seed, protocol=protocol, accuracies=accuracies, training=training)
        cell["seconds"] = 360.0
        (tmp_path / "cpu" / "cells" / f"{row}-{budget}-{seed}-{protocol}.json").write_text(json.dumps(cell))

    for seed in (0, 1):
        for budget in ("images", "compute"):
            write("mae", budget, seed, "knn", **{"k = 5": 1.0, "k = 20": 30.0 + 2 * seed})
        write("dear", "images", seed, "knn", **{"k = 5": 1.0, "k = 20": 31.0 + 4 * seed})
    write("mae", "images", 0, "fewshot", **{"n = 1": 11.0, "n = 16": 21.0})
    write("cl_mae", "images", 1, "finetune-50", **{"top-1": 50.0})
    write("calm", "images", 0, "knn", **{"k = 5": 1.0, "k = 20": 28.0})
    write("raw", None, 0, "knn", **{"k = 5": 1.0, "k = 20": 25.0})
    return tmp_path


def test_table(module, made_up, capsys):
    options = ["--scale", "cpu", "--study", str(made_up / "study.yaml"), "--output_dir", str(made_up)]
    assert module.main(["table", *options, "--results", str(made_up / "results")]) == 0
    text = (made_up / "results" / "cpu.md").read_text()
    assert capsys.readouterr().out == f"{text}\n"
    _, images, compute, baselines, ablations = text.split("## ")
    head = "| row | seeds | knn, k = 20 | fewshot, n = 1 | fewshot, n = 16 | finetune-50, top-1 | mask difficulty |"
    assert head in images
    # t = 12.706, s / sqrt(2) = 1
    mae = "| 31.00 ± 12.71 | 11.00 (1) | 21.00 (1) | - | - | 32 | 2 | 60 | CPU (1 thread) |"
    assert f"| MAE | 2 {mae}" in images
    assert "| CL-MAE | 1 | - | - | - | 50.00 | 0.900 | 32 |" in images
    assert "| Dear | 2 | 33.00 ± 25.41 | - | - | - | 0.900 ± 0.000 | 32 |" in images
    less = images.split("Less MAE under the same seed:")[1].strip().splitlines()
    assert less[0] == "| row | seeds | knn, k = 20 |"
    assert less[2:] == ["| CL-MAE | 1 | - |", "| Dear | 2 | 2.00 ± 12.71 |"]
    assert "Calm" not in images + compute
    # 10 cells of 0.1 hours; MAE's four trainings, the dear one's two, CL-MAE's and the ablation's, of a minute.
    assert "`study.py run --scale cpu`, 1.1 hours" in text
    assert "they take more FLOPs than that: Dear." in compute
    assert [line.split(" | ")[0] for line in compute.strip().splitlines()[6:8]] == ["| MAE", "| CL-MAE"]
    assert "| raw pixels | 1 | 25.00 | - | - |" in baselines
    assert [line.split(" | ")[0] for line in ablations.strip().splitlines()[6:8]] == ["| CL-MAE", "| Calm"]
    assert "| Calm | 1 | 28.00 | 0.900 |" in ablations
    assert "| Calm | 1 | -2.00 |" in ablations

    content = json.loads((made_up / "results" / "cpu.json").read_text())
    first = content["rows"][0]
    assert first["accuracies"]["knn"]["k = 20"]["values"] == [30.0, 32.0]
    assert [(p["images_seen"], p["mean"]) for p in first["curve"]] == [(16, 20.5), (32, 31.0)]
    lines = list(csv.DictReader((made_up / "results" / "cpu.csv").open()))
    (line,) = (x for x in lines if (x["row"], x["budget"], x["column"]) == ("mae", "compute", "k = 20"))
    assert (line["seeds"], line["mean"], line["half_width"], line["images_seen"]) == ("2", "31.0", "12.706", "96")
    names = {path.name for path in (made_up / "results").iterdir()}
    assert names == {"cpu.json", "cpu.csv", "cpu.md", "cpu.png", "cpu-curves.png"}


def test_every_cell_once(module):
    settings = module.read_settings(FOLDER / "study.yaml", "cpu")
    steps = {"images": dict.fromkeys(settings["recipes"], 10), "compute": dict.fromkeys(settings["recipes"], 10)}
    steps["compute"] |= {"mae": 30, "cl_cmae": 5}
    rows = module.table_rows(settings, steps)
    assert [row for row, budget in rows if budget == "compute"] == ["mae"]
    found = module.table_cells(settings, rows)
    ablations = len(module.ablations(settings))
    assert ablations == 4
    assert len(set(found)) == len(found) == 3 * (6 * (3 + 3) + 3 * ablations + 3 + 3) + 3


def test_time_runs_out(module):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), module.stopping(1e-3):
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before
    with module.stopping(1e-3):
        pass
    time.sleep(0.1)  # the alarm is off


def test_interval_is_students(module):
    assert module.interval([1.0, 2.0, 3.0])["half_width"] == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert module.interval([4.0]) == {"mean": 4.0, "half_width": None, "n": 1, "values": [4.0]}


def test_wrong_use(study, home, module, tmp_path):
    with pytest.raises(SystemExit, match=r"`--scale` is 'tpu'; study\.yaml has cpu, gpu"):
        module.main(["run", "--scale", "tpu"])
    options = ("--seed", 0, "--protocol", "knn")
    with pytest.raises(SystemExit, match="no such cell; the rows are mae"):
        study("cell", "--recipe", "cl_mae", "--budget", "compute", *options, output_dir=tmp_path)
    with pytest.raises(SystemExit, match="holds no cells"):
        study("table", "--results", "none", output_dir=tmp_path)
    with pytest.raises(SystemExit, match="holds no study"):
        study("table", "--results", "none", output_dir=tmp_path / "other")
    changed = module.read_settings(home / "study.yaml", "cpu") | {"protocols": {"finetune-50": {"label_fraction": 0.4}}}
    with pytest.raises(ValueError, match=r"protocols\.finetune-50\.label_fraction: 0\.5 there, 0\.4 now"):
        module.open_study(changed, "data", tmp_path / "cpu")


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_study_as_it_is(module, scale, tmp_path):
    settings = module.read_settings(FOLDER / "study.yaml", scale)
    for part in ("pretraining", "finetuning"):
        settings[part]["use_cpu"] = True  # bf16 is refused where there is no GPU
    recipes = {recipe.name: recipe for recipe in module.read_recipes(settings, "uoft-cs/cifar10", tmp_path)}
    assert list(recipes)[:5] == ["mae", "cl_mae_authors", "cl_mae", "cmae", "cl_cmae"]
    assert set(module.ablations(settings).values()) == {"cl_mae", "cmae"}
    assert (
        len(
            {
                (r.config.hidden_size, r.config.num_hidden_layers, r.args.total_train_batch_size)
                for r in recipes.values()
            }
        )
        == 1
    )
    assert recipes["cl_cmae"].config.learned_masks
    assert recipes["cl_mae_authors"].config.soft_masking == "tokens"
    for protocol in settings["protocols"]:
        for row, decay in (("mae", 0.75), ("scratch", 1.0)):
            args, _ = module.finetuning_arguments(settings, module.Cell(row, None, 3, protocol), tmp_path)
            assert (args.seed, args.layer_decay) == (3, decay)
    assert len(settings["seeds"]) >= 3
    assert settings["images_seen"] >= (200 * 50_000 if scale == "gpu" else 1)
