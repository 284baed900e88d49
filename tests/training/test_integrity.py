# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Manifests of checkpoints and models, the choice among them, their rotation, and one run at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import zlib
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from clmae.training import base
from clmae.training.integrity import (
    LOCK_NAME,
    checkpoint_step,
    checkpoints,
    choose_checkpoint,
    last_valid_checkpoint,
    rotate_checkpoints,
    run_lock,
    seal,
    unseal,
    verify,
)

from ..processes import script
from .runs import assert_equal_weights, image_dataset, tiny_model, tiny_trainer, warned, weights

SAVING = dict(save_strategy="steps", save_steps=2, max_steps=6, save_total_limit=None)


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture
def folder(tmp_path):
    """`checkpoint-8`, `-9` and `-10`, sealed, in one output folder (by name, 9 would be the last)."""
    for step in (8, 9, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        (checkpoint / "shards").mkdir(parents=True)
        for name in ("model.safetensors", "shards/0.bin"):
            (checkpoint / name).write_bytes(bytes(range(200)))
        seal(checkpoint)
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    return tmp_path


# -- manifests --------------------------------------------------------------------------------------------------------


def test_a_folder_with_its_manifest_is_valid(folder):
    checkpoint = folder / "checkpoint-9"
    assert verify(checkpoint) == []
    files = json.loads((checkpoint / "sealed.json").read_text())["files"]
    assert {name: entry["size"] for name, entry in files.items()} == {"model.safetensors": 200, "shards/0.bin": 200}
    (checkpoint / "notes.txt").write_text("added later")
    seal(checkpoint, ["model.safetensors"])
    (checkpoint / "shards/0.bin").unlink()
    assert verify(checkpoint) == []
    assert [path.name for path in checkpoint.iterdir() if "unfinished" in path.name] == []


@pytest.mark.parametrize("name", ["model.safetensors", "shards/0.bin"])
@pytest.mark.parametrize(
    ("fault", "message"), [(flip_bit, "checksum"), (cut, "100 bytes, but 200"), (Path.unlink, "is missing")]
)
def test_every_fault_is_found_and_named(folder, name, fault, message):
    fault(folder / "checkpoint-9" / name)
    (problem,) = verify(folder / "checkpoint-9")
    assert problem.startswith(name)
    assert message in problem


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"files": 3}',
        '{"files": {"a": {}}}',
        '{"files": {"a": {"size": Infinity, "crc32": 1}}}',
        '{"files": {"../checkpoint-8/model.safetensors": {"size": 200, "crc32": 1}}}',
        '{"files": {"/etc/hostname": {"size": 1, "crc32": 1}}}',
        '{"files": {"\\u0000": {"size": 1, "crc32": 1}}}',
        '{"files": {"model.safetensors": {"size": 200, "crc32": 2}}, "crc32": 1}',
        "[" * 100_000,
    ],
)
def test_a_broken_manifest_is_a_problem(folder, content):
    if content.startswith('{"files"') and not content.endswith('"crc32": 1}'):  # its checksum is in order
        files = json.loads(content)["files"]
        content = json.dumps({"files": files, "crc32": zlib.crc32(json.dumps(files, sort_keys=True).encode())})
    (folder / "checkpoint-9" / "sealed.json").write_text(content)
    assert len(verify(folder / "checkpoint-9")) == 1


@pytest.mark.slow
def test_every_byte_of_the_manifest_counts(folder):
    path = folder / "checkpoint-9" / "sealed.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        problems = verify(folder / "checkpoint-9")
        # A tab for a space and the like change nothing.
        assert problems or json.loads(changed) == json.loads(whole)
        assert all(problem.startswith("sealed.json") for problem in problems)


def test_the_manifest_comes_last_and_whole(folder, monkeypatch):
    checkpoint = folder / "checkpoint-9"
    unseal(checkpoint)
    assert "no manifest" in verify(checkpoint)[0]
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        seal(checkpoint)
    assert "no manifest" in verify(checkpoint)[0]


# -- which checkpoint -------------------------------------------------------------------------------------------------


def test_the_newest_valid_checkpoint_is_taken_and_the_others_named(folder, caplog):
    assert last_valid_checkpoint(folder) == (folder / "checkpoint-10", {})
    assert choose_checkpoint(True, folder) == str(folder / "checkpoint-10")
    assert warned(caplog) == []
    flip_bit(folder / "checkpoint-10" / "model.safetensors")
    unseal(folder / "checkpoint-9")
    assert choose_checkpoint(True, folder) == str(folder / "checkpoint-8")
    first, second, third = warned(caplog)
    assert "Passed over checkpoint-10: model.safetensors" in first
    assert "checkpoint-9: it is not sealed" in second
    assert "Resuming from checkpoint-8" in third
    shutil.rmtree(folder / "checkpoint-8")
    with pytest.raises(ValueError, match=r"no valid checkpoint: checkpoint-10: .*checksum.*checkpoint-9"):
        choose_checkpoint(True, folder)


