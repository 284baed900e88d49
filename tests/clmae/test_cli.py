# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The commands, from the arguments to exit code, messages and files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForPreTraining

import clmae.cli.pretrain
from clmae import FAMILIES, model_cards
from clmae.cli import main
from clmae.configuration.errors import InputError
from clmae.model_cards import hub_files
from clmae.modeling.conversion import to_mae
from clmae.training.data import make_image_processor

ROOT = Path(__file__).parents[2]
PACKAGE = Path(clmae.__file__).parents[1]  # new processes import what is imported here
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TINY = """\
model_size: tiny
hidden_size: 32
num_hidden_layers: 1
num_attention_heads: 4
decoder_hidden_size: 16
decoder_num_hidden_layers: 1
decoder_num_attention_heads: 2
image_size: 16
patch_size: 4
per_device_train_batch_size: 4
learning_rate: 1.0e-3
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
"""
TINY_MASKER = "masker_num_hidden_layers: 1\nmasker_num_attention_heads: 2\n"


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """A folder and a cache of its own, and no Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def save_image(path, seed=0, size=(24, 20), mode="RGB"):
    coarse = np.random.default_rng(seed).uniform(0, 255, (5, 5, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize(size, Image.BICUBIC).convert(mode).save(path)
    return str(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 24 pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        save_image(folder / f"{i:02}.png", seed=i)
    return str(folder)


@pytest.fixture
def recipe(tmp_path):
    """`recipe(family, text)`: the path of a recipe for a tiny model."""

    def write(family="cl_mae", text=""):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"family: {family}\n{TINY}{TINY_MASKER if family == 'cl_mae' else ''}{text}")
        return str(path)

    return write


@pytest.fixture
def parsed(monkeypatch):
    """What `clmae pretrain` would train on what: it stops where it would load data."""
    seen = {}

    def stop(data, config, seed):
        seen.update(data=data, config=config, seed=seed)
        raise InputError("this far and no further")

    monkeypatch.setattr(clmae.training.build, "build_datasets", stop)
    return seen


def error(capsys, *argv):
    """The message of a command that ends with exit code 2."""
    assert main(list(argv)) == 2
    _, marked, message = capsys.readouterr().err.partition("clmae: error: ")
    assert marked
    return message


# -- clmae ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pretrain", "verify", "visualize"])
def test_an_error_of_the_program_keeps_its_traceback(monkeypatch, command):
    def run(argv):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(f"clmae.cli.{command}.run", run)
    with pytest.raises(ValueError, match="shapes do not match"):
        main([command])


def test_no_command_shows_how(capsys):
    assert main([]) == 2
    assert "usage: clmae COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_examples_before_commands(capsys, flag):
    assert main([flag]) == 0
    text = capsys.readouterr().out
    assert text.index("usage:") < text.index("examples:") < text.index("commands:")


def test_unknown_command(capsys):
    message = error(capsys, "pretrian")
    assert "unknown command 'pretrian'; did you mean 'pretrain'?" in message


# -- clmae pretrain: what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "--help_all"])
def test_help_of_pretrain(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", flag])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.index("examples:") < text.index("clmae pretrain --config recipes/") < text.index("\n  --family ")
    for option in (
        "--dataset",
        "--mask_ratio",
        "--masker_num_hidden_layers",
        "--masker_update_interval",
        "--output_dir",
    ):
        assert f"\n  {option} " in text
    assert ("--adam_epsilon" in text) == (flag == "--help_all")


def test_help_of_the_family_that_was_named(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--family=mae", "--help"])
    text = capsys.readouterr().out
    assert "fields of MAEConfig" in text
    assert "--masker_num_hidden_layers" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "d", "--learning_rat", "1"], "unknown option '--learning_rat'; did you mean 'learning_rate'?"),
        (["--dataset", "d", "--mask_ratio", "abc"], "invalid float value: 'abc'"),
        (["--dataset", "d", "--mask_ratio", "1.5"], "`mask_ratio` is 1.5; give a number in [0, 1)"),
        (["--dataset", "d", "--image_size", "30"], "`image_size` is 30 and `patch_size` 16"),
        (["--dataset", "d", "--model_size", "huuge"], "`model_size` is 'huuge'; choose one of tiny, small"),
        (["--dataset", "d", "--masker_update_interval", "0"], "`masker_update_interval` is 0"),
        (["--dataset", "d", "--lr_scheduler_type", "cosin"], "cosin"),
        (["--dataset", "d", "--on_bad_image", "ignore"], "`on_bad_image` is 'ignore'; choose one of raise, skip"),
        (["--dataset", "d", "--family", "clmae"], "`family` is 'clmae'; did you mean 'cl_mae'?"),
        (["--dataset", "d", "--family", "mae", "--curriculum_end", "0"], "unknown option '--curriculum_end'"),
        (["--family", "mae"], "missing: --dataset"),
        (["--config", "none.yaml"], "--config none.yaml: No such file"),
        (["--dataset", "/no/such/folder"], "`dataset` is '/no/such/folder', but there is no such file or folder"),
        (["--dataset", "d", "--resume_from_checkpoint", "last"], "holds no checkpoint"),
        (["--dataset", "d", "--resume_from_checkpoint", "elsewhere"], "'elsewhere', which is no checkpoint folder"),
    ],
)
def test_mistakes_end_with_2_and_a_message(capsys, argv, message):
    assert message in error(capsys, "pretrain", "--use_cpu", "true", "--output_dir", "out", *argv)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask_ration: 0.5\n", "unknown entry 'mask_ration'; did you mean 'mask_ratio'?"),
        ("mask_ratio: [0.5\n", "not a YAML file"),
        ("mask_ratio: much\n", "invalid float value: 'much'"),
        ("mask_ratio: 2\n", "`mask_ratio` is 2"),
    ],
)
def test_mistakes_in_recipes(capsys, recipe, text, message):
    assert message in error(capsys, "pretrain", "--config", recipe(text=text), "--dataset", "d")


def test_family_typo_in_a_recipe(capsys, recipe):
    assert "`family` is 'mea'; did you mean 'mae'?" in error(capsys, "pretrain", "--config", recipe("mea"))


@pytest.mark.parametrize("name", ["family", "model_size", "mask_ratio", "dataset", "eval_split"])
def test_an_empty_entry_of_a_recipe(capsys, tmp_path, name):
    entries = {"family": "mae", "model_size": "tiny", "dataset": "nowhere/at/all", "output_dir": "out"} | {name: ""}
    (tmp_path / "recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in entries.items()))
    optional = name in ("mask_ratio", "eval_split")  # without a value of their own: as not given
    expected = "nowhere/at/all" if optional else f"recipe.yaml: `{name}` is empty; give a value, or leave it out."
    assert expected in error(capsys, "pretrain", "--config", "recipe.yaml")
    if not optional:
        assert expected in error(capsys, "compare", "--recipes", "recipe.yaml", "--output_dir", "out")


def test_empty_folder(capsys, recipe):
    Path("empty").mkdir()
    message = error(capsys, "pretrain", "--config", recipe(), "--dataset", "empty", "--output_dir", "out")
    assert "`dataset` is the folder 'empty', which holds no images" in message


def test_earlier_run_is_not_overwritten(capsys, recipe, photos):
    Path("out/checkpoint-5").mkdir(parents=True)
    message = error(capsys, "pretrain", "--config", recipe(), "--dataset", photos, "--output_dir", "out")
    assert "holds the checkpoints of an earlier run (checkpoint-5)" in message
    assert "--resume_from_checkpoint last" in message


def test_data_set_smaller_than_a_batch(capsys, recipe, photos):
    argv = ["--dataset", photos, "--output_dir", "out", "--per_device_train_batch_size", "100"]
    message = error(capsys, "pretrain", "--config", recipe(), *argv)
    assert "`per_device_train_batch_size` asks for batches of 100" in message


# -- clmae pretrain: recipes ----------------------------------------------------------------------------------------


def test_command_line_goes_before_the_recipe(capsys, parsed, recipe):
    path = recipe(text="mask_ratio: 0.5\nnorm_pix_loss: false\nhorizontal_flip: false\nseed: 7\ndataset: d\n")
    argv = ["--mask_ratio", "0.625", "--image_size", "32", "64", "--patch_size", "8"]
    assert "this far" in error(capsys, "pretrain", "--config", path, *argv)
    config = parsed["config"]
    assert (config.mask_ratio, config.hidden_size, config.norm_pix_loss) == (0.625, 32, False)
    assert config.grid_size == (4, 8)
    assert (parsed["data"].dataset, parsed["data"].horizontal_flip, parsed["seed"]) == ("d", False, 7)
    error(capsys, "pretrain", "--config", path, "--norm_pix_loss", "true", "--family", "cl_mae")
    assert parsed["config"].norm_pix_loss


def test_there_are_recipes():
    assert {"mae_cifar10.yaml", "cl_mae_cifar10.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_nothing_but_options_and_make_a_configuration(capsys, parsed, path):
    message = error(capsys, "pretrain", "--config", str(path), "--use_cpu", "true", "--output_dir", "out")
    assert "this far" in message, message
    family = next(line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("family:"))
    assert type(parsed["config"]) is FAMILIES[family][0]


# -- clmae pretrain, clmae visualize --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    """`trained(family)`: the folder of a model that `clmae pretrain` left."""
    folders = {}

    def get(family):
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            text = (
                f"family: {family}\n{TINY}{TINY_MASKER if family == 'cl_mae' else ''}max_steps: 4\nlogging_steps: 2\n"
            )
            (folder / "recipe.yaml").write_text(text)
            argv = ["--config", str(folder / "recipe.yaml"), "--dataset", photos, "--output_dir", str(folder / "out")]
            assert main(["pretrain", *argv]) == 0
            folders[family] = folder / "out"
        return folders[family]

    return get


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


def test_pretrain_says_what_comes_next(capsys, recipe, photos):
    argv = ["--dataset", photos, "--output_dir", "out", "--max_steps", "1", "--save_strategy", "no"]
    assert main(["pretrain", "--config", recipe("mae"), *argv]) == 0
    assert "clmae visualize --model out --images" in capsys.readouterr().out


def with_broken_image(folder):
    folder.mkdir()
    for i in range(11):
        save_image(folder / f"{i:02}.png", seed=i)
    (folder / "05.png").write_bytes(b"no picture")
    return str(folder)


def test_broken_image_is_named(capsys, recipe, tmp_path):
    folder = with_broken_image(tmp_path / "photos")
    argv = ["--dataset", folder, "--output_dir", "out", "--num_train_epochs", "1", "--num_held_out", "0"]
    message = error(capsys, "pretrain", "--config", recipe("mae"), *argv, "--dataloader_drop_last", "false")
    assert "05.png" in message
    assert "`on_bad_image`" in message


def test_broken_image_is_skipped_and_counted(capsys, recipe, tmp_path):
    folder = with_broken_image(tmp_path / "photos")
    argv = ["--dataset", folder, "--output_dir", "out", "--num_train_epochs", "1", "--num_held_out", "0"]
    argv += ["--dataloader_drop_last", "false", "--on_bad_image", "skip"]
    assert main(["pretrain", "--config", recipe("mae"), *argv]) == 0
    assert "1 broken images were skipped" in capsys.readouterr().out
    assert json.loads(Path("out/pretrain_results.json").read_text())["num_bad_images"] == 1


def wait_for(path, process, seconds=90):
    for _ in range(seconds * 50):
        if path.exists() or process.poll() is not None:
            return
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_checkpoint_from_which_the_run_ends(capsys, recipe, photos, number, code):
    text = f"dataset: {photos}\noutput_dir: out\nmax_steps: 250\ndataloader_num_workers: 1\ndifficulty_steps: 0\n"
    command = ["pretrain", "--config", recipe(text=text)]
    process = subprocess.Popen(
        [sys.executable, "-m", "clmae", *command],
        env={**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(Path("out/pictures/step-000000.png"), process)
    time.sleep(0.3)  # so that the workers run
    os.killpg(process.pid, number)  # as a terminal does: the workers are told, too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "--resume_from_checkpoint last" in output
    assert "Traceback" not in output
    (checkpoint,) = Path("out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 0 < step < 250
    assert f"Stopped at step {step}." in output
    assert not Path("out/model.safetensors").exists()
    assert not Path("out/run.lock").exists()
    assert main(["verify", "out"]) == 0
    assert main([*command, "--resume_from_checkpoint", "last"]) == 0
    state = json.loads(Path("out/trainer_state.json").read_text())
    assert state["global_step"] == 250
    assert Path("out/model.safetensors").exists()
    assert main(["verify", "out"]) == 0
    assert "out: whole" in capsys.readouterr().out


# -- clmae verify -----------------------------------------------------------------------------------------------------


def test_verify_names_what_is_wrong(capsys, trained, tmp_path):
    shutil.copytree(trained("mae"), tmp_path / "out")
    capsys.readouterr()
    assert main(["verify", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == ["out/checkpoint-4: whole", "out: whole"]
    assert main(["verify", "out/checkpoint-4"]) == 0
    os.truncate("out/checkpoint-4/optimizer.pt", 10)
    Path("out/config.json").unlink()
    assert main(["verify", "out"]) == 1
    damaged, problem, model, missing = capsys.readouterr().out.splitlines()[1:]
    assert (damaged, model) == ("out/checkpoint-4: damaged or unfinished", "out: damaged or unfinished")
    assert problem.startswith("  optimizer.pt has 10 bytes")
    assert missing == "  config.json is missing."


def test_verify_mistakes(capsys, tmp_path):
    assert "no folder" in error(capsys, "verify", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither a checkpoint nor a model" in error(capsys, "verify", "empty")


def without_manifest(kind, folder, family, tiny_config, trained):
    """A whole model that no `sealed.json` speaks of."""
    if kind == "shipped":
        return shutil.copytree(Path(model_cards.__file__).parent / "cl_mae_digits", folder)
    if kind == "downloaded":  # what is pushed is what comes back
        source = trained(family)
        for name in hub_files(source):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, folder / name)
        return folder
    model = FAMILIES[family][2](tiny_config(family))
    if kind == "converted":
        torch.save(to_mae(model), "mae.pth")
        heads = ["--num_attention_heads", "4", "--decoder_num_attention_heads", "2"]
        heads += ["--masker_num_attention_heads", "2"]
        assert main(["convert", "mae.pth", str(folder), *heads]) == 0
    else:
        model.save_pretrained(folder, max_shard_size="20KB" if kind == "sharded" else "1GB")
    return folder


@pytest.mark.parametrize(
    ("kind", "family"),
    [*itertools.product(["saved", "sharded", "converted", "downloaded"], FAMILIES), ("shipped", "cl_mae")],
)
def test_verify_a_model_without_a_manifest(capsys, tmp_path, kind, family, tiny_config, trained):
    folder = without_manifest(kind, tmp_path / "model", family, tiny_config, trained)
    weights = sorted(folder.glob("*.safetensors"))
    assert (len(weights) > 1) == (kind == "sharded")
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{folder}: whole, but without a manifest: the values of its weights were not compared\n"
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    weight = files[weights[-1].name]
    index = {"weight_map": {"vit.no_such_weight": weights[0].name}}
    damages = [
        (weights[-1].name, weight[:-1], f"{weights[-1].name} cannot be read"),
        (weights[-1].name, weight + b"0", f"{weights[-1].name} cannot be read"),
        (weights[-1].name, weight[:6], f"{weights[-1].name} cannot be read"),
        (weights[-1].name, None, f"{weights[-1].name} is missing" if kind == "sharded" else "there are no weights"),
        ("config.json", files["config.json"][:-9], "config.json is no JSON file"),
        ("config.json", b"[]", "config.json holds no configuration"),
        ("config.json", None, "config.json is missing"),
    ]
    if kind == "sharded":
        name = "model.safetensors.index.json"
        damages += [(name, json.dumps(index).encode(), f"{weights[0].name} lacks vit.no_such_weight")]
        damages += [(name, b"{}", f"{name} names no weights"), (name, files[name][:-5], f"{name} is no JSON file")]
    if kind != "shipped":  # whose code is in the package
        damages += [(f"modeling_{json.loads(files['config.json'])['model_type']}.py", None, ".py is missing")]
    for name, content, message in damages:
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        assert main(["verify", str(folder)]) == 1, message
        printed = capsys.readouterr().out
        assert printed.startswith(f"{folder}: damaged\n  ")
        assert message in printed
        (folder / name).write_bytes(files[name])


def test_a_checkpoint_without_a_manifest_was_cut_off(capsys, trained, tmp_path):
    shutil.copytree(trained("mae"), tmp_path / "out")
    Path("out/checkpoint-4/sealed.json").unlink()
    for argument in ("out", "out/checkpoint-4", "out/checkpoint-4/"):
        assert main(["verify", argument]) == 1
        assert "out/checkpoint-4: damaged or unfinished\n  it is not sealed" in capsys.readouterr().out


def test_resume_passes_over_a_damaged_checkpoint_or_says_that_none_is_left(capsys, trained, tmp_path, recipe, photos):
    shutil.copytree(trained("mae"), tmp_path / "out")
    os.truncate("out/checkpoint-4/optimizer.pt", 10)
    argv = ["--config", recipe("mae"), "--dataset", photos, "--output_dir", "out", "--max_steps", "4"]
    message = error(capsys, "pretrain", *argv, "--resume_from_checkpoint", "last")
    assert "no valid checkpoint: checkpoint-4: optimizer.pt has 10 bytes" in message
    message = error(capsys, "pretrain", *argv, "--resume_from_checkpoint", "out/checkpoint-4")
    assert "optimizer.pt has 10 bytes" in message


def test_a_run_that_diverges_ends_with_1(capsys, recipe, photos):
    argv = ["--config", recipe("mae"), "--dataset", photos, "--output_dir", "out", "--max_steps", "6"]
    assert main(["pretrain", *argv, "--learning_rate", "1e30", "--warmup_steps", "0", "--logging_steps", "6"]) == 1
    assert "is not finite. Its images" in capsys.readouterr().err
    assert not list(Path("out").glob("checkpoint-*"))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_visualize(capsys, trained, tmp_path, family):
    images = [save_image("a.png"), save_image("b.jpg", seed=1, size=(60, 33)), save_image("c.png", mode="L")]
    argv = ["visualize", "--model", str(trained(family)), "--images", *images]
    assert main([*argv, "--output", "new/masks.png"]) == 0
    assert "new/masks.png" in capsys.readouterr().out
    with Image.open("new/masks.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 10
    assert main([*argv, "--output", "again.png"]) == 0
    assert main([*argv, "--output", "other.png", "--seed", "1"]) == 0
    first, again, other = (Path(name).read_bytes() for name in ("new/masks.png", "again.png", "other.png"))
    assert again == first
    assert (other == first) == (family == "cl_mae")  # learned masks are not drawn at random


def test_visualize_mistakes(capsys, trained):
    model, good = str(trained("mae")), save_image("good.png")
    Path("broken.png").write_bytes(b"no picture")
    arguments = ["visualize", "--model", model, "--images", good]
    assert "`images`: broken.png: it cannot be decoded" in error(capsys, *arguments, "broken.png")
    assert "`images`: none.png: the file none.png cannot be read" in error(capsys, *arguments, "none.png")
    assert "`output` is 'masks.jpg'" in error(capsys, *arguments, "--output", "masks.jpg")
    assert "`model` './nowhere' cannot be loaded" in error(
        capsys, "visualize", "--model", "./nowhere", "--images", good
    )
    Path("empty").mkdir()
    assert "`model` './empty' cannot be loaded" in error(capsys, "visualize", "--model", "./empty", "--images", good)
    assert "missing: --model" in error(capsys, "visualize", "--images", good)
    assert "did you mean 'output'?" in error(capsys, *arguments, "--outptu", "x.png")
    assert not list(Path().glob("masks*"))


# What a command calls its model, and the command up to it.
MODEL_COMMANDS = {
    "evaluate knn": ("`model`", ["evaluate", "knn", "--dataset", "nowhere/at/all", "--model"]),
    "evaluate finetune": ("`model`", ["evaluate", "finetune", "--dataset", "nowhere/at/all", "--model"]),
    "evaluate linear-lars": ("`model`", ["evaluate", "linear-lars", "--dataset", "nowhere/at/all", "--model"]),
    "visualize": ("`model`", ["visualize", "--images", "none.png", "--model"]),
    "export": ("SRC", ["export", "--to", "vit", "out/exported"]),
}


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("out/missing", "there is no such folder, and as a Hub id:"),
        ("missing", "there is no such folder, and as a Hub id:"),
        ("./missing", "there is no such folder."),
        ("../a/b/missing", "there is no such folder."),
        ("empty", "there is no config.json in this folder."),
        ("weights.pth", "it is a file; give the folder of a model (`clmae convert` makes one of a checkpoint)."),
        ("broken", "config.json"),
    ],
)
def test_a_model_that_is_not_there(capsys, command, path, reason):
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    Path("weights.pth").write_bytes(b"")
    name, argv = MODEL_COMMANDS[command]
    argv = [*argv[:-1], path, argv[-1]] if command == "export" else [*argv, path]
    message = error(capsys, *argv)  # before anything is said of the images
    assert message.startswith(f"{name} {path!r} cannot be loaded: ")
    assert reason in message
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
@pytest.mark.parametrize("family", [*FAMILIES, "cmae, learned masks"])
def test_visualize_needs_a_decoder(capsys, tiny_config, family, kind):
    family, *masks = family.split(", ")
    config = tiny_config(family, **({"learned_masks": True} if masks else {}))
    FAMILIES[family][{"encoder": 1, "classifier": 3}[kind]](config).save_pretrained("model")
    make_image_processor(16, 3, [0.5] * 3, [0.5] * 3).save_pretrained("model")
    argv = ["visualize", "--model", "model", "--images", save_image("a.png"), "--output", "masks.png"]
    message = error(capsys, *argv)
    assert message.startswith("`model` 'model' is no whole masked autoencoder: its weights lack decoder.")
    assert not Path("masks.png").exists()


def test_visualize_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["visualize", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.index("examples:") < text.index("\n  --model ")
