# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""One process of `test_features.py`, started by torchrun: leaves what it got in `FOLDER/<size>-<rank>.safetensors`."""

import sys
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import clmae
from clmae.evaluation.features import LabelledImages, extract_features, raw_pixels
from clmae.training.data import make_image_processor


def main(folder: Path, size: str) -> None:
    torch.set_num_threads(1)
    model = clmae.MAEModel.from_pretrained(folder / "model")
    encoded = []
    model.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    processor = make_image_processor(16, 3, [0.5] * 3, [0.5] * 3)
    images = LabelledImages(datasets.load_from_disk(str(folder / size)), processor)
    options = dict(batch_size=2, cache_dir=folder / "cache")
    features, labels = extract_features(model, images, **options)
    count = sum(encoded)
    dist.barrier()
    cached, _ = extract_features(model, images, **options, progress=False)
    assert sum(encoded) == count
    pixels, _ = raw_pixels(images, progress=False)
    found = {"features": features, "labels": labels, "cached": cached, "pixels": pixels, "encoded": torch.tensor(count)}
    save_file(
        {name: tensor.clone() for name, tensor in found.items()}, folder / f"{size}-{dist.get_rank()}.safetensors"
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        for size in sys.argv[2:]:
            main(Path(sys.argv[1]), size)
    finally:
        dist.destroy_process_group()
