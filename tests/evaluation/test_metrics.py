# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Metrics of the evaluate library; tables by class."""

from __future__ import annotations

import csv

import evaluate
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics

from clmae.evaluation.metrics import METRICS, metric_folder
from clmae.evaluation.metrics.classes import Predictions, confusion_figure
from clmae.evaluation.metrics.modules import (
    MacroF1,
    MeanPerClassAccuracy,
    Top5Accuracy,
)


def imbalanced(n: int = 300, classes: int = 7, seed: int = 0):
    """Scores `(n, classes)` that are often right, and classes, of which the last is rare."""
    generator = torch.Generator().manual_seed(seed)
    references = (torch.rand(n, generator=generator) ** 2 * classes).long()
    scores = torch.randn(n, classes, generator=generator) + 1.5 * torch.nn.functional.one_hot(references, classes)
    return scores, references


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)


def expected(scores, references) -> dict[str, float]:
    truth, found = references.numpy(), scores.argmax(1).numpy()
    return {
        "top1_accuracy": sklearn_metrics.accuracy_score(truth, found),
        "top5_accuracy": sklearn_metrics.top_k_accuracy_score(
            truth, scores.numpy(), k=5, labels=range(scores.shape[1])
        ),
        "mean_per_class_accuracy": sklearn_metrics.balanced_accuracy_score(truth, found),
        "macro_f1": sklearn_metrics.f1_score(truth, found, average="macro"),
    }


# -- the evaluate library -------------------------------------------------------------------------------------------


def test_evaluate_loads_each_offline():
    scores, references = imbalanced()
    for name, value in expected(scores, references).items():
        metric = evaluate.load(metric_folder(name))
        assert metric.compute(predictions=scores, references=references) == {name: pytest.approx(value)}
        if name != "top5_accuracy":
            assert metric.compute(predictions=scores.argmax(1), references=references) == {name: pytest.approx(value)}


def test_evaluate_combines_them():
    scores, references = imbalanced()
    combined = evaluate.combine([metric_folder(name) for name in METRICS])
    assert combined.compute(predictions=scores, references=references) == pytest.approx(expected(scores, references))
    for part in (slice(0, 100), slice(100, None)):
        combined.add_batch(predictions=scores[part].numpy(), references=references[part].numpy())
    assert combined.compute() == pytest.approx(expected(scores, references))


def test_classes_that_are_missing_somewhere():
    predictions, references = [0, 0, 3, 5], [0, 1, 1, 5]  # no 2, no 4; 3 only predicted
    compute = dict(predictions=predictions, references=references)
    assert MeanPerClassAccuracy().compute(**compute)["mean_per_class_accuracy"] == pytest.approx((1 + 0 + 1) / 3)
    assert MacroF1().compute(**compute)["macro_f1"] == pytest.approx((2 / 3 + 0 + 0 + 1) / 4)


def test_equal_scores_are_no_way_to_be_right_nor_is_a_class_without_a_score():
    scores, references = np.zeros((4, 10)), [0, 1, 9, 12]
    assert Top5Accuracy().compute(predictions=scores, references=references) == {"top5_accuracy": 0.25}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0, 1], [0, -1], "must hold class numbers from 0"),
        ([[0.0, np.nan]], [0], "`predictions` holds NaN"),
        ([[0.0, 1.0]], [0], "top 5 need scores of at least five classes"),
        ([0, 1], [0, 1], "top 5 need scores"),
    ],
)
def test_bad_input(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        Top5Accuracy().compute(predictions=predictions, references=references)
    with pytest.raises(ValueError, match="`name` is 'accuracy'; choose one of top1_accuracy"):
        metric_folder("accuracy")


# -- tables by class ------------------------------------------------------------------------------------------------


def test_class_files(tmp_path):
    scores, references = imbalanced()
    found = Predictions(scores.argmax(1), references, [*"abcdefg", "never, seen"])
    paths = found.save(tmp_path / "new" / "knn.5")
    assert [path.name for path in paths] == ["knn.5-classes.csv", "knn.5-confusion.csv", "knn.5-confusion.png"]
    matrix = sklearn_metrics.confusion_matrix(references, scores.argmax(1), labels=range(8))
    with paths[1].open() as file:
        first, *rows = csv.reader(file)
    assert first[1:] == [row[0] for row in rows] == [*"abcdefg", "never, seen"]
    assert [[int(cell) for cell in row[1:]] for row in rows] == matrix.tolist()
    with paths[0].open() as file:
        table = list(csv.DictReader(file))
    precision, recall, each, support = sklearn_metrics.precision_recall_fscore_support(references, scores.argmax(1))
    for i, row in enumerate(table[:7]):
        assert row["class"] == "abcdefg"[i]
        assert int(row["support"]) == support[i]
        numbers = [float(row[name]) for name in ("accuracy", "precision", "f1")]
        assert numbers == pytest.approx([100 * recall[i], 100 * precision[i], 100 * each[i]], abs=0.005)
    assert list(table[7].values()) == ["never, seen", "0", "", "", ""]
    with Image.open(paths[2]) as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def unconfused(size: int) -> pd.DataFrame:
    names = [f"class {i}" for i in range(size)]
    return pd.DataFrame(np.eye(size, dtype=int), names, names)


def test_a_figure_of_many_classes_stays_legible():
    few, many = (confusion_figure(unconfused(size)) for size in (10, 120))
    assert sorted({text.get_text() for text in few.axes[0].texts}) == ["0", "100"]
    assert len(few.axes[0].get_xticks()) == 10
    assert len(many.axes[0].texts) == 0
    assert len(many.axes[0].get_yticks()) <= 50
    labels = [label.get_text() for label in many.axes[0].get_yticklabels()]
    assert labels[:2] == ["class 0", "class 3"]


def test_classes_without_names_are_numbered():
    found = Predictions(torch.tensor([0, 2]), torch.tensor([2, 2]))
    assert found.class_table()["class"].tolist() == ["0", "1", "2"]
    assert found.confusion_matrix().to_numpy().tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 1]]
