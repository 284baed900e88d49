# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Samples per second of one loading process: `ImageDataset`, as training reads it, beside MAE's recipe.

    python benchmarks/input_pipeline.py --images PHOTOS

MAE's recipe is PIL's decoder and torchvision's RandomResizedCrop (bicubic), flip, ToTensor and Normalize, as in the
paper's code; ours ends with uint8, which the device normalises. Both get the encoded images of the same photographs
from the same dataset, on one thread, a round of each in turn. Writes `input_pipeline.md`: medians, their ratio, and the
mean absolute difference of the same crops in units of 1/255.
"""

from __future__ import annotations

import argparse
import functools
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from measure import describe
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from clmae.evaluation.tables import markdown_table
from clmae.model_cards.files import write_whole
from clmae.training.data import (
    ImageDataset,
    ImageSource,
    load_image_dataset,
    random_resized_crop_box,
    sample_state,
    uniform,
    unnormalized,
)

HERE = Path(__file__).resolve().parent
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SCALE = (0.2, 1.0)


def our_samples(source: ImageSource, size: int, **settings: Any) -> ImageDataset:
    """What the workers of `clmae pretrain` would do: square images of `size` pixels, in 14 or 8 rows of patches."""
    rows = 14 if size % 14 == 0 else 8
    dataset = ImageDataset(
        *source,
        image_size=(size, size),
        num_channels=3,
        num_patches=rows**2,
        patch_size=(size // rows, size // rows),
        mean=MEAN,
        std=STD,
        crop_scale=SCALE,
        **settings,
    )
    return unnormalized(dataset)


def mae_recipe(source: ImageSource, size: int) -> Callable[[int], torch.Tensor]:
    """Image by index to normalised sample `(3, size, size)`, as MAE's code makes it."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=SCALE, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda index: transform(_pil(source, index))


def _pil(source: ImageSource, index: int) -> Image.Image:
    value = source.dataset[index][source.image_column]
    return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]).convert("RGB")


def samples_per_second(make: Callable[[int], Any], start: int, count: int, num_images: int) -> float:
    """Of `count` samples, from the image `start` on, round and round."""
    begun = time.perf_counter()
    for i in range(start, start + count):
        make(i % num_images)
    return count / (time.perf_counter() - begun)


def difference(source: ImageSource, size: int, count: int) -> float:
    """Mean over `count` images of the mean absolute difference of our and PIL's pixels of the same crop, in 1/255."""
    ours = our_samples(source, size, horizontal_flip=False)
    differences = []
    for i in range(count):
        image = ImageOps.exif_transpose(_pil(source, i))
        # The box that the dataset draws for this image.
        draw = functools.partial(uniform, sample_state(0, 0, i))
        box = random_resized_crop_box(image.height, image.width, draw, SCALE)
        theirs = np.array(resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC), dtype=np.float32)
        differences.append(np.abs(ours[i]["pixel_values"].permute(1, 2, 0).numpy() - theirs).mean())
    return float(np.mean(differences))


def measure(source: ImageSource, size: int, rounds: int, count: int) -> dict[str, Any]:
    """A row of the table: samples per second of both, interleaved, and how their pixels differ."""
    num_images = len(source.dataset)
    makers = {"ours": our_samples(source, size).__getitem__, "recipe": mae_recipe(source, size)}
    for make in makers.values():
        samples_per_second(make, 0, min(count, 20), num_images)  # what happens once
    # The same images in a round; crops are drawn anew.
    speeds = pd.DataFrame(
        [
            {n: samples_per_second(make, i * count, count, num_images) for n, make in makers.items()}
            for i in range(rounds)
        ]
    ).median()
    return {
        "image size": size,
        "clmae, samples/s": f"{speeds['ours']:.0f}",
        "MAE's recipe, samples/s": f"{speeds['recipe']:.0f}",
        "ratio": f"{speeds['ours'] / speeds['recipe']:.2f}",
        "difference of a crop, 1/255": f"{difference(source, size, min(num_images, 100)):.3f}",
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="Photographs: a folder or file that `--dataset` would take.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 64], help="Pixels of a sample's side.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=200, help="Samples of each in a round.")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="Folder of the results.")
    args = parser.parse_args()
    threads, text = torch.get_num_threads(), describe(torch.device("cpu"))
    torch.set_num_threads(1)  # as in a loading process
    try:
        source = load_image_dataset(args.images)
        table = pd.DataFrame([measure(source, size, args.rounds, args.count) for size in args.sizes])
    finally:
        torch.set_num_threads(threads)
    text += f" One thread; {len(source.dataset)} images, medians of {args.rounds} interleaved rounds of {args.count} "
    text += f"samples.\n\n{markdown_table(table)}"
    write_whole(args.output / "input_pipeline.md", text)
    print(text)


if __name__ == "__main__":
    main()
