# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints and models of earlier versions load, and runs go on from them (`tests/fixtures/make_run.py`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForPreTraining

from ..fixtures import make_run

FOLDER = Path(make_run.__file__).parent / "commit_0c17772"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "cmae_learned"])
def test_an_earlier_run_goes_on_and_its_model_loads(name, tmp_path):
    record = json.loads((FOLDER / name / "record.json").read_text())
    checkpoint = tmp_path / f"checkpoint-{make_run.SAVED_AT}"
    shutil.copytree(FOLDER / name / checkpoint.name, checkpoint)
    run = make_run.trainer(name, tmp_path, 2 * make_run.SAVED_AT, save_strategy="no")
    run.train(resume_from_checkpoint=True)
    # It goes on with the weights, the optimiser's state and the order of the images, but with other crops and masks.
    losses, saved_at = make_run.losses(run), make_run.SAVED_AT
    assert losses[:saved_at] == record["losses"][:saved_at]
    assert losses == pytest.approx(record["losses"], rel=0.15)
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {2 * saved_at}
    model = AutoModelForPreTraining.from_pretrained(FOLDER / name / "model").eval()
    images, noise = torch.linspace(-1, 1, 256).view(1, 1, 16, 16), torch.linspace(0, 0.9, 16)[None]
    assert model(images, noise=noise).logits.flatten()[:20].tolist() == pytest.approx(record["logits"], abs=1e-5)
