# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The trained model that comes with the package: small, whole, and as its card says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, pipeline

from clmae.model_cards import card
from clmae.model_cards.card import write_card

FOLDER = Path(card.__file__).parent / "cl_mae_mnist"


def test_it_is_small_and_half_precision_on_disk():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size < 6e6
    with safe_open(path, "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_it_loads_and_reconstructs():
    digits = load_digits()
    processor = AutoImageProcessor.from_pretrained(FOLDER)
    scans = [(digits.images[i] * (255 / 16)).astype("uint8").repeat(4, 0).repeat(4, 1) for i in range(64)]
    pixel_values = processor([scan[..., None] for scan in scans], return_tensors="pt")["pixel_values"]
    features = AutoModel.from_pretrained(FOLDER).eval()(pixel_values).pooler_output
    assert features.dtype == torch.float32
    assert features.shape == (64, 96)
    model = AutoModelForPreTraining.from_pretrained(FOLDER).eval()
    fresh = AutoModelForPreTraining.from_config(model.config).eval()
    with torch.no_grad():
        trained, untrained = (m(pixel_values, masking="random").reconstruction_loss.item() for m in (model, fresh))
    assert trained < 0.8 * untrained


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_transformers_pipeline_takes_any_picture(backend, tmp_path):
    digit = Image.fromarray((load_digits().images[3] * (255 / 16)).astype("uint8")).resize((28, 28), Image.BICUBIC)
    processor = AutoImageProcessor.from_pretrained(FOLDER, backend=backend)
    extract = pipeline("image-feature-extraction", model=str(FOLDER), image_processor=processor)
    tokens = torch.tensor(extract(digit))
    assert tokens.shape == (1, 1 + 49, 96)
    for mode in ("RGB", "P"):
        digit.convert(mode).save(tmp_path / "digit.png")
        torch.testing.assert_close(torch.tensor(extract(str(tmp_path / "digit.png"))), tokens)
    default = pipeline("image-feature-extraction", model=str(FOLDER))
    torch.testing.assert_close(torch.tensor(default(digit.convert("RGB"))), tokens)


def test_its_card_is_what_its_files_say(tmp_path):
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    knn = json.loads((FOLDER / "knn.json").read_text())
    accuracy = next(row for row in knn["rows"] if row["name"] == "pretrained")["accuracies"]["k = 20"]
    assert f"| k = 20 | {accuracy:.2f} [" in text
    assert "To be written" not in text
    copy = shutil.copytree(FOLDER, tmp_path / FOLDER.name)
    assert write_card(copy).read_text(encoding="utf-8") == text
