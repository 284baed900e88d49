# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Two processes with 4 images each do what one process with the same 8 images does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from .runs import record_run, tiny_model, weights

# Means over processes of means over 4 images are means over the 8. (keep_std and keep_spread are no means.)
SAME = (
    "eval_mask_difficulty",
    "loss",
    "reconstruction_loss",
    "soft_reconstruction_loss",
    "gauss_loss",
    "kl_loss",
    "diversity_loss",
)
SAME += ("keep_mean", "keep_low", "keep_high", "curriculum_factor", "learning_rate", "eval_loss", "mask_difficulty")

SHORT = dict(max_steps=4, learning_rate=0.01)
RUNS = {
    "every_step": dict(SHORT, picture_steps=2),
    "every_second_step": dict(SHORT, masker_update_interval=2),
    # Here transformers would not look for parameters without gradient.
    "checkpointing": dict(SHORT, masker_update_interval=2, gradient_checkpointing=True),
    "everything": dict(SHORT, everything=True, contrastive_crop_interval=0.5),
    "resident": dict(SHORT, resident=True, save_strategy="steps", save_steps=2),
    # The processes share a batch of 8, by which the learning rate goes.
    "split": dict(
        max_steps=4,
        learning_rate=None,
        base_learning_rate=0.32,
        per_device_train_batch_size=8,
        accelerator_config={"split_batches": True},
    ),
}
STREAM = dict(SHORT, stream=True)
# An epoch's last batch holds 5 images of 13, which are repeated until both processes have 4.
UNEVEN = dict(SHORT, count=13, everything=True, dataloader_drop_last=False, optim="adamw_torch")
RESUMED = dict(UNEVEN, resume=f"{len(RUNS) + 1}/rank-0/checkpoint-2")
UNEVEN |= dict(save_strategy="steps", save_steps=2)


def one_of_two(folder: Path, runs: list[dict[str, Any]]) -> None:
    """What each process does: run i leaves its files in `<i>/rank-<rank>`; `resume` is relative to the folder."""
    for i, options in enumerate(runs):
        output_dir = folder / str(i) / f"rank-{os.environ['RANK']}"
        output_dir.mkdir(parents=True)
        if "resume" in options:
            options["resume"] = str(folder / options["resume"])
        result = record_run(output_dir, **options)
        torch.save(result | {"world_size": dist.get_world_size()}, output_dir / "result.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, processes) -> Path:
    """The folder with what both processes left of every run."""
    folder = tmp_path_factory.mktemp("two")
    runs = [{"per_device_train_batch_size": 4, **options} for options in (*RUNS.values(), STREAM, UNEVEN, RESUMED)]
    processes.launch(2, one_of_two, folder, runs)
    return folder


@pytest.fixture(scope="module", params=RUNS)
def runs(request, two_processes, tmp_path_factory):
    """`(first process, second process, one process alone, folder of the two)` of equal runs."""
    folder = two_processes / str(list(RUNS).index(request.param))
    two = [torch.load(folder / f"rank-{rank}" / "result.pt") for rank in (0, 1)]
    torch.set_num_threads(1)
    alone = record_run(tmp_path_factory.mktemp("alone"), **{**RUNS[request.param], "per_device_train_batch_size": 8})
    return *two, alone, folder


def test_gradients_of_the_first_step(runs):
    first, second, alone, _ = runs
    assert first["world_size"] == second["world_size"] == 2
    assert len(alone["gradients"]) > 50
    assert first["gradients"].keys() == alone["gradients"].keys()
    torch.testing.assert_close(first["gradients"], second["gradients"], rtol=0, atol=0)
    torch.testing.assert_close(first["gradients"], alone["gradients"], rtol=1e-4, atol=1e-5)


def test_weights_at_the_end(runs):
    first, second, alone, _ = runs
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=2e-5)
    # Which says something only because they went much further than that.
    initial = weights(tiny_model())
    for name in ("decoder.decoder_pred.weight", "masking_module.head.weight"):
        assert (alone["weights"][name] - initial[name]).abs().max() > 2e-3


def test_logs(runs):
    first, second, alone, _ = runs
    names = SAME + (("contrastive_loss", "position_loss", "position_accuracy") if alone["boxes"] is not None else ())
    values = [
        {(entry["step"], name): entry[name] for entry in run["history"] for name in names if name in entry}
        for run in (first, second, alone)
    ]
    assert {name for _, name in values[2]} == set(names)
    assert values[0] == pytest.approx(values[2], rel=1e-3, abs=1e-4)
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_boxes(runs):
    first, second, alone, _ = runs
    if alone["boxes"] is None:
        assert first["boxes"] is second["boxes"] is None
        return
    assert torch.equal(first["boxes"], second["boxes"])
    assert len(alone["boxes"].unique(dim=0)) > 4
    # The weights differ by rounding, which may move an edge by a pixel.
    torch.testing.assert_close(first["boxes"], alone["boxes"], rtol=0, atol=1 / 16 + 1e-6)


def test_only_the_first_process_draws(two_processes):
    folder = two_processes / str(list(RUNS).index("every_step"))
    drawn = sorted(path.name for path in (folder / "rank-0" / "pictures").iterdir())
    assert drawn == ["curves.png", "step-000000.png", "step-000002.png", "step-000004.png"]
    assert not (folder / "rank-1" / "pictures").exists()


def test_one_process_goes_on_where_two_left_off(two_processes, tmp_path):
    folder = two_processes / str(list(RUNS).index("resident")) / "rank-0"
    two = torch.load(folder / "result.pt")
    torch.set_num_threads(1)
    options = dict(RUNS["resident"], per_device_train_batch_size=8, save_strategy="no")
    one = record_run(tmp_path, resume=str(folder / "checkpoint-2"), **options)
    assert [entry["step"] for entry in one["history"] if "loss" in entry] == [1, 2, 3, 4]
    # Up to the order of the images in a sum, as if it had gone on with two.
    torch.testing.assert_close(one["weights"], two["weights"], rtol=0, atol=2e-5)


def test_each_process_reads_its_part_of_a_stream(two_processes, tmp_path):
    folder = two_processes / str(len(RUNS))
    first, second = (torch.load(folder / f"rank-{rank}" / "result.pt") for rank in (0, 1))
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    torch.set_num_threads(1)
    alone = record_run(tmp_path, per_device_train_batch_size=8, **STREAM)
    # Two passes over 16 images: the same ones together as in one process, none twice.
    for images in (slice(0, 8), slice(8, 16)):
        both = first["seen"][images] + second["seen"][images]
        assert len(set(both)) == 16
        assert set(both) == set(alone["seen"][images.start * 2 : images.stop * 2])


def test_last_batches_are_filled_up_and_two_processes_go_on_where_they_were(two_processes):
    whole, resumed = (
        [torch.load(two_processes / str(len(RUNS) + run) / f"rank-{rank}" / "result.pt") for rank in (0, 1)]
        for run in (1, 2)
    )
    assert [len(run["seen"]) for run in whole] == [4 * 4] * 2  # steps, images
    assert [len(run["seen"]) for run in resumed] == [2 * 4] * 2
    for other in (whole[1], *resumed):
        torch.testing.assert_close(other["weights"], whole[0]["weights"], rtol=0, atol=0)
