# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Grey images for models with one channel: as in training, in both backends, and in transformers' pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessor, BitImageProcessorPil, pipeline

from clmae import FAMILIES, MAEImageProcessor, MAEImageProcessorPil
from clmae.training.data import center_view, decode_image, make_image_processor, normalize

BACKENDS = {"torchvision": MAEImageProcessor, "pil": MAEImageProcessorPil}


def photo(mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A picture whose channels differ, with transparent parts where the mode has them."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    return Image.fromarray(coarse, "RGBA").resize(size).convert("RGB" if mode in ("P", "1") else mode).convert(mode)


@pytest.fixture
def folder(tmp_path):
    make_image_processor(16, 1, [0.4], [0.3]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
def test_every_image_is_shown_in_grey_as_in_training(folder, backend, mode):
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
    assert type(processor) is BACKENDS[backend]
    clear = Image.new("RGBA", (16, 16))
    if "A" in mode and not BitImageProcessorPil(do_normalize=False)(clear).pixel_values[0].any():
        pytest.skip("this version of transformers does not lay transparency over white, in colours either")
    image = photo(mode)
    expected = normalize(center_view(decode_image(image, 1), (16, 16)), [0.4], [0.3])
    found = processor([image, image], return_tensors="pt").pixel_values
    torch.testing.assert_close(found, torch.stack([expected] * 2), atol=1e-6, rtol=0)
    large = photo(mode, (50, 30))
    expected = normalize(center_view(decode_image(large, 1), (16, 16)), [0.4], [0.3])
    torch.testing.assert_close(processor(large, return_tensors="pt").pixel_values[0], expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_and_tensors(folder, backend):
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
    grey, rgb = np.array(photo("L")), np.array(photo())
    expected = processor(photo(), return_tensors="pt").pixel_values
    for image in (rgb, torch.from_numpy(rgb), rgb.transpose(2, 0, 1), grey[..., None], torch.from_numpy(grey)[None]):
        layout = {"input_data_format": "channels_last"} if image.ndim == 3 and image.shape[2] in (1, 3) else {}
        found = processor(image, return_tensors="pt", **layout).pixel_values
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    light = processor(rgb / np.float32(255), do_rescale=False, input_data_format="channels_last", return_tensors="pt")
    torch.testing.assert_close(light.pixel_values, expected, atol=1.01 / 255 / 0.3, rtol=0)  # rounded otherwise


def test_what_is_saved_says_what_is_shown_and_others_stay_stock(folder, tmp_path):
    again = AutoImageProcessor.from_pretrained(folder)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "preprocessor_config.json").read_text() == (
        folder / "preprocessor_config.json"
    ).read_text()
    assert (tmp_path / "again" / "image_processing_mae.py").is_file()
    for num_channels in (2, 3, 13):
        processor = make_image_processor(16, num_channels, [0.5] * num_channels, [0.5] * num_channels)
        assert type(processor) is BitImageProcessor
    plain = MAEImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    stock = BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    assert torch.equal(*(p(photo("P"), return_tensors="pt").pixel_values for p in (plain, stock)))


@pytest.mark.slow
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "cmae, learned masks"])
@pytest.mark.parametrize("task", ["image-feature-extraction", "image-classification"])
def test_transformers_pipelines(task, family, num_channels, tiny_config, tmp_path):
    family, *masks = family.split(", ")
    config = tiny_config(family, num_channels=num_channels, num_labels=3, **({"learned_masks": True} if masks else {}))
    model = FAMILIES[family][1 if task == "image-feature-extraction" else 3](config).eval()
    model.save_pretrained(tmp_path)
    processor = make_image_processor(16, num_channels, [0.4] * num_channels, [0.3] * num_channels)
    processor.save_pretrained(tmp_path)
    photo(size=(30, 20)).save(tmp_path / "photo.png")
    run = pipeline(task, model=str(tmp_path))
    with torch.no_grad():
        expected = model(**processor(photo(size=(30, 20)), return_tensors="pt"))
    for image in (photo(size=(30, 20)), str(tmp_path / "photo.png")):
        found = run(image)
        if task == "image-feature-extraction":
            torch.testing.assert_close(torch.tensor(found), expected.last_hidden_state)
            torch.testing.assert_close(torch.tensor(run(image, pool=True)), expected.pooler_output)
        else:
            scores = {entry["label"]: entry["score"] for entry in found}
            torch.testing.assert_close(
                torch.tensor([scores[f"LABEL_{i}"] for i in range(3)]), expected.logits.softmax(-1)[0]
            )
