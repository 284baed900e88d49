# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The image processor of models with one channel, which shows every image in grey.

No stock processor does: pipelines make every image RGB, and a model of one channel refuses it. This file is complete in
itself, so that transformers can save it beside a model; models with other numbers of channels have a stock processor.
"""

import torch
from transformers import BitImageProcessor, BitImageProcessorPil
from transformers.image_utils import is_pil_image
from transformers.processing_utils import ImagesKwargs


def to_grayscale(image: torch.Tensor) -> torch.Tensor:
    """`(1, H, W)` of an RGB image `(3, H, W)`, integers to the last bit as PIL's mode "L"; others stay as they are."""
    if image.shape[0] != 3:
        return image
    red, green, blue = image if image.is_floating_point() else image.int()
    gray = 19595 * red + 38470 * green + 7471 * blue  # ITU-R 601-2, in parts of 65536
    return (gray / 65536 if image.is_floating_point() else (gray + 32768) >> 16).to(image.dtype)[None]


class MAEImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a typed dictionary
    r"""
    do_grayscale (`bool`, *optional*, defaults to `self.do_grayscale`):
        Whether to show images in grey, with one channel.
    """

    do_grayscale: bool


class _Grayscale:
    """What both backends add to transformers' `BitImageProcessor`."""

    valid_kwargs = MAEImageProcessorKwargs
    do_grayscale = False
    _auto_class = "AutoImageProcessor"  # so that `save_pretrained` puts this file beside `preprocessor_config.json`

    def process_image(self, image, do_convert_rgb=None, do_grayscale=False, **kwargs):
        # Grey by way of RGB, so that palettes and transparency are transformers' task.
        do_convert_rgb = is_pil_image(image) if do_grayscale else do_convert_rgb
        image = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)  # type: ignore[misc]  # a mixin
        if not do_grayscale:
            return image
        gray = to_grayscale(torch.as_tensor(image))
        return gray if isinstance(image, torch.Tensor) else gray.numpy()

    def to_dict(self):
        return {**super().to_dict(), "auto_map": AUTO_MAP}  # type: ignore[misc]  # a mixin


class MAEImageProcessor(_Grayscale, BitImageProcessor):
    r"""transformers' `BitImageProcessor`, and with `do_grayscale` every image in grey (whatever `do_convert_rgb` is).

    PIL images of any mode become grey, and arrays and tensors with three channels; those with one stay as they are.
    """


class MAEImageProcessorPil(_Grayscale, BitImageProcessorPil):
    r"""[`MAEImageProcessor`] without torchvision."""


# transformers itself would name one class, whatever the backend that is asked for.
_MODULE = __name__.rpartition(".")[2]
AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": f"{_MODULE}.{MAEImageProcessor.__name__}",
        "pil": f"{_MODULE}.{MAEImageProcessorPil.__name__}",
    }
}

__all__ = ["MAEImageProcessor", "MAEImageProcessorPil"]
