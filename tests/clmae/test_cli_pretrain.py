# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae pretrain`: what is refused, what recipes say, and what a run leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForPreTraining

from clmae import FAMILIES, CLMAEForPreTraining
from clmae.cli import main
from clmae.cli.pretrain import read_arguments

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "d", "--learning_rat", "1"], "unknown option '--learning_rat'; did you mean '--learning_rate'?"),
        (["--dataset", "d", "--mask_ratio", "abc"], "invalid float value: 'abc'"),
        (["--dataset", "d", "--mask_ratio", "1.5"], "`mask_ratio` is 1.5; give a number in [0, 1)"),
        (["--dataset", "d", "--image_size", "30"], "`image_size` is 30 and `patch_size` 16"),
        (["--dataset", "d", "--model_size", "huuge"], "`model_size` is 'huuge'; choose one of tiny, small"),
        (["--dataset", "d", "--masker_update_interval", "0"], "`masker_update_interval` is 0"),
        (["--dataset", "d", "--lr_scheduler_type", "cosin"], "cosin"),
        (["--dataset", "d", "--on_bad_image", "ignore"], "`on_bad_image` is 'ignore'; choose one of raise, skip"),
        (["--dataset", "d", "--family", "clmae"], "`family` is 'clmae'; did you mean 'cl_mae'?"),
        (["--dataset", "d", "--family"], "--family: expected one argument"),
        (["--dataset", "d", "--family", "mae", "--curriculum_end", "0"], "unknown option '--curriculum_end'"),
        (["--family", "mae"], "missing: --dataset"),
        (["--config", "none.yaml"], "--config none.yaml: No such file"),
        (["--dataset", "/no/such/folder"], "`dataset` is '/no/such/folder', but there is no such file or folder"),
        (["--dataset", "d", "--resume_from_checkpoint", "last"], "holds no checkpoint"),
        (["--dataset", "d", "--resume_from_checkpoint", "elsewhere"], "'elsewhere', which is no checkpoint folder"),
    ],
)
def test_mistakes_end_with_2_and_a_message(error, argv, message):
    assert message in error("pretrain", "--use_cpu", "true", "--output_dir", "out", *argv)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("cl_mae", "mask_ration: 0.5\n", "unknown entry 'mask_ration'; did you mean 'mask_ratio'?"),
        ("cl_mae", "mask_ratio: [0.5\n", "not a YAML file"),
        ("cl_mae", "mask_ratio: much\n", "invalid float value: 'much'"),
        ("cl_mae", "mask_ratio: 2\n", "`mask_ratio` is 2"),
        ("mea", "", "`family` is 'mea'; did you mean 'mae'?"),
    ],
)
def test_mistakes_in_recipes(error, recipe, family, text, message):
    assert message in error("pretrain", "--config", recipe(family, text), "--dataset", "d")


@pytest.mark.parametrize("name", ["family", "model_size", "mask_ratio", "dataset", "eval_split"])
def test_an_empty_entry_of_a_recipe(error, name):
    entries = {"family": "mae", "model_size": "tiny", "dataset": "nowhere/at/all", "output_dir": "out"} | {name: ""}
    Path("recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in entries.items()))
    optional = name in ("model_size", "mask_ratio", "eval_split")  # without a value of their own: as not given
    expected = "nowhere/at/all" if optional else f"recipe.yaml: `{name}` is empty; give a value, or leave it out."
    assert expected in error("pretrain", "--config", "recipe.yaml")
    if not optional:
        assert expected in error("compare", "--recipes", "recipe.yaml", "--output_dir", "out")


def test_folders_that_do_not_fit(error, recipe, photos):
    Path("empty").mkdir()
    Path("earlier/checkpoint-5").mkdir(parents=True)
    for argv, message in (
        (["empty", "--output_dir", "out"], "`dataset` is the folder 'empty', which holds no images"),
        (
            [photos, "--output_dir", "earlier"],
            "holds the checkpoints of an earlier run (checkpoint-5): go on with `--r",
        ),
        (
            [photos, "--output_dir", "out", "--per_device_train_batch_size", "100"],
            "`per_device_train_batch_size` asks for batches of 100",
        ),
    ):
        assert message in error("pretrain", "--config", recipe(), "--dataset", *argv)


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_command_line_goes_before_the_recipe(recipe):
    path = recipe(text="mask_ratio: 0.5\nnorm_pix_loss: false\nhorizontal_flip: false\nseed: 7\ndataset: d\n")
    argv = ["--config", path, "--output_dir", "out", "--mask_ratio", "0.625"]
    config, data, args, values = read_arguments([*argv, "--image_size", "32", "64", "--patch_size", "8"])
    assert (config.mask_ratio, config.hidden_size, config.norm_pix_loss) == (0.625, 32, False)
    assert config.grid_size == (4, 8)
    assert (data.dataset, data.horizontal_flip, args.seed) == ("d", False, 7)
    assert (values["mask_ratio"], values["seed"]) == (0.625, 7)
    assert read_arguments([*argv, "--norm_pix_loss", "true", "--family", "cl_mae"])[0].norm_pix_loss


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_nothing_but_options_and_make_a_configuration(path):
    config, *_ = read_arguments(["--config", str(path), "--use_cpu", "true", "--output_dir", "out", "--bf16", "false"])
    family = next(line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("family:"))
    assert type(config) is FAMILIES[family][0]
    assert {"mae_cifar10", "cl_mae_cifar10"} <= {path.stem for path in RECIPES}


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_pretrain_leaves_model_processor_numbers_and_pictures(trained, family):
    folder = trained(family)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "trainer_state.json"} <= names
    assert {"checkpoint-4", "pictures", "pretrain_results.json"} <= names
    model = AutoModelForPreTraining.from_pretrained(folder)
    assert type(model) is FAMILIES[family][2]
    assert (model.config.hidden_size, model.config.image_size) == (32, 16)
    assert AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (40, 30))).pixel_values[0].shape == (3, 16, 16)
    results = json.loads((folder / "pretrain_results.json").read_text())
    assert results["num_bad_images"] == 0
    assert 0 < results["eval_loss"] < 10
    assert {"step-000000.png", "step-000004.png", "curves.png"} == {p.name for p in (folder / "pictures").iterdir()}
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert any("mask_difficulty" in entry for entry in history) == (family == "cl_mae")


