# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The method study's table: `table.py results.jsonl ...` adds runs to screening.csv, and writes screening.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from clmae.evaluation.tables import markdown_table

HERE = Path(__file__).parent


def row(line: str) -> dict[str, object]:
    """A run's figures: accuracies in percent, difficulty as partner (its least) and at the end."""
    run = json.loads(line)
    difficulties = [entry["difficulty"] for entry in run["log"]]
    return dict(
        variant=run["variant"],
        seed=run["seed"],
        thousands=round(run["steps"] * 256 * run["cost"] / 1000),
        cost=round(run["cost"], 3),
        images=run["steps"] * 256,
        knn=round(run["knn"], 2),
        linear=round(run["linear"], 2),
        random_mask_loss=run["log"][-1]["random"],
        least_difficulty=min(difficulties),
        last_difficulty=difficulties[-1],
        seconds=run["seconds"],
    )


def main() -> None:
    path = HERE / "screening.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame()
    rows = [row(line) for name in sys.argv[1:] for line in Path(name).read_text().splitlines() if "failed" not in line]
    table = pd.concat([table, pd.DataFrame(rows)]).drop_duplicates(["variant", "seed", "thousands"], keep="last")
    table = table.sort_values(["thousands", "knn"], ascending=[True, False])
    table.to_csv(path, index=False)
    (HERE / "screening.md").write_text(markdown_table(table))


if __name__ == "__main__":
    main()
