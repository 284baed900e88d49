# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The loss, what stays frozen, the averaged weights; and that a run can be repeated."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTModel
from transformers.modeling_outputs import ImageClassifierOutput

from clmae.evaluation.finetuning import (
    ClassificationTrainer,
    FinetuningArguments,
    LinearLarsArguments,
    classifier_scores,
    load_classifier,
)
from clmae.training.finite import NonFiniteError
from clmae.training.integrity import checkpoints, run_lock, verify

from ...training.runs import EachStep
from .samples import PLAIN, STRONG, VIT, augmented, coloured_images


class Fixed(nn.Module):
    """Gives the same logits whatever the images."""

    config = None

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.logits[: len(pixel_values)])


def test_loss_is_the_cross_entropy_to_mixed_and_smoothed_targets(arguments):
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]])
    trainer = ClassificationTrainer(Fixed(logits), arguments(label_smoothing_factor=0.1), augmented(), num_classes=3)
    targets = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.4, 0.6]])
    inputs = {"pixel_values": torch.zeros(2, 3, 16, 16), "labels": targets}
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    smoothed = 0.9 * targets + 0.1 / 3  # once, and not once more by the Trainer
    reference = -(smoothed.double() * logits.double().log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=1e-6)
    classes = {**inputs, "labels": torch.tensor([0, 2])}
    plain = trainer.compute_loss(trainer.model.eval(), classes)
    torch.testing.assert_close(plain, F.cross_entropy(logits, classes["labels"]))


def train(model: nn.Module, args, **options) -> ClassificationTrainer:
    trainer = ClassificationTrainer(model, args, augmented(**STRONG), num_classes=3, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("kind", "fields"), [(FinetuningArguments, dict(trained_blocks=1)), (LinearLarsArguments, dict(learning_rate=5.0))]
)
def test_what_is_frozen_stays_bit_for_bit_and_in_evaluation_mode(saved, arguments, kind, fields):
    args = arguments(kind, **fields)
    model = load_classifier(saved, args, 3)
    before = copy.deepcopy(dict(model.named_parameters()))
    modes = []

    linear = kind is LinearLarsArguments
    frozen, trained = (model.encoder, model.classifier) if linear else model.vit.layers

    def watch(step, **kwargs):
        modes.append((frozen.training, any(part.training for part in frozen.modules()), trained.training))

    trainer = train(model, args, callbacks=[EachStep(watch)])
    assert modes == [(False, False, True)] * 3
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    # accelerate wraps the optimiser
    assert len(trainer.optimizer.state) == len(trained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FinetuningArguments, LinearLarsArguments])
