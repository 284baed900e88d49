# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""From the Trainer to the Hub and back by id, by huggingface_hub's own client to a Hub on this machine."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor

from clmae import CLMAEForPreTraining
from clmae.model_cards import hub_files
from clmae.training.data import make_image_processor

from ..local_hub import Fault, Repo

OWNER, OTHER = "hf_owner_token", "hf_other_token"
NUMBERS = itertools.count()

TRAIN = """
from pathlib import Path
from tests.training.runs import tiny_trainer
from transformers import BitImageProcessor
trainer = tiny_trainer(
    Path({folder!r}), max_steps=4, save_strategy="steps", save_steps=2, push_to_hub=True, hub_model_id={repo_id!r},
    hub_strategy={strategy!r}, hub_token={token!r}, hub_private_repo=True, hub_always_push=True,
    processing_class=BitImageProcessor(size={{"shortest_edge": 16}}),
)
trainer.train()
result = trainer.push_to_hub().oid
"""
FEATURES = """
import torch
{first}
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained({repo_id!r}, {options}).eval()
with torch.no_grad():
    features = model(torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)).last_hidden_state
result = [type(model).__module__, type(AutoImageProcessor.from_pretrained({repo_id!r})).__name__, features.tolist()]
"""


@pytest.fixture
def publish(hub, tmp_path, tiny_config):
    """`publish(private)`: the id of a CL-MAE on the Hub, and what its encoder gives for FEATURES' image."""

    def put(private=False):
        repo_id = f"org/cl-mae-{next(NUMBERS)}"
        torch.manual_seed(len(hub.repos))
        model = CLMAEForPreTraining(tiny_config("cl_mae"))
        model.save_pretrained(tmp_path)
        BitImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path)
        repo = hub.repos[repo_id] = Repo(private)
        repo.commit({path.name: path.read_bytes() for path in tmp_path.iterdir()})
        return repo_id, features_of(model)

    return put


def features_of(model):
    with torch.no_grad():
        return model.eval().vit(torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)).last_hidden_state


def features(client, repo_id, first="", options="", token=None):
    return client.attempt(FEATURES.format(repo_id=repo_id, first=first, options=options), token)


def assert_features(answer, expected, module):
    assert not answer["error"], answer["output"]
    model_module, processor, values = answer["result"]
    assert module in model_module
    assert processor.startswith("BitImageProcessor")
    torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-6, atol=1e-6)


# -- by id ------------------------------------------------------------------------------------------------------------


def test_without_clmae_the_models_own_code_runs_if_allowed(bare_client, publish):
    repo_id, expected = publish()
    answer = features(bare_client, repo_id)
    assert "trust_remote_code" in answer["error"]
    answer = features(bare_client, repo_id, options="trust_remote_code=True")
    assert_features(answer, expected, "transformers_modules")


PIPELINE = """
import numpy
{first}
from PIL import Image
from transformers import AutoImageProcessor, pipeline
picture = Image.fromarray(numpy.arange(768, dtype="uint8").reshape(16, 16, 3))
run = pipeline("image-feature-extraction", model={repo_id!r}, trust_remote_code={trust})
options = dict(trust_remote_code={trust})
both = [AutoImageProcessor.from_pretrained({repo_id!r}, backend=name, **options) for name in ("torchvision", "pil")]
result = [run(picture), *[type(each).__module__ + "." + type(each).__name__ for each in both]]
"""


