# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae`: the choice of a command, its help, and what every command says of a model that is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import clmae
from clmae.cli import COMMANDS, keep_freed_memory, main

# The options of each command (of `clmae pretrain`: some of each group), all of which its whole help explains.
COMMON = "--model --dataset --dataset_config_name --train_split --test_split --image_column --label_column --output "
COMMON += "--max_train_samples --max_test_samples --baselines "
FROZEN = COMMON + "--feature --layer --feature_cache --batch_size --num_workers --bf16 --seed "
TRAINED = COMMON + "--labels_per_class --label_fraction --base_learning_rate --resume_from_checkpoint --min_crop_scale "
LONG = ("evaluate finetune", "evaluate partial", "evaluate linear-lars")  # take every field of TrainingArguments
PRETRAIN = "--family --model_size --dataset --mask_ratio --output_dir --seed --push_to_hub --picture_steps "
HELP = {
    "pretrain": PRETRAIN + "--masker_num_hidden_layers --masker_update_interval --curriculum_end",
    "pretrain --family=cmae": PRETRAIN + "--learned_masks --contrastive_crop",
    "evaluate knn": FROZEN + "--ks --temperature --euclidean_k --chunk_size",
    "evaluate linear": FROZEN + "--l2_grid --validation_share --max_iter",
    "evaluate fewshot": FROZEN + "--shots --num_draws --l2_grid --one_shot_l2 --max_iter",
    "evaluate finetune": TRAINED + "--mixup_alpha --layer_decay",
    "evaluate partial": TRAINED + "--trained_blocks",
    "evaluate linear-lars": TRAINED + "--lars_momentum --feature",
    "compare": "--recipes --output_dir --seeds --budgets --protocols --images_seen --num_points --eval_dataset "
    "--eval_config_name --eval_train_split --eval_test_split --eval_image_column --eval_label_column "
    "--eval_max_train_samples --eval_max_test_samples --eval_feature",
    "embed": "MODEL DATA --output --split --max_samples --image_column --label_column --feature --layer --batch_size "
    "--num_workers --bf16 --device --plot",
    "visualize": "--model --images --output --seed",
    "export": "SRC DST --to",
    "convert": "SRC DST --num_attention_heads --decoder_num_attention_heads --masker_num_attention_heads --image_size "
    "--layer_norm_eps --norm_pix_loss --mask_ratio --soft_masking --gauss_loss_weight --diversity_loss_weight "
    "--ignore_unexpected",
    "card": "OUTPUT_DIR --repo_id --license --force",
    "push": "OUTPUT_DIR ID --private --license --message --force",
    "verify": "DIR",
    "bench": "--batch_sizes --num_steps --num_images",
}


def help_of(capsys, command, flag="--help"):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), flag])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", HELP)
def test_help_explains_every_option_after_examples(capsys, command):
    text = help_of(capsys, command, "--help-all")
    assert text.index("examples:") < text.index(f"\n  clmae {command.split()[0]} ")
    lines = [line.split() for line in text[text.index("examples:") :].splitlines() if line.startswith("  ")]
    assert set(HELP[command].split()) <= {words[0] for words in lines if words}
    assert text.count("\n  --seed ") <= 1


@pytest.mark.parametrize("command", [command for command in HELP if command.startswith(("pretrain", *LONG))])
def test_help_is_short_and_help_all_explains_every_field(capsys, command):
    short, everything = help_of(capsys, command), help_of(capsys, command, "--help-all")
    assert short.count("\n") < 60
    for name in ("--dataset", "--num_train_epochs", "--resume_from_checkpoint"):
        assert f"\n  {name} " in short
        assert f"\n  {name} " in everything
    for name in ("--adam_epsilon", "--weight_decay", "--label_names"):
        assert f"\n  {name} " not in short
        assert f"\n  {name} " in everything


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"clmae {clmae.__version__}\n"


