# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What is chosen by device: attention, and the way of float32 matrix products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clmae.training import base, matmul
from clmae.training.build import fastest_attention

from .runs import EachStep, tiny_trainer


def test_attention():
    assert [fastest_attention(torch.device(name)) for name in ("cpu", "cuda")] == ["eager", "sdpa"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("as_exact", "before", "options", "expected"),
    [
        (True, "highest", {}, "medium"),
        (False, "highest", {}, "highest"),
        (True, "high", {}, "high"),
        (True, "highest", {"bf16": True}, "highest"),
    ],
)
def test_matmul_precision(tmp_path, monkeypatch, as_exact, before, options, expected):
    messages, seen = [], set()
    monkeypatch.setattr(matmul, "medium_is_float32", lambda: as_exact)
    monkeypatch.setattr(matmul.logger, "info", messages.append)
    look = EachStep(lambda *args, **kwargs: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision(before)
    try:
        tiny_trainer(tmp_path, "mae", max_steps=1, callbacks=[look], **options).train()
        assert seen == {expected}
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert any("oneDNN" in message for message in messages) == (expected == "medium")


def test_the_precision_is_given_back_by_a_run_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(matmul, "medium_is_float32", lambda: True)
    with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
        tiny_trainer(tmp_path, "mae").train(resume_from_checkpoint=True)
    trainer = tiny_trainer(tmp_path, "mae")
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_is_tried_out(monkeypatch):
    matmul.medium_is_float32.__wrapped__()
    assert torch.get_float32_matmul_precision() == "highest"
    linear = nn.functional.linear
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # products stay as they are
    assert matmul.medium_is_float32.__wrapped__()

    def rounded(a, b):
        return linear(a, b) if a.dtype == torch.float64 else linear(a.bfloat16().float(), b.bfloat16().float())

    monkeypatch.setattr(nn.functional, "linear", rounded)
    assert not matmul.medium_is_float32.__wrapped__()


@pytest.mark.parametrize(
    ("capabilities", "bf16", "warns"),
    [
        ({"architecture": "x86_64", "avx512_f": False}, True, True),
        ({"architecture": "x86_64", "avx512_f": False}, False, False),
        ({"architecture": "x86_64", "avx512_f": True}, True, False),
        ({"architecture": "aarch64"}, True, False),
    ],
)
def test_emulated_bf16_is_warned_of(tmp_path, monkeypatch, capabilities, bf16, warns):
    messages = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(base.logger, "warning", messages.append)
    tiny_trainer(tmp_path, "mae", bf16=bf16)
    assert any("no AVX-512" in message for message in messages) == warns
