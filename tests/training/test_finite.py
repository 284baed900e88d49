# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Losses and gradients that are nan or inf: found, named, never saved, and skipped where that is allowed."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from clmae.training.finite import NonFiniteError
from clmae.training.integrity import checkpoints, verify

from .runs import EachStep, assert_equal_weights, logged, plain_dataset, tiny_model, tiny_trainer, warned, weights

SAVING = dict(save_strategy="steps", save_steps=2, save_total_limit=None, max_steps=8)


class Poison:
    """Makes something nan at one optimiser step (counted from 1) and micro-batch, and keeps its images."""

    def __init__(self, trainer, step, what="loss", batch=0):
        self.trainer, self.step, self.what, self.batch = trainer, step, what, batch
        self.count, self.images = -1, None
        self.forward, trainer.model.forward = trainer.model.forward, self

    def __call__(self, *args, **kwargs):
        outputs = self.forward(*args, **kwargs)
        step = self.trainer.state.global_step + 1
        if not self.trainer.model.training or step != self.step:
            return outputs
        self.count += 1
        if self.count == self.batch:
            self.images = kwargs["pixel_values"].clone()
            if self.what == "gradient":  # finite forward, infinite backward
                zero = next(self.trainer.model.parameters()).flatten()[0] * 0
                outputs.loss = outputs.loss + torch.sqrt(zero.abs())
            else:
                outputs[self.what] = outputs[self.what] * math.nan
                if self.what != "loss":
                    outputs.loss = outputs.loss + outputs[self.what]
        return outputs


def named_images(trainer, message, epoch):
    """What the images that a message names looked like in an epoch."""
    dataset = trainer.train_dataset
    indices = json.loads(message[message.index("[") : message.index("]") + 1])
    return torch.stack([dataset[epoch * len(dataset) + index]["pixel_values"] for index in indices])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "named", "logging_steps"),
    [
        ("loss", "the loss (loss) is", 50),
        ("gauss_loss", "the loss (loss, gauss_loss) is", 1),
        ("gradient", "the gradient is", 1),
        ("gradient", "the gradient is", 50),
    ],
)
def test_the_run_stops_before_anything_poisoned_is_saved(tmp_path, what, named, logging_steps):
    trainer = tiny_trainer(tmp_path, "cl_mae", **SAVING, logging_steps=logging_steps)
    poison = Poison(trainer, 5, what)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith(f"Step 5: {named} not finite. Its images")
    assert "The last checkpoint from before is checkpoint-4" in message
    assert "`max_skipped_steps`" in message
    assert trainer.state.global_step == (5 if logging_steps == 1 else 6)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert [verify(path) for path in checkpoints(tmp_path)] == [[], []]
    # Of an epoch's four steps, the fifth is the first of the next.
    assert torch.equal(named_images(trainer, message, epoch=1), poison.images)


def test_the_micro_batch_is_named(tmp_path):
    trainer = tiny_trainer(
        tmp_path, "mae", **SAVING, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=4
    )
    poison = Poison(trainer, 3, batch=1)
    with pytest.raises(NonFiniteError, match="Step 3: ") as error:
        trainer.train()
    assert torch.equal(named_images(trainer, str(error.value), epoch=0), poison.images)


def test_what_another_process_saw_stops_this_one(tmp_path):
    trainer = tiny_trainer(tmp_path, "cl_mae")
    # As if a second process had seen a nan in the last value.
    trainer.accelerator.gather = lambda flags: torch.cat([flags, torch.zeros_like(flags[:-1]), flags.new_ones(1)])
    trainer.finite.add_losses({"loss": torch.tensor(1.0), "kl_loss": torch.tensor(1.0)})
    with pytest.raises(NonFiniteError, match=r"Step 1: the loss \(kl_loss\) is not finite\. There is no checkpoint"):
        trainer.finite.check()
    trainer.finite.check()  # once


def test_data_without_keys_and_the_last_step(tmp_path):
    trainer = tiny_trainer(tmp_path, "mae", train_dataset=plain_dataset(8), max_steps=3, logging_steps=100)
    Poison(trainer, 3)
    with pytest.raises(NonFiniteError, match=r"Step 3: the loss \(loss\) is not finite\. There is no checkpoint"):
        trainer.train()


