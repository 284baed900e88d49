# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""A saved encoder, and arguments for a few steps on a CPU."""

from __future__ import annotations

import pytest
import torch

from clmae import FAMILIES
from clmae.evaluation.finetuning import FinetuningArguments
from clmae.training.data import make_image_processor


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tiny_config):
    """Folder of an untrained autoencoder and its image processor."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    FAMILIES["mae"][2](tiny_config(hidden_size=16, intermediate_size=32)).save_pretrained(folder)
    make_image_processor(16, 3, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tmp_path):
    def make(kind: type = FinetuningArguments, **fields):
        quick = dict(use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=16, max_steps=3)
        return kind(output_dir=str(tmp_path / "out"), **{**quick, **fields})

    return make
