# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Tiny configurations and images for every test."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import datasets
import huggingface_hub
import pytest
import torch

import clmae
from clmae.configuration.configuration_mae import pair

from .local_hub import Client, LocalHub
from .processes import Processes

TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
    image_size=16,
    patch_size=4,
)
TINY_MASKER = dict(
    **dict(masker_objective="soft"),
    **dict(masker_num_hidden_layers=2, masker_num_attention_heads=2, masker_intermediate_size=48),
)
# All of its tasks, in the form that is easiest to compute by hand.
TINY_CMAE = dict(
    masker_objective="soft",
    contrastive_loss_weight=0.1,
    position_loss_weight=0.1,
    projection_batch_norm=False,
    decoded_views=2,
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what starts a process or needs a model that was trained first."""
    for item in items:
        if {"processes", "trained", "finished_run"} & set(item.fixturenames):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _deterministic():
    """One seed, and one thread unless OMP_NUM_THREADS says otherwise: tiny models are slower on several."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of `datasets` that no other test has filled, and no Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., clmae.MAEConfig]:
    """`tiny_config(family, **fields)`: 16 patches of 4 pixels, 32 wide, 2 blocks in each network."""

    def make(family: str = "mae", **fields) -> clmae.MAEConfig:
        masker = {"cl_mae": TINY_MASKER, "cmae": TINY_CMAE}.get(family, {})
        return clmae.FAMILIES[family][0](**{**TINY, **masker, **fields})

    return make


@pytest.fixture(scope="session")
def make_images() -> Callable[..., torch.Tensor]:
    """`make_images(config, batch_size)`: normally distributed `pixel_values` of the configured shape."""

    def make(config: clmae.MAEConfig, batch_size: int = 2, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
        shape = (batch_size, config.num_channels, *pair(config.image_size))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    return make


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """`benchmark(name)`: a script of `benchmarks/` as a module, which finds those beside it."""
    folder = Path(__file__).parents[1] / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if folder in Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]


@pytest.fixture(scope="session")
def hub():
    """A Hub on this machine; tests take repositories of their own."""
    with LocalHub() as server:
        yield server


@pytest.fixture(scope="session")
def processes(hub, tmp_path_factory):
    """What starts processes for tests; their huggingface_hub talks to `hub`."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    started = Processes(tmp_path_factory.mktemp("processes"), {**settings, "NO_PROXY": "127.0.0.1"})
    yield started
    started.close()


@pytest.fixture(scope="session")
def client(processes, tmp_path_factory):
    """A process that talks to `hub`, for whoever is to use it."""
    return Client(processes, tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="session")
def bare_client(processes, tmp_path_factory):
    """The same, without `clmae`."""
    return Client(processes, tmp_path_factory.mktemp("client"), clmae=False)
