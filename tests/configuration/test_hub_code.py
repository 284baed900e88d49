# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The code beside a checkpoint: what is written, and that it loads in a process that has no `clmae`."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import logging
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    BitImageProcessor,
)

from clmae import FAMILIES
from clmae.configuration import CLMAEConfig
from clmae.configuration.hub_code import AUTO_CLASSES, hub_auto_map, hub_code
from clmae.training import CurriculumTrainer, PretrainingArguments

from ..processes import script

# All that a family's folder may hold: nothing of another family that it does not build on.
MAE_FILES = {"configuration_mae.py", "errors.py", "hub_code.py", "losses.py", "masking.py", "modeling_mae.py"}
CL_MAE_FILES = MAE_FILES | {"configuration_cl_mae.py", "modeling_cl_mae.py"}
FILES = {
    "mae": MAE_FILES,
    "cl_mae": CL_MAE_FILES,
    "cmae": CL_MAE_FILES | {"configuration_cmae.py", "modeling_cmae.py"},
}

# Loads every folder with every Auto class where `clmae` cannot be imported, saves again, and keeps what came out.
STRANGER = """
import sys
import json, torch, transformers
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor
root, families, images = sys.argv[1], sys.argv[2].split(","), torch.load(sys.argv[1] + "/images.pt")
outputs, classes = {}, {}
for family in families:
    for kind, auto in (
        ("ForPreTraining", "AutoModelForPreTraining"),
        ("ForImageClassification", "AutoModelForImageClassification"),
        ("Model", "AutoModel"),
    ):
        folder = f"{root}/{family}/{kind}"
        try:
            AutoConfig.from_pretrained(folder)
            raise SystemExit("code ran without consent")
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
        classes[f"{family}/{kind}"] = type(model).__name__
        kwargs = {"noise": torch.linspace(0, 1, 16).expand(2, 16)} if kind == "ForPreTraining" else {}
        with torch.no_grad():
            outputs[f"{family}/{kind}"] = model(images, return_dict=True, **kwargs)[-1 if kind == "Model" else "logits"]
        model.save_pretrained(folder.replace(family, family + "-again"))
    # The encoder out of the autoencoder's folder, another Auto class than the one that saved it.
    folder = f"{root}/{family}/ForPreTraining"
    encoder = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, out_indices=[-1])
    backbone = AutoBackbone.from_config(config, trust_remote_code=True).eval()
    backbone.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        outputs[f"{family}/encoder"] = encoder(images).last_hidden_state
        outputs[f"{family}/backbone"] = backbone(images).feature_maps[0]
    classes[f"{family}/processor"] = type(AutoImageProcessor.from_pretrained(folder)).__name__
assert not [name for name in sys.modules if name.split(".")[0] == "clmae"]
torch.save(outputs, root + "/outputs.pt")
json.dump(classes, open(root + "/classes.json", "w"))
"""


def python_files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_config, make_images, processes):
    """Every class of every family, saved here; outputs and saved folders of a process without `clmae`."""
    root = tmp_path_factory.mktemp("hub")
    images = make_images(tiny_config())
    torch.save(images, root / "images.pt")
    for family, (_, *classes, _) in FAMILIES.items():
        for model_class in classes:
            config = tiny_config(family, num_labels=3)
            folder = root / family / model_class.__name__.removeprefix(config.__class__.__name__.removesuffix("Config"))
            model_class(config).save_pretrained(folder)
            BitImageProcessor(size={"shortest_edge": 16}).save_pretrained(folder)
    processes.run(script, STRANGER, root, ",".join(FAMILIES), clmae=False)
    return root, images, torch.load(root / "outputs.pt"), json.loads((root / "classes.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_without_clmae_computes_the_same(family, shared, caplog, monkeypatch):
    root, images, outputs, classes = shared
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    prefix = FAMILIES[family][0].__name__.removesuffix("Config")
    for kind, auto_class in (
        ("ForPreTraining", AutoModelForPreTraining),
        ("ForImageClassification", AutoModelForImageClassification),
        ("Model", AutoModel),
    ):
        with caplog.at_level(logging.WARNING):
            model = auto_class.from_pretrained(root / family / kind).eval()
        assert type(model).__module__.startswith("clmae.")  # the local class wins
        assert classes[f"{family}/{kind}"] == f"{prefix}{kind}" == type(model).__name__
        arguments = {"noise": torch.linspace(0, 1, 16).expand(2, 16)} if kind == "ForPreTraining" else {}
        with torch.no_grad():
            result = model(images, **arguments)
        expected = result.pooler_output if kind == "Model" else result.logits
        assert torch.equal(outputs[f"{family}/{kind}"], expected)
    assert caplog.records == []
    encoder = AutoModel.from_pretrained(root / family / "ForPreTraining").eval()
    with torch.no_grad():
        tokens = encoder(images).last_hidden_state
    assert torch.equal(outputs[f"{family}/encoder"], tokens)
    assert torch.equal(outputs[f"{family}/backbone"].flatten(2).transpose(1, 2), tokens[:, 1:])
    assert classes[f"{family}/processor"].startswith("BitImageProcessor")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ForPreTraining", "ForImageClassification", "Model"])
def test_saving_again_without_clmae_writes_the_same_folder(family, kind, shared):
    root, *_ = shared
    first, again = root / family / kind, root / f"{family}-again" / kind
    assert python_files(again) == python_files(first)
    assert set(python_files(first)) == FILES[family]
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads((first / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_is_whole_flat_and_licensed(family):
    code = hub_code(family)
    assert set(code) == FILES[family]
    assert hub_code(family) == code
    for name, source in code.items():
        assert source.startswith("# Copyright 2026 The clmae authors. Licensed under the Apache License"), name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                assert (node.module.split(".")[0] != "clmae") if node.level == 0 else f"{node.module}.py" in code
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "clmae" for alias in node.names)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_map_names_the_registered_classes(family, tiny_config, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    assert set(python_files(tmp_path)) == FILES[family]
    names = [f"modeling_{family}.{registered.__name__}" for registered in FAMILIES[family]]
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert written == dict(zip(AUTO_CLASSES, names, strict=True))
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)) is FAMILIES[family][0]


@pytest.mark.slow
def test_a_trainers_checkpoint_holds_the_code(tmp_path, tiny_config, make_images):
    config = tiny_config("cl_mae")
    images = [{"pixel_values": image} for image in make_images(config, 4)]
    options = dict(dataloader_pin_memory=False, use_cpu=True, report_to="none")
    args = PretrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, per_device_train_batch_size=4, **options
    )
    trainer = CurriculumTrainer(model=FAMILIES["cl_mae"][2](config), args=args, train_dataset=images)
    trainer.train()
    assert set(python_files(tmp_path / "checkpoint-1")) == FILES["cl_mae"]


def test_only_the_main_process_writes(tmp_path, tiny_config):
    FAMILIES["cl_mae"][1](tiny_config("cl_mae")).save_pretrained(tmp_path, is_main_process=False)
    assert python_files(tmp_path) == {}


def test_pushing_a_configuration_pushes_after_the_code_is_there(tmp_path, tiny_config, monkeypatch):
    pushed = {}

    def push_to_hub(self, repo_id, **kwargs):
        pushed.update(repo_id=repo_id, **kwargs)

    monkeypatch.setattr(CLMAEConfig, "push_to_hub", push_to_hub)
    tiny_config("cl_mae").save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert pushed == {"repo_id": "mine", "private": True}
    tiny_config("cl_mae").save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="org/mine")
    assert pushed["repo_id"] == "org/mine"


