# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""No cache that another test has filled, and no Hub."""

import datasets
import huggingface_hub
import pytest


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    """See the module."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
