# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae card`; and `clmae push`, by huggingface_hub's own client to a Hub on this machine."""

from __future__ import annotations

import hashlib
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor

from clmae import MAEForPreTraining
from clmae.cli import main

from ..local_hub import Fault
from ..processes import script

OWNER = "hf_owner_token"
NUMBERS = itertools.count()


@pytest.fixture
def folder(tmp_path, tiny_config):
    """A model, its run's state, and what does not belong on the Hub."""
    path = tmp_path / "out"
    torch.manual_seed(next(NUMBERS))  # the Hub knows a file of any repository by its content
    MAEForPreTraining(tiny_config("mae")).save_pretrained(path)
    BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(path)
    history = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": history}))
    (path / "checkpoint-3").mkdir()
    for name in ("training_args.bin", "optimizer.pt", "checkpoint-3/model.safetensors", "events.out.tfevents.1"):
        (path / name).write_bytes(b"no")
    return path


@pytest.fixture
def repo_id():
    """A name that no other test has."""
    return f"org/push-{next(NUMBERS)}"


@pytest.fixture
def push(client):
    """`push(folder, repo_id, *options)`: the command's exit code and what it printed, run by the owner."""

    def run(folder, repo_id, *options, token=OWNER):
        arguments = ["push", str(folder), repo_id, *options]
        answer = client.attempt(f"from clmae.cli import main; result = main({arguments!r})", token)
        assert not answer["error"], answer["output"]
        assert "Traceback" not in answer["output"]
        assert OWNER not in answer["output"]
        return answer["result"], answer["output"]

    return run


def snapshot(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}


# -- clmae card -------------------------------------------------------------------------------------------------------


def test_card(folder, capsys, error):
    assert main(["card", str(folder)]) == 0
    assert "licence is apache-2.0, because no --license was given" in capsys.readouterr().out
    assert main(["card", str(folder), "--repo_id", "org/tiny", "--license", "mit"]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'README.md'}\n"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert all(part in text for part in ("# tiny\n", "license: mit", "(pictures/curves.png)"))
    assert (folder / "pictures" / "curves.png").stat().st_size > 1000
    (folder / "README.md").write_text("# Mine\n")
    assert "edited by hand" in error("card", folder)
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert main(["card", str(folder), "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no folder"),
        ([], "OUTPUT_DIR"),
        (["out", "--licence", "mit"], "did you mean '--license'"),
        (["."], "no config.json"),
    ],
)
def test_wrong_use_of_card(tmp_path, error, arguments, message):
    assert message in error("card", *arguments)
    assert list(tmp_path.iterdir()) == []


# -- clmae push -------------------------------------------------------------------------------------------------------


def test_push(hub, push, folder, repo_id):
    code, output = push(folder, repo_id)
    assert code == 0, output
    files = hub.repos[repo_id].files
    code_files = {"modeling_mae.py", "configuration_mae.py", "errors.py", "hub_code.py", "losses.py", "masking.py"}
    own = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "pictures/curves.png"}
    assert set(files) == own | code_files | {".gitattributes"}
    assert all(files[name] == (folder / name).read_bytes() for name in own)
    assert f'from_pretrained("{repo_id}"'.encode() in files["README.md"]
    assert "model.safetensors" in output
    assert f"{len(files) - 1} files, " in output
    assert f"pushed to {hub.url}/{repo_id}" in output
    assert len(hub.repos[repo_id].commits) == 2  # its creation, and this
    assert not hub.repos[repo_id].private


def test_a_second_push_changes_nothing_and_a_changed_model_is_one_commit(hub, push, folder, repo_id):
    push(folder, repo_id)
    head = hub.repos[repo_id].head
    code, output = push(folder, repo_id)
    assert (code, hub.repos[repo_id].head) == (0, head)
    assert "nothing has changed" in output
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "trainer_state.json").unlink()
    (folder / "pictures" / "curves.png").unlink()
    code, output = push(folder, repo_id)
    assert "pushed to" in output
    assert len(hub.repos[repo_id].commits) == 3
    assert hub.repos[repo_id].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "pictures/curves.png" not in hub.repos[repo_id].files  # the card no longer shows it


def test_private(hub, push, folder, repo_id):
    assert push(folder, repo_id, "--private")[0] == 0
    assert hub.repos[repo_id].private
    code, _ = push(folder, repo_id, token="hf_other_token")
    assert code == 2
    public = f"{repo_id}-public"
    push(folder, public)
    head = hub.repos[public].head
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    code, output = push(folder, public, "--private")
    assert (code, hub.repos[public].head) == (2, head)
    assert "public" in output


def test_somebody_elses_name(hub, push, folder, repo_id):
    code, output = push(folder, repo_id, token="hf_other_token")
    assert code == 2
    assert "403" in output
    assert "rights" in output
    assert repo_id not in hub.repos


@pytest.mark.parametrize("name", ["./folder", "folder", "org/a/b", "../x"])
def test_what_is_no_name_on_the_hub(hub, push, folder, name):
    code, output = push(folder, name)
    assert code == 2
    assert f"ID {name!r} is no name on the Hub; give owner/name." in output


