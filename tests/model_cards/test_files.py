# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""A file is replaced whole or not at all, and is as readable as any other."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from clmae.model_cards.files import replacing, write_whole


def test_the_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_bytes(b"whole")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    write_whole(path, "ä\r\n")
    assert path.read_bytes() == "ä\r\n".encode()
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_writers_at_the_same_time_do_not_meet(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # which ends last


def test_mode_is_that_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "weights.safetensors") as temporary:
        save_file({"weight": torch.ones(2)}, temporary)
    assert load_file(tmp_path / "weights.safetensors")["weight"].tolist() == [1, 1]
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