def test_a_checkpoint_that_is_named_must_not_be_damaged(folder, caplog, tmp_path):
    checkpoint = folder / "checkpoint-9"
    assert choose_checkpoint(str(checkpoint), folder) == str(checkpoint)
    cut(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-9.*damaged: model\.safetensors has 100 bytes"):
        choose_checkpoint(str(checkpoint), folder)
    assert warned(caplog) == []
    unseal(checkpoint)  # as another program's
    assert choose_checkpoint(checkpoint, folder) == str(checkpoint)
    assert "no manifest (sealed.json)" in warned(caplog)[0]
    with pytest.raises(ValueError, match="no such folder"):
        choose_checkpoint(str(tmp_path / "none"), folder)
    assert choose_checkpoint(None, folder) is None
    assert choose_checkpoint(False, folder) is None


@pytest.mark.parametrize(
    ("step", "limit", "best", "left"),
    [
        (10, 2, None, {9, 10}),
        (10, 1, None, {10}),
        (10, 1, 8, {8, 10}),
        (10, 2, 8, {8, 10}),
        (10, None, None, {8, 9, 10}),
        (10, 0, None, {8, 9, 10}),
        (9, 2, None, {8, 9}),  # went back behind 10
        (9, 1, None, {9}),
    ],
)
def test_rotation_goes_by_steps(folder, step, limit, best, left):
    for age, name in enumerate((10, 8, 9)):  # as if the clock had been set back
        os.utime(folder / f"checkpoint-{name}", (time.time() - 1e6 * age,) * 2)
    rotate_checkpoints(folder, step, limit, best and str(folder / f"checkpoint-{best}"))
    assert {checkpoint_step(path) for path in checkpoints(folder)} == left
    assert (folder / "checkpoint-best").is_dir()


@pytest.mark.parametrize("spelling", ["relative", "slash", "link"])
def test_the_best_checkpoint_stays_however_it_is_spelled(folder, monkeypatch, spelling):
    (folder / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    best = {"relative": "checkpoint-8", "slash": f"{folder}/./checkpoint-8/", "link": folder / "link" / "checkpoint-8"}
    rotate_checkpoints(folder, 10, 1, best[spelling])
    assert {checkpoint_step(path) for path in checkpoints(folder)} == {8, 10}


def test_a_checkpoint_that_is_half_deleted_does_not_count(folder, monkeypatch):
    delete = shutil.rmtree

    def stop_halfway(path, **options):
        (path / "model.safetensors").unlink()  # as if killed at that moment

    monkeypatch.setattr(shutil, "rmtree", stop_halfway)
    rotate_checkpoints(folder, 10, 2)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-9", "checkpoint-10"]
    assert any((folder / name).is_dir() for name in os.listdir(folder) if name.startswith(".checkpoint-8"))
    monkeypatch.setattr(shutil, "rmtree", delete)
    rotate_checkpoints(folder, 10, 1)
    assert sorted(os.listdir(folder)) == ["checkpoint-10", "checkpoint-best"]


# -- the trainer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of six steps with all its checkpoints and its model, and its weights."""
    folder = tmp_path_factory.mktemp("finished")
    model = tiny_model("cmae", learned_masks=True)
    trainer = tiny_trainer(folder, model, train_dataset=image_dataset(contrastive_crop=True, num_views=2), **SAVING)
    trainer.train()
    trainer.save_model()
    return folder, weights(trainer.model)


@pytest.mark.slow
def test_manifests_name_all_that_belongs(finished, tmp_path):
    folder, _ = finished
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    expected = {"model.safetensors", "config.json", "pretraining.json", "modeling_cmae.py"}
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "contrastive_crop.safetensors"}
    for path, names in ((folder, expected), (folder / "checkpoint-4", expected | states)):
        assert verify(path) == []
        assert names <= json.loads((path / "sealed.json").read_text())["files"].keys()
    shutil.copytree(folder / "checkpoint-4", tmp_path, dirs_exist_ok=True)
    (tmp_path / "training_args.bin").unlink()  # as in a checkpoint from the Hub
    assert verify(tmp_path) == []
    assert not (folder / LOCK_NAME).exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["flip", "cut", "missing", "no manifest"])
def test_a_run_resumes_bit_by_bit_from_the_newest_valid_checkpoint(finished, tmp_path, caplog, fault):
    folder, expected = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-6")
    name = {"flip": "model.safetensors", "cut": "contrastive_crop.safetensors", "missing": "rng_state.pth"}
    path = tmp_path / "checkpoint-4" / name.get(fault, "sealed.json")
    {"flip": flip_bit, "cut": cut}.get(fault, Path.unlink)(path)
    model = tiny_model("cmae", learned_masks=True)
    dataset = image_dataset(contrastive_crop=True, num_views=2)
    trainer = tiny_trainer(tmp_path, model, train_dataset=dataset, **{**SAVING, "save_total_limit": 2})
    trainer.train(resume_from_checkpoint=True)
    assert path.name in warned(caplog)[0]
    assert_equal_weights(weights(trainer.model), expected)
    left = checkpoints(tmp_path)
    assert [path.name for path in left] == ["checkpoint-4", "checkpoint-6"]
    assert [verify(path) for path in left] == [[], []]


