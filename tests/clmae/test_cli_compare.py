# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae compare`, from the arguments to the files, and killed on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer

import clmae.evaluation.compare as module
from clmae.cli import main
from clmae.evaluation import plan
from clmae.training.trainer import CurriculumTrainer

pytestmark = pytest.mark.slow
INTERVAL = 4  # steps between checkpoints
SHORT = f"num_train_epochs: 3\nnum_held_out: 0\nsave_steps: {INTERVAL}\npicture_steps: 0\n"
EVERYTHING = "learned_masks: true\nmasker_num_hidden_layers: 1\nmasker_num_attention_heads: 2\ncontrastive_crop: true\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory, recipe_text):
    """A folder with labelled photos, and a recipe of plain MAE and one of all the rest."""
    folder = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 30)):
        for label in range(2):
            (folder / "photos" / split / f"{label}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.uniform(0, 200, (4, 4, 3)) + 12 * label
                photo = Image.fromarray(pixels.astype(np.uint8)).resize((16, 16))
                photo.save(folder / "photos" / split / f"{label}" / f"{i}.png")
    (folder / "mae.yaml").write_text(recipe_text("mae", 16) + SHORT)
    (folder / "all.yaml").write_text(recipe_text("cmae", 8) + SHORT + EVERYTHING)
    return folder


@pytest.fixture(autouse=True)
def _in_its_folder(home, monkeypatch):
    monkeypatch.chdir(home)


def command(output_dir, *more):
    recipes = ["--recipes", "mae.yaml", "all.yaml", "--dataset", "photos", "--num_points", "2"]
    return ["compare", *recipes, "--output_dir", str(output_dir), *more]


@pytest.fixture(scope="module")
def finished(home):
    """An uninterrupted comparison's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        torch.set_num_threads(1)
        assert main(command("whole")) == 0
    return home / "whole"


def table_without_seconds(folder):
    table = pd.read_json(folder / "table.json")
    return table[table["column"] != "s / step"].to_dict("records")


# -- a whole comparison -----------------------------------------------------------------------------------------------


def test_files_of_a_comparison(finished):
    table = pd.read_csv(finished / "table.csv", keep_default_na=False)
    table = table[table["final"]].drop_duplicates(["budget", "recipe", "protocol"])
    rows = table[table["protocol"] == "linear"].set_index(["budget", "recipe"])
    assert list(rows.index) == [
        *(("images", "mae"), ("images", "all"), ("compute", "mae"), ("compute", "all")),
        *(("", "random"), ("", "raw")),
    ]
    assert list(rows.loc["images", "images_seen"]) == [96, 96]
    assert list(rows.loc["images", "step"]) == [6, 12]
    longer, whole = rows.loc[("compute", "mae")], rows.loc[("compute", "all")]
    assert longer["step"] > 6
    assert whole["flops"] * (1 - 1 / longer["step"]) < longer["flops"] <= whole["flops"]
    assert set(table["protocol"]) == {"knn", "linear", "training"}
    text = (finished / "table.md").read_text()
    assert text.index("## Equal images seen") < text.index("## Equal compute") < text.rindex("| raw pixels |")
    with Image.open(finished / "accuracy.png") as figure:
        assert figure.width > 600


def test_a_runs_folder_keeps_its_model(finished):
    names = sorted(folder.name for folder in (finished / "runs").iterdir() if folder.name[0] in "am")
    assert len(names) == 3  # the most expensive recipe is trained once
    for name in names:
        left = {path.name for path in (finished / "runs" / name).iterdir()}
        assert "model" in left
        assert not [name for name in left if name.startswith("checkpoint") or name == "points"]
    points = sorted(path.name for path in (finished / "cells").glob("all-12-steps-seed-0-*"))
    ends = ("knn-step-6", "knn", "linear-step-6", "linear")
    assert points == [f"all-12-steps-seed-0-photos-{end}.json" for end in ends]
    state = json.loads((finished / "runs" / names[0] / "model" / "trainer_state.json").read_text())
    assert state["global_step"] == 12


def test_a_run_is_what_pretrain_makes(finished, home):
    options = ["--dataset", "photos", "--output_dir", "alone", "--max_steps", "12", "--seed", "0"]
    assert main(["pretrain", "--config", "all.yaml", *options]) == 0
    ours = load_file(finished / "runs" / "all-12-steps-seed-0" / "model" / "model.safetensors")
    theirs = load_file(home / "alone" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_comparison_is_not_done_again(finished, monkeypatch, capsys):
    before = table_without_seconds(finished)
    (finished / "table.json").unlink()
    monkeypatch.setattr(plan, "evaluate_model", None)  # calling it would raise
    monkeypatch.setattr(module, "CurriculumTrainer", None)
    assert main(command(finished, "--logging_steps", "7")) == 0  # an option without an effect
    assert "16 of 16 results are there" in capsys.readouterr().out
    assert table_without_seconds(finished) == before


def test_another_configuration_is_refused(finished, error):
    message = error(*command(finished, "--mask_ratio", "0.5"))
    assert "holds another comparison" in message
    assert "recipes.mae.options.mask_ratio: None there, 0.5 now" in message


def test_interrupted_it_goes_on_and_takes_more_seeds(home, monkeypatch, capsys):
    argv = command("interrupted", "--recipes", "mae.yaml", "--budgets", "images", "--protocols", "linear")
    original = CurriculumTrainer.training_step

    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CurriculumTrainer, "training_step", training_step)
        assert main(argv) == 130
    assert "Go on with the same command." in capsys.readouterr().out
    assert (home / "interrupted" / "runs" / "mae-6-steps-seed-0" / "checkpoint-3").is_dir()
    assert main([*argv, "--seeds", "0", "1"]) == 0
    table = pd.read_csv(home / "interrupted" / "table.csv").query(
        "final and protocol == 'linear' and column == 'top-1'"
    )
    assert list(zip(table["recipe"], table["n"], strict=True)) == [("mae", 2), ("random", 2), ("raw", 1)]


# -- what is refused at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipes", "none.yaml"], "recipe none.yaml: --config none.yaml: No such file"),
        (["--recipes", "mae.yaml", "mae.yaml"], "each under a name of its own"),
        (["--protocols", "knn", "kmn"], "`protocols` is ['knn', 'kmn']; give some of knn, linear"),
        (["--budgets", "time"], "`budgets` is ['time']; give some of images, compute"),
        (["--seeds", "1", "1"], "`seeds` is [1, 1]"),
        (["--eval_dataset", "photos/test/0"], "label"),
        (["--eval_dataset", "./nowhere"], "no such file or folder"),
        (["--mask_ratio", "2"], "recipe mae.yaml: `mask_ratio` is 2.0"),
        (["--mask_ratoi", "0.5"], "recipe mae.yaml: unknown option '--mask_ratoi'; did you mean '--mask_ratio'?"),
        (["--seed", "1"], "--seed is not for `clmae compare`: give --seeds"),
        (["--config=mae.yaml"], "--config is not for `clmae compare`: give the recipes by --recipes"),
        (["--resume-from-checkpoint", "last"], "an unfinished comparison goes on by itself"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_written(home, error, more, message):
    assert message in error(*command("refused", *more))
    assert not (home / "refused").exists()


# -- killed -----------------------------------------------------------------------------------------------------------


def test_killed_at_any_point_it_ends_with_the_same_table(finished, home, processes):
    cache = datasets.config.HF_DATASETS_CACHE
    codes = [processes.start(compare, command("killed"), place, cache).wait() for place in [*PLACES, None]]
    assert codes == [-signal.SIGKILL] * len(PLACES) + [0]
    assert table_without_seconds(home / "killed") == table_without_seconds(finished)
    trained = len((home / "killed" / "steps.txt").read_text())
    once = sum(int(name.split("-")[1]) for name in os.listdir(finished / "runs") if "steps" in name)
    # Done again: the steps 5 and 6 before the kill in the 7th, and 5 to 8, whose checkpoint was not finished.
    assert trained == once + 2 + INTERVAL


def kill_at(owner, name, call=1, spoil=None):
    """This process kills itself at the `call`-th call of `owner.name`; before, `spoil` leaves something half done."""
    original, calls = getattr(owner, name), []

    def replacement(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            if spoil is not None:
                spoil(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def half_an_optimizer(trainer, folder):
    Path(folder, "optimizer.pt").write_bytes(b"half of it")


def in_the_seventh_step_of_the_second_run():
    kill_at(CurriculumTrainer, "training_step", 6 + 7)


def in_its_second_checkpoint():
    kill_at(Trainer, "_save_optimizer_and_scheduler", 1, half_an_optimizer)


def between_the_points_of_its_curve():
    kill_at(plan, "evaluate_model", 2)


def when_only_the_table_is_to_be_written():
    kill_at(module, "summarize")


PLACES = [
    in_the_seventh_step_of_the_second_run,
    in_its_second_checkpoint,
    between_the_points_of_its_curve,
    when_only_the_table_is_to_be_written,
]


def count_steps(path):
    """One character in a file for every training step."""
    original = CurriculumTrainer.training_step

    def training_step(*args, **kwargs):
        with open(path, "a") as file:
            file.write(".")
        return original(*args, **kwargs)

    CurriculumTrainer.training_step = training_step


def compare(argv, place, cache):
    """The comparison in a process that kills itself at a place, if one is given."""
    datasets.config.HF_DATASETS_CACHE = cache
    count_steps(Path(argv[argv.index("--output_dir") + 1], "steps.txt"))
    if place is not None:
        place()
    return main(argv)
