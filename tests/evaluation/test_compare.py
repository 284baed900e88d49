# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What a comparison costs, plans, resumes from and reports; that it works as a whole is in test_cli_compare.py."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

import clmae
from clmae.evaluation import plan as module
from clmae.evaluation import tables
from clmae.evaluation.plan import Cost, Evaluation, Recipe, Run, count_encoder_flops, count_step_flops
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_step_flops_follow_accumulation_and_masker_interval(tiny_config):
    config, state = tiny_config("cl_mae"), torch.get_rng_state()
    every, never = (count_step_flops(config, arguments(masker_update_interval=k)) for k in (1, 10**9))
    assert never < every
    assert count_step_flops(config, arguments(masker_update_interval=4)) == pytest.approx((every + 3 * never) / 4)
    assert count_step_flops(config, arguments(gradient_accumulation_steps=3)) == 3 * every
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_cost_of_looking_for_objects(recipe):
    plain, crops = (Cost(recipe("cmae", data={"contrastive_crop": on}), 40) for on in (False, True))
    refresh = 40 * count_encoder_flops(recipe("cmae").config)
    # 10 steps an epoch and 10 epochs: before epochs 2, 4, 6 and 8.
    found = [(crops.flops(step, 100) - plain.flops(step, 100)) / refresh for step in (20, 21, 40, 80, 81, 100)]
    assert found == [0, 1, 1, 3, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("crop", [False, True])
def test_steps_for_flops_is_the_most_that_fits(recipe, crop):
    cost = Cost(recipe("cmae", data={"contrastive_crop": crop}), 40)
    for budget in (cost.flops(37, 37), cost.flops(37, 37) - 1, round(cost.step_flops * 25.5)):
        fits = [steps for steps in range(1, 60) if cost.flops(steps, steps) <= budget]
        assert cost.steps_for(budget) == max(fits)
    assert cost.steps_for(0) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("split", "factor"), [(False, 2), (True, 1)])
def test_cost_is_that_of_all_processes(recipe, monkeypatch, split, factor):
    alone = Cost(recipe("mae"), 40)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    both = Cost(recipe("mae", args={"accelerator_config": {"split_batches": split}}), 40)
    assert both.images_per_step == factor * alone.images_per_step
    assert both.step_flops == factor * alone.step_flops
    assert both.steps_per_epoch * factor == alone.steps_per_epoch


@pytest.fixture
def make_plan(labelled):
    """`make_plan(recipes, **options)`: evaluated on the labelled images."""

    def make(recipes, *args, evaluation=None, **options):
        return module.make_plan(
            recipes, {"data": Evaluation(**{"dataset": labelled, **(evaluation or {})})}, *args, **options
        )

    return make


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plan_gives_equal_images_and_equal_compute(recipe, make_plan):
    small = recipe("mae", "small", {"per_device_train_batch_size": 2})
    plan = make_plan([recipe("mae"), small, recipe("cl_mae")])
    assert plan.steps["images"] == {"mae": 10, "small": 20, "cl_mae": 10}
    flops = {name: cost.flops(plan.steps["compute"][name], 0) for name, cost in plan.costs.items()}
    assert plan.steps["compute"]["cl_mae"] == 10
    for name in ("mae", "small"):
        assert plan.steps["compute"][name] > plan.steps["images"][name]
        assert 0 <= flops["cl_mae"] - flops[name] < plan.costs[name].step_flops


@pytest.mark.slow
def test_equal_compute_may_be_a_recipes_own(recipe, make_plan):
    plan = make_plan([recipe("mae"), recipe("cl_mae")], reference="mae")
    assert plan.steps["compute"] == {
        "mae": 10,
        "cl_mae": plan.costs["cl_mae"].steps_for(plan.costs["mae"].flops(10, 10)),
    }
    assert plan.steps["compute"]["cl_mae"] < 10
    with pytest.raises(ValueError, match="`reference` is 'cmae'; give the name of one of the recipes: mae"):
        make_plan([recipe("mae")], reference="cmae")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "images_seen", "steps"),
    [({"max_steps": -1, "num_train_epochs": 2.5}, None, 25), ({}, 130, 32), ({}, 1, 1)],
)
def test_plan_takes_the_length_of_the_first_or_images_seen(recipe, make_plan, args, images_seen, steps):
    plan = make_plan([recipe(args=args)], images_seen)
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
def test_bad_plans_are_refused(recipe, make_plan, labelled, tmp_path, change, message):
    change = dict(change)
    if "test_split" in change:  # a single data set answers to any split
        folder = tmp_path / "splits"
        datasets.DatasetDict({"train": datasets.load_from_disk(labelled)}).save_to_disk(folder)
        change["dataset"] = str(folder)
    recipes = [recipe(name) for name in change.pop("recipes", ["mae"])]
    own = {name: change.pop(name) for name in ("images_seen", "num_points") if name in change}
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(recipes, evaluation=change, **own)