def test_a_model_saved_by_a_callback_is_checked(tmp_path):
    def keep(step, **kwargs):
        trainer.save_model(str(tmp_path / f"model-{step}"), _internal_call=True)

    trainer = tiny_trainer(tmp_path, "mae", max_steps=4, logging_steps=100, callbacks=[EachStep(keep)])
    Poison(trainer, 3)
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("model-*")) == ["model-1", "model-2"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_moves_nothing_and_leaves_no_trace(tmp_path, caplog, what):
    seen = {}

    look = EachStep(lambda step, model, **kwargs: seen.update({step: weights(model)}))
    trainer = tiny_trainer(tmp_path, "cl_mae", **SAVING, max_skipped_steps=1, logging_steps=2, callbacks=[look])
    Poison(trainer, 4, what)
    trainer.train()
    (message,) = warned(caplog)
    assert message.startswith("Step 4: ")
    assert message.endswith("Skipped this step, number 1 of at most 1.")
    assert_equal_weights(seen[4], seen[3])
    assert any(not torch.equal(seen[5][name], seen[4][name]) for name in seen[4])
    assert all(value.isfinite().all() for value in seen[8].values())
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
    assert 4 not in logged(trainer, "grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("family", "fields"), [("mae", {}), ("cmae", {"learned_masks": True})])
def test_a_window_of_skipped_steps_logs_what_is_known(tmp_path, family, fields, what):
    trainer = tiny_trainer(tmp_path, tiny_model(family, **fields), max_steps=4, max_skipped_steps=2, logging_steps=2)
    for step in (1, 2):
        Poison(trainer, step, "reconstruction_loss" if what == "loss" else what)
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert all(math.isfinite(value) for value in first.values())
    assert ("loss" in first) == ("reconstruction_loss" in first) == (what == "gradient")
    assert first.get("loss") != 0
    assert {"loss", "reconstruction_loss", "grad_norm"} <= second.keys()


@pytest.mark.slow
def test_nothing_piles_up_where_nothing_is_logged(tmp_path):
    trainer = tiny_trainer(tmp_path, "mae", max_steps=101, logging_strategy="no")
    Poison(trainer, 3)
    with pytest.raises(NonFiniteError, match="Step 3: "):
        trainer.train()
    assert trainer.state.global_step == 100


def test_one_step_too_many(tmp_path):
    trainer = tiny_trainer(tmp_path, "mae", max_steps=6, max_skipped_steps=2)
    for step in (2, 4, 5):
        Poison(trainer, step)
    with pytest.raises(NonFiniteError, match="Step 5: "):
        trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer.model).values())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_the_norm_of_the_gradient_is_logged_before_it_is_clipped(tmp_path, max_grad_norm):
    norms = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            norms[state.global_step + 1] = torch.stack(gradients).norm().item()

    model = tiny_model("mae")
    trainer = tiny_trainer(tmp_path, model, max_steps=2, max_grad_norm=max_grad_norm, callbacks=[Look()])
    trainer.train()
    values = logged(trainer, "grad_norm")
    assert values.keys() == norms.keys() == {1, 2}
    if max_grad_norm:
        assert all(norm <= max_grad_norm * 1.001 < values[step] for step, norm in norms.items())
    else:
        assert values == pytest.approx(norms, rel=1e-5)


def test_a_loss_scaler_may_not_skip_every_step(tmp_path):
    trainer = tiny_trainer(tmp_path, "mae", max_steps=100)
    for skipped in [True] * 49 + [False] + [True] * 49:
        trainer.accelerator = SimpleNamespace(scaler=object(), optimizer_step_was_skipped=skipped)
        trainer.finite.on_step_end(trainer.args, TrainerState(global_step=1), TrainerControl())
    with pytest.raises(NonFiniteError, match="Step 7: the gradient is not finite, as in the 49 steps before"):
        trainer.finite.on_step_end(trainer.args, TrainerState(global_step=7), TrainerControl())


@pytest.mark.slow
def test_nothing_is_drawn_of_a_model_that_is_nan(tmp_path):
    trainer = tiny_trainer(tmp_path, "mae", max_steps=4, logging_steps=4, picture_steps=1)
    Poison(trainer, 2)
    with pytest.raises(NonFiniteError, match="Step 2"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "pictures").glob("step-*")) == [
        "step-000000.png",
        "step-000001.png",
    ]
