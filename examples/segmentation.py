# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Semantic segmentation on a pretrained backbone: `MAEBackbone` in transformers' UperNet, trained by its `Trainer`.

    python examples/segmentation.py --output_dir outputs/segmentation

An encoder is pretrained on many images without labels (those of digits.py), then UperNet is trained on a few with
masks, once from that encoder and once from random weights. The table gives the mean intersection over union (mIoU) of
the 11 classes (background and ten digits) on other digits and other crops.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from digits import DigitsOnPhotographs, pretrain
from sklearn.metrics import jaccard_score
from transformers import Trainer, TrainingArguments, UperNetConfig, UperNetForSemanticSegmentation, set_seed

from clmae import MAEBackbone

CLASSES = ["background", *map(str, range(10))]


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
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.05,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=DigitsOnPhotographs(num_images, train=True, target="masks"),
        eval_dataset=DigitsOnPhotographs(num_test, train=False, target="masks"),
        compute_metrics=scores,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1),
    )
    trainer.train()
    return trainer.evaluate()["eval_miou"]


def main() -> None:
    """Pretrains, trains both segmentation models, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/segmentation"))
    parser.add_argument("--encoder", type=Path, help="folder of a pretrained encoder (default: pretrain one)")
    parser.add_argument("--unlabelled", type=int, default=4000, help="images to pretrain on")
    parser.add_argument("--labelled", type=int, default=200, help="images with masks")
    parser.add_argument("--test", type=int, default=500, help="images to evaluate on")
    parser.add_argument("--pretraining_epochs", type=float, default=40)
    parser.add_argument("--epochs", type=float, default=40)
    arguments = parser.parse_args()
    encoder = arguments.encoder or arguments.output_dir / "encoder"
    if arguments.encoder is None:
        set_seed(0)
        pretrain(encoder, arguments.unlabelled, arguments.pretraining_epochs)
    rows = {}
    for name, pretrained in (("pretrained", True), ("random", False)):
        set_seed(0)
        folder = arguments.output_dir / name
        rows[name] = segment(encoder, pretrained, folder, arguments.labelled, arguments.test, arguments.epochs)
    table = pd.Series(rows, name="mIoU").rename_axis("encoder").round(1).to_frame()
    print(table)
    table.to_csv(arguments.output_dir / "segmentation.csv")


if __name__ == "__main__":
    main()
