# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What a comparison costs, plans, resumes from and reports; that it works as a whole is in test_cli_compare.py."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import datasets
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

import clmae
from clmae.evaluation import compare as module
from clmae.evaluation.compare import Cost, Judging, Recipe, Run, count_encoder_flops, count_step_flops, make_plan
from clmae.training.arguments import PretrainingArguments
from clmae.training.data import DataArguments


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """40 images of 16 px in two classes, saved to disk."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(40)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    folder = tmp_path_factory.mktemp("labelled") / "data"
    datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 20}, features=features).save_to_disk(folder)
    return str(folder)


def arguments(**fields):
    return PretrainingArguments(
        **{"output_dir": "never", "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 10, **fields}
    )


@pytest.fixture
def recipe(tiny_config, labelled):
    """`recipe(family, args, data, **config)`: named by its family."""

    def make(family="mae", name=None, args=None, data=None, **config):
        data = DataArguments(**{"dataset": labelled, "num_held_out": 0, **(data or {})})
        return Recipe(
            name or family, tiny_config(family, **config), data, arguments(**(args or {})), {"family": family}
        )

    return make


# -- compute ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mae", "cmae"])
def test_step_flops_are_torchs_own_count(tiny_config, make_images, family):
    config = tiny_config(family)
    model = clmae.FAMILIES[family][2]._from_config(config, attn_implementation="eager")
    images = make_images(config, 4)
    images = torch.stack([images, images], 1) if family == "cmae" else images
    with FlopCounterMode(display=False) as counter:
        model(pixel_values=images).loss.backward()
    assert count_step_flops(config, arguments()) == counter.get_total_flops()


def test_encoder_flops_by_hand(tiny_config):
    config = tiny_config()
    patches, tokens, width, inner = 16, 17, 32, 64
    layer = 2 * tokens * (4 * width * width + 2 * tokens * width + 2 * width * inner)
    assert count_encoder_flops(config) == 2 * patches * width * 3 * 4 * 4 + config.num_hidden_layers * layer


def test_step_flops_follow_accumulation_and_masker_interval(tiny_config):
    config = tiny_config("cl_mae")
    every, never = (count_step_flops(config, arguments(masker_update_interval=k)) for k in (1, 10**9))
    assert never < every
    assert count_step_flops(config, arguments(masker_update_interval=4)) == pytest.approx((every + 3 * never) / 4)
    assert count_step_flops(config, arguments(gradient_accumulation_steps=3)) == 3 * every


def test_step_flops_leave_the_random_state_alone(tiny_config):
    before = torch.get_rng_state()
    count_step_flops(tiny_config("cl_mae"), arguments())
    assert torch.equal(before, torch.get_rng_state())


def test_cost_of_looking_for_objects(recipe):
    plain, crops = (Cost(recipe("cmae", data={"contrastive_crop": on}), 40) for on in (False, True))
    refresh = 40 * count_encoder_flops(recipe("cmae").config)
    # 10 steps an epoch and 10 epochs: before epochs 2, 4, 6 and 8.
    found = [(crops.flops(step, 100) - plain.flops(step, 100)) / refresh for step in (20, 21, 40, 80, 81, 100)]
    assert found == [0, 1, 1, 3, 4, 4]


@pytest.mark.parametrize("crop", [False, True])
def test_steps_for_flops_is_the_most_that_fits(recipe, crop):
    cost = Cost(recipe("cmae", data={"contrastive_crop": crop}), 40)
    for budget in (cost.flops(37, 37), cost.flops(37, 37) - 1, round(cost.step_flops * 25.5)):
        fits = [steps for steps in range(1, 60) if cost.flops(steps, steps) <= budget]
        assert cost.steps_for(budget) == max(fits)
    assert cost.steps_for(0) == 1


@pytest.mark.parametrize(("split", "factor"), [(False, 2), (True, 1)])
def test_cost_is_that_of_all_processes(recipe, monkeypatch, split, factor):
    alone = Cost(recipe("mae"), 40)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    both = Cost(recipe("mae", args={"accelerator_config": {"split_batches": split}}), 40)
    assert both.images_per_step == factor * alone.images_per_step
    assert both.step_flops == factor * alone.step_flops
    assert both.steps_per_epoch * factor == alone.steps_per_epoch


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_plan_gives_equal_images_and_equal_compute(recipe, labelled):
    small = recipe("mae", "small", {"per_device_train_batch_size": 2})
    plan = make_plan([recipe("mae"), small, recipe("cl_mae")], Judging(labelled))
    assert plan.steps["images"] == {"mae": 10, "small": 20, "cl_mae": 10}
    flops = {name: cost.flops(plan.steps["compute"][name], 0) for name, cost in plan.costs.items()}
    assert plan.steps["compute"]["cl_mae"] == 10
    for name in ("mae", "small"):
        assert plan.steps["compute"][name] > plan.steps["images"][name]
        assert 0 <= flops["cl_mae"] - flops[name] < plan.costs[name].step_flops


def test_equal_compute_may_be_a_recipes_own(recipe, labelled):
    plan = make_plan([recipe("mae"), recipe("cl_mae")], Judging(labelled), reference="mae")
    assert plan.steps["compute"] == {
        "mae": 10,
        "cl_mae": plan.costs["cl_mae"].steps_for(plan.costs["mae"].flops(10, 10)),
    }
    assert plan.steps["compute"]["cl_mae"] < 10
    with pytest.raises(ValueError, match="`reference` is 'cmae'; give the name of one of the recipes: mae"):
        make_plan([recipe("mae")], Judging(labelled), reference="cmae")


@pytest.mark.parametrize(
    ("args", "images_seen", "steps"),
    [({"max_steps": -1, "num_train_epochs": 2.5}, None, 25), ({}, 130, 32), ({}, 1, 1)],
)
def test_plan_takes_the_length_of_the_first_or_images_seen(recipe, labelled, args, images_seen, steps):
    plan = make_plan([recipe(args=args)], Judging(labelled), images_seen)
    assert plan.steps == {"images": {"mae": steps}, "compute": {"mae": steps}}


@pytest.mark.parametrize(("steps", "points"), [(100, [25, 50, 75, 100]), (10, [3, 5, 8, 10]), (2, [1, 2])])
def test_points_are_evenly_spaced_and_end_with_the_run(steps, points):
    assert Run("mae", steps, 0).points(4) == points


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": []}, "`recipes` is []"),
        ({"recipes": ["mae", "mae"]}, "each under a name of its own"),
        ({"images_seen": 0}, "`images_seen` is 0"),
        ({"num_points": 0}, "`num_points` is 0"),
        ({"protocols": ("knn", "nearest")}, "`protocols` is ['knn', 'nearest']; give some of knn"),
        ({"protocols": ()}, "`protocols` is []"),
        ({"test_split": "validation"}, "validation"),
        ({"label_column": "kind"}, "kind"),
        ({"dataset": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_bad_plans_are_refused(recipe, labelled, tmp_path, change, message):
    change = dict(change)
    if "test_split" in change:  # a single data set answers to any split
        folder = tmp_path / "splits"
        datasets.DatasetDict({"train": datasets.load_from_disk(labelled)}).save_to_disk(folder)
        change["dataset"] = str(folder)
    recipes = [recipe(name) for name in change.pop("recipes", ["mae"])]
    own = {name: change.pop(name) for name in ("images_seen", "num_points") if name in change}
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(recipes, Judging(**{"dataset": labelled, **change}), **own)


def test_images_without_classes_are_refused(recipe, labelled, tmp_path):
    datasets.load_from_disk(labelled).remove_columns("label").save_to_disk(tmp_path / "bare")
    with pytest.raises(ValueError, match="label"):
        make_plan([recipe()], Judging(str(tmp_path / "bare")))


def test_recipes_on_different_images_are_refused(recipe, labelled):
    with pytest.raises(ValueError, match=r"`max_train_samples` is None in mae and 20 in cl_mae.*--max_train_samples"):
        make_plan([recipe(), recipe("cl_mae", data={"max_train_samples": 20})], Judging(labelled))


def test_a_batch_larger_than_the_training_set_is_refused(recipe, labelled):
    with pytest.raises(ValueError, match=r"recipe mae: .* batches of 64 images, but the training set has 40"):
        make_plan([recipe(args={"per_device_train_batch_size": 64})], Judging(labelled))


def test_only_the_same_plan_goes_on(recipe, labelled, tmp_path):
    path = tmp_path / "plan.json"
    plan = make_plan([recipe()], Judging(labelled))
    module.keep_plan(plan, path)
    module.keep_plan(make_plan([recipe()], Judging(labelled)), path)
    written = path.read_text()
    message = "(judging.protocols: ['knn', 'linear'] there, ['knn'] now; num_points: 4 there, 2 now)"
    with pytest.raises(ValueError, match=re.escape(message)):
        module.keep_plan(dataclasses.replace(plan, num_points=2, judging=Judging(labelled, ("knn",))), path)
    with pytest.raises(ValueError, match=r"recipes\.cl_mae: None there"):
        module.keep_plan(make_plan([recipe(), recipe("cl_mae")], Judging(labelled)), path)
    assert path.read_text() == written


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(recipe, labelled):
    """Of two recipes, two seeds and made-up accuracies: `10 * recipe + seed` more than the step."""
    plan = make_plan([recipe(), recipe("cl_mae")], Judging(labelled), num_points=2)
    seeds, budgets = (0, 2), ("images", "compute")
    results = {}
    for i, name in enumerate(plan.recipes):
        for budget in budgets:
            for seed in seeds:
                run = Run(name, plan.steps[budget][name], seed)
                points = []
                for step in run.points(2):
                    value = step + 10 * i + seed
                    columns = {"k = 5": 1.0, "k = 20": value, "k = 20, top-5": 99.0, "Euclidean": 2.0}
                    accuracies = {"knn": columns} | ({"linear": {"top-1": value / 2}} if step == run.steps else {})
                    points.append({"step": step, "images_seen": 4 * step, "flops": step, "accuracies": accuracies})
                noise = {"knn": {**columns, "k = 20": 5.0 + seed}, "linear": {"top-1": 3.0}}
                results[run] = {"points": points, "seconds_per_step": 0.5, "baselines": {"random encoder": noise}}
    return module.make_table(plan, results, seeds, budgets)


def test_table_has_mean_and_deviation_over_seeds(table):
    rows = {(row["budget"], row["recipe"]): row for row in table["rows"]}
    assert list(rows)[:2] == [("images", "mae"), ("images", "cl_mae")]
    found = rows["images", "cl_mae"]["accuracies"]
    assert found["knn"]["k = 20"] == {"mean": 21, "std": pytest.approx(2**0.5), "values": [20, 22]}
    assert found["linear"]["top-1"]["values"] == [10, 11]
    assert rows["compute", "cl_mae"]["step"] == 10 < rows["compute", "mae"]["step"]
    assert rows[None, "random encoder"]["accuracies"]["knn"]["k = 20"]["mean"] == 6
    assert [point["step"] for point in table["curves"][0]["points"]] == [5, 10]
    json.dumps(table, allow_nan=False)


def test_markdown_has_a_table_a_budget(table):
    text = module.table_to_markdown(table)
    assert text.startswith("Accuracy in percent; seeds 0, 2: mean ± standard deviation.")
    _, images, compute = text.split("## ")
    assert images.startswith("Equal images seen")
    assert "| recipe | knn, k = 20 | linear, top-1 | images seen | steps | FLOPs | s / step |" in images
    assert "| cl_mae | 21.00 ± 1.41 | 10.50 ± 0.71 | 40 | 10 | 10 | 0.5 |" in images
    assert "| random encoder | 6.00 ± 1.41 | 3.00 ± 0.00 |  |  |  |  |" in compute


def test_csv_has_every_column(table):
    lines = list(csv.DictReader(io.StringIO(module.table_to_csv(table))))
    assert len(lines) == 5
    assert lines[1]["recipe"] == "cl_mae"
    assert (lines[1]["knn k = 20"], lines[1]["knn k = 20 std"]) == ("21.000", "1.414")
    assert lines[1]["knn k = 20, top-5"] == "99.000"
    assert (lines[4]["budget"], lines[4]["recipe"], lines[4]["seconds_per_step"]) == ("", "random encoder", "")


def test_figure_has_accuracy_over_images_and_over_compute(table):
    figure = module.accuracy_figure(table)
    left, right = figure.axes
    assert left.get_xlabel() == "images seen"
    assert "FLOPs" in right.get_xlabel()
    mae, cl_mae, random = left.lines
    assert list(cl_mae.get_xdata()) == [20, 40]
    assert list(cl_mae.get_ydata()) == [16, 21]
    assert list(random.get_ydata()) == [6, 6]
    assert right.lines[0].get_xdata()[-1] > mae.get_xdata()[-1] / 4  # trained for longer at equal compute
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mae", "cl_mae", "random encoder"]
