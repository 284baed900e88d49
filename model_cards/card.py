# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""A model's card: `template.md`, filled with what the pretraining wrote into its output folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections import ChainMap
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from transformers import AutoConfig, PreTrainedConfig

from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards.files import write_whole
from clmae.model_cards.run import FAMILIES, Run, read_run

CARD_NAME = "README.md"
EVAL_RESULTS_NAME = ".eval_results/clmae.yaml"
DEFAULT_LICENSE = "apache-2.0"  # that of the code that travels with the weights
PROTOCOLS = {
    "knn": "Nearest neighbours",
    "linear": "Linear probe",
    "fewshot": "Few-shot probe",
    "finetune": "Fine-tuning",
}
# Of transformers' bookkeeping, or of how a folder is used, not of the model.
_NOT_SETTINGS = {*PreTrainedConfig().to_dict(), "out_features", "out_indices", "stage_names"}
_AUTHOR = re.compile(r"(<!-- author: [^\n]*-->\n)(.*?)(\n<!-- /author -->)", re.DOTALL)
_AUTHOR_DEFAULT = "## Intended use\n\n*To be written by the model's author.*"
_DIGEST = re.compile(r"\n<!-- made by clmae: ([0-9a-f]{64}) -->\n*\Z")


class EditedCardError(InputError):
    """A card holds words that making it anew would lose."""


# -- the text -------------------------------------------------------------------------------------------------------


def render_card(run: Run, repo_id: str | None = None, license: str = DEFAULT_LICENSE, author: str = "") -> str:
    """The card of a run; its last line is a checksum, by which [`is_edited`] tells whether it was edited.

    Args:
        run: What the folder tells.
        repo_id: Where on the Hub the model is; without it, the code snippet loads the folder it is run in.
        license: Of the weights, by the Hub's identifier.
        author: The author's own section.
    """
    family, data = FAMILIES[run.config["model_type"]], run.record.get("data") or {}
    metadata = CardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license=license,
        tags=["clmae", family.lower(), "vision", "self-supervised-learning", "masked-image-modeling"],
        datasets=[data["dataset"]] if data.get("dataset_on_hub") else None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("template.md")),
        run=run,
        family=family,
        title=repo_id.split("/")[-1] if repo_id else run.folder.resolve().name,
        repo_id=repo_id,
        author=author or _AUTHOR_DEFAULT,
        image_size=pair(run.config["image_size"]),
        patch_size=pair(run.config["patch_size"]),
        changed_config=changed_config(run.config),
        evaluations=[_evaluation(run, evaluation) for evaluation in run.evaluations],
        training=_training(run),
    )
    return f"{card.content.rstrip()}\n\n<!-- made by clmae: {_digest(card.content)} -->\n"


def _evaluation(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """An evaluation, as the template takes it: among others what the encoder does not beat, and in which scores."""
    encoder, *others = result["rows"]
    scores, not_better = encoder["accuracies"], {}
    for other in others:
        worse = [name for name, score in scores.items() if other["accuracies"].get(name, -1.0) >= score]
        if worse:
            not_better[other["name"]] = "any score" if len(worse) == len(scores) else "; ".join(worse)
    return dict(
        title=PROTOCOLS.get(result["protocol"], result["protocol"]),
        dataset=dataset_name(run, result["settings"])[0],
        rows=result["rows"],
        notes=_protocol_notes(result),
        not_better=not_better,
    )


def _protocol_notes(result: dict[str, Any]) -> str:
    """How a score came about, in a line."""
    settings = result["settings"]
    parts = [
        f"{settings['num_train']:,} labelled images to learn from" if settings.get("num_train") else "",
        f"evaluated on {settings['num_test']:,} ({settings.get('test_split')})" if settings.get("num_test") else "",
        f"features: {settings['feature']}" if settings.get("feature") else "",
        *(f"{name} = {value}" for name, value in settings.get("parameters", {}).items() if name != "chunk_size"),
    ]
    return "; ".join(part for part in parts if part)


def dataset_name(run: Run, settings: dict[str, Any]) -> tuple[str, bool]:
    """What a card calls the dataset of an evaluation, and whether that is a Hub id.

    The settings may hold a path of the user's machine, of which only the last name is shown. `owner/name` may be a
    relative path too. It counts as a Hub id only where that can be told: when the evaluation's path of the model leads
    to this folder from here, and the dataset's leads nowhere.
    """
    source = str(settings.get("dataset", ""))
    here = Path(str(settings.get("model"))).resolve() == run.folder.resolve()
    if here and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not Path(source).exists():
        return source, True
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1] or "unnamed", False


