# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""How a classifier does on each class, and which classes it confuses: tables and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix, precision_recall_fscore_support
from torch import Tensor

from clmae.model_cards.files import write_whole
from clmae.training.pictures import save_figure

_MAX_NUMBERED = 20  # classes whose cells still have room for a number
_MAX_TICKS = 50
_MAX_NAME = 24  # letters of a class name in the figure


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

    def confusion_matrix(self) -> pd.DataFrame:
        """How many samples of each class (row) were predicted to be of each class (column)."""
        names = self._names()
        matrix = confusion_matrix(self.references, self.predictions, labels=range(len(names)))
        return pd.DataFrame(matrix, names, names)

    def class_table(self) -> pd.DataFrame:
        """A row for each class: `class`, `support`, and `accuracy` (recall), `precision` and `f1` in percent.

        A number that is not defined (of a class without samples, or never predicted) is NaN.
        """
        names = self._names()
        precision, recall, f1, support = precision_recall_fscore_support(
            self.references, self.predictions, labels=range(len(names)), zero_division=np.nan
        )
        shares = {"accuracy": recall, "precision": precision, "f1": f1}
        percent = {column: (100 * values).round(2) for column, values in shares.items()}
        return pd.DataFrame({"class": names, "support": support, **percent})

    def save(self, stem: Path) -> list[Path]:
        """Writes `<stem>-classes.csv`, `<stem>-confusion.csv` and `<stem>-confusion.png`; returns their paths."""
        paths = [stem.with_name(stem.name + end) for end in ("-classes.csv", "-confusion.csv", "-confusion.png")]
        matrix = self.confusion_matrix()
        write_whole(paths[0], self.class_table().to_csv(index=False))
        write_whole(paths[1], matrix.to_csv(index_label="true \\ predicted"))
        save_figure(confusion_figure(matrix), paths[2])
        return paths

    def _names(self) -> list[str]:
        if self.class_names is not None:
            return list(self.class_names)
        return [str(i) for i in range(1 + max(int(self.predictions.max()), int(self.references.max())))]


def confusion_figure(matrix: pd.DataFrame) -> Figure:
    """A figure of a confusion matrix of counts, true classes as rows; colour is the percentage of the row.

    Up to 20 classes have that percentage in their cells, and from 50 on only some classes are named.
    """
    size = len(matrix)
    counts = matrix.to_numpy()
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    side = min(3 + 0.42 * size, 12)
    figure = Figure(figsize=(side + 1, side), layout="compressed")
    axis = figure.subplots()
    display = ConfusionMatrixDisplay(percent)
    numbers = dict(include_values=size <= _MAX_NUMBERED, values_format=".0f", text_kw={"fontsize": 8})
    display.plot(ax=axis, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 100}, **numbers)
    figure.colorbar(display.im_, ax=axis, fraction=0.046, pad=0.02, label="% of the true class")
    ticks = range(0, size, -(-size // _MAX_TICKS))
    names = [name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…" for name in matrix.columns[ticks]]
    fontsize = 9 if size <= _MAX_NUMBERED else 7
    axis.set_xticks(ticks, names, rotation=90, fontsize=fontsize)
    axis.set_yticks(ticks, names, fontsize=fontsize)
    title = f"{counts.trace() / counts.sum():.1%} of {counts.sum():,} images right"
    axis.set(xlabel="predicted", ylabel="true", title=title)
    return figure
