# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Object detection on a pretrained backbone: `MAEBackbone` in transformers' Deformable DETR, trained by its `Trainer`.

    python examples/detection.py --output_dir outputs/detection

An encoder is pretrained on many images without labels (those of digits.py), then the detector is trained on a few with
boxes, once from that encoder and once from random weights. The table gives, on other digits and other crops, the mean
over the ten digits of the average precision at an intersection over union (IoU) of 0.5 (AP50), and the mean over the
objects of the IoU of the better one of the image's two most confident boxes. `--encoder outputs/segmentation/encoder`
takes the encoder of segmentation.py, which is pretrained longer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from digits import SIZE, DigitsOnPhotographs, pretrain
from torchvision.ops import box_convert, box_iou
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from clmae import MAEBackbone

DIGITS = {digit: str(digit) for digit in range(10)}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch that transformers' detectors take: images stacked, labels a list of dictionaries."""
    images = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": images, "labels": [sample["labels"] for sample in samples]}


def score(prediction: EvalPrediction) -> dict[str, float]:
    """AP50 and the mean IoU (0 to 100) of batches of logits `(batch_size, num_queries, 10)` and boxes.

    A box is correct if its IoU with an object of its class is at least 0.5 and no more confident box has that object.
    """
    num_objects, ious = np.zeros(len(DIGITS)), []
    confidences: list[list[float]] = [[] for _ in DIGITS]
    correct: list[list[bool]] = [[] for _ in DIGITS]
    for (logits, boxes), labels in zip(prediction.predictions, prediction.label_ids, strict=True):
        for image_scores, image_boxes, label in zip(torch.tensor(logits).sigmoid(), boxes, labels, strict=True):
            predicted, objects = (
                box_convert(torch.tensor(each), "cxcywh", "xyxy") for each in (image_boxes, label["boxes"])
            )
            iou = box_iou(predicted, objects)
            ious += iou[image_scores.amax(1).topk(2).indices].amax(0).tolist()
            classes = torch.tensor(label["class_labels"])
            num_objects += np.bincount(classes, minlength=len(DIGITS))
            for digit in DIGITS:
                free = iou * (classes == digit)
                for query in image_scores[:, digit].argsort(descending=True).tolist():
                    best = free[query].argmax()
                    confidences[digit].append(image_scores[query, digit].item())
                    correct[digit].append(free[query, best].item() >= 0.5)
                    if correct[digit][-1]:
                        free[:, best] = 0
    precisions = []
    for digit in DIGITS:
        hits = np.array(correct[digit])[np.argsort(confidences[digit])[::-1]]
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        precisions.append(precision[hits].sum() / max(1, num_objects[digit]))
    return {"AP50": 100 * float(np.mean(precisions)), "IoU": 100 * float(np.mean(ious))}


def detect(encoder: Path, pretrained: bool, folder: Path, num_images: int, num_test: int, epochs: float) -> dict:
    """Trains Deformable DETR on labelled images, saves it with its image processor, and returns its scores."""
    backbone = MAEBackbone.from_pretrained(encoder, out_features=["stage4"])
    config = DeformableDetrConfig(
        backbone_config=backbone.config,
        num_feature_levels=1,
        num_queries=20,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        id2label=DIGITS,
        label2id={name: digit for digit, name in DIGITS.items()},
    )
    model = DeformableDetrForObjectDetection(config)
    if pretrained:
        model.model.backbone.model = backbone
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=50,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.05,
        max_grad_norm=0.1,
        save_strategy="no",
        report_to="none",
        eval_do_concat_batches=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=DigitsOnPhotographs(num_images, train=True, target="boxes"),
        eval_dataset=DigitsOnPhotographs(num_test, train=False, target="boxes"),
        compute_metrics=score,
        # The outputs without the loss: its parts, the logits, the boxes, and more.
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[1:3],
        processing_class=DeformableDetrImageProcessor(
            size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
    )
    trainer.train()
    trainer.save_model()
    scores = trainer.evaluate()
    return {name: scores[f"eval_{name}"] for name in ("AP50", "IoU")}


def main() -> None:
    """Pretrains, trains both detectors, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/detection"))
    parser.add_argument("--encoder", type=Path, help="folder of a pretrained encoder (default: pretrain one)")
    parser.add_argument("--unlabelled", type=int, default=4000, help="images to pretrain on")
    parser.add_argument("--labelled", type=int, default=400, help="images with boxes")
    parser.add_argument("--test", type=int, default=500, help="images to evaluate on")
    parser.add_argument("--pretraining_epochs", type=float, default=6)
    parser.add_argument("--epochs", type=float, default=14)
    arguments = parser.parse_args()
    encoder = arguments.encoder or arguments.output_dir / "encoder"
    if arguments.encoder is None:
        set_seed(0)
        pretrain(encoder, arguments.unlabelled, arguments.pretraining_epochs)
    rows = {}
    for name, pretrained in (("pretrained", True), ("random", False)):
        set_seed(0)
        folder = arguments.output_dir / name
        rows[name] = detect(encoder, pretrained, folder, arguments.labelled, arguments.test, arguments.epochs)
    table = pd.DataFrame(rows).T.rename_axis("encoder").round(1)
    print(table)
    table.to_csv(arguments.output_dir / "detection.csv")


if __name__ == "__main__":
    main()
