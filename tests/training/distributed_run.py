# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""One process of `test_distributed_training.py`, started by torchrun.

`distributed_run.py FOLDER RUNS`, RUNS a JSON list of options: run i leaves its files in `FOLDER/i/rank-<rank>`; what is
resumed is relative to FOLDER.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from runs import record_run

if __name__ == "__main__":
    torch.set_num_threads(1)
    for i, options in enumerate(json.loads(sys.argv[2])):
        folder = Path(sys.argv[1]) / str(i) / f"rank-{os.environ['RANK']}"
        folder.mkdir(parents=True)
        if "resume" in options:
            options["resume"] = str(Path(sys.argv[1], options["resume"]))
        result = record_run(folder, **options)
        torch.save(result | {"world_size": dist.get_world_size()}, folder / "result.pt")
    dist.destroy_process_group()