def test_help_of_the_family_that_was_named(capsys):
    text = help_of(capsys, "pretrain --family=mae")
    assert "fields of MAEConfig" in text
    assert "--masker_objective" not in text


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["-h"], 0), (["--help"], 0)])
def test_without_a_command_all_are_listed_after_examples(capsys, argv, code):
    assert main(argv) == code
    text = capsys.readouterr().out
    assert text.index("usage: clmae COMMAND") < text.index("examples:") < text.index("commands:")
    assert all(f"\n  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(("argv", "code"), [(["evaluate"], 2), (["evaluate", "--help"], 0)])
def test_evaluate_without_a_protocol_lists_them(capsys, argv, code):
    assert main(argv) == code
    text = capsys.readouterr().out
    assert all(name in text for name in ("knn", "linear", "fewshot", "finetune", "partial", "linear-lars"))


def test_unknown_names(error):
    assert "unknown command 'pretrian'; did you mean 'pretrain'?" in error("pretrian")
    assert "unknown protocol 'fewshots'; did you mean 'fewshot'?" in error("evaluate", "fewshots")


@pytest.mark.parametrize("command", ["pretrain", "verify", "visualize"])
def test_an_error_of_the_program_keeps_its_traceback(monkeypatch, command):
    def run(argv):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(f"clmae.cli.{command}.run", run)
    with pytest.raises(ValueError, match="shapes do not match"):
        main([command])


def _page_faults(path, keep):
    """Writes how many page faults repeated steps cause that allocate 128 MB and free it."""
    import resource

    if keep:
        keep_freed_memory()
    counts = []
    for _ in range(12):
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        torch.stack([torch.ones(2**22) for _ in range(8)])
    Path(path).write_text(str(counts[-1] - counts[5]))  # the first steps need new memory, where the heap has gaps


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept(processes, tmp_path):
    started = [processes.start(_page_faults, str(tmp_path / name), name == "kept") for name in ("kept", "given back")]
    assert [process.wait() for process in started] == [0, 0]
    kept, given_back = (int((tmp_path / name).read_text()) for name in ("kept", "given back"))
    assert 4 * kept < given_back


# What a command calls its model, and the command up to it.
MODEL_COMMANDS = {
    "evaluate knn": ("`model`", ["evaluate", "knn", "--dataset", "nowhere/at/all", "--model"]),
    "evaluate finetune": ("`model`", ["evaluate", "finetune", "--dataset", "nowhere/at/all", "--model"]),
    "evaluate linear-lars": ("`model`", ["evaluate", "linear-lars", "--dataset", "nowhere/at/all", "--model"]),
    "embed": ("MODEL", ["embed", "--output=out/f.npy", "nowhere/at/all"]),
    "visualize": ("`model`", ["visualize", "--images", "none.png", "--model"]),
    "export": ("SRC", ["export", "--to", "vit", "out/exported"]),
}


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_a_model_that_is_not_there(error, command):
    for name in ("empty", "broken", "stopped/checkpoint-8", "stopped/checkpoint-12"):
        Path(name).mkdir(parents=True)
    Path("broken/config.json").write_text("{")
    Path("weights.pth").write_bytes(b"")
    name, argv = MODEL_COMMANDS[command]
    for path, reason in (
        ("out/missing", "there is no such folder, and as a Hub id:"),
        ("missing", "there is no such folder, and as a Hub id:"),
        ("./missing", "there is no such folder."),
        ("../a/b/missing", "there is no such folder."),
        ("empty", "there is no config.json in this folder."),
        ("stopped", "The run in it has not ended; its newest checkpoint is stopped/checkpoint-12."),
        ("weights.pth", "it is a file; give the folder of a model (`clmae convert` makes one of a checkpoint)."),
        ("broken", "config.json"),
    ):
        # Before anything is said of the images.
        message = error(*([*argv[:-1], path, argv[-1]] if command in ("embed", "export") else [*argv, path]))
        assert message.startswith(f"{name} {path!r} cannot be loaded: ")
        assert reason in message
        assert not Path("out").exists()
