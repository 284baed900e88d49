# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Cards: all that they say comes from the run's files, nothing of the machine is in them, and no words are lost."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import shutil

import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor, Trainer, ViTConfig

from clmae import CMAEForPreTraining, MAEConfig, MAEForPreTraining
from clmae.model_cards import EditedCardError, check_folder, describe_data, hub_files, write_card
from clmae.model_cards.card import changed_config
from clmae.model_cards.hub import check_card
from clmae.model_cards.record import changed_arguments
from clmae.model_cards.run import read_run
from clmae.training import CurriculumTrainer, PretrainingArguments
from clmae.training.data import DataArguments, make_image_processor

from ..training.runs import QUIET, SHORT, SILENT, image_dataset, tiny_model, tiny_trainer

SECRET = "hf_do_not_tell"
PROCESSOR = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The output folder of a run of four steps that was cut after two, with its data's description."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    photos = tmp_path_factory.mktemp("private") / "holiday"
    photos.mkdir()
    options = dict(max_steps=4, picture_steps=2, difficulty_steps=2, save_strategy="steps", save_steps=2)
    for checkpoint in (None, str(folder / "checkpoint-2")):
        own = dict(output_dir=str(folder), hub_token=SECRET, run_name=str(folder))
        trainer = CurriculumTrainer(
            tiny_model(),
            PretrainingArguments(**{**QUIET, **SHORT, **SILENT, **options, **own}),
            train_dataset=image_dataset(),
            eval_dataset=image_dataset(6, train=False),
            processing_class=BitImageProcessor(**PROCESSOR),
            data_arguments=DataArguments(dataset=str(photos), min_crop_scale=0.5),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    return folder


@pytest.fixture
def folder(finished_run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(finished_run, tmp_path / "tiny", ignore=shutil.ignore_patterns("checkpoint-*"))


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def write_evaluation(folder, dataset="uoft-cs/cifar10", model=None, **row):
    own = {"name": "pretrained", "accuracies": {"k = 5": 40.25, "k = 20": 41.5}, **row}
    random = {"name": "random encoder", "accuracies": {"k = 5": 33.0, "k = 20": 41.5}}
    settings = {"dataset": dataset, "model": str(model or folder), "num_train": 5000, "num_test": 1000}
    settings |= {"parameters": {"temperature": 0.07}, "feature": "pooler_output", "date": "2026-01-02T03:04:05+00:00"}
    result = {"protocol": "knn", "rows": [own, random], "settings": settings}
    (folder / "knn.json").write_text(json.dumps(result))


# -- what a card says -------------------------------------------------------------------------------------------------


def test_it_shows_what_the_run_recorded(finished_run):
    text, state = card(finished_run), json.loads((finished_run / "trainer_state.json").read_text())
    record = json.loads((finished_run / "pretraining.json").read_text())
    weights = load_file(finished_run / "model.safetensors")
    assert f"| parameters | {sum(w.numel() for w in weights.values()):,}, of which" in text
    assert "| optimiser steps | 4 |" in text
    assert "| images seen | 16 (4 per step) |" in text
    assert "| training | `learning_rate` | `0.001` |" in text
    assert "| data | `min_crop_scale` | `0.5` |" in text
    assert "dataset: “holiday”, a local one" in text
    assert "- images trained on: 16, without labels\n" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    last = next(entry for entry in reversed(state["log_history"]) if "reconstruction_loss" in entry)
    assert f"| reconstruction loss, training | {last['reconstruction_loss']:.4g} |" in text
    assert [(s["first_step"], s["last_step"]) for s in record["sessions"]] == [(0, 2), (2, 4)]
    assert all(s["seconds"] > 0 for s in record["sessions"])
    assert re.findall(r"^@inproceedings{(\w+),$", text, re.MULTILINE) == ["madan2024clmae", "he2022masked"]
    assert "Nothing was measured downstream" in text


def test_every_section_is_there_and_every_picture(finished_run):
    text = card(finished_run)
    body = text.split("```bibtex")[0]
    headings = re.findall(r"^#+ (.*)$", body, re.MULTILINE)
    assert set(headings) >= {"Use", "Intended use", "Evaluation", "Data", "Training", "Limits", "Licence", "Citation"}
    assert not re.search(r"\{[{%#]|\n{3}| \n", body)  # nothing is left of the template
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures == ["pictures/curves.png", *(f"pictures/step-{step:06}.png" for step in (0, 2, 4))]
    assert all((finished_run / picture).stat().st_size > 1000 for picture in pictures)
    check_card(finished_run)


def test_front_matter_and_licence(finished_run, folder):
    assert yaml.safe_load(card(finished_run).split("---")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "license": "apache-2.0",
        "tags": ["clmae", "cl-mae", "vision", "self-supervised-learning", "masked-image-modeling"],
    }
    record = json.loads((folder / "pretraining.json").read_text())
    record["data"] |= {"dataset": "uoft-cs/cifar10", "dataset_on_hub": True}
    (folder / "pretraining.json").write_text(json.dumps(record))
    write_card(folder, license="cc-by-4.0")
    write_card(folder)  # which keeps the licence
    front_matter = yaml.safe_load(card(folder).split("---")[1])
    assert (front_matter["datasets"], front_matter["license"]) == (["uoft-cs/cifar10"], "cc-by-4.0")
    assert "Weights: `cc-by-4.0`" in card(folder)


def test_the_trainer_takes_transformers_arguments_and_leaves_an_edited_card(tmp_path):
    ours, theirs = (inspect.signature(owner.create_model_card).bind for owner in (CurriculumTrainer, Trainer))
    everything = [None, "en", "mit", "tag", "name", "base", "task", "dataset tag", "dataset", "dataset arguments"]
    assert list(ours(*everything).arguments.items())[:3] == list(theirs(*everything).arguments.items())[:3]
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    for arguments, expected in ((("en", "mit"), "mit"), ((None, "cc0-1.0"), "cc0-1.0")):
        trainer.create_model_card(*arguments)
        assert yaml.safe_load(card(tmp_path).split("---")[1])["license"] == expected
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer.create_model_card()
    assert card(tmp_path) == "# Mine\n"


@pytest.mark.slow
@pytest.mark.parametrize(("num_channels", "with_code"), [(1, True), (3, True), (5, True), (3, False)])
def test_the_snippet_runs_as_pasted(tmp_path, monkeypatch, tiny_config, num_channels, with_code):
    MAEForPreTraining(tiny_config("mae", num_channels=num_channels)).save_pretrained(tmp_path)
    make_image_processor(16, num_channels, [0.5] * num_channels, [0.5] * num_channels).save_pretrained(tmp_path)
    if not with_code:  # as in this repository, which has it already
        config = json.loads((tmp_path / "config.json").read_text())
        del config["auto_map"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    write_card(tmp_path)
    monkeypatch.chdir(tmp_path)
    snippet, output = re.search(r"```python\n(.*?)```", card(tmp_path), re.DOTALL)[1], io.StringIO()
    assert ("trust_remote_code" in snippet, "import clmae" in snippet) == (with_code, not with_code)
    with contextlib.redirect_stdout(output):
        exec(snippet, {})
    assert output.getvalue() == "torch.Size([1, 32])\n"
    assert output.getvalue().strip() in snippet


def test_the_snippet_names_the_repository(folder):
    write_card(folder, "org/cl-mae-tiny")
    assert 'AutoModel.from_pretrained("org/cl-mae-tiny", trust_remote_code=True)' in card(folder)
    assert "# cl-mae-tiny\n" in card(folder)


def test_nothing_of_the_machine_is_told(finished_run):
    for name in ("README.md", "pretraining.json"):
        text = (finished_run / name).read_text(encoding="utf-8")
        assert SECRET not in text
        assert str(finished_run.parent) not in text
        assert "private" not in text


def test_local_data_are_told_by_their_name_alone(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    for source in (str(tmp_path / "photos"), "../photos/", "."):
        described = describe_data(DataArguments(dataset=source, horizontal_flip=False))
        assert described == {"dataset": "photos", "dataset_on_hub": False, "options": {"horizontal_flip": False}}
    described = describe_data(DataArguments(dataset="org/photos"))
    assert described == {"dataset": "org/photos", "dataset_on_hub": True, "options": {}}


def test_changed_arguments(tmp_path):
    path = {"output_dir": str(tmp_path), "run_name": "mine", "optim_args": "/home/me/x", "hub_token": SECRET}
    args = PretrainingArguments(**path, **QUIET, weight_decay=0.1, lr_scheduler_kwargs={"num_cycles": 0.25}, seed=42)
    changed = changed_arguments(args)
    assert changed.pop("learning_rate") == args.learning_rate  # computed from the batch, so not its default
    assert changed == {"weight_decay": 0.1, "lr_scheduler_kwargs": {"num_cycles": 0.25}}


def test_changed_config_leaves_out_what_follows():
    config = MAEConfig.from_size(
        "base", image_size=64, hidden_size=64, num_attention_heads=4, decoder_intermediate_size=8
    )
    expected = {"hidden_size": 64, "num_attention_heads": 4, "image_size": 64, "decoder_intermediate_size": 8}
    assert changed_config(json.loads(config.to_json_string(use_diff=False))) == expected


def test_a_folder_without_a_record(tmp_path, tiny_config):
    CMAEForPreTraining(tiny_config("cmae")).save_pretrained(tmp_path)
    write_card(tmp_path)
    text = card(tmp_path)
    assert "## Data\n\nNot recorded." in text
    assert "Over the run" not in text
    assert "Masks and reconstructions" not in text


def test_what_is_no_model_of_ours(tmp_path):
    with pytest.raises(ValueError, match="no config"):
        write_card(tmp_path)
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'vit'"):
        write_card(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_with_their_protocol_and_intervals(folder):
    write_evaluation(folder, intervals={"k = 5": [39.0, 41.5]}, std={"k = 20": 0.4})
    write_card(folder)
    assert "| k = 5 | 40.25 [39.0, 41.5] | 33.00 |\n| k = 20 | 41.50 ± 0.4 | 41.50 |" in card(folder)
    assert "5,000 labelled images to learn from; evaluated on 1,000" in card(folder)
    assert "temperature = 0.07" in card(folder)
    assert "on uoft-cs/cifar10: not above random encoder in k = 20." in card(folder)
    entries = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/clmae.yaml").read_text()))
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [
        ("uoft-cs/cifar10", "knn-k-5", 40.25),
        ("uoft-cs/cifar10", "knn-k-20", 41.5),
    ]
    (folder / "knn.json").unlink()
    write_card(folder)
    assert not (folder / ".eval_results/clmae.yaml").exists()


def test_scores_on_local_data(folder, monkeypatch):
    (folder / "my" / "birds").mkdir(parents=True)
    monkeypatch.chdir(folder)
    for dataset, model in (
        *(("/home/me/secret/birds", None), ("secret/../birds/", None), (r"C:\secret\birds", None)),
        ("my/birds", None),  # a relative path is no Hub id
        ("her/birds", "elsewhere"),  # nor where it cannot be told: the model was elsewhere when it was evaluated
    ):
        write_evaluation(folder, dataset, model)
        write_card(folder)
        assert "** on birds, in %" in card(folder)
        assert "secret" not in card(folder)
        assert not (folder / ".eval_results").exists()


# -- a person's words -------------------------------------------------------------------------------------------------


def test_the_authors_section_survives(folder):
    words = "## Intended use\n\nFor $counting$ birds \\1, at dawn."
    before = card(folder)
    after = re.sub(r"(?s)## Intended use.*?\n<!-- /author", lambda _: f"{words}\n<!-- /author", before)
    (folder / "README.md").write_text(after)
    write_evaluation(folder)
    write_card(folder, "org/birds")
    assert f"-->\n{words}\n<!-- /author -->" in card(folder)
    assert "40.25" in card(folder)


@pytest.mark.parametrize(
    "edit", [lambda text: text.replace("## Limits", "## Limits\n\nNone!"), lambda text: "# Mine\n"]
)
def test_other_words_are_not_lost(folder, edit):
    edited = edit(card(folder))
    (folder / "README.md").write_text(edited)
    with pytest.raises(EditedCardError, match="--force"):
        write_card(folder)
    assert card(folder) == edited
    write_card(folder, force=True)
    assert card(folder) != edited
    write_card(folder)  # sealed again


def test_the_same_run_makes_the_same_card_and_line_ends_are_no_edit(folder):
    before = write_card(folder).read_text(encoding="utf-8")
    (folder / "README.md").write_bytes(before.replace("\n", "\r\n").encode())
    assert write_card(folder).read_text(encoding="utf-8") == before


# -- what goes to the Hub ---------------------------------------------------------------------------------------------


def test_hub_files(finished_run):
    names = hub_files(finished_run)
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(names)
    assert {"modeling_cl_mae.py", "configuration_mae.py", "losses.py", "pictures/step-000004.png"} <= set(names)
    assert [n for n in names if "checkpoint" in n or n.endswith((".bin", ".pt", ".json5")) or "state" in n] == []
    assert len(names) == len(set(names))


def test_hub_files_stay_inside(folder):
    (folder.parent / "secret.png").write_bytes(b"secret")
    (folder / "my_script.py").write_text("print('mine')")
    (folder / "README.md").write_text(f"![](../secret.png) ![]({folder.parent}/secret.png)")
    assert not any("secret" in name or "my_script" in name for name in hub_files(folder))


def test_a_missing_file_is_named(folder):
    check_folder(folder)
    names = ["config.json", "preprocessor_config.json", "losses.py", "modeling_cl_mae.py"]
    for name in names:
        (folder / name).rename(folder / f"{name}.away")
        with pytest.raises(ValueError, match=f"{name} is missing"):
            check_folder(folder)
        (folder / f"{name}.away").rename(folder / name)


def test_broken_weights(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, path)
    with pytest.raises(ValueError, match=f"not finite, in {re.escape(name)}"):
        check_folder(folder)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        check_folder(folder)
    path.unlink()
    with pytest.raises(ValueError, match="no weights"):
        check_folder(folder)


def test_an_incomplete_card(folder):
    (folder / "pictures" / "curves.png").unlink()
    with pytest.raises(ValueError, match=r"curves\.png is missing"):
        check_card(folder)
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="license"):
        check_card(folder)
    assert read_run(folder).curves is None
