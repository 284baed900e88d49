# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`CurriculumTrainer`: optimiser, curriculum, logged terms, evaluation, difficulty, update interval, data, saving."""

from __future__ import annotations

import itertools
import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    default_data_collator,
)

from clmae.training import CurriculumTrainer, PretrainingArguments, curriculum_factor
from clmae.training.base import EpochSampler
from clmae.training.data import ImageDataset, make_image_processor
from clmae.training.flops import step_flops

from .runs import (
    CONFIG,
    VARIANTS,
    EachStep,
    assert_equal_weights,
    image_dataset,
    logged,
    pil_dataset,
    plain_dataset,
    streaming_dataset,
    tiny_model,
    tiny_trainer,
    warned,
    weights,
)

TERMS = ("reconstruction_loss", "soft_reconstruction_loss", "gauss_loss", "kl_loss", "diversity_loss")
STATISTICS = ("keep_mean", "keep_std", "keep_low", "keep_high", "keep_spread")


def vit_mae() -> ViTMAEForPreTraining:
    """transformers' own autoencoder, as tiny as ours."""
    torch.manual_seed(0)
    return ViTMAEForPreTraining(ViTMAEConfig(**CONFIG, norm_pix_loss=True))


class Recorder:
    """What a model was called with in training, and what it returned."""

    def __init__(self, model):
        self.inputs, self.outputs = [], []
        model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, model, args, kwargs, outputs):
        if model.training:
            self.inputs.append(kwargs)
            self.outputs.append(outputs)


# -- order of the images --------------------------------------------------------------------------------------------


def test_order_of_an_epoch_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(50, seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global generator has no part in it
        keys = list(sampler)
        assert len(sampler) == 50
        assert sorted(keys) == list(range(50 * epoch, 50 * epoch + 50))
        return tuple(key - 50 * epoch for key in keys)

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert all(orders[key] == order(*key) for key in orders)
    assert len({*orders.values(), tuple(range(50))}) == 5


def test_epochs_show_the_same_images_in_new_orders_with_new_crops(tmp_path):
    keys = []

    class Spied(ImageDataset):
        def __getitem__(self, key):
            keys.append(key)
            return super().__getitem__(key)

    dataset = image_dataset(8)
    dataset.__class__ = Spied
    tiny_trainer(tmp_path, "mae", train_dataset=dataset, num_train_epochs=3).train()
    epochs = [keys[8 * e : 8 * e + 8] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8 * e, 8 * e + 8)) for e in range(3)]
    assert len({tuple(key % 8 for key in epoch) for epoch in epochs}) == 3


# -- optimiser ------------------------------------------------------------------------------------------------------


def optimiser_names(trainer):
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]


@pytest.mark.parametrize("family", ["mae", "cl_mae"])
def test_parameter_groups(tmp_path, family):
    trainer = tiny_trainer(tmp_path, family, learning_rate=0.5, masker_learning_rate_multiplier=3.0, weight_decay=0.25)
    trainer.create_optimizer()
    assert trainer.has_masking_module is (family == "cl_mae")
    groups = optimiser_names(trainer)
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sorted(name for names in groups for name in names) == sorted(trainable)
    for group, names in zip(trainer.optimizer.param_groups, groups, strict=True):
        maskers = {name.startswith("masking_module.") for name in names}
        decayed = {trainable[name].ndim > 1 for name in names}
        assert len(maskers) == len(decayed) == 1  # no group is mixed
        assert group["lr"] == (1.5 if maskers.pop() else 0.5)
        assert group["weight_decay"] == (0.25 if decayed.pop() else 0)
        assert group["betas"] == (0.9, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "masker_schedule"),
    [
        ("cosine", [0.5, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(5))]),
        ("constant", [1.0] * 6),
        ("constant_with_warmup", [0.5, *[1.0] * 5]),
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
    ],
)
def test_schedules_of_autoencoder_and_masking_module(tmp_path, kind, masker_schedule):
    rates = []

    def record(step, optimizer, **kwargs):
        rates.append(
            {name: group["lr"] for group, names in zip(optimizer.param_groups, groups, strict=True) for name in names}
        )

    trainer = tiny_trainer(
        tmp_path,
        masker_learning_rate_multiplier=0.5,
        masker_lr_scheduler_type=kind,
        max_steps=6,
        warmup_steps=2,
        callbacks=[EachStep(record)],
    )
    trainer.create_optimizer()
    groups = optimiser_names(trainer)
    trainer.train()
    schedule = [rate["vit.layernorm.weight"] for rate in rates]
    # After step k, the rate of the next: 1/2, then the cosine over the 4 steps that are left.
    expected = [5e-4, *(1e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5))]
    assert schedule == pytest.approx(expected)
    for rate, base, factor in zip(rates, schedule, masker_schedule, strict=True):
        for name, value in rate.items():
            assert value == pytest.approx(0.5e-3 * factor if name.startswith("masking_module.") else base)