def _training(run: Run) -> dict[str, Any]:
    """Steps, time and devices, and the last of the logged values; no steps if none was recorded."""
    sessions = run.record.get("sessions", [])
    return dict(
        steps=run.state.get("global_step", sessions[-1]["last_step"] if sessions else None),
        measured=sum(session["last_step"] - session["first_step"] for session in sessions),
        seconds=sum(session["seconds"] for session in sessions),
        devices=list(dict.fromkeys(f"{session['num_processes']} × {session['device']}" for session in sessions)),
        last=dict(ChainMap(run.results, *reversed(run.state.get("log_history", [])))),
    )


def changed_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration that are neither defaults nor follow from the other fields."""
    kind: Any = type(AutoConfig.for_model(config["model_type"]))
    default = kind().to_dict()
    fields = {name: value for name, value in config.items() if name in default and name not in _NOT_SETTINGS}
    changed = {name: value for name, value in fields.items() if value != default[name]}

    def follows(name: str) -> bool:
        try:
            others = {other: value for other, value in changed.items() if other != name}
            return kind(**others).to_dict()[name] == changed[name]
        except ValueError:  # the others do not go with its default
            return False

    return {name: value for name, value in changed.items() if not follows(name)}


def eval_results(run: Run) -> str:
    """`.eval_results/*.yaml` of the model's scores on datasets of the Hub; empty if there are none."""
    entries = []
    for evaluation in run.evaluations:
        dataset, on_hub = dataset_name(run, evaluation["settings"])
        for column, value in evaluation["rows"][0]["accuracies"].items() if on_hub else ():
            task = re.sub(r"[^a-z0-9]+", "-", f"{evaluation['protocol']} {column}".lower()).strip("-")
            notes = f"accuracy in %; {_protocol_notes(evaluation)}"
            entries.append(EvalResultEntry(dataset, task, value, date=evaluation["settings"].get("date"), notes=notes))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""


# -- what a person wrote --------------------------------------------------------------------------------------------


def _digest(text: str) -> str:
    """SHA-256 of a card without the author's section and the line with the checksum, however its lines end."""
    text = _AUTHOR.sub(r"\1\3", _DIGEST.sub("", text.replace("\r\n", "\n")))
    return hashlib.sha256(text.strip().encode()).hexdigest()


def is_edited(text: str) -> bool:
    """Whether a card was not made here, or was edited outside of the author's section."""
    text = text.replace("\r\n", "\n")
    digest = _DIGEST.search(text)
    return digest is None or digest[1] != _digest(text) or not _AUTHOR.search(text)


def author_section(text: str) -> str:
    """The author's own section of a card; empty if it has none, or nobody wrote it yet."""
    section = _AUTHOR.search(text.replace("\r\n", "\n"))
    return section[2] if section and section[2].strip() != _AUTHOR_DEFAULT else ""


def write_card(
    folder: str | os.PathLike, repo_id: str | None = None, license: str | None = None, force: bool = False
) -> Path:
    """Makes a folder's card anew: `README.md` and, for scores on the Hub's datasets, `.eval_results/clmae.yaml`.

    The author's section of an earlier card stays, and so does its licence.

    Args:
        folder: Output folder of a run.
        repo_id: As in [`render_card`].
        license: Of the weights, by the Hub's identifier; the earlier card's, or Apache-2.0, if not given.
        force: Overwrite a card that was written or edited by hand; its author's section stays even then.

    Returns:
        The card's path.

    Raises:
        EditedCardError: There is a README.md that was not made here, or was edited outside of the author's section.
        InputError: As [`read_run`].
    """
    run, path = read_run(folder), Path(folder, CARD_NAME)
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    if earlier and is_edited(earlier) and not force:
        raise EditedCardError(
            f"{path} was written or edited by hand outside of the author's section, which is all that stays when the "
            "card is made anew: move your words there, or overwrite them with `clmae card --force`."
        )
    earlier_license = re.match(r"---\r?\n.*?^license: ([^\r\n]+)\r?$.*?^---\r?$", earlier, re.DOTALL | re.MULTILINE)
    license = license or (earlier_license[1] if earlier_license else DEFAULT_LICENSE)
    text, scores = render_card(run, repo_id, license, author_section(earlier)), eval_results(run)
    scores_path = Path(folder, EVAL_RESULTS_NAME)
    if scores:
        write_whole(scores_path, scores)
    else:
        scores_path.unlink(missing_ok=True)
    write_whole(path, text)
    return path