def test_recipes_that_cannot_be_compared_are_refused(recipe, make_plan, labelled, tmp_path):
    with pytest.raises(ValueError, match=r"`max_train_samples` is None in mae and 20 in cl_mae.*--max_train_samples"):
        make_plan([recipe(), recipe("cl_mae", data={"max_train_samples": 20})])
    with pytest.raises(ValueError, match=r"recipe mae: .* batches of 64 images, but the training set has 40"):
        make_plan([recipe(args={"per_device_train_batch_size": 64})])
    datasets.load_from_disk(labelled).remove_columns("label").save_to_disk(tmp_path / "bare")
    with pytest.raises(ValueError, match="label"):
        make_plan([recipe()], evaluation={"dataset": str(tmp_path / "bare")})


@pytest.mark.slow
def test_only_the_same_plan_goes_on(recipe, make_plan, tmp_path):
    path = tmp_path / "plan.json"
    for _ in range(2):
        module.keep_plan(make_plan([recipe()]), path)
    written = path.read_text()
    other = make_plan([recipe()], num_points=2, evaluation={"protocols": ("knn",)})
    message = "(num_points: 4 there, 2 now; evaluations.data.protocols: ['knn', 'linear'] there, ['knn'] now)"
    with pytest.raises(ValueError, match=re.escape(message)):
        module.keep_plan(other, path)
    with pytest.raises(ValueError, match=r"\(recipes\.mae\.steps\.compute: \d+ there, \d+ now\)"):  # the dearest counts
        module.keep_plan(make_plan([recipe(), recipe("cl_mae")]), path)
    assert path.read_text() == written


@pytest.mark.slow
def test_recipes_may_be_added_to_a_plan(recipe, make_plan, tmp_path):
    path = tmp_path / "plan.json"
    first = make_plan([recipe()], reference="mae")
    both = make_plan([recipe(), recipe("cl_mae")], reference="mae")
    module.keep_plan(first, path)
    module.keep_plan(both, path)
    assert json.loads(path.read_text()) == both.to_json()
    with pytest.raises(ValueError, match=r"recipes\.cl_mae\.options\.family: 'cl_mae' there, None now"):
        module.keep_plan(first, path)


@pytest.mark.slow
def test_every_evaluation_once(recipe, labelled):
    fine = {"finetune-10": {"label_fraction": 0.1, "use_cpu": True}}
    evaluations = {
        "first": Evaluation(labelled, ("knn", "linear", "finetune-10"), finetuning=fine),
        "second": Evaluation(labelled, ("linear",)),
    }
    recipes = [recipe(), dataclasses.replace(recipe("cl_mae"), budgets=("images",), protocols=("knn",))]
    plan = module.make_plan(recipes, evaluations, num_points=2, reference="mae", baselines=tuple(module.BASELINES))
    rows = plan.rows()
    assert rows == [
        *(("images", "mae"), ("images", "cl_mae"), ("compute", "mae")),
        *(("", b) for b in module.BASELINES),
    ]
    names = [cell.name for cell in plan.cells(rows, [3, 4])]
    assert len(set(names)) == len(names)
    first = [name.partition("seed-3-")[2] for name in names if name.startswith("mae-10-steps-seed-3")]
    # Curves of the probes on frozen features.
    assert first == [
        *("first-knn-step-5", "first-linear-step-5", "first-knn", "first-linear", "first-finetune-10"),
        *("second-linear-step-5", "second-linear"),
    ]
    rest = [name for name in names if not name.startswith("mae")]
    assert [name for name in rest if "seed-4" in name] == [
        *("cl_mae-10-steps-seed-4-first-knn-step-5", "cl_mae-10-steps-seed-4-first-knn"),
        *("random-seed-4-first-knn", "random-seed-4-first-linear", "random-seed-4-second-linear"),
        "scratch-seed-4-first-finetune-10",
    ]
    assert "raw-seed-0-first-knn" in rest


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.fixture
def results():
    """Two recipes under two seeds at two points, a baseline under one seed: k-NN is `step + 10 * recipe + 2 * seed`."""
    records = []
    for i, (recipe, label) in enumerate((("mae", "MAE"), ("cl_mae", "CL-MAE"), ("raw", "raw pixels"))):
        for budget, step, seed in itertools.product(("images", "compute"), (5, 10), (0, 1)):
            step, budget = (step, budget) if recipe != "raw" else (0, "")
            if recipe == "raw" and records[-1]["recipe"] == "raw":
                continue
            about = dict(budget=budget, recipe=recipe, label=label, seed=seed, dataset="data", final=step in (0, 10))
            about |= dict(step=step, images_seen=4 * step, flops=step * 10**15)
            for column, value in (("k = 5", 1.0), ("k = 20", step + 10 * i + 2 * seed), ("k = 20, top-5", 99.0)):
                records.append({**about, "protocol": "knn", "column": column, "value": value})
            if recipe == "cl_mae" and about["final"]:
                more = {"dataset": "", "protocol": "training", "column": "mask_difficulty", "value": 1.1}
                records.append({**about, **more})
    return pd.DataFrame(records)


