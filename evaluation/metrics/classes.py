# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""How a classifier does on each class, and what it takes for what: tables and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from clmae.evaluation.metrics.scores import class_counts
from clmae.model_cards.files import write_whole
from clmae.training.pictures import save_figure

_MAX_NUMBERED = 20  # classes whose cells still have room for a number
_MAX_TICKS = 50
_MAX_NAME = 24  # letters of a class name in the picture


@dataclass(frozen=True, eq=False)
class Predictions:
    """What was predicted for each sample of a test set.

    Attributes:
        predictions, references: Predicted and true classes, `(n,)` integers >= 0, on the CPU.
        class_names: By class number; numbers serve where there are none.
    """

    predictions: Tensor
    references: Tensor
    class_names: Sequence[str] | None = None

    def confusion_matrix(self) -> np.ndarray:
        """How many samples of class i (row) were predicted to be of class j, `(num_classes, num_classes)` int64."""
        size = len(self._names())
        return (self.references * size + self.predictions).bincount(minlength=size * size).view(size, size).numpy()

    def class_table(self) -> list[dict[str, Any]]:
        """A row for each class: `class`, `support`, and `accuracy` (recall), `precision` and `f1` in percent.

        A number that is not defined (of a class without samples, or never predicted) is `None`.
        """
        counts = class_counts(self.predictions, self.references)
        rows = []
        for i, name in enumerate(self._names()):
            # A class at the end of the list may be in neither.
            hits, support, predicted = (int(part[i]) if i < len(part) else 0 for part in counts)
            rows.append(
                {
                    "class": name,
                    "support": support,
                    "accuracy": _percent(hits, support),
                    "precision": _percent(hits, predicted),
                    "f1": _percent(2 * hits, support + predicted),
                }
            )
        return rows

    def save(self, stem: Path) -> list[Path]:
        """Writes `<stem>-classes.csv`, `<stem>-confusion.csv` and `<stem>-confusion.png`; returns their paths."""
        matrix, names = self.confusion_matrix(), self._names()
        table = self.class_table()
        paths = [stem.with_name(stem.name + end) for end in ("-classes.csv", "-confusion.csv", "-confusion.png")]
        _write_csv(paths[0], [list(table[0]), *(list(row.values()) for row in table)])
        _write_csv(
            paths[1], [["true \\ predicted", *names], *([name, *row] for name, row in zip(names, matrix, strict=True))]
        )
        save_figure(confusion_figure(matrix, names), paths[2])
        return paths

    def _names(self) -> list[str]:
        if self.class_names is not None:
            return list(self.class_names)
        return [str(i) for i in range(1 + max(int(self.predictions.max()), int(self.references.max())))]


def confusion_figure(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """A picture of a confusion matrix `(num_classes, num_classes)` of counts, true classes as rows.

    Colour is the share of the row, so that rare classes show as well; up to 20 classes have it in percent in their
    cells, and from 50 on only some classes are named.
    """
    size = len(matrix)
    shares = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    side = min(3 + 0.42 * size, 12)
    figure = Figure(figsize=(side + 1, side), layout="compressed")
    axis = figure.subplots()
    shown = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    ticks = range(0, size, -(-size // _MAX_TICKS))
    names = [_shortened(class_names[i]) for i in ticks]
    fontsize = 9 if size <= _MAX_NUMBERED else 7
    axis.set_xticks(ticks, names, rotation=90, fontsize=fontsize)
    axis.set_yticks(ticks, names, fontsize=fontsize)
    axis.set(xlabel="predicted", ylabel="true")
    if size <= _MAX_NUMBERED:
        for (i, j), share in np.ndenumerate(shares):
            if matrix[i, j]:
                colour = "white" if share > 0.5 else "black"
                axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(shown, ax=axis, fraction=0.046, pad=0.02, label="share of the true class")
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole else None


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue())


__all__ = ["Predictions", "confusion_figure"]
