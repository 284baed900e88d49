# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The launchers' files: accelerate knows every field, and the SLURM script starts what it says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from torch.distributed.run import get_args_parser

from clmae.cli.pretrain import read_arguments

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(("name", "kind"), [("ddp", DistributedType.MULTI_GPU), ("fsdp", DistributedType.FSDP)])
def test_accelerate_configs(name, kind):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))  # refuses fields that it does not know
    assert config.distributed_type == kind
    assert config.num_processes == 8
    known = {action.dest for action in launch_command_parser()._actions}
    assert not config.fsdp_config.keys() - known
    assert bool(config.fsdp_config) == (name == "fsdp")
    assert config.mixed_precision == "no"
    if name == "fsdp":  # the one that a masking module allows
        assert config.fsdp_config["fsdp_version"] == 1
        assert config.fsdp_config["fsdp_use_orig_params"]


@pytest.fixture
def slurm(tmp_path):
    """`slurm(*options, **environment)`: what the script gives to `srun`, or its error."""
    commands = {"srun": 'printf "%s\\n" "$@"', "scontrol": 'printf "first\\nsecond\\n"'}
    for name, body in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    job = dict(JOB_NODELIST="n[1-2]", NNODES="2", GPUS_ON_NODE="4", JOB_ID="17", CPUS_PER_TASK="8")
    job = {f"SLURM_{name}": value for name, value in job.items()}

    def call(*options, **environment):
        environment = {**job, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **environment}
        command = ["bash", str(RECIPES / "slurm.sh"), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)

    return call


@pytest.mark.slow
def test_slurm_script(tmp_path, slurm):
    recipe, output = str(RECIPES / "mae_cifar10.yaml"), tmp_path / "run"
    done = slurm("--use_cpu", "true", RECIPE=recipe, OUTPUT=str(output))
    assert done.returncode == 0, done.stderr
    cpus, torchrun, *arguments = done.stdout.splitlines()
    assert (cpus, torchrun) == ("--cpus-per-task=8", "torchrun")
    launch = get_args_parser().parse_args(arguments)
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_id, launch.rdzv_backend) == ("2", "4", "17", "c10d")
    assert (launch.rdzv_endpoint, launch.module, launch.training_script) == ("first:29500", True, "clmae")
    command, *options = launch.training_script_args
    assert command == "pretrain"
    _, data, args, _ = read_arguments(options)
    assert (data.dataset, args.output_dir, args.resume_from_checkpoint) == ("uoft-cs/cifar10", str(output), "false")
    (output / "checkpoint-3").mkdir(parents=True)
    done = slurm(RECIPE=recipe, OUTPUT=str(output))
    assert done.stdout.splitlines()[-2:] == ["--resume_from_checkpoint", "last"]
    done = slurm(OUTPUT="run")
    assert done.returncode != 0
    assert "give a recipe" in done.stderr
