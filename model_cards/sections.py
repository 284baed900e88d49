# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The sections of a model card, each from what the run recorded; an empty one has nothing to tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from clmae.configuration.configuration_mae import pair
from clmae.model_cards.families import CONTRASTIVE_CROP_PAPER, FAMILIES
from clmae.model_cards.run import Run

# Of transformers' bookkeeping, or of how a folder is used, not of the model.
# fmt: off
_NOT_SETTINGS = frozenset((
    "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "model_type", "num_labels",
    "out_features", "out_indices", "problem_type", "return_dict", "stage_names", "torch_dtype", "transformers_version",
    "use_cache",
))
# fmt: on
_PROTOCOLS = {
    "knn": "Nearest neighbours",
    "linear": "Linear probe",
    "fewshot": "Few-shot probe",
    "finetune": "Fine-tuning",
}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of PIL, by the number of channels
_SMALL_DATA = 100_000  # images; the families' papers pretrain on 1.28 million


class DatasetName(NamedTuple):
    """What a card calls a data set: a Hub id, or the bare name of a local file or folder."""

    name: str
    on_hub: bool


def dataset_name(run: Run, settings: dict[str, Any]) -> DatasetName:
    """What a card calls the data set of an evaluation, whose settings may hold a path of the user's machine.

    `owner/name` may be a relative path too. It counts as a Hub id only where that can be told: when the evaluation's
    path of the model leads to this folder from here, and the data set's leads nowhere.
    """
    source = str(settings.get("dataset", ""))
    here = Path(str(settings.get("model"))).resolve() == run.folder.resolve()
    if here and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not Path(source).exists():
        return DatasetName(source, True)
    return DatasetName(re.split(r"[/\\]", source.rstrip("/\\"))[-1] or "unnamed", False)


