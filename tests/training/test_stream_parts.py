# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Parts of a stream: disjoint, together the whole, and only where processes may end an epoch apart."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from clmae.training import PretrainingArguments
from clmae.training.trainer import _reads_in_parts

from .runs import streaming_dataset


def noises(dataset):
    return [sample["noise"].numpy().tobytes() for sample in dataset]


@pytest.mark.parametrize("shards", [1, 3, 4])  # 4 are divided as they are
def test_parts_are_the_whole(shards):
    whole = streaming_dataset(13, shards)
    parts = [whole.part(i, 2) for i in range(2)]
    for epoch in (0, 1):
        whole.set_epoch(epoch)
        expected = noises(whole)
        found = []
        for part in parts:
            part.set_epoch(epoch)
            found += noises(part)
        assert sorted(found) == sorted(expected)
        assert len(set(found)) == 13


def test_parts_have_workers():
    part = streaming_dataset(13, 4).part(1, 2)
    loader = DataLoader(part, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        part.set_epoch(epoch)
        assert sorted(sample["noise"].numpy().tobytes() for sample in loader) == sorted(noises(part))


def test_where_a_stream_is_read_in_parts(tmp_path, monkeypatch):
    def reads(world=2, **options):
        args = PretrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
        monkeypatch.setattr(PretrainingArguments, "world_size", world)
        return _reads_in_parts(args)

    assert reads()
    monkeypatch.undo()
    assert not reads(world=1)
    for options in (
        {"save_strategy": "epoch"},
        {"eval_strategy": "epoch"},
        {"logging_strategy": "epoch"},
        {"accelerator_config": {"dispatch_batches": True}},
    ):
        monkeypatch.undo()
        assert not reads(**options)