def test_a_family_from_elsewhere_is_saved_without_code(tmp_path):
    class OtherConfig(CLMAEConfig):
        model_type = "other"

    assert hub_auto_map(OtherConfig) == {}
    OtherConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


USERS = """
from clmae import FAMILIES
{family_config}, _, {family_model}, *_ = FAMILIES["{family}"]
class UsersConfig({family_config}):
    {model_type}
class UsersModel({family_model}):
    config_class = UsersConfig
"""
# In a process of its own, where nothing has registered the classes: what the folder names them.
READER = """
import sys
from transformers import AutoModelForPreTraining
for folder in sys.argv[1:]:
    model = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
    print(type(model).__name__, type(model.config).__name__)
    model.save_pretrained(folder)
"""


@pytest.fixture(scope="module")
def users_folders(tmp_path_factory, tiny_config):
    """Models of a user's subclasses, with the family's `model_type` and their own, registered as transformers says."""
    root, folders = tmp_path_factory.mktemp("users"), {}
    for family in FAMILIES:
        for own in (False, True):
            name = f"users_{family}_{own}"
            names = dict(family_config="Base", family_model="BaseModel", family=family)
            source = USERS.format(**names, model_type=f"model_type = '{name}'" if own else "pass")
            (root / f"{name}.py").write_text(source)
            spec = importlib.util.spec_from_file_location(name, root / f"{name}.py")
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.UsersConfig.register_for_auto_class()
            module.UsersModel.register_for_auto_class("AutoModelForPreTraining")
            fields = {name: value for name, value in tiny_config(family).to_dict().items() if name != "model_type"}
            folders[family, own] = root / name
            module.UsersModel(module.UsersConfig(**fields)).save_pretrained(folders[family, own])
    return root, folders


@pytest.mark.slow
def test_a_users_subclass_is_loaded_as_itself(users_folders, processes):
    _, folders = users_folders
    for (family, own), folder in folders.items():
        users = {"AutoConfig": "UsersConfig", "AutoModelForPreTraining": "UsersModel"}
        users = {auto_class: f"{folder.name}.{name}" for auto_class, name in users.items()}
        expected = users if own else hub_auto_map(FAMILIES[family][0]) | users
        assert json.loads((folder / "config.json").read_text())["auto_map"] == expected
    # With the family's `model_type`, transformers takes the family's class once `clmae` is imported; so that one first.
    order = [folders["mae", False], *(folder for (_, own), folder in folders.items() if own)]
    for _ in range(2):  # and again, as what was loaded so saved it
        assert processes.run(script, READER, *order).stdout.split() == ["UsersModel", "UsersConfig"] * len(order)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_users_subclass_registered_here_needs_no_flag(users_folders, family):
    _, folders = users_folders
    module = sys.modules[f"users_{family}_True"]
    AutoConfig.register(module.UsersConfig.model_type, module.UsersConfig)
    AutoModelForPreTraining.register(module.UsersConfig, module.UsersModel)
    assert type(AutoModelForPreTraining.from_pretrained(folders[family, True])) is module.UsersModel


def test_another_familys_entries_are_not_taken_over(tmp_path, tiny_config):
    for family, other in itertools.permutations(FAMILIES, 2):
        FAMILIES[family][1](tiny_config(family)).save_pretrained(tmp_path)
        FAMILIES[other][0].from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == hub_auto_map(FAMILIES[other][0])
