# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Callbacks: the sampler's epoch, figures at their steps, TensorBoard, signals."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, TENSORS, EventAccumulator
from transformers import TrainerCallback, TrainerControl, TrainerState

from clmae.training import InterruptCallback
from clmae.training.base import EpochSampler
from clmae.training.callbacks import EpochCallback
from clmae.training.data import make_image_processor
from clmae.training.integrity import verify

from .runs import EachStep, assert_equal_weights, logged, tiny_trainer, weights

# -- epochs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "epoch"),
    [(None, 0), (0.0, 0), (0.5, 0), (1.0, 1), (2.999, 2), (3 - 1e-12, 3), (sum([0.1] * 10), 1), (7 + 2 / 3, 7)],
)
def test_epoch_reaches_the_sampler(progress, epoch):
    sampler = EpochSampler(4, seed=0)
    callback = EpochCallback(SimpleNamespace(epoch_sampler=sampler))
    callback.on_epoch_begin(None, SimpleNamespace(epoch=progress), None)
    assert sampler.epoch == epoch


# -- pictures -------------------------------------------------------------------------------------------------------


def assert_picture(data):
    """A PNG of sensible size that is not blank."""
    image = Image.open(io.BytesIO(data))
    image.verify()
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert image.format == "PNG"
    assert min(pixels.shape) > 100
    assert max(pixels.shape) < 3000
    assert pixels.std() > 5


def names(folder):
    return sorted(path.name for path in (folder / "pictures").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mae", "cl_mae"])
def test_pictures_are_drawn_at_their_steps(tmp_path, family):
    processor = make_image_processor(16, 3, [0.5] * 3, [0.25] * 3)
    trainer = tiny_trainer(
        tmp_path, family, max_steps=5, picture_steps=2, difficulty_steps=1, processing_class=processor
    )
    trainer.train()
    assert names(tmp_path) == ["curves.png", *(f"step-00000{step}.png" for step in (0, 2, 4, 5))]
    for path in (tmp_path / "pictures").iterdir():
        assert_picture(path.read_bytes())
    pictures = [(tmp_path / "pictures" / f"step-00000{step}.png").read_bytes() for step in (0, 5)]
    assert pictures[0] != pictures[1]


@pytest.mark.slow
def test_a_resumed_run_draws_only_what_is_left(tmp_path):
    tiny_trainer(tmp_path / "first", max_steps=4, save_strategy="steps", save_steps=2).train()
    trainer = tiny_trainer(tmp_path / "second", max_steps=4, picture_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert names(tmp_path / "second") == ["curves.png", "step-000003.png", "step-000004.png"]


# -- TensorBoard ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_gets_scalars_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = tiny_trainer(
        tmp_path, max_steps=4, logging_steps=3, picture_steps=2, difficulty_steps=2, report_to="tensorboard"
    )
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(file), size_guidance={IMAGES: 0, SCALARS: 0, TENSORS: 0})
    board.Reload()
    scalars = {tag.removeprefix("train/"): board.Scalars(tag) for tag in board.Tags()["scalars"]}
    for name in ("reconstruction_loss", "soft_reconstruction_loss", "curriculum_factor", "keep_spread"):
        assert [event.step for event in scalars[name]] == [3]
        assert scalars[name][0].value == pytest.approx(logged(trainer, name)[3], rel=1e-5)
    assert [event.step for event in scalars["mask_difficulty"]] == [0, 2, 4]
    images = board.Images("reconstructions")
    assert [event.step for event in images] == [0, 2, 4]
    assert_picture(images[-1].encoded_image_string)


# -- Ctrl-C ---------------------------------------------------------------------------------------------------------