def table(header: list[str], rows: list[list[Any]], align: str = "---") -> str:
    """A Markdown table."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# -- what it is -----------------------------------------------------------------------------------------------------


def title(run: Run, repo_id: str | None) -> str:
    """The model's name on the Hub, or its folder's."""
    return repo_id.split("/")[-1] if repo_id else run.folder.resolve().name


def summary(run: Run) -> str:
    """Family, sizes, and what the model is for."""
    config, (total, encoder) = run.config, run.num_parameters
    family = FAMILIES[config["model_type"]]
    image, patch = ("×".join(map(str, pair(config[name]))) for name in ("image_size", "patch_size"))
    channels = f"{config['num_channels']} channel{'s' * (config['num_channels'] > 1)}"
    rows = [
        ["images", f"{image} pixels, {channels}, patches of {patch}"],
        ["encoder", _stack(config, "")],
        ["decoder", _stack(config, "decoder_")],
        ["parameters", f"{total:,}, of which the encoder {encoder:,}"],
    ]
    paper = family.papers[0]
    return (
        f"A vision transformer pretrained without labels as **{family.title}** ([{paper.arxiv}]"
        f"(https://arxiv.org/abs/{paper.arxiv})): {family.method}. It gives features of images, and is a start for "
        f"fine-tuning; it has no classifier.\n\n{table(['', ''], rows)}"
    )


def _stack(config: dict[str, Any], prefix: str) -> str:
    blocks, width, heads = (
        config[f"{prefix}{name}"] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    return f"{blocks} blocks, {width} wide, {heads} heads"


def usage(run: Run, repo_id: str | None) -> str:
    """A snippet that runs as pasted."""
    config, source = run.config, f'"{repo_id or "."}"'
    height, width = pair(config["image_size"])
    mode = _MODES.get(config["num_channels"])
    consent = ", trust_remote_code=True" if config.get("auto_map") else ""
    if mode:
        imports = ["from PIL import Image", "from transformers import AutoImageProcessor, AutoModel"]
        inputs = [
            f'image = Image.new("{mode}", ({width}, {height}))  # or Image.open("photo.jpg").convert("{mode}")',
            f"processor = AutoImageProcessor.from_pretrained({source}{consent if mode == 'L' else ''})",
            'pixel_values = processor(image, return_tensors="pt")["pixel_values"]',
        ]
    else:
        imports = ["from transformers import AutoModel"]
        shape = f"1, {config['num_channels']}, {height}, {width}"
        inputs = [f"pixel_values = torch.zeros({shape})  # or your images, normalised as preprocessor_config.json says"]
    ours = config["model_type"] != "vit_mae"
    if ours and not consent:
        imports = ["import clmae  # registers the family", *imports]
    lines = [
        "import torch",
        *imports,
        "",
        *inputs,
        f"model = AutoModel.from_pretrained({source}{consent}).eval()",
        "with torch.no_grad():",
        "    outputs = model(pixel_values)  # last_hidden_state: the class token, then the patches",
        f"features = outputs.{'pooler_output' if ours else 'last_hidden_state[:, 1:].mean(dim=1)'}",
        f"print(features.shape)  # torch.Size([1, {config['hidden_size']}])",
    ]
    notes = f"Runs as it stands{'' if repo_id else ', in the folder of this card'}."
    if consent:
        notes += (
            " The folder brings the model's code, which `trust_remote_code=True` lets run; with the `clmae` package "
            "installed, `import clmae` takes its place."
        )
    elif ours:
        notes += " The `clmae` package has the model's code."
    return "```python\n" + "\n".join(lines) + f"\n```\n\n{notes}"


# -- how it was judged ----------------------------------------------------------------------------------------------


def evaluation(run: Run) -> str:
    """A table for each evaluation, its protocol, and what the scores are to be compared with."""
    if not run.evaluations:
        return "Nothing was measured downstream: how good the features are for a task is not known."
    return "\n\n".join(_evaluation(run, one) for one in run.evaluations)


def _evaluation(run: Run, result: dict[str, Any]) -> str:
    rows, settings = result["rows"], result["settings"]
    # A row for each score: there are more of them than encoders.
    cells = [[column, *(_score(row, column) for row in rows)] for column in rows[0]["accuracies"]]
    spread = "; ± standard deviation over draws" if any(row.get("std") for row in rows) else ""
    interval = "; in brackets its 95 % interval" if any(row.get("intervals") for row in rows) else ""
    return (
        f"**{_title(result)}** on {dataset_name(run, settings).name}, in %{spread}{interval}:\n\n"
        f"{table(['', *(row['name'] for row in rows)], cells, '---:')}\n\n{_sentence(protocol_notes(result))}"
    )


def _score(row: dict[str, Any], column: str) -> str:
    if column not in row["accuracies"]:
        return "–"
    std, interval = (row.get("std") or {}).get(column), (row.get("intervals") or {}).get(column)
    spread = "" if std is None else f" ± {std:.1f}"
    return f"{row['accuracies'][column]:.2f}{spread}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def protocol_notes(result: dict[str, Any]) -> str:
    """How a score came about, in a line."""
    settings = result["settings"]
    parts = [
        f"{settings['num_train']:,} labelled images to learn from" if settings.get("num_train") else "",
        f"judged on {settings['num_test']:,} ({settings.get('test_split')})" if settings.get("num_test") else "",
        f"features: {settings['feature']}" if settings.get("feature") else "",
        *(f"{name} = {value}" for name, value in settings.get("parameters", {}).items() if name != "chunk_size"),
    ]
    return "; ".join(part for part in parts if part)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


# -- how it came about ----------------------------------------------------------------------------------------------


def data(run: Run) -> str:
    """The images it learned from."""
    described = run.record.get("data")
    if not described:
        return "Not recorded."
    name, on_hub = described.get("dataset"), described.get("dataset_on_hub")
    where = f"[{name}](https://huggingface.co/datasets/{name})" if on_hub else f"“{name}”, a local one"
    lines = [
        f"- data set: {where if name else 'not recorded'}",
        f"- images trained on: {_count(described['num_train_images'])}, without labels",
        f"- held out, for the evaluation loss and the pictures: {_count(described['num_held_out_images'])}",
    ]
    if run.results.get("num_bad_images"):
        lines.append(f"- broken images skipped: {run.results['num_bad_images']:,}")
    return "\n".join(lines)


def _count(images: int | None) -> str:
    return "a stream, not counted" if images is None else f"{images:,}"


def training(run: Run) -> str:
    """Steps, images, time and machine, and where the run ended."""
    state, record = run.state, run.record
    sessions = record.get("sessions", [])
    steps = state.get("global_step", sessions[-1]["last_step"] if sessions else None)
    if not steps:
        return "Not recorded."
    rows = [["optimiser steps", f"{steps:,}"]]
    if state.get("epoch"):
        rows.append(["epochs", _number(round(state["epoch"], 2))])
    batch = record.get("total_train_batch_size")
    if batch:
        rows.append(["images seen", f"{steps * batch:,} ({batch:,} a step)"])
    seconds = sum(session["seconds"] for session in sessions)
    if seconds:
        measured = sum(session["last_step"] - session["first_step"] for session in sessions)
        rows.append(["time", f"{_duration(seconds)}{_part(measured, steps)}"])
        rows.append(["images a second", _number(float(measured * batch / seconds))])
        devices = {f"{session['num_processes']} × {session['device']}": None for session in sessions}
        rows.append(["device", ", ".join(devices)])
    if "seed" in record:
        rows.append(["seed", record["seed"]])
    rows += [[label, _number(value)] for label, value in _last_values(run).items()]
    if record.get("versions"):
        rows.append(["software", ", ".join(f"{name} {number}" for name, number in record["versions"].items())])
    return table(["", ""], rows)


def _part(measured: int, steps: int) -> str:
    return "" if measured == steps else f" (of {measured:,} steps; of the others it was not recorded)"


def _last_values(run: Run) -> dict[str, float]:
    """The last of the logged values that say how the run ended."""
    labels = {
        "reconstruction_loss": "reconstruction loss, training",
        "eval_loss": "reconstruction loss, held-out images under random masks",
        "mask_difficulty": "mask difficulty (loss under learned masks over that under random ones)",
        "curriculum_factor": "curriculum factor λ_CL (+1: partner, −1: adversary)",
    }
    last: dict[str, float] = {}
    for entry in [*run.state.get("log_history", []), run.results]:
        last |= {label: entry[name] for name, label in labels.items() if name in entry}
    return {label: last[label] for label in labels.values() if label in last}


def curves(run: Run) -> str:
    """The curves' picture."""
    return f"![Losses, and measures of learned masks, over the steps]({run.curves})" if run.curves else ""


