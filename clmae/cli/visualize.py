# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Draw masks and reconstructions of images.

examples:
  clmae visualize --model out/cl-mae --images photo1.jpg photo2.jpg --output masks.png
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForPreTraining
from transformers.hf_argparser import HfArg

from clmae.cli.folders import load_whole
from clmae.cli.options import CommandParser
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards.run import read_model_config


@dataclass
class VisualizeArguments:
    """What to draw."""

    model: str = HfArg(help="Folder or Hub id of a pretrained masked autoencoder.")
    images: list[str] = HfArg(help="Image files, or folders of which the first 8 are drawn.")
    output: str = HfArg(default="masks.png", help="PNG file to write.")
    seed: int = HfArg(default=0, help="Seed of the masks, where they are drawn.")


def run(argv: Sequence[str]) -> int:
    """Draws images, masks, reconstructions and what masks are learned by into one PNG file."""
    (args,) = CommandParser("clmae visualize", __doc__, {"options": VisualizeArguments}).read(argv)
    from clmae.training.data import center_view, decode_image, normalize, sample_generator  # the help does not wait
    from clmae.training.pictures import reconstruction_figure, save_figure

    if Path(args.output).suffix.lower() != ".png":
        raise InputError(f"`output` is {args.output!r}; give the name of a .png file.")
    read_model_config(args.model)
    model = load_whole(AutoModelForPreTraining, args.model, "`model`")
    try:
        processor = AutoImageProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise InputError(f"`model` {args.model!r} has no image processor: {error}") from error
    size, mean, std = pair(model.config.image_size), processor.image_mean, processor.image_std
    views = []
    for name, image in _images(args.images):
        try:
            views.append(normalize(center_view(decode_image(image, model.config.num_channels), size), mean, std))
        except InputError as error:
            raise InputError(f"`images`: {name}: {error}") from error
    num_patches = math.prod(size) // math.prod(pair(model.config.patch_size))  # of any ViTMAE, ours or transformers'
    noise = torch.rand(len(views), num_patches, generator=sample_generator(args.seed, 0, 0))
    # Masks drawn by predicted errors differ along the curriculum: first those of the partner, then of the adversary.
    by_errors = getattr(model.config, "learns_masks", False) and model.config.masker_objective == "error"
    factors: tuple[float | None, ...] = (None,)
    if by_errors and model.config.curriculum_shape != "constant":
        factors = (model.config.curriculum_start, model.config.curriculum_end)
    figure = reconstruction_figure(model, torch.stack(views), noise, mean, std, curriculum_factors=factors)
    print(f"wrote {save_figure(figure, args.output)}")
    return 0


def _images(names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What messages call each image, and what `decode_image` takes; those of a folder in its place."""
    from clmae.training.data import load_image_dataset  # the help does not wait

    for name in names:
        if Path(name).is_dir():
            dataset, column = load_image_dataset(name)
            yield from ((f"image {i} of {name}", image) for i, image in enumerate(dataset[:8][column]))
        else:
            yield name, name