class PressCtrlC(TrainerCallback):
    """Sends SIGINT, or another signal, to this process within step `step`, `times` times."""

    def __init__(self, step, times=1, number=signal.SIGINT):
        self.step, self.times, self.number = step, times, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def handler():
    """Python's own handler, whatever the test does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "workers"), [(3, 0), (4, 2)])
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on_bit_by_bit(tmp_path, handler, step, workers):
    run = dict(num_train_epochs=2, difficulty_steps=2, dataloader_num_workers=workers)
    whole = tiny_trainer(tmp_path / "whole", **run)
    whole.train()
    interrupt = InterruptCallback()
    stopped = tiny_trainer(tmp_path / "stopped", **run, callbacks=[interrupt, PressCtrlC(step)])
    stopped.train()
    assert interrupt.interrupted
    assert stopped.state.global_step == step < whole.state.global_step
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = tiny_trainer(tmp_path / "stopped", **run)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert_equal_weights(weights(resumed.model), weights(whole.model))


def signalled():
    return signal.getsignal(signal.SIGINT) is not signal.default_int_handler


def test_run_that_nobody_stops(tmp_path, handler):
    interrupt = InterruptCallback()
    seen = []
    tiny_trainer(
        tmp_path, max_steps=2, callbacks=[interrupt, EachStep(lambda *a, **k: seen.append(signalled()))]
    ).train()
    assert not interrupt.interrupted
    assert seen == [True, True]
    assert not (tmp_path / "pictures").exists()  # with `picture_steps` 0
    assert signal.getsignal(signal.SIGINT) is handler


def test_second_ctrl_c_stops_at_once(tmp_path, handler):
    trainer = tiny_trainer(tmp_path, max_steps=6, callbacks=[InterruptCallback(), PressCtrlC(3, times=2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
def test_the_same_trainer_goes_on_after_ctrl_c(tmp_path):
    interrupt = InterruptCallback()
    trainer = tiny_trainer(tmp_path, max_steps=6, callbacks=[interrupt, PressCtrlC(2)])
    trainer.train()
    assert trainer.state.global_step == 2
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert not interrupt.interrupted


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_saves_and_leaves_out_an_evaluation(tmp_path, times):
    before = signal.getsignal(signal.SIGTERM)
    interrupt = InterruptCallback()
    callbacks = [interrupt, PressCtrlC(2, times, signal.SIGTERM)]
    trainer = tiny_trainer(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, callbacks=callbacks)
    trainer.train()
    assert interrupt.received == signal.SIGTERM
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert verify(tmp_path / "checkpoint-2") == []
    assert logged(trainer, "eval_loss").keys() == {1}
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_workers_outlive_a_sigterm_to_the_whole_group(tmp_path):
    class FromOutside(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
                # Workers heed their parent's.
                subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)
                time.sleep(0.2)

    interrupt = InterruptCallback()
    trainer = tiny_trainer(tmp_path, max_steps=4, dataloader_num_workers=2, callbacks=[interrupt, FromOutside()])
    trainer.train()
    assert interrupt.received == signal.SIGTERM
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def _exit_with_1_unless_sigterm_is_blocked():
    sys.exit(signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, []))


@pytest.mark.parametrize("kind", ["train", "eval", "test"])
def test_sigterm_is_blocked_in_a_worker_from_its_start(tmp_path, kind):
    trainer = tiny_trainer(tmp_path, dataloader_num_workers=1)
    dataset = [] if kind == "train" else [trainer.eval_dataset]
    loader = getattr(trainer, f"get_{kind}_dataloader")(*dataset)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    process = loader.multiprocessing_context.Process(target=_exit_with_1_unless_sigterm_is_blocked)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.slow
def test_workers_end_when_their_parent_tells_them(tmp_path):
    loader = tiny_trainer(tmp_path, dataloader_num_workers=1).get_train_dataloader()
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("mine", "others", "logs", "stops"),
    [(15, 0, True, True), (0, 15, True, True), (15, 0, False, False), (0, 0, True, False)],
)
def test_processes_agree_where_to_stop(monkeypatch, mine, others, logs, stops):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda heard, op: heard.fill_(max(mine, others)))
    callback, control = InterruptCallback(), TrainerControl(should_log=logs, should_evaluate=True)
    callback.received = mine or None
    callback.on_step_end(SimpleNamespace(world_size=2, device="cpu"), TrainerState(), control)
    assert control.should_training_stop is control.should_save is stops
    assert control.should_evaluate is not stops


def test_ctrl_c_is_left_to_the_launcher_of_several_processes(handler):
    callback = InterruptCallback()
    callback.on_train_begin(SimpleNamespace(world_size=2), TrainerState(), TrainerControl())
    assert signal.getsignal(signal.SIGINT) is handler
    callback.on_train_end(SimpleNamespace(world_size=2), TrainerState(), TrainerControl())
    assert signal.getsignal(signal.SIGINT) is handler