def test_same_seed_same_weights_whatever_came_before(saved, arguments, kind):
    def weights(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        args = arguments(kind, seed=seed, learning_rate=1e-2)
        trainer = train(load_classifier(saved, args, 3), args)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    first = weights(1, noise=10)
    assert torch.equal(first, weights(1, noise=20))
    assert not torch.equal(first, weights(2, noise=10))


@pytest.mark.slow
def test_accumulated_batches_are_one_batch(tmp_path, arguments):
    # transformers' ViT takes the Trainer's loss arguments, by which the Trainer would leave a mean loss undivided.
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path)

    def gradients(**fields) -> torch.Tensor:
        plain = dict(max_steps=1, lr_scheduler_type="constant", warmup_steps=0, optim="sgd", learning_rate=1.0)
        args = arguments(**plain, **PLAIN, **fields)
        before = load_classifier(tmp_path, args, 3)
        trainer = train(copy.deepcopy(before), args)
        return before.classifier.weight - trainer.model.classifier.weight

    whole = gradients(per_device_train_batch_size=6)
    parts = gradients(per_device_train_batch_size=3, gradient_accumulation_steps=2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert whole.abs().max() > 1e-3


@pytest.mark.slow
def test_average_of_the_weights_is_what_is_judged_and_survives_a_resume(saved, arguments, tmp_path):
    decay, history = 0.7, []

    def watch(step, model, **kwargs):
        history.append(model.classifier.weight.detach().clone())

    args = arguments(ema_decay=decay, learning_rate=1e-2, max_steps=4, save_strategy="steps", save_steps=2)
    args.save_total_limit = None
    model = load_classifier(saved, args, 3)
    expected = model.classifier.weight.detach().clone()
    trainer = train(model, args, callbacks=[EachStep(watch)])
    for weight in history:
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(trainer.model.classifier.weight.detach(), expected)
    again = ClassificationTrainer(load_classifier(saved, args, 3), args, augmented(**STRONG), num_classes=3)
    again.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    for (name, value), (_, resumed) in zip(
        trainer.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(resumed, value, msg=name)
    plain = ClassificationTrainer(load_classifier(saved, args, 3), args, augmented(**STRONG), num_classes=3)
    with pytest.raises(ValueError, match="kept no average"):
        plain.train(resume_from_checkpoint=str(tmp_path))


WRONG_SAMPLES = {
    r"a tuple of \(Image, int\)": [(Image.new("RGB", (16, 16)), 0)] * 4,
    "a dict with 'image', 'label'": coloured_images(4),
    r"`pixel_values` of torch\.uint8": [(torch.zeros(3, 16, 16, dtype=torch.uint8), 0)] * 4,
}


@pytest.mark.parametrize("sample", WRONG_SAMPLES)
def test_images_that_are_no_pixels_are_refused_at_once(saved, arguments, sample):
    model, wrong = load_classifier(saved, arguments(), 3), WRONG_SAMPLES[sample]
    with pytest.raises(ValueError, match=r"`train_dataset` is a (list|Dataset).*`AugmentedImages\("):
        ClassificationTrainer(model, arguments(), wrong, num_classes=3)
    with pytest.raises(ValueError, match=rf"`eval_dataset` gives {sample}.*`LabelledImages\("):
        ClassificationTrainer(model, arguments(), augmented(), wrong, num_classes=3)


def test_empty_evaluation_data_are_refused_and_small_training_data_too(saved, arguments):
    model = load_classifier(saved, arguments(), 3)
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        ClassificationTrainer(model, arguments(), augmented(), [], num_classes=3)
    with pytest.raises(ValueError, match="batches of 16 images in all, but the training set has 6"):
        ClassificationTrainer(model, arguments(dataloader_drop_last=True), augmented(), num_classes=3)


def test_a_folder_in_use_is_refused_and_tokens_are_not_saved(saved, arguments):
    args = arguments(save_strategy="steps", save_steps=3, hub_token="hf_do_not_tell")
    trainer = ClassificationTrainer(load_classifier(saved, args, 3), args, augmented(), num_classes=3)
    with run_lock(args.output_dir), pytest.raises(ValueError, match=r"`output_dir` .* is in use"):
        trainer.train()
    trainer.train()
    trainer.save_model()
    files = [path for path in Path(args.output_dir).rglob("*") if path.is_file()]
    assert "training_args.bin" in {path.name for path in files}
    assert [path for path in files if b"hf_do_not_tell" in path.read_bytes()] == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(saved, arguments, what):
    args = arguments(max_steps=6, per_device_train_batch_size=3, save_strategy="steps", save_steps=2, logging_steps=50)
    model = load_classifier(saved, args, 3)

    def poison(module, inputs, outputs):
        if module.training and trainer.state.global_step == 4:
            factor = module.classifier.weight.flatten()[0] * 0
            outputs.logits = outputs.logits + (torch.sqrt(factor.abs()) if what == "gradient" else math.nan)

    model.register_forward_hook(poison)
    trainer = ClassificationTrainer(model, args, augmented(**STRONG), num_classes=3)
    named = {"loss": r"the loss \(loss\)", "gradient": "the gradient"}[what]
    message = rf"Step 5: {named} is not finite\. Its images, .*: \[\d, \d, \d\]\. The last .* checkpoint-4\. Take"
    with pytest.raises(NonFiniteError, match=message) as error:
        trainer.train()
    assert "max_skipped_steps" not in str(error.value)  # no option of this trainer
    assert [path.name for path in checkpoints(args.output_dir)] == ["checkpoint-4"]
    assert verify(checkpoints(args.output_dir)[0]) == []


def test_scores_by_hand():
    predicted = torch.tensor([[0, 1], [0, 2], [1, 0], [2, 1]])
    scores = classifier_scores(predicted, torch.tensor([0, 0, 0, 2]), 3)
    assert scores.accuracies["top-1"] == 0.75
    assert scores.accuracies["mean per class"] == pytest.approx((2 / 3 + 1) / 2)
    assert "top-5" not in scores.accuracies
    assert all(low <= scores.accuracies[name] <= high for name, (low, high) in scores.intervals.items())
    five = torch.arange(5).expand(2, -1)
    assert classifier_scores(five, torch.tensor([4, 5]), 6).accuracies["top-5"] == 0.5