def test_statistics_by_hand(results):
    table = tables.summarize(results)
    (row,) = table[(table["recipe"] == "mae") & table["final"] & (table["column"] == "k = 20")].to_dict("records")[:1]
    assert (row["n"], row["mean"], row["values"]) == (2, 11, "10 12")
    assert row["std"] == pytest.approx(2**0.5)
    assert row["half_width"] == pytest.approx(12.7062)  # Student's t for one degree of freedom, s / sqrt(2) = 1
    alone = table[(table["recipe"] == "raw") & (table["column"] == "k = 20")].iloc[0]
    assert (alone["n"], alone["mean"]) == (1, 20)
    assert np.isnan(alone["half_width"])
    three = pd.DataFrame([{**results.iloc[0], "seed": seed, "value": seed + 1.0} for seed in range(3)])
    assert tables.summarize(three)["half_width"].item() == pytest.approx(4.30265 / 3**0.5)


def test_means_over_datasets(results):
    assert tables.with_means(results, {"knn": 1, "linear": 0}).equals(results)
    others = results[(results["protocol"] == "knn") & (results["recipe"] != "raw")]
    both = pd.concat([results, others.assign(dataset="others", value=others["value"] + 4)], ignore_index=True)
    assert tables.with_means(both, {"knn": 3}).equals(both)  # not of a part of the datasets
    both = tables.with_means(both, {"knn": 2, "linear": 1})
    means = both[both["dataset"] == tables.MEAN]
    assert set(means["recipe"]) == {"mae", "cl_mae"}  # raw pixels were evaluated on one of them alone
    pd.testing.assert_series_equal(means["value"], others["value"] + 2, check_index=False)
    assert both[len(means) : len(means) + len(results)].reset_index(drop=True).equals(results)


def test_markdown_has_a_table_for_each_budget_and_dataset(results):
    text = tables.results_to_markdown(results, compared_with="mae")
    assert text.startswith("Accuracy in percent; seeds 0, 1: mean ± half of the 95 % interval")
    _, images, compute = text.split("## ")
    assert images.startswith("Equal images seen\n")
    assert "| recipe | knn, k = 20 | mask_difficulty | images seen | steps | FLOPs |" in images
    assert "| MAE | 11.00 ± 12.71 | - | 40 | 10 | 1e+16 |" in images
    assert "| CL-MAE | 21.00 ± 12.71 | 1.100 ± 0.000 | 40 | 10 | 1e+16 |" in images
    assert "| raw pixels | 20.00 (1) | - | - | - | - |" in images
    less = images.split("Less MAE under the same seed:")[1].strip().splitlines()
    assert less == [
        "| recipe | knn, k = 20 |",
        "| --- | ---: |",
        "| CL-MAE | 10.00 ± 0.00 |",
        "| raw pixels | 10.00 (1) |",
    ]
    assert compute.startswith("Equal compute\n")
    both = pd.concat([results, results[results["dataset"] == "data"].assign(dataset="other")])
    text = tables.results_to_markdown(both, compared_with="mae")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    budgets = ("Equal images seen", "Equal compute")
    assert titles == [f"## {budget}, {dataset}" for dataset in ("data", "other") for budget in budgets]
    assert text.count("| CL-MAE | 21.00 ± 12.71 | 1.100 ± 0.000 |") == 4


def test_seeds_are_those_that_were_run(results):
    """Raw pixels are kept under seed 0 whatever the seeds are."""
    other = results[(results["seed"] == 1) | (results["recipe"] == "raw")]
    text = tables.results_to_markdown(other, compared_with="mae")
    assert text.startswith("Accuracy in percent; seed 1.\n")
    assert "Less MAE" not in text


def test_figures(results):
    left, right = tables.curves_figure(results).axes
    assert left.get_xlabel() == "images seen"
    assert "FLOPs" in right.get_xlabel()
    mae, cl_mae, raw = left.lines
    assert list(cl_mae.get_xdata()) == [20, 40]
    assert list(cl_mae.get_ydata()) == [16, 21]
    assert list(raw.get_ydata()) == [20, 20]
    assert list(mae.get_ydata()) == [6, 11]
    assert [text.get_text() for text in left.figure.legends[0].get_texts()] == ["MAE", "CL-MAE", "raw pixels"]
    (panel,) = tables.accuracy_figure(results).axes
    assert panel.get_title() == "data: knn, accuracy in %"
    # Several datasets have one curve each, of their mean; what was run for one recipe alone has no panel.
    several = pd.concat([results, results.assign(dataset="other", value=results["value"] + 4)])
    several = several[(several["budget"] != "images") | (several["recipe"] == "mae")]
    left, right = tables.curves_figure(tables.with_means(several, {"knn": 2})).axes
    for axis in (left, right):
        assert axis.get_title() == "mean of the datasets: runs at equal compute"
        assert list(axis.lines[1].get_ydata()) == [18, 23]
    assert list(left.lines[1].get_xdata()) == [20, 40]
