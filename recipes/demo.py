# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The demo: pretrain CL-MAE on handwritten digits, judge it, draw it. `make demo` runs this."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_from_disk
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from clmae.cli import main as clmae
from clmae.training.pictures import curves_figure, save_figure

RECIPE = Path(__file__).with_name("demo.yaml")
TRAINED = RECIPE.parents[1] / "model_cards" / "cl_mae_digits"  # what an earlier run of this file ended with
OUTPUT = Path("outputs/demo")


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 scans of digits (8 x 8, 17 grey levels), enlarged to 32 px, in two splits."""
    digits = load_digits()
    scans = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = [PILImage.fromarray(scan).resize((32, 32), PILImage.Resampling.BICUBIC) for scan in scans]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    parts = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": [images[i] for i in part], "label": digits.target[part].tolist()}, features=features
            )
            for split, part in zip(("train", "test"), parts, strict=True)
        }
    ).save_to_disk(folder)


def run(*arguments: str) -> None:
    """Runs a command as a user would type it."""
    print("\n$ clmae " + " ".join(arguments), flush=True)
    code = clmae(arguments)
    if code:
        raise SystemExit(code)


def show_trained_model(data: Path) -> None:
    """Before anything is trained: masks and reconstructions of the model that comes with the repository."""
    scans = [OUTPUT / f"scan-{i}.png" for i in range(6)]
    for path, image in zip(scans, load_from_disk(data)["test"]["image"], strict=False):
        image.save(path)
    picture = str(OUTPUT / "trained.png")
    run("visualize", "--model", str(TRAINED), "--images", *map(str, scans), "--output", picture)


def write_report(tables: list[str], seconds: float) -> None:
    """`report.md` with its figures, in the model's folder."""
    history = json.loads((OUTPUT / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    save_figure(curves_figure(history), OUTPUT / "curves.png")
    pictures = sorted((OUTPUT / "pictures").glob("step-*.png"))
    moments = {"early": pictures[0], "middle": pictures[len(pictures) // 2], "late": pictures[-1]}
    lines = [
        "# CL-MAE on handwritten digits",
        "",
        "1,437 scans without their labels, pretrained by `recipes/demo.yaml`; judged on 360 others. "
        f"Pretraining and judging took {seconds:.0f} s.",
        "",
        *tables,
        "",
        "These scans are so simple that their raw pixels, and an encoder that was never trained, already tell the "
        "digits apart: the table shows how judging works. The README has figures for photographs.",
        "",
        "## Over the run",
        "",
        "The curriculum factor λ_CL goes from partner (+1) to adversary (−1). Mask difficulty is the reconstruction "
        "loss under learned masks over that under random ones: below 1 the masks are easier, above 1 harder.",
        "",
        "![Losses, mask difficulty, curriculum factor and keep probabilities over the steps](curves.png)",
    ]
    for name, picture in moments.items():
        lines += ["", f"## Masks and reconstructions, {name}", "", f"![{name}](pictures/{picture.name})"]
    (OUTPUT / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Everything, from an empty `outputs/demo`."""
    started = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    data = str(OUTPUT / "digits")
    write_digits(OUTPUT / "digits")
    show_trained_model(OUTPUT / "digits")
    run("pretrain", "--config", str(RECIPE), "--dataset", data, "--output_dir", str(OUTPUT), "--use_cpu", "true")
    tables = []
    for protocol in ("knn", "linear"):
        table = OUTPUT / f"{protocol}.md"
        run(
            "evaluate", protocol, "--model", str(OUTPUT), "--dataset", data, "--output", str(table.with_suffix(".json"))
        )
        tables += [table.read_text(encoding="utf-8")]
    write_report(tables, time.perf_counter() - started)
    print(f"\nA trained model's masks are in {OUTPUT / 'trained.png'}.")
    print(f"The model is in {OUTPUT}, the report in {OUTPUT / 'report.md'}. Next:")
    print(f"  clmae evaluate knn --model {OUTPUT} --dataset {data}")
    print("  clmae pretrain --help")
    print("  clmae pretrain --config recipes/cl_mae_cifar10.yaml --dataset YOUR_IMAGES --output_dir out/mine")


if __name__ == "__main__":
    main()
