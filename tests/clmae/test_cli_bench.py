# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae bench`, from the command line."""

from __future__ import annotations

import os

import pytest
import torch

import clmae.cli.bench as module
from clmae.cli import main
from clmae.cli.bench import Measured, batch_sizes, duration

SIZES = dict(
    **dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, mask_ratio=0.5),
    **dict(decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2),
)
TINY = ["--use_cpu", *(f"--{name}={value}" for name, value in SIZES.items())]
MASKER = ["--masker_num_hidden_layers=1", "--masker_num_attention_heads=2"]


def rows(text):
    """Cells of the lines of numbers."""
    return [line.split() for line in text.splitlines() if line.strip() and line.split()[0].isdigit()]


@pytest.mark.slow
def test_bench_of_a_curriculum(capsys):
    options = ("--batch_sizes", "8", "4", "--num_steps", "1", "--num_images", "1000", "--masker_update_interval", "2")
    assert main(["bench", "--family", "cl_mae", *TINY, *MASKER, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cl_mae, 16 wide, 1 blocks, on CPU (1 thread); an epoch: 1,000 images\n")
    assert [row[0] for row in rows(printed)] == ["4", "8"]
    assert all(float(row[1]) > 0 and row[3] == "-" for row in rows(printed))
    assert printed.splitlines()[-1].startswith("Fastest: ")
    assert os.listdir() == []


@pytest.mark.slow
def test_bench_of_a_recipe_with_two_views(capsys):
    with open("recipe.yaml", "w") as file:
        file.write("family: cmae\ndataset: nobody/nothing\ncontrastive_crop: true\nnum_train_epochs: 3\n")
        file.write("gradient_accumulation_steps: 4\neval_strategy: epoch\nlogging_steps: 1\nlearning_rate: 0.5\n")
    assert main(["bench", "--config", "recipe.yaml", *TINY, "--batch_sizes", "2", "--num_steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert len(rows(printed)) == 1
    assert "loss" not in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_sizes", "0"], "`batch_sizes` is [0]"),
        (["--num_steps", "0"], "`num_steps` is 0"),
        (["--output_dir", "out"], "--output_dir is not for `clmae bench`"),
        (["--per_device_train_batch_size", "4"], "give --batch_sizes"),
        (["--batch_size", "4"], "unknown option '--batch_size'"),
        (["--family", "vae"], "`family` is 'vae'"),
    ],
)
def test_wrong_use(error, argv, message):
    assert message in error("bench", *argv)


# -- what only a GPU does, with what it would measure -----------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(most)`: measurements of a GPU into which `most` images fit, and whose speed grows with the batch."""

    def pretend(most):
        def measure(config, args, num_steps):
            batch = args.train_batch_size
            return Measured(batch / (100 + batch), batch * 2**20) if batch <= most else None

        monkeypatch.setattr(module, "measure", measure)
        monkeypatch.setattr(module, "batch_sizes", lambda asked, more: batch_sizes(asked, more=True))

    return pretend


@pytest.mark.slow
def test_doubles_until_it_does_not_fit(gpu, capsys):
    gpu(100)
    assert main(["bench", "--family", "mae", *TINY, "--batch_sizes", "16", "32"]) == 0
    printed = capsys.readouterr().out
    assert [row[0] for row in rows(printed)] == ["16", "32", "64", "128"]
    assert "   128 does not fit" in printed
    assert "Fastest: 164.0 images/s, with --per_device_train_batch_size 64" in printed
    gpu(1)
    assert main(["bench", "--family", "mae", *TINY]) == 1
    assert "--gradient_checkpointing" in capsys.readouterr().out


def test_out_of_memory_is_no_error(monkeypatch, capsys):
    def forward(self, *args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("clmae.modeling.modeling_mae.MAEForPreTraining.forward", forward)
    assert main(["bench", "--family", "mae", *TINY, "--batch_sizes", "4"]) == 1
    assert "     4 does not fit" in capsys.readouterr().out


def test_batch_sizes():
    assert list(batch_sizes([8, 2, 8], more=False)) == [2, 8]
    assert list(batch_sizes([1000], more=True)) == [1000, 2000, 4000]


def test_duration():
    assert [duration(s) for s in (42, 210, 7200, 200_000)] == ["42 s", "3.5 min", "2.0 h", "2.3 days"]
