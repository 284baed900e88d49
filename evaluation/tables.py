# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Tables and figures of the results of an experiment."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy.stats import t as student_t

BUDGETS = {"images": "equal images seen", "compute": "equal compute"}
MEAN = "mean of the datasets"
LEVEL = 0.95  # of the intervals
COSTS = {"images seen": ("images_seen", "{:,}"), "steps": ("step", "{:,}"), "FLOPs": ("flops", "{:.3g}")}


def headline(protocol: str, columns: Iterable[str]) -> str:
    """The column by which a protocol is quoted: of k-NN's the largest k by cosine, else the first."""
    columns = list(columns)
    by_cosine = [column for column in columns if re.fullmatch(r"k = \d+", column)]
    return (by_cosine if protocol == "knn" and by_cosine else columns[:1])[-1]


def headlines(results: pd.DataFrame) -> pd.DataFrame:
    """Of [`Runner.results`] what a table shows: each protocol's headline; all of few-shot and of the training."""
    shown = {
        (protocol, column)
        for protocol, columns in results.groupby("protocol", sort=False)["column"].unique().items()
        for column in (columns if protocol in ("fewshot", "training") else [headline(protocol, columns)])
    }
    return results[[key in shown for key in zip(results["protocol"], results["column"], strict=True)]]


def with_means(results: pd.DataFrame, num_datasets: dict[str, int]) -> pd.DataFrame:
    """Before the results those of a further dataset, `MEAN`, of runs that have all of `num_datasets` (by protocol)."""
    scores = results[results["protocol"].isin(num_datasets)]
    keys = [column for column in results.columns if column not in ("dataset", "value")]
    means = scores.groupby(keys, sort=False)["value"].agg(n="count", value="mean").reset_index().assign(dataset=MEAN)
    count = means["protocol"].map(num_datasets)
    return pd.concat([means[(means["n"] == count) & (count > 1)][results.columns], results], ignore_index=True)


def summarize(results: pd.DataFrame, over: Sequence[str] = ("step", "images_seen", "flops")) -> pd.DataFrame:
    """Over the seeds: their number, mean, standard deviation, half of Student's 95 % interval, and the values."""
    keys = ["budget", "recipe", "label", "dataset", "protocol", "column", *over]
    groups = results.groupby([*keys, "final"], sort=False)["value"]
    table = groups.agg(n="count", mean="mean", std="std").reset_index()
    table["half_width"] = student_t.ppf((1 + LEVEL) / 2, table["n"] - 1) * table["std"] / table["n"] ** 0.5
    table["values"] = [" ".join(f"{value:g}" for value in values) for _, values in groups]
    return table


def differences(results: pd.DataFrame, compared_with: str) -> pd.DataFrame:
    """Values less those of a recipe under the same seed (and budget; of baselines, at the first one), summarized."""
    first = next(iter(results["budget"]))
    results = results[results["final"] & (results["protocol"] != "training")]
    keys = ["other", "seed", "dataset", "protocol", "column"]
    results = results.assign(other=results["budget"].replace("", first))
    base = results[(results["recipe"] == compared_with) & (results["budget"] != "")].set_index(keys)["value"]
    pairs = results[results["recipe"] != compared_with].join(base.rename("base"), on=keys, how="inner")
    return summarize(pairs.assign(value=pairs["value"] - pairs["base"]))