@pytest.mark.slow
def test_a_broken_image_is_named_or_skipped_and_counted(capsys, error, recipe, save_image):
    Path("photos").mkdir()
    for i in range(11):
        save_image(f"photos/{i:02}.png", seed=i)
    Path("photos/05.png").write_bytes(b"no picture")
    argv = ["pretrain", "--config", recipe("mae"), "--dataset", "photos", "--output_dir", "out"]
    argv += ["--num_train_epochs", "1", "--num_held_out", "0", "--dataloader_drop_last", "false"]
    message = error(*argv)
    assert "05.png" in message
    assert "`on_bad_image`" in message
    assert main([*argv, "--on_bad_image", "skip", "--image_size", "32"]) == 0
    printed = capsys.readouterr().out
    assert "The first image has 20 x 24 pixels, and is enlarged" in printed
    assert "1 broken images were skipped" in printed
    assert "clmae visualize --model out --images" in printed  # what comes next
    assert json.loads(Path("out/pretrain_results.json").read_text())["num_bad_images"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_checkpoint_from_which_the_run_ends(capsys, recipe, photos, processes, number, code):
    text = f"dataset: {photos}\noutput_dir: out\nmax_steps: 9000\ndataloader_num_workers: 1\ndifficulty_steps: 0\n"
    command = ["pretrain", "--config", recipe(text=text)]
    process = processes.start(main, command)
    end = time.monotonic() + 90
    while not Path("out/pictures/step-000000.png").exists() and process.running and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)  # so that the workers run
    process.signal(number)  # as a terminal does: the workers get it, too
    assert process.wait(60) == code, process.stderr
    output = process.stdout + process.stderr
    assert "--resume_from_checkpoint last" in output
    assert "Traceback" not in output
    (checkpoint,) = Path("out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 0 < step < 9000
    assert f"Stopped at step {step}." in output
    assert not Path("out/model.safetensors").exists()
    assert not Path("out/run.lock").exists()
    assert main(["verify", "out"]) == 0
    assert main([*command, "--resume_from_checkpoint", "last", "--max_steps", str(step + 2)]) == 0
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == step + 2
    assert main(["verify", "out"]) == 0
    printed = capsys.readouterr().out
    assert f"Going on from step {step:,} of {step + 2:,}.\nIt was begun as a run of 9,000 steps" in printed
    assert "out: whole" in printed
    assert main([*command, "--resume_from_checkpoint", "last", "--max_steps", str(step + 2)]) == 0
    assert f"from step {step + 2:,} of {step + 2:,}: nothing is left to do." in capsys.readouterr().out


@pytest.mark.slow
def test_resume_passes_over_a_damaged_checkpoint_or_says_that_none_is_left(error, trained, recipe, photos):
    shutil.copytree(trained("mae"), "out")
    argv = ["--config", recipe("mae"), "--dataset", photos, "--output_dir", "out", "--max_steps", "4"]
    message = error("pretrain", *argv, "--hidden_size", "64", "--resume_from_checkpoint", "out/checkpoint-4")
    assert re.search(r"where \S+ has shape \(.*32.*\), but in this model \(.*64.*\): resume with the options", message)
    os.truncate("out/checkpoint-4/optimizer.pt", 10)
    for newest in ("last", "true"):
        message = error("pretrain", *argv, "--resume_from_checkpoint", newest)
        assert "no valid checkpoint: checkpoint-4: optimizer.pt has 10 bytes" in message
    message = error("pretrain", *argv, "--resume_from_checkpoint", "out/checkpoint-4")
    assert "optimizer.pt has 10 bytes" in message


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_1(capsys, recipe, photos):
    argv = ["--config", recipe("mae"), "--dataset", photos, "--output_dir", "out", "--max_steps", "6"]
    assert main(["pretrain", *argv, "--learning_rate", "1e30", "--warmup_steps", "0", "--logging_steps", "6"]) == 1
    assert "is not finite. Its images" in capsys.readouterr().err
    assert not list(Path("out").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_run_that_starts_from_weights_and_is_evaluated_on_the_way(trained, photos, labelled, capsys):
    options = dict(family="cl_mae", dataset=photos, output_dir="out", per_device_train_batch_size=4, max_steps=4)
    options |= dict(init=trained("mae"), learning_rate=0, masker_num_attention_heads=2, use_cpu="true")
    options |= dict(knn_dataset=labelled, knn_steps=2, disable_tqdm="true", report_to="none")
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["pretrain", *argv]) == 0
    output = capsys.readouterr().out
    assert "'knn_accuracy'" in output
    assert "'linear_accuracy'" in output
    model, start = (AutoModelForPreTraining.from_pretrained(folder) for folder in ("out", trained("mae")))
    assert type(model) is CLMAEForPreTraining
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in start.state_dict().items())
    argv = ["pretrain", *argv, "--model_size", "tiny"]
    assert main(argv) == 2
    assert "leave out `model_size`" in capsys.readouterr().err