def test_without_a_token_nothing_is_done(hub, push, folder, repo_id):
    before, requests = snapshot(folder), len(hub.requests)
    code, output = push(folder, repo_id, token=None)
    assert code == 2
    assert "HF_TOKEN" in output
    assert snapshot(folder) == before
    assert len(hub.requests) == requests


def test_a_connection_that_breaks(hub, push, folder, repo_id):
    for request, files in (("/api/repos/create", None), (f"/api/models/{repo_id}/commit/", [".gitattributes"])):
        hub.faults = [Fault(request, times=99)]
        code, output = push(folder, repo_id)
        hub.faults = []
        assert code == 2
        assert "no file was changed there" in output
        assert (list(hub.repos[repo_id].files) if repo_id in hub.repos else None) == files
        assert (folder / "README.md").read_text(encoding="utf-8").rstrip().endswith("-->")  # written whole
        assert not list(folder.rglob("*.unfinished"))
    hub.faults = [Fault("PUT /objects/")]  # once, where the client tries again
    save_file({"new": torch.rand(9)}, folder / "model.safetensors", {"format": "pt"})  # not there yet
    code, output = push(folder, repo_id)
    assert hub.faults == []  # it did break
    assert code == 0, output
    assert hub.repos[repo_id].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(hub.repos[repo_id].commits) == 2


def test_words_written_on_the_hub_are_not_lost(hub, push, folder, repo_id):
    push(folder, repo_id)
    repo = hub.repos[repo_id]
    edited = repo.files["README.md"].replace(b"*To be written by the model's author.*", b"For birds.")
    repo.commit({**repo.files, "README.md": edited})
    code, output = push(folder, repo_id)
    assert code == 2
    assert "edited on the Hub" in output
    assert repo.files["README.md"] == edited
    (folder / "README.md").write_bytes(edited)  # brought here, as the message says
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert push(folder, repo_id)[0] == 0
    assert b"For birds." in repo.files["README.md"]
    repo.commit({**repo.files, "README.md": edited + b"More.\n"})
    assert push(folder, repo_id)[0] == 2
    assert push(folder, repo_id, "--force")[0] == 0
    assert b"More." not in repo.files["README.md"]


def test_a_card_edited_here_goes_as_it_is(hub, push, folder, repo_id):
    push(folder, repo_id)
    edited = (folder / "README.md").read_text(encoding="utf-8") + "\nMine.\n"
    (folder / "README.md").write_text(edited, encoding="utf-8")
    code, output = push(folder, repo_id)
    assert code == 0, output
    assert "is uploaded as it is" in output
    assert hub.repos[repo_id].files["README.md"].decode() == edited


def test_what_is_not_fit_is_refused_at_once(hub, push, folder, repo_id):
    path, requests = folder / "model.safetensors", len(hub.requests)
    weights = load_file(path)
    save_file({name: torch.full_like(value, torch.inf) for name, value in weights.items()}, path)
    (folder / "losses.py").unlink()
    before = snapshot(folder)
    code, output = push(folder, repo_id)
    assert code == 2
    assert "losses.py is missing" in output
    assert "not finite" in output
    assert push(folder.parent / "nowhere", repo_id)[0] == 2
    assert push(folder, "just-a-name")[0] == 2
    assert snapshot(folder) == before
    assert len(hub.requests) == requests


@pytest.mark.slow
def test_space(hub, push, folder, repo_id, tmp_path, processes):
    (folder / "trainer_state.json").unlink()
    code, output = push(folder, repo_id, "--space")
    assert code == 0, output
    assert f"files to {hub.url}/spaces/{repo_id}" in output
    assert not (folder / "README.md").exists()  # no model card is made for it
    files = hub.repos[f"spaces/{repo_id}"].files
    assert files["README.md"].startswith(b"---\ntitle: push-")
    assert b"\nsdk: gradio\n" in files["README.md"]
    assert b"gradio>=6" in files["requirements.txt"]
    assert b"torch>=" in files["requirements.txt"]
    assert b"clmae" not in files["requirements.txt"]
    assert not [name for name in files if "checkpoint" in name or "training_args" in name]
    for name, content in files.items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    # As a Space runs it: nothing of the repository, and `serve` up to the page.
    code = "from clmae.app import Explorer; import clmae; print(Explorer('model').describe(), clmae.__file__)"
    result = processes.run(script, code, folder=tmp_path / "space")
    assert result.stdout.startswith("MAE, "), result.stderr
    assert str(tmp_path) in result.stdout
    assert "serve('model', host=None, port=None)" in files["app.py"].decode()


def test_space_of_a_model_on_the_hub(hub, push, folder, repo_id):
    assert push("org/some-model", repo_id, "--space", "--private")[0] == 0
    repo = hub.repos[f"spaces/{repo_id}"]
    assert repo.private
    assert "serve('org/some-model', host=None, port=None)" in repo.files["app.py"].decode()
    assert b"\nmodels: [org/some-model]\n---\n" in repo.files["README.md"]
    assert not [name for name in repo.files if name.startswith("model/")]
    assert repo_id not in hub.repos
    assert push("no/such/folder", repo_id, "--space")[0] == 2
    assert push(folder, repo_id, "--space", token="hf_other_token")[0] == 2