def pictures(run: Run) -> str:
    """The first, the middle and the last of the pictures."""
    steps = list(run.pictures)
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    alt = "Held-out images, what the model sees of them, and what it reconstructs"
    return "\n\n".join(f"Step {step:,}:\n\n![{alt}]({run.pictures[step]})" for step in shown)


def settings(run: Run) -> str:
    """Fields of the configuration, of the training and of the data that differ from their defaults."""
    groups = {
        "model": changed_config(run.config),
        "training": run.record.get("arguments", {}),
        "data": run.record.get("data", {}).get("options", {}),
    }
    rows = [[group, f"`{name}`", f"`{value}`"] for group, changed in groups.items() for name, value in changed.items()]
    return table(["of", "setting", "value"], rows)


def changed_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration that are neither defaults nor follow from the other fields."""
    kind = type(AutoConfig.for_model(config["model_type"]))
    default = kind().to_dict()
    own = {name: value for name, value in config.items() if name in default and name not in _NOT_SETTINGS}
    changed = {name: value for name, value in own.items() if value != default[name]}
    return {name: value for name, value in changed.items() if not _follows(kind, changed, name)}


def _follows(kind: type, changed: dict[str, Any], name: str) -> bool:
    """Whether a field comes out the same when it is left to the others."""
    try:
        return kind(**{key: value for key, value in changed.items() if key != name}).to_dict()[name] == changed[name]
    except ValueError:  # the others do not go with its default
        return False


# -- what to know before using it -----------------------------------------------------------------------------------


def limits(run: Run) -> str:
    """What follows from the facts of the run, for whoever wants to use the model."""
    described = run.record.get("data", {})
    count = described.get("num_train_images")
    points = [
        "Pretrained on one data set only: expect it to do best on images like those, and check it on yours.",
        "What that data set shows too often, too seldom or wrongly, the features do too; this was not examined.",
    ]
    if count is not None and count < _SMALL_DATA:
        points.append(
            f"Small data: {count:,} images, where the papers of the family pretrain on 1.28 million (ImageNet-1K); "
            "results of theirs cannot be expected."
        )
    height, width = pair(run.config["image_size"])
    points.append(f"Made for images of {height}×{width} pixels; for other sizes, position embeddings are interpolated.")
    points += _limits_of_evaluation(run) + _limits_of_masks(run)
    points.append("One run with one seed: differences between runs were not measured.")
    return "\n".join(f"- {point}" for point in points)


def _limits_of_evaluation(run: Run) -> list[str]:
    if not run.evaluations:
        return ["No downstream evaluation."]
    points = []
    for result in run.evaluations:
        own, *others = result["rows"]
        where = f"{_title(result)} on {dataset_name(run, result['settings']).name}"
        for other in others:
            worse = [c for c, score in own["accuracies"].items() if other["accuracies"].get(c, -1.0) >= score]
            if worse:
                scores = "any score" if len(worse) == len(own["accuracies"]) else "; ".join(worse)
                points.append(f"{where}: not above {other['name']} in {scores}.")
    return points


def _title(result: dict[str, Any]) -> str:
    return _PROTOCOLS.get(result["protocol"], result["protocol"])


def _limits_of_masks(run: Run) -> list[str]:
    entries = [entry for entry in run.state.get("log_history", []) if "mask_difficulty" in entry]
    factors = [entry["curriculum_factor"] for entry in run.state.get("log_history", []) if "curriculum_factor" in entry]
    if not entries or not factors or factors[-1] >= 0 or entries[-1]["mask_difficulty"] > 1:
        return []
    return [
        "The masking module did not become an adversary: mask difficulty ended at "
        f"{entries[-1]['mask_difficulty']:.3f}, no higher than that of random masks."
    ]


def licence(license: str) -> str:
    """Of weights and code."""
    return (
        f"Weights: `{license}`. The code beside them: Apache-2.0, by the clmae authors. The images that they were "
        "trained on have terms of their own."
    )


def citation(run: Run) -> str:
    """BibTeX of the family's papers."""
    papers = FAMILIES[run.config["model_type"]].papers
    if run.record.get("data", {}).get("options", {}).get("contrastive_crop"):
        papers = (*papers, CONTRASTIVE_CROP_PAPER)
    return "```bibtex\n" + "\n\n".join(paper.bibtex() for paper in papers) + "\n```"