def markdown_table(table: pd.DataFrame) -> str:
    """Columns and rows as they are; the first column to the left, the others to the right."""
    lines = [[*table.columns], ["---", *["---:"] * (table.shape[1] - 1)], *table.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _wide(summary: pd.DataFrame, seeds: int, with_costs: bool = True) -> str:
    """A row for each recipe, a column for each protocol: `"38.02 ± 1.16"`, `" (2)"` if not over all seeds."""

    def cell(row: pd.Series) -> str:
        digits = 3 if row["protocol"] == "training" else 2
        half = "" if pd.isna(row["half_width"]) else f" ± {row['half_width']:.{digits}f}"
        return f"{row['mean']:.{digits}f}{half}" + (f" ({row['n']})" if row["n"] != seeds else "")

    training = summary["protocol"] == "training"
    title = summary["column"].where(training, summary["protocol"] + ", " + summary["column"])
    order = sorted(title.unique(), key=lambda name: (name in set(title[training]), name == "s / step"))
    summary = summary.assign(title=title, text=summary.apply(cell, axis=1))
    table = summary.pivot(index="label", columns="title", values="text").fillna("-")
    table = table.reindex(index=summary["label"].unique(), columns=order)
    if with_costs:
        costs = summary.groupby("label")[["images_seen", "step", "flops"]].first().loc[table.index]
        for name, (column, form) in COSTS.items():
            table[name] = [form.format(number) if number else "-" for number in costs[column]]
    return markdown_table(table.reset_index(names="recipe"))


def results_to_markdown(results: pd.DataFrame, compared_with: str) -> str:
    """For each dataset and budget a table with the baselines, and one of the differences from a recipe."""
    # Raw pixels are the same under every seed, and kept under 0.
    seeds = results.loc[(results["recipe"] != "raw") | (results["recipe"] == "raw").all(), "seed"].unique()
    text = f"Accuracy in percent; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    text += ": mean ± half of the 95 % interval (Student's t); (n): over n of them.\n" if len(seeds) > 1 else ".\n"
    shown = headlines(results[results["final"]])
    label = shown.loc[shown["recipe"] == compared_with, "label"]
    paired, shown = differences(shown, compared_with), summarize(shown)
    datasets, budgets = ([name for name in shown[column].unique() if name] for column in ("dataset", "budget"))
    for dataset, budget in itertools.product(datasets, budgets):
        part, differing = (
            table[table["dataset"].isin([dataset, ""]) & table["budget"].isin([budget, ""])]
            for table in (shown, paired)
        )
        text += f"\n## {BUDGETS[budget].capitalize()}{f', {dataset}' * (len(datasets) > 1)}\n\n"
        text += _wide(part, len(seeds))
        if len(seeds) > 1 and not differing.empty:
            text += f"\nLess {label.iloc[0]} under the same seed:\n\n{_wide(differing, len(seeds), with_costs=False)}"
    return text


def accuracy_figure(results: pd.DataFrame) -> Figure:
    """A panel for each dataset and protocol, a line or point for each row, with the 95 % interval over the seeds."""
    table = summarize(headlines(results[results["final"] & (results["protocol"] != "training")]))
    # The reference is one run under both budgets.
    table = table.drop_duplicates(["recipe", "step", "dataset", "protocol", "column"])
    names = table["label"].where(table["budget"] != "compute", table["label"] + ", equal compute")
    table["name"] = names.map(lambda name: textwrap.fill(name, 24))
    panels = list(table.groupby(["dataset", "protocol"], sort=False))
    height = -(-len(panels) // 3)
    figure = Figure(figsize=(13, 1 + height * (1.4 + 0.3 * table["name"].nunique())), layout="constrained")
    axes = figure.subplots(height, min(3, len(panels)), squeeze=False).ravel()
    for axis, ((dataset, protocol), panel) in zip(axes, panels, strict=False):
        several = panel["column"].nunique() > 1  # images per class of the few-shot probe
        for name, row in panel.groupby("name", sort=False):
            style: dict[str, Any] = dict(marker="o", capsize=3, label=name)
            half = row["half_width"].fillna(0)
            if several:
                axis.errorbar(row["column"], row["mean"], yerr=half, **style)
            else:
                axis.errorbar(row["mean"], [name], xerr=half, **style)
        if several:
            axis.legend(fontsize="x-small")
        else:
            axis.invert_yaxis()
        axis.set(title=f"{dataset}: {protocol}, accuracy in %")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def curves_figure(results: pd.DataFrame) -> Figure:
    """Accuracy while training, over images seen at equal images and over FLOPs at equal compute.

    A row for each dataset and protocol, or for the mean of the datasets alone where a protocol has it. Where one budget
    was run for a single recipe, the other's runs take its place.
    """
    table = summarize(headlines(results[results["protocol"] != "training"]))
    points = table[~table["final"]]
    averaged = set(points.loc[points["dataset"] == MEAN, "protocol"])
    points = points[(points["dataset"] == MEAN) | ~points["protocol"].isin(averaged)]
    keys = (table[:1] if points.empty else points)[["dataset", "protocol"]].drop_duplicates().values.tolist()
    recipes = table[table["budget"] != ""].groupby("budget", sort=False)["recipe"].nunique()
    figure = Figure(figsize=(9, 4 * len(keys)), layout="constrained")
    axes = figure.subplots(len(keys), 2, sharey="row", squeeze=False)
    panels = (("images", "images_seen", "images seen"), ("compute", "flops", "compute (FLOPs)"))
    for (dataset, protocol), row in zip(keys, axes, strict=True):
        measured = table[(table["dataset"] == dataset) & (table["protocol"] == protocol)]
        measured = measured[measured["column"] == measured["column"].iloc[0]]
        for axis, (budget, unit, label) in zip(row, panels, strict=True):
            shown = budget if recipes.get(budget, 0) > 1 else recipes.idxmax()
            for recipe, curve in measured[measured["budget"] == shown].groupby("label", sort=False):
                curve = curve.sort_values("step")
                half, color = curve["half_width"].fillna(0), f"C{list(table['label'].unique()).index(recipe)}"
                axis.plot(curve[unit], curve["mean"], marker="o", markersize=4, label=recipe, color=color)
                axis.fill_between(curve[unit], curve["mean"] - half, curve["mean"] + half, color=color, alpha=0.15)
            for (_, baseline), style in zip(measured[measured["budget"] == ""].iterrows(), ("--", ":"), strict=False):
                axis.axhline(baseline["mean"], color="grey", linewidth=1, linestyle=style, label=baseline["label"])
            axis.set(title=f"{dataset}: runs at {BUDGETS[shown]}", xlabel=label)
            axis.set_xlim(left=0)
            axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{protocol}, {measured['column'].iloc[0]}: accuracy in %")
    lines = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(3, len(lines)), frameon=False)
    return figure