def test_masking_modules_first_rate_is_its_own_schedules(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=6, warmup_steps=2)
    trainer.create_optimizer_and_scheduler(6)
    rates = {group.get("masking_module", False): group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {False: 0.0, True: 1e-3}  # the autoencoder warms up, the masking module does not
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0


def test_a_schedule_that_is_no_function_of_the_step_is_refused(tmp_path):
    options = dict(max_steps=2, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    with pytest.raises(ValueError, match=r"`lr_scheduler_type` is 'reduce_lr_on_plateau', .* such as cosine"):
        tiny_trainer(tmp_path, **options)
    tiny_trainer(tmp_path, "mae", **options).train()


def test_given_optimisers_and_schedulers_are_left_alone(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    options = dict(masker_learning_rate_multiplier=3.0, max_steps=1)
    trainer = tiny_trainer(tmp_path, model, optimizers=(optimizer, scheduler), **options)
    trainer.train()
    assert trainer.create_optimizer() is trainer.optimizer
    assert len(optimizer.param_groups) == 1
    assert trainer.lr_scheduler is scheduler
    assert not logged(trainer, "masker_learning_rate")


# -- curriculum -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_curriculum_factor_reaches_the_model(tmp_path, accumulation):
    model = tiny_model(curriculum_shape="cosine", curriculum_start=0.5)
    recorder = Recorder(model)
    tiny_trainer(tmp_path, model, max_steps=5, gradient_accumulation_steps=accumulation).train()
    factors = [inputs["curriculum_factor"] for inputs in recorder.inputs]
    assert all(isinstance(f, torch.Tensor) and f.shape == () and f.dtype == torch.float32 for f in factors)
    expected = [curriculum_factor(step, 5, "cosine", 0.5, -1.0) for step in range(5) for _ in range(accumulation)]
    assert [f.item() for f in factors] == pytest.approx(expected, abs=1e-7)
    assert (factors[0].item(), factors[-1].item()) == (0.5, -1.0)


# -- logged terms ---------------------------------------------------------------------------------------------------


def test_logged_terms_are_the_means_over_micro_batches(tmp_path):
    model = tiny_model()
    recorder = Recorder(model)
    trainer = tiny_trainer(tmp_path, model, max_steps=6, gradient_accumulation_steps=2, logging_steps=3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    assert len(recorder.outputs) == 12
    for entry, outputs in zip(entries, (recorder.outputs[:6], recorder.outputs[6:]), strict=True):
        for name in ("loss", *TERMS):
            expected = sum(output[name].item() for output in outputs) / 6
            assert entry[name] == pytest.approx(expected, rel=1e-5, abs=1e-6), name
        # Of each step's whole batch, accumulated from two: a spread does not average over parts.
        keep = (
            torch.stack([output.keep_probabilities.detach() for output in outputs]).unflatten(0, (3, 2)).flatten(1, 2)
        )
        assert entry["keep_mean"] == pytest.approx(keep.mean().item(), rel=1e-5)
        assert entry["keep_std"] == pytest.approx(keep.flatten(1).std(1, correction=0).mean().item(), rel=1e-4)
        assert entry["keep_spread"] == pytest.approx(keep.std(1, correction=0).mean().item(), rel=1e-4)
        assert (entry["keep_low"], entry["keep_high"]) == ((keep < 0.1).float().mean(), (keep > 0.9).float().mean())
    assert entries[0]["curriculum_factor"] == pytest.approx((1 + 0.6 + 0.2) / 3)
    assert entries[1]["curriculum_factor"] == pytest.approx((-0.2 - 0.6 - 1) / 3)


def test_loss_is_composed_of_the_logged_terms(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.train()
    config = trainer.model.config
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        assert {*TERMS, *STATISTICS, "curriculum_factor", "learning_rate"} <= entry.keys()
        total = (
            entry["reconstruction_loss"]
            + entry["curriculum_factor"] * entry["soft_reconstruction_loss"]
            + config.gauss_loss_weight * entry["gauss_loss"]
            + config.kl_loss_weight * entry["kl_loss"]
            + config.diversity_loss_weight * entry["diversity_loss"]
        )
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_mae_gets_no_curriculum_and_logs_its_reconstruction_loss_alone(tmp_path):
    model = tiny_model("mae")
    recorder = Recorder(model)
    trainer = tiny_trainer(tmp_path, model, max_steps=2, difficulty_steps=1)
    trainer.train()
    assert [set(inputs) for inputs in recorder.inputs] == [{"pixel_values", "noise"}] * 2
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        assert entry["reconstruction_loss"] == pytest.approx(entry["loss"], rel=1e-4)
        assert not entry.keys() & {*TERMS[1:], *STATISTICS, "curriculum_factor"}
    assert not logged(trainer, "mask_difficulty")


@pytest.mark.slow
def test_a_second_run_logs_nothing_of_the_first(tmp_path):
    model = tiny_model()
    recorder = Recorder(model)
    # Step 3 is after the last log of the first run.
    trainer = tiny_trainer(tmp_path, model, max_steps=3, logging_steps=2)
    trainer.train()
    del recorder.outputs[:]
    trainer.train()
    expected = sum(output.reconstruction_loss.item() for output in recorder.outputs[:2]) / 2
    assert logged(trainer, "reconstruction_loss")[2] == pytest.approx(expected, rel=1e-5)


# -- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruction_loss(model, samples, **kwargs):
    """L_rec of samples, in one batch."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return model.eval()(**batch, **kwargs).reconstruction_loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("family", VARIANTS)
def test_evaluation_is_the_loss_under_the_datasets_noise(tmp_path, family):
    dataset = image_dataset(10, train=False)
    trainer = tiny_trainer(tmp_path, family, eval_dataset=dataset, max_steps=2, logging_steps=100)
    trainer.train()
    masking = {"masking": "random"} if trainer.has_masking_module else {}
    samples = [dataset[i] for i in range(10)]
    expected = reconstruction_loss(trainer.model, samples, **masking)
    # Far enough from what leaving out the last, partial batch would give, or training's masks.
    assert abs(reconstruction_loss(trainer.model, samples[:8], **masking) - expected) > 1e-4
    if family == "cl_mae":
        assert abs(reconstruction_loss(trainer.model, samples) - expected) > 1e-4
    first, second = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
    assert first == pytest.approx(expected, rel=1e-5)
    assert second == first
    assert trainer.args.dataloader_drop_last


def test_evaluation_does_not_depend_on_the_step(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=plain_dataset(6))
    first = trainer.evaluate()["eval_loss"]
    trainer.state.global_step = 17
    assert trainer.evaluate()["eval_loss"] == first


@pytest.mark.slow
@pytest.mark.parametrize("data", [image_dataset, plain_dataset])
def test_evaluation_and_pictures_leave_the_training_as_it_is(tmp_path, data):
    # Into a second epoch, whose order of plain data comes from the global generator.
    run = dict(train_dataset=data(), max_steps=6)
    bare = tiny_trainer(tmp_path / "bare", **run)
    bare.train()
    options = dict(eval_strategy="steps", eval_steps=1, difficulty_steps=1, picture_steps=3)
    busy = tiny_trainer(tmp_path / "busy", **run, **options, dataloader_num_workers=1)
    busy.train()
    assert_equal_weights(weights(busy.model), weights(bare.model))
    assert logged(busy, "loss") == logged(bare, "loss")


# -- mask difficulty ------------------------------------------------------------------------------------------------


def test_mask_difficulty_by_hand(tmp_path):
    dataset = image_dataset(6, train=False)
    options = dict(max_steps=7, logging_steps=2, difficulty_steps=3, num_probe_images=5)
    trainer = tiny_trainer(tmp_path, eval_dataset=dataset, **options)
    initial = tiny_model()
    for training in (True, False):
        trainer.model.train(training)
        trainer.measure_difficulty()
        assert trainer.model.training is training
    trainer.train()
    samples = [dataset[i] for i in range(5)]
    difficulty = logged(trainer, "mask_difficulty")
    assert list(difficulty) == [0, 3, 6, 7]
    assert list(logged(trainer, "loss")) == list(logged(trainer, "reconstruction_loss")) == [2, 4, 6]  # none is lost
    for step, model in ((0, initial), (7, trainer.model)):
        expected = reconstruction_loss(model, samples) / reconstruction_loss(model, samples, masking="random")
        assert difficulty[step] == pytest.approx(expected, rel=1e-5)
        assert expected != pytest.approx(1, abs=1e-3)


def test_evaluation_reports_the_difficulty_of_all_images(tmp_path):
    dataset = image_dataset(6, train=False)  # batches of 4 and 2
    trainer = tiny_trainer(tmp_path, eval_dataset=dataset, num_probe_images=2, max_steps=2, eval_strategy="epoch")
    samples = [dataset[i] for i in range(6)]
    losses = [reconstruction_loss(trainer.model, samples, masking=masking) for masking in ("learned", "random")]
    metrics = trainer.evaluate()
    assert metrics["eval_mask_difficulty"] == pytest.approx(losses[0] / losses[1], rel=1e-5)
    assert metrics["eval_mask_difficulty"] != pytest.approx(trainer.measure_difficulty(), abs=1e-4)
    assert metrics["eval_loss"] == pytest.approx(losses[1], rel=1e-5)
    assert trainer.evaluate(metric_key_prefix="other")["other_mask_difficulty"] == metrics["eval_mask_difficulty"]
    assert "test_mask_difficulty" in trainer.predict(dataset).metrics
    trainer.train()
    assert logged(trainer, "eval_mask_difficulty").keys() == {2}


def astray(**fields):
    """A model whose masks are alike, saturated and far from the mask ratio, and stay so."""
    model = tiny_model(**fields)
    with torch.no_grad():
        model.masking_module.head.weight.zero_()
        model.masking_module.head.bias.fill_(6.0)
    return model


ASTRAY = ["collapsed", "saturated", "left the mask ratio"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "logging", "batch_size", "first", "kinds"),
    [
        (53, 1, 8, 51, ASTRAY),
        (80, 20, 8, 60, ASTRAY),
        (101, "no", 8, 100, ASTRAY),  # where nothing is logged, every hundred steps: nothing may pile up
        (52, 1, 7, 51, ASTRAY[1:]),  # too few images to compare
    ],
)
def test_masks_that_go_astray_are_reported_once_and_early(tmp_path, caplog, steps, logging, batch_size, first, kinds):
    options = {"logging_strategy": "no"} if logging == "no" else {"logging_steps": logging}
    options |= dict(per_device_train_batch_size=batch_size, masker_learning_rate_multiplier=0.0)
    tiny_trainer(tmp_path, astray(), max_steps=steps, **options).train()
    messages = [message for message in warned(caplog) if message.startswith("Step")]
    assert [message.split(":")[0] for message in messages] == [f"Step {first}"] * len(kinds)
    assert all(kind in message for kind, message in zip(kinds, messages, strict=True))


@pytest.mark.slow
def test_healthy_masks_give_no_warning(tmp_path, caplog):
    model = tiny_model(mask_ratio=0.3)  # which is about what the masks below have
    with torch.no_grad():  # masks that differ from image to image
        model.masking_module.head.weight.mul_(9)
        model.masking_module.head.bias.fill_(-2.5)
    options = dict(per_device_train_batch_size=8, learning_rate=1e-6, masker_learning_rate_multiplier=0.0)
    tiny_trainer(tmp_path, model, max_steps=70, logging_steps=70, **options).train()
    assert warned(caplog) == []


def test_without_evaluation_data_nothing_is_measured_or_drawn(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=None, max_steps=2, difficulty_steps=1, picture_steps=1)
    trainer.train()
    assert not logged(trainer, "mask_difficulty")
    assert not (tmp_path / "pictures").exists()


# -- two views --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("learned_masks", [False, True])
def test_cmae_logs_its_tasks(tmp_path, learned_masks):
    model = tiny_model("cmae", learned_masks=learned_masks)
    recorder = Recorder(model)
    trainer = tiny_trainer(tmp_path, model, max_steps=2, difficulty_steps=1, picture_steps=2)
    trainer.train()
    for step, (inputs, outputs) in enumerate(zip(recorder.inputs, recorder.outputs, strict=True)):
        assert inputs["pixel_values"].shape == (4, 2, 3, 16, 16)
        assert inputs["noise"].shape == (4, 2, 16)
        assert not torch.equal(inputs["noise"][:, 0], inputs["noise"][:, 1])
        assert not torch.equal(inputs["pixel_values"][:, 0], inputs["pixel_values"][:, 1])
        for name in ("contrastive_loss", "position_loss", "position_accuracy"):
            assert logged(trainer, name)[step + 1] == pytest.approx(outputs[name].item(), rel=1e-5)
    assert trainer.has_masking_module is learned_masks
    steps = [entry["step"] for entry in trainer.state.log_history if "mask_difficulty" in entry]
    assert steps == ([0, 1, 2] if learned_masks else [])  # once where the last step is a multiple
    assert ("curriculum_factor" in recorder.inputs[0]) is learned_masks
    assert (tmp_path / "pictures" / "step-000002.png").is_file()


def test_views_without_noise_are_masked_each_for_itself(tmp_path):
    model = tiny_model("cmae")
    recorder = Recorder(model)
    data = [{"pixel_values": torch.stack([sample["pixel_values"]] * 2)} for sample in plain_dataset(8)]
    tiny_trainer(tmp_path, model, train_dataset=data, max_steps=2).train()
    noise = [inputs["noise"] for inputs in recorder.inputs]
    assert {tuple(n.shape) for n in noise} == {(4, 2, 16)}
    assert len(torch.cat(noise).flatten(0, 1).unique(dim=0)) == 16


def test_one_view_where_two_are_contrasted(tmp_path):
    trainer = tiny_trainer(tmp_path, "cmae", train_dataset=image_dataset(), max_steps=1)
    with pytest.raises(ValueError, match=r"`pixel_values` has 1 view\(s\) of each image, but two are contrasted"):
        trainer.train()


# -- update interval ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_between_its_updates_the_masking_module_does_not_move(tmp_path, optim):
    model = tiny_model()
    snapshots = [weights(model)]
    trainer = tiny_trainer(
        tmp_path,
        model,
        max_steps=6,
        masker_update_interval=2,
        optim=optim,
        weight_decay=0.5,
        callbacks=[EachStep(lambda step, **kwargs: snapshots.append(weights(model)))],
    )
    trainer.train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    masker = {name for name in trainable if name.startswith("masking_module.")}
    assert len(snapshots) == 7
    for step, (before, after) in enumerate(itertools.pairwise(snapshots)):
        moved = {name for name in trainable if not torch.equal(before[name], after[name])}
        assert moved == (trainable if step % 2 == 0 else trainable - masker), step


def test_terms_are_logged_as_means_over_the_steps_that_computed_them(tmp_path):
    model = tiny_model()
    recorder = Recorder(model)
    trainer = tiny_trainer(tmp_path, model, max_steps=4, masker_update_interval=2, logging_steps=4)
    trainer.train()
    assert [output.gauss_loss is not None for output in recorder.outputs] == [True, False, True, False]
    for name in TERMS:
        values = [output[name].item() for output in recorder.outputs if output.get(name) is not None]
        assert logged(trainer, name)[4] == pytest.approx(sum(values) / len(values), rel=1e-5)


# -- models, data, precision ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_model", "plain"),
    [(lambda: tiny_model("mae"), True), (tiny_model, False), (tiny_model, True), (vit_mae, False)],
    ids=["mae-plain", "cl_mae-images", "cl_mae-plain", "vit-images"],
)
def test_families_train(tmp_path, make_model, plain):
    model = make_model()
    before = weights(model)
    recorder = Recorder(model)
    data = plain_dataset() if plain else image_dataset()
    trainer = tiny_trainer(
        tmp_path, model, train_dataset=data, eval_dataset=plain_dataset(6), max_steps=6, picture_steps=6
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in before if not torch.equal(before[name], model.state_dict()[name])} == trainable
    assert all(output.mask.mean() == 0.75 for output in recorder.outputs)
    assert (tmp_path / "pictures" / "step-000006.png").is_file()


@pytest.mark.slow
def test_masks_of_data_without_noise_are_new_each_batch_and_the_same_each_run(tmp_path):
    def run(seed):
        model = tiny_model("mae")
        recorder = Recorder(model)
        torch.manual_seed(seed)  # the global generator has no part in the masks
        options = dict(max_steps=3, gradient_accumulation_steps=2, data_seed=seed % 2)
        tiny_trainer(tmp_path, model, train_dataset=plain_dataset(), **options).train()
        return torch.stack([inputs["noise"] for inputs in recorder.inputs]), weights(model)

    noise, final = run(0)
    assert noise.shape == (6, 4, 16)
    assert len(noise.flatten().unique()) == noise.numel()
    assert noise.min() >= 0
    assert noise.max() < 1
    again, final_again = run(0)
    assert torch.equal(noise, again)
    assert_equal_weights(final_again, final)
    assert torch.equal(run(2)[0], noise)
    assert not torch.equal(run(1)[0], noise)


def test_processes_have_masks_of_their_own(tmp_path, monkeypatch):
    # All processes share one seed: without the rank in the key, their masks would be equal.
    noises = []
    for rank in (0, 1):
        trainer = tiny_trainer(tmp_path, "mae")
        monkeypatch.setattr(type(trainer.args), "process_index", rank)
        monkeypatch.setattr(type(trainer.args), "world_size", 2)
        batch = {"pixel_values": torch.zeros(4, 3, 16, 16)}
        noises += [trainer._complete_inputs(dict(batch), training=True)["noise"] for _ in range(2)]
        monkeypatch.undo()
    assert len(torch.stack(noises).unique()) == 4 * 4 * 16


def test_dataset_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`per_device_train_batch_size` asks for batches of 8 .* has 7: take a smal"):
        tiny_trainer(tmp_path, train_dataset=image_dataset(7), per_device_train_batch_size=8)
    options = dict(per_device_train_batch_size=8, dataloader_drop_last=False, num_train_epochs=1)
    trainer = tiny_trainer(tmp_path, train_dataset=image_dataset(7), **options)
    trainer.train()
    assert trainer.state.global_step == 1


def pil_samples(count: int = 8) -> list[Image.Image]:
    return [row["image"] for row in pil_dataset(count)]


WRONG_SAMPLES = {
    r"a tuple of \(\w*Image\w*, int\)": [(image, 0) for image in pil_samples()],
    "a dict with 'image'": pil_dataset(8),
    r"a \w*Image\w*": pil_samples(),
    r"`pixel_values` of torch\.uint8": [{"pixel_values": torch.zeros(3, 16, 16, dtype=torch.uint8)}] * 8,
    r"`pixel_values` that are a \w*Image\w*": [{"pixel_values": image} for image in pil_samples()],
    r"a tuple of \(Tensor, int\)": [(sample["pixel_values"], 0) for sample in plain_dataset(8)],
    "a dict with 'image',": pil_dataset(8).to_iterable_dataset(),
}


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("came", WRONG_SAMPLES)
def test_samples_that_are_no_pixels_are_refused_at_once(tmp_path, came, name):
    with pytest.raises(ValueError, match=rf"`{name}` gives {came}.*`ImageDataset\("):
        tiny_trainer(tmp_path, "mae", max_steps=1, **{name: WRONG_SAMPLES[came]})


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    "empty", [[], pil_dataset(1).select([]), pil_dataset(1).to_iterable_dataset().take(0)], ids=repr
)
def test_empty_datasets_are_refused_at_once(tmp_path, empty, name):
    with pytest.raises(ValueError, match=f"`{name}` is empty"):
        tiny_trainer(tmp_path, "mae", max_steps=1, dataloader_drop_last=False, **{name: empty})


@pytest.mark.slow
def test_an_own_collator_makes_pixels_of_what_it_likes(tmp_path):
    def collate(images):
        return {"pixel_values": torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])}

    own = dict(train_dataset=pil_samples(), eval_dataset=pil_samples(), data_collator=collate)
    tiny_trainer(tmp_path, tiny_model("mae", image_size=20), max_steps=1, picture_steps=1, **own).train()


@pytest.mark.slow
def test_bf16(tmp_path):
    model = tiny_model()
    recorder = Recorder(model)
    trainer = tiny_trainer(tmp_path, model, max_steps=3, bf16=True, difficulty_steps=1, picture_steps=3)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss").values())
    assert all(math.isfinite(value) for value in logged(trainer, "mask_difficulty").values())
    # Autocast was on (accelerate gives the outputs back in float32), and the weights stayed in float32.
    logits = recorder.outputs[0].logits
    assert torch.equal(logits, logits.bfloat16().float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cl_mae", "cmae", "cmae-error"])  # of which the others have parts
def test_torch_compile(tmp_path, family):
    torch._dynamo.reset()
    options = dict(torch_compile=True, torch_compile_backend="eager", max_steps=3)
    # The curriculum's factor changes at each step, and must not compile the model anew.
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer = tiny_trainer(tmp_path / "compiled", family, **options)
        trainer.train()
    plain = tiny_trainer(tmp_path / "plain", family, max_steps=3)
    plain.train()
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)
    assert set(trainer.model.state_dict()) == set(plain.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "data"), [("cl_mae", "stream"), ("cmae", "map")])
def test_batches_are_normalised_on_the_device_as_samples_would_be(tmp_path, family, data):
    views = 2 if family == "cmae" else 1
    found = {}
    for collator in (None, default_data_collator):
        model = tiny_model(family)
        recorder, bytes_seen = Recorder(model), set()
        dataset = streaming_dataset(16, num_views=views) if data == "stream" else image_dataset(num_views=views)
        trainer = tiny_trainer(tmp_path, model, train_dataset=dataset, data_collator=collator, max_steps=5)
        prepare = trainer._prepare_inputs
        trainer._prepare_inputs = lambda inputs, prepare=prepare, seen=bytes_seen: (
            seen.update((name, values.dtype) for name, values in inputs.items()) or prepare(inputs)
        )
        trainer.train()
        assert trainer.train_dataset is dataset
        found[collator] = [inputs["pixel_values"] for inputs in recorder.inputs], weights(model)
        name, dtype = ("pixel_values", torch.uint8 if collator is None else torch.float32)
        assert {(name, dtype), ("noise", torch.float32)} <= bytes_seen
    (ours, our_weights), (plain, plain_weights) = found.values()
    assert ours[0].shape == ((4, 2, 3, 16, 16) if views == 2 else (4, 3, 16, 16))
    for pixel_values, expected in zip(ours, plain, strict=True):
        assert torch.equal(pixel_values, expected)
    assert_equal_weights(our_weights, plain_weights)


def test_a_subclass_keeps_its_own_samples(tmp_path):
    class Inverted(ImageDataset):
        def __getitem__(self, key):
            sample = super().__getitem__(key)
            return {**sample, "pixel_values": -sample["pixel_values"]}

    dataset = image_dataset(4)
    expected = -torch.stack([dataset[key]["pixel_values"] for key in range(4)])
    dataset.__class__ = Inverted
    model = tiny_model()
    recorder = Recorder(model)
    tiny_trainer(tmp_path, model, train_dataset=dataset, max_steps=1).train()
    seen = recorder.inputs[0]["pixel_values"]
    assert {image.sum().item() for image in seen} == {image.sum().item() for image in expected}


@pytest.mark.slow
def test_a_dataset_that_is_changed_or_replaced_is_seen_as_it_is(tmp_path):
    model = tiny_model()
    recorder = Recorder(model)
    trainer = tiny_trainer(tmp_path, model, max_steps=6)

    def change(step, **kwargs):
        if step == 4:
            trainer.train_dataset.mean, trainer.train_dataset.std = [0.0] * 3, [1.0] * 3

    trainer.add_callback(EachStep(change))
    trainer.train()
    lowest = [inputs["pixel_values"].min().item() for inputs in recorder.inputs]
    assert max(lowest[:4]) < -0.5
    assert min(lowest[4:]) >= 0
    recorder.inputs.clear()
    trainer.train_dataset = torch.utils.data.Subset(image_dataset(), range(8))
    trainer.train()
    assert len(recorder.inputs) == 6
    assert min(inputs["pixel_values"].min() for inputs in recorder.inputs) < -0.5


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"remove_unused_columns": True}, {"include_num_input_tokens_seen": "all"}], ids=str)
def test_what_looks_at_batches_as_they_are_loaded(tmp_path, fields):
    trainer = tiny_trainer(tmp_path, max_steps=1, **fields)
    assert next(iter(trainer.get_train_dataloader())).keys() >= {"pixel_values"}
    trainer.train()
    if "include_num_input_tokens_seen" in fields:
        assert trainer.state.num_input_tokens_seen == 4 * 3 * 16 * 16


@pytest.mark.slow
def test_the_count_of_flops_is_that_of_the_steps(tmp_path):
    def collate(samples):  # which may add what the model takes
        return {"interpolate_pos_encoding": None, **default_data_collator(samples)}

    for options in ({}, {"data_collator": collate}):
        trainer = tiny_trainer(
            tmp_path, max_steps=2, gradient_accumulation_steps=2, masker_update_interval=2, **options
        )
        trainer.train()
        expected = 2 * step_flops(trainer.model.config, 2 * 4, 2)
        assert trainer.state.total_flos == pytest.approx(expected, rel=1e-6)
    trainer = tiny_trainer(tmp_path, vit_mae(), max_steps=1)
    trainer.train()
    assert trainer.state.total_flos > 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_streams_train(tmp_path, workers):
    model = tiny_model()
    recorder = Recorder(model)
    trainer = tiny_trainer(
        tmp_path, model, train_dataset=streaming_dataset(16), max_steps=6, dataloader_num_workers=workers
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss").values())
    # The second pass, from step 5 on, shows other views of the images.
    batches = torch.stack([inputs["pixel_values"] for inputs in recorder.inputs])
    assert len({tuple(image.flatten().tolist()) for image in batches.flatten(0, 1)}) == 24


def test_evaluation_streams_are_evaluated_and_probed(tmp_path):
    stream = streaming_dataset(6, train=False)
    samples = list(stream)
    trainer = tiny_trainer(tmp_path, eval_dataset=stream, num_probe_images=3, max_steps=1, difficulty_steps=1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        reconstruction_loss(trainer.model, samples, masking="random"), rel=1e-5
    )
    assert torch.equal(trainer.held_out_batch()["pixel_values"], torch.stack([s["pixel_values"] for s in samples[:3]]))
    trainer.train()
    assert list(logged(trainer, "mask_difficulty")) == [0, 1]


def test_held_out_batch_of_a_datasets_stream(tmp_path):
    rows = [{"pixel_values": sample["pixel_values"].tolist()} for sample in plain_dataset(4)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset().with_format("torch")
    trainer = tiny_trainer(tmp_path, eval_dataset=stream, num_probe_images=3)
    batch = trainer.held_out_batch()
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["noise"].shape == (3, 16)
    assert trainer.held_out_batch() is batch


def test_held_out_batch_is_the_first_images_with_their_noise(tmp_path):
    dataset = image_dataset(6, train=False)
    batch = tiny_trainer(tmp_path, eval_dataset=dataset, num_probe_images=4).held_out_batch()
    for name in ("pixel_values", "noise"):
        assert torch.equal(batch[name], torch.stack([dataset[i][name] for i in range(4)]))
    batch = tiny_trainer(tmp_path, eval_dataset=dataset, num_probe_images=64).held_out_batch()
    assert len(batch["pixel_values"]) == 6


# -- resuming -------------------------------------------------------------------------------------------------------

EPOCHS, STEPS_AN_EPOCH = 3, 4
BUSY = dict(num_train_epochs=EPOCHS, difficulty_steps=5, eval_strategy="steps", eval_steps=3)
ACCUMULATION = {1: dict(), 2: dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)}


def history(trainer):
    """Everything logged that is no measurement of time."""
    timed = ("runtime", "per_second", "total_flos", "train_loss")
    return [{k: v for k, v in e.items() if not k.endswith(timed)} for e in trainer.state.log_history]


def stop_workers(trainer):
    """Persistent workers that are left to the garbage collector take seconds to go."""
    handler = trainer.callback_handler
    for loader in (handler.train_dataloader, handler.eval_dataloader):
        if getattr(loader, "_iterator", None) is not None:
            loader._iterator._shutdown_workers()


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Uninterrupted runs with a checkpoint every second step: `(folder, trainer)` by family and accumulation."""
    torch.set_num_threads(1)
    runs = {}

    def get(family, accumulation):
        key = family, accumulation
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole")
            saving = dict(save_strategy="steps", save_steps=2, save_total_limit=None)
            trainer = tiny_trainer(folder, family, **BUSY, **ACCUMULATION[accumulation], **saving)
            trainer.train()
            assert trainer.state.global_step == EPOCHS * STEPS_AN_EPOCH
            runs[key] = folder, trainer
        return runs[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "step", "workers", "persistent", "accumulation"),
    [
        ("cl_mae", 2, 0, False, 1),  # within the first epoch
        ("cl_mae", 4, 0, False, 1),  # between two epochs
        ("cl_mae", 6, 0, False, 1),
        ("cl_mae", 6, 2, False, 1),
        ("cl_mae", 4, 2, True, 1),
        ("cl_mae", 2, 2, True, 1),  # then two epochs by the same workers
        ("cl_mae", 6, 0, False, 2),
        ("mae", 6, 0, False, 1),
        ("cmae", 6, 0, False, 1),
        ("cmae", 2, 2, True, 2),
        ("cl_mae-error", 6, 0, False, 1),
        ("cmae-error", 2, 2, True, 2),
    ],
)
def test_resumed_runs_end_bit_by_bit_as_whole_ones(
    tmp_path, whole_runs, family, step, workers, persistent, accumulation
):
    folder, whole = whole_runs(family, accumulation)
    resumed = tiny_trainer(
        tmp_path,
        family,
        **BUSY,
        **ACCUMULATION[accumulation],
        dataloader_num_workers=workers,
        dataloader_persistent_workers=persistent,
    )
    torch.manual_seed(123)  # a new process is in no particular state
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    stop_workers(resumed)
    assert resumed.state.global_step == whole.state.global_step
    assert_equal_weights(weights(resumed.model), weights(whole.model))
    assert history(resumed) == history(whole)


@pytest.mark.slow
def test_resume_of_data_without_noise(tmp_path):
    options = dict(train_dataset=plain_dataset(8), num_train_epochs=2, save_strategy="steps", save_steps=2)
    whole = tiny_trainer(tmp_path / "whole", "mae", **options)
    whole.train()
    resumed = tiny_trainer(tmp_path / "resumed", "mae", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal_weights(weights(resumed.model), weights(whole.model))


@pytest.mark.slow
def test_masks_by_predicted_errors_are_easier_then_harder(tmp_path):
    """A partner's masks are easier than random ones, an adversary's harder; patches differ in how hard they are."""
    model = tiny_model("cl_mae-error", norm_pix_loss=False, curriculum_start=1.0)
    images = plain_dataset(64)
    for sample in images:
        sample["pixel_values"][..., :8] = 0.0  # one half is flat, the other is noise
    options = dict(max_steps=120, learning_rate=3e-3, difficulty_steps=20, per_device_train_batch_size=16)
    trainer = tiny_trainer(tmp_path, model, train_dataset=images, eval_dataset=images[:16], **options)
    trainer.train()
    difficulty = list(logged(trainer, "mask_difficulty").values())
    assert min(difficulty[1:3]) < 0.9
    assert difficulty[-1] > 1.1
    assert trainer.evaluate()["eval_mask_difficulty"] > 1.1
    assert all(loss < 1.5 for loss in list(logged(trainer, "prediction_loss").values())[-20:])


# -- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mae", "cl_mae", "cmae-error"])
def test_saved_model_is_loaded_by_the_auto_classes(tmp_path, family):
    processor = make_image_processor(16, 3, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    trainer = tiny_trainer(tmp_path, family, processing_class=processor, max_steps=2, save_strategy="steps")
    trainer.train()
    trainer.save_model()
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {p.name for p in tmp_path.iterdir()}
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        loaded = AutoModelForPreTraining.from_pretrained(folder)
        assert type(loaded) is type(trainer.model)
        assert_equal_weights(weights(loaded), weights(trainer.model))
        encoder = AutoModel.from_pretrained(folder)
        assert_equal_weights(weights(encoder), weights(trainer.model.vit))
        assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == [0.1, 0.2, 0.3]


def test_default_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trainer = CurriculumTrainer(tiny_model("mae"))
    assert isinstance(trainer.args, PretrainingArguments)
    assert trainer.args.output_dir == "clmae_output"


def test_contrast_needs_other_images(tmp_path):
    views = image_dataset(9, num_views=2)
    with pytest.raises(ValueError, match=r"`per_device_train_batch_size` is 1 on one process, but contrast"):
        tiny_trainer(tmp_path, tiny_model("cmae"), train_dataset=views, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=r"`dataloader_drop_last` is false, and 9 training images in batches of 4"):
        tiny_trainer(tmp_path, tiny_model("cmae"), train_dataset=views, dataloader_drop_last=False)
    one_view = image_dataset(9)
    model = tiny_model("cmae", contrastive_loss_weight=0.0)
    tiny_trainer(tmp_path, model, train_dataset=one_view, dataloader_drop_last=False, max_steps=3).train()


@pytest.mark.parametrize("label", [{}, {"label": 1}], ids=["plain", "label"])
def test_pictures_of_an_evaluation_set_with_views(tmp_path, label):
    views = [{"pixel_values": torch.randn(2, 3, 16, 16), "noise": torch.rand(2, 16), **label} for _ in range(8)]
    trainer = tiny_trainer(tmp_path, tiny_model("cmae"), train_dataset=views, eval_dataset=views)
    assert trainer.held_out_batch()["pixel_values"].shape == (8, 3, 16, 16)
    assert trainer.held_out_batch()["noise"].shape == (8, 16)
