# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Two processes with half the batch each arrive at the gradients of one process with all of it."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from clmae import CLMAEForPreTraining

TERMS = ("reconstruction_loss", "soft_reconstruction_loss", "gauss_loss", "kl_loss", "diversity_loss")
# (curriculum factor, gradient checkpointing, weights switched off, micro-batches) of each case.
CASES = {
    "plain": (-0.7, False, (), 1),
    "checkpointing": (-0.7, True, (), 1),
    "accumulation": (0.0, False, ("diversity_loss_weight",), 2),
    "sharded": (-0.7, False, (), 1),
    "sharded_checkpointing": (-0.7, True, (), 1),
}


def distribute(model: CLMAEForPreTraining, case: str) -> nn.Module:
    """DDP; or FSDP as recipes/accelerate/fsdp.yaml has it, with the blocks that the model names sharded one by one."""
    if not case.startswith("sharded"):
        return DistributedDataParallel(model)
    blocks = {type(module) for module in model.modules() if type(module).__name__ in model._no_split_modules}
    assert len(blocks) == len(model._no_split_modules)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def run_case(folder: Path, case: str, rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """Loss terms, the mask ranks and gradients of the rank's share of the batch."""
    factor, checkpointing, weights_off, parts = CASES[case]
    model = CLMAEForPreTraining.from_pretrained(folder, dtype=torch.float64).train()
    for weight in weights_off:
        setattr(model.config, weight, 0.0)
    if checkpointing:
        model.gradient_checkpointing_enable()
    run = distribute(model, case) if processes > 1 else model
    images = load_file(folder / "images.safetensors")["pixel_values"].chunk(processes)[rank]
    results: dict[str, torch.Tensor] = {}
    for i, part in enumerate(images.chunk(parts)):
        hold = run.no_sync() if processes > 1 and i < parts - 1 else contextlib.nullcontext()
        with hold:
            outputs = run(part, curriculum_factor=torch.tensor(factor, dtype=torch.float64))
            (outputs.loss / parts).backward()
        for term in TERMS:
            results[term] = results.get(term, 0) + outputs[term].detach() / parts
    if parts == 1:
        results["ids_restore"] = outputs.ids_restore
    whole = contextlib.nullcontext()
    if isinstance(run, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(run, with_grads=True)
    with whole:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                results[name.replace("_fsdp_wrapped_module.", "")] = parameter.grad.clone()
    return results


def one_of_two(folder: Path) -> None:
    """What each process does: leaves its results of each case in `<case>-<rank>.safetensors`."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case in CASES:
        save_file(run_case(folder, case, rank, dist.get_world_size()), folder / f"{case}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tiny_config, make_images, tmp_path_factory, processes):
    """A model, four images, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("two_processes")
    torch.manual_seed(0)
    model = CLMAEForPreTraining(tiny_config("cl_mae")).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_file({"pixel_values": make_images(model.config, 4, torch.float64)}, folder / "images.safetensors")
    processes.launch(2, one_of_two, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(folder, case):
    expected = run_case(folder, case)
    first, second = (load_file(folder / f"{case}-{rank}.safetensors") for rank in (0, 1))
    names = set(expected) - set(TERMS) - {"ids_restore"}
    assert first.keys() == expected.keys()
    assert sum(expected[name].abs().max() > 1e-6 for name in names) > 0.8 * len(names)
    for name in names:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected[name], atol=1e-10, rtol=0)
    for term in TERMS if case != "accumulation" else ("reconstruction_loss", "gauss_loss", "kl_loss"):
        torch.testing.assert_close((first[term] + second[term]) / 2, expected[term], atol=1e-12, rtol=0)
    if case != "accumulation":
        # These two are of the global batch already, in each process.
        for term in ("soft_reconstruction_loss", "diversity_loss"):
            torch.testing.assert_close(first[term], second[term], atol=0, rtol=0)
        assert torch.equal(torch.cat([first["ids_restore"], second["ids_restore"]]), expected["ids_restore"])
