# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Counts the images of the study's evaluation sets that nearly are images of its pretraining set.

`python benchmarks/transfer_study/duplicates.py`, in the folder with the datasets. Two images are near-duplicates where
their grey 16 x 16 thumbnails, less their means, have a cosine similarity of at least `--least`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from clmae.configuration.errors import InputError
from clmae.evaluation.tables import markdown_table
from clmae.training.data import decode_image, load_image_dataset

CHUNK = 1000  # of images compared at once


def thumbnails(source: str, split: str) -> np.ndarray:
    """Of all images of a split, `(n, 256)` float32, of mean 0 and length 1."""
    dataset, column = load_image_dataset(source, split)
    grey = (Image.fromarray(decode_image(sample[column], 3)).convert("L") for sample in dataset)
    size, box = (16, 16), Image.Resampling.BOX
    vectors = np.stack([np.asarray(image.resize(size, box), dtype=np.float32).ravel() for image in grey])
    vectors -= vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def most_similar(queries: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Of each query the cosine similarity to the most similar image, `(n,)`."""
    parts = [queries[start : start + CHUNK] @ images.T for start in range(0, len(queries), CHUNK)]
    return np.concatenate([part.max(1) for part in parts])


def main() -> None:
    """Prints a table with a row for each evaluation set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="tiny-imagenet", help="the pretraining set")
    parser.add_argument("--least", type=float, default=0.98, help="cosine similarity of near-duplicates")
    options = parser.parse_args()
    study = yaml.safe_load(Path(__file__).with_name("study.yaml").read_text(encoding="utf-8"))
    images, rows = thumbnails(options.dataset, "train"), []
    evaluations = next(iter(study["scales"].values()))["evaluations"].values()
    for dataset, split in dict.fromkeys(
        (fields["dataset"], fields.get("test_split", "test")) for fields in evaluations
    ):
        try:
            queries = thumbnails(dataset, split)
        except InputError:  # a part of the training split is tested on
            split, queries = "train", thumbnails(dataset, "train")
        found = int((most_similar(queries, images) >= options.least).sum())
        rows.append({"dataset": dataset, "split": split, "images": len(queries), "near-duplicates": found})
    print(markdown_table(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
