# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae card`: exit code, messages, files."""

from __future__ import annotations

import json

import pytest

from clmae import MAEForPreTraining
from clmae.cli import main


@pytest.fixture
def folder(tmp_path, tiny_config):
    """A model and the state of its run."""
    MAEForPreTraining(tiny_config("mae")).save_pretrained(tmp_path / "out")
    history = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    state = {"global_step": 3, "log_history": history}
    (tmp_path / "out" / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path / "out"


def test_card(folder, capsys):
    assert main(["card", str(folder), "--repo_id", "org/tiny", "--license", "mit"]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'README.md'}\n"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "# tiny\n" in text
    assert "license: mit" in text
    assert "(pictures/curves.png)" in text
    assert (folder / "pictures" / "curves.png").stat().st_size > 1000


def test_an_edited_card_is_refused(folder, capsys):
    (folder / "README.md").write_text("# Mine\n")
    assert main(["card", str(folder)]) == 2
    assert "edited by hand" in capsys.readouterr().err
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
def test_wrong_use(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["card", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