@pytest.mark.slow
def test_a_run_that_had_come_to_its_end_takes_no_step_more(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    dataset = image_dataset(contrastive_crop=True, num_views=2)
    trainer = tiny_trainer(tmp_path, tiny_model("cmae", learned_masks=True), train_dataset=dataset, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert_equal_weights(weights(trainer.model), finished[1])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_before_anything_is_read(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "copy")
    cut(tmp_path / "copy" / "optimizer.pt")
    trainer = tiny_trainer(tmp_path / "out", tiny_model("cmae", learned_masks=True))
    with pytest.raises(ValueError, match=r"optimizer\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "copy"))


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.slow
def test_nothing_in_a_checkpoint_is_unpickled_freely(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "whole")
    pickled = sorted(path.name for path in (tmp_path / "whole").iterdir() if path.suffix in (".pt", ".pth", ".bin"))
    assert pickled == ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"]
    for name in pickled:
        hostile, made = tmp_path / name.split(".")[0], tmp_path / "made"
        shutil.copytree(tmp_path / "whole", hostile)
        torch.save({"x": Payload(made)}, hostile / name)
        seal(hostile)  # whoever wants to harm can seal
        dataset = image_dataset(contrastive_crop=True, num_views=2)
        trainer = tiny_trainer(
            tmp_path / "out", tiny_model("cmae", learned_masks=True), train_dataset=dataset, **SAVING
        )
        refused = pytest.raises(pickle.UnpicklingError, match="weights_only")
        with contextlib.nullcontext() if name == "training_args.bin" else refused:  # which nobody reads
            trainer.train(resume_from_checkpoint=str(hostile))
        assert not made.exists()
        torch.load(hostile / name, weights_only=False)
        made.rmdir()  # it would have


def test_tokens_are_nowhere(tmp_path, capfd):
    secret = "hf_do_not_tell"
    trainer = tiny_trainer(tmp_path, "mae", **SAVING, hub_token=secret, report_to="tensorboard", log_level="debug")
    print(trainer.args)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {"README.md", "pretraining.json", "trainer_state.json", "training_args.bin", "config.json"}
    assert names <= {path.name for path in written}
    # Files of torch.save are zip archives without compression.
    assert [str(path) for path in written if secret.encode() in path.read_bytes()] == []
    assert secret not in "".join(capfd.readouterr())
    assert trainer.args.hub_token == secret


def test_older_checkpoints_go_only_when_the_new_one_has_its_manifest(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, "mae", **{**SAVING, "save_total_limit": 1})
    seen = []

    def look(folder, names=None):
        seen.append([path.name for path in checkpoints(tmp_path) if not verify(path)])
        seal(folder, names)

    monkeypatch.setattr(base, "seal", look)
    trainer.train()
    assert seen == [[], ["checkpoint-2"], ["checkpoint-4"]]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6"]
    assert trainer.args.save_total_limit == 1
    saved = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1  # as they are given


@pytest.mark.slow
def test_a_model_that_is_written_over_has_no_manifest_meanwhile(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    trainer = tiny_trainer(tmp_path, "mae")
    monkeypatch.setattr(trainer.model, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trainer.save_model()
    assert "no manifest" in verify(tmp_path)[0]


@pytest.mark.slow
def test_importing_leaves_torchs_deserialisers_as_they_are(processes):
    code = "import torch; known = list(torch.serialization._package_registry); import clmae.training, clmae.evaluation"
    code += "; assert torch.serialization._package_registry == known"
    processes.run(script, code)


# -- one run at a time ------------------------------------------------------------------------------------------------


def hold(folder, connection):
    with run_lock(folder):
        connection.send(os.getpid())
        time.sleep(60)


@pytest.fixture
def other(tmp_path, processes):
    """A process that holds the lock of `tmp_path`."""
    here, there = multiprocessing.Pipe()
    process = processes.start(hold, tmp_path, there)
    assert here.poll(60)
    yield process
    if process.running:
        process.signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, other):
    trainer = tiny_trainer(tmp_path, "mae", max_steps=1)
    with pytest.raises(ValueError, match=rf"in use by another run \(process {other.pid} on "):
        trainer.train()
    other.signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK_NAME).is_file()  # left by the dead; it keeps nobody out
    trainer.train()
    assert trainer.state.global_step == 1
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_folder_that_is_lost_meanwhile_hides_no_error(tmp_path):
    def lose(folder):
        shutil.rmtree(folder)
        folder.write_text("no folder")
        raise OSError("disk lost")

    with pytest.raises(OSError, match="disk lost"), run_lock(tmp_path / "out"):
        lose(tmp_path / "out")


def test_a_second_run_of_the_same_process_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with run_lock(tmp_path), pytest.raises(ValueError, match="of this process"), run_lock(tmp_path / "link"):
        pass
    with run_lock(tmp_path):  # free again
        assert (tmp_path / LOCK_NAME).is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="cannot be written to"), run_lock(tmp_path / "out"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("no folder")
    with pytest.raises(ValueError, match=r"`output_dir`.*cannot be written to"), run_lock(tmp_path / "out"):
        pass


def test_where_there_are_no_locks_the_run_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with run_lock(tmp_path):
        assert "No locks available" in warned(caplog)[0]