@pytest.mark.parametrize("with_clmae", [True, False])
def test_a_model_of_one_channel_brings_its_image_processor(hub, client, bare_client, tmp_path, tiny_config, with_clmae):
    repo_id = f"org/grey-{next(NUMBERS)}"
    model = CLMAEForPreTraining(tiny_config("cl_mae", num_channels=1)).eval()
    model.save_pretrained(tmp_path)
    processor = make_image_processor(16, 1, [0.5], [0.5])
    processor.save_pretrained(tmp_path)
    assert "image_processing_mae.py" in hub_files(tmp_path)
    hub.repos[repo_id] = Repo()
    hub.repos[repo_id].commit({name: (tmp_path / name).read_bytes() for name in hub_files(tmp_path)})
    first, used = ("import clmae", client) if with_clmae else ("", bare_client)
    answer = used.attempt(PIPELINE.format(repo_id=repo_id, first=first, trust=None if with_clmae else True))
    assert not answer["error"], answer["output"]
    values, *names = answer["result"]
    place = "clmae.modeling.image_processing_mae." if with_clmae else "transformers_modules."
    assert all(name.startswith(place) for name in names)
    assert [name.rpartition(".")[2] for name in names] == ["MAEImageProcessor", "MAEImageProcessorPil"]
    picture = Image.fromarray(np.arange(768, dtype="uint8").reshape(16, 16, 3))
    with torch.no_grad():
        expected = model.vit(**processor(picture, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-5, atol=1e-5)


def test_with_clmae_no_code_of_the_hub_runs(client, publish):
    repo_id, expected = publish()
    assert_features(features(client, repo_id, first="import clmae"), expected, "clmae.modeling")


def test_a_private_model(client, bare_client, publish):
    repo_id, expected = publish(private=True)
    for token in (None, OTHER):
        answer = features(bare_client, repo_id, options="trust_remote_code=True", token=token)
        assert answer["error"].startswith("OSError")
        assert repo_id in answer["error"]
    assert_features(features(client, repo_id, first="import clmae", token=OWNER), expected, "clmae.modeling")


def test_a_missing_model(client):
    error = features(client, "org/nothing-here", first="import clmae")["error"]
    assert error.startswith("OSError")
    assert "org/nothing-here" in error


def test_an_interrupted_download_is_taken_up_where_it_broke(hub, client, publish):
    repo_id, expected = publish()
    request = f"GET /{repo_id}/resolve/[^/]+/model.safetensors"
    hub.faults = [Fault(request, after=5000)]
    # The client goes on after the last whole chunk, which is larger than this model unless it is told otherwise.
    chunks = "import clmae, huggingface_hub\nhuggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000"
    answer = features(client, repo_id, first=chunks)
    assert hub.faults == []  # it did break
    assert_features(answer, expected, "clmae.modeling")
    (resumed,) = [r for r in hub.requests if r.startswith(f"GET /{repo_id}") and "bytes=" in r]
    assert 0 < int(re.search(r"bytes=(\d+)-$", resumed)[1]) <= 5000


# -- from the Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_a_run_goes_to_the_hub_as_it_trains(hub, client, bare_client, tmp_path, strategy):
    repo_id, folder = f"org/run-{next(NUMBERS)}", tmp_path / "out"
    code = TRAIN.format(folder=str(folder), repo_id=repo_id, strategy=strategy, token=OWNER)
    head = client.run(code)
    repo = hub.repos[repo_id]
    assert repo.private
    assert repo.head == head
    saved = [files for files in repo.commits.values() if "model.safetensors" in files]
    assert len({files["model.safetensors"] for files in saved}) == 2  # steps 2 and 4
    for files in saved:  # each of them loads: its code came along
        assert {"config.json", "modeling_cl_mae.py", "preprocessor_config.json"} <= files.keys()
    names = set(repo.files)
    assert {"README.md", "pictures/curves.png"} <= names
    assert f"# {repo_id.split('/')[1]}\n" in repo.files["README.md"].decode()
    assert not any(OWNER.encode() in content or str(tmp_path).encode() in content for content in repo.files.values())
    assert not [name for name in names if name.endswith("training_args.bin") or "tfevents" in name]
    checkpoints = {name.split("/")[0] for name in names if name.startswith("checkpoint-")}
    assert checkpoints == ({"checkpoint-2", "checkpoint-4"} if strategy == "all_checkpoints" else set())
    expected = features_of(CLMAEForPreTraining.from_pretrained(folder))
    answer = features(bare_client, repo_id, options="trust_remote_code=True", token=OWNER)
    assert_features(answer, expected, "transformers_modules")
