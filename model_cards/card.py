# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""A model's card, rendered from what its pretraining wrote into the output folder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from clmae.configuration.errors import InputError
from clmae.model_cards import sections
from clmae.model_cards.families import FAMILIES
from clmae.model_cards.files import write_whole
from clmae.model_cards.run import Run, read_run

CARD_NAME = "README.md"
EVAL_RESULTS_NAME = ".eval_results/clmae.yaml"
DEFAULT_LICENSE = "apache-2.0"  # that of the code that travels with the weights
_AUTHOR = re.compile(r"(<!-- author: [^\n]*-->\n)(.*?)(\n<!-- /author -->)", re.DOTALL)
_SEAL = re.compile(r"\n<!-- made by clmae: ([0-9a-f]{64}) -->\n*\Z")
_AUTHOR_DEFAULT = """\
## Intended use

*To be written by the model's author.*"""


class EditedCardError(InputError):
    """A card holds words that making it anew would lose."""


# -- the text -------------------------------------------------------------------------------------------------------


def render_card(run: Run, repo_id: str | None = None, license: str = DEFAULT_LICENSE, author: str = "") -> str:
    """The card of a run, with its seal.

    Args:
        run: What the folder tells.
        repo_id: Where on the Hub the model is; without it, the code snippet loads the folder it is run in.
        license: Of the weights, by the Hub's identifier.
        author: The author's own section.
    """
    parts = {
        "metadata": f"---\n{yaml.safe_dump(metadata(run, license), sort_keys=False)}---",
        "title": sections.title(run, repo_id),
        "author": author or _AUTHOR_DEFAULT,
        "licence": sections.licence(license),
        "usage": sections.usage(run, repo_id),
    }
    for name in ("summary", "evaluation", "data", "training", "curves", "pictures", "settings", "limits", "citation"):
        parts[name] = getattr(sections, name)(run)
    template = Path(__file__).with_name("template.md").read_text(encoding="utf-8")
    return _sealed(Template(_without_empty_sections(template, parts)).substitute(parts))


def _without_empty_sections(template: str, parts: dict[str, str]) -> str:
    """The template without those headings that there is nothing to say under."""
    for name, part in parts.items():
        if not part:
            template = re.sub(rf"^#+ [^\n]*\n\n\${name}\n\n", "", template, flags=re.MULTILINE)
    return template


def metadata(run: Run, license: str) -> dict[str, Any]:
    """The front matter, by which the Hub files the model."""
    data = run.record.get("data", {})
    family = FAMILIES[run.config["model_type"]].title.lower()
    return {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "license": license,
        "tags": ["clmae", family, "vision", "self-supervised-learning", "masked-image-modeling"],
        **({"datasets": [data["dataset"]]} if data.get("dataset_on_hub") else {}),
    }


def eval_results(run: Run) -> str:
    """`.eval_results/*.yaml` of the model's scores on data sets of the Hub; empty if there are none."""
    entries = []
    for evaluation in run.evaluations:
        settings = evaluation["settings"]
        dataset = sections.dataset_name(run, settings)
        if not dataset.on_hub:
            continue
        row = evaluation["rows"][0]
        for column, value in row["accuracies"].items():
            task = re.sub(r"[^a-z0-9]+", "-", f"{evaluation['protocol']} {column}".lower()).strip("-")
            notes = f"accuracy in %; {sections.protocol_notes(evaluation)}"
            entries.append(EvalResultEntry(dataset.name, task, value, date=settings.get("date"), notes=notes))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""


# -- what a person wrote --------------------------------------------------------------------------------------------


def _sealed(text: str) -> str:
    return f"{text.rstrip()}\n\n<!-- made by clmae: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    """SHA-256 of a card without its seal and the author's section, however its lines end."""
    own = _AUTHOR.sub(r"\1\3", _SEAL.sub("", text.replace("\r\n", "\n")))
    return hashlib.sha256(own.strip().encode()).hexdigest()


def is_edited(text: str) -> bool:
    """Whether a card was not made here, or was edited outside of the author's section."""
    text = text.replace("\r\n", "\n")
    seal = _SEAL.search(text)
    return seal is None or seal[1] != _digest(text) or not _AUTHOR.search(text)


def author_section(text: str) -> str:
    """The author's own section of a card; empty if it has none, or nobody wrote it yet."""
    found = _AUTHOR.search(text.replace("\r\n", "\n"))
    return found[2] if found and found[2].strip() != _AUTHOR_DEFAULT else ""


def _license_of(text: str) -> str | None:
    found = re.match(r"---\n.*?^license: ([^\n]+)$.*?^---$", text.replace("\r\n", "\n"), re.DOTALL | re.MULTILINE)
    return found[1] if found else None


# -- writing --------------------------------------------------------------------------------------------------------


def write_card(
    folder: str | os.PathLike, repo_id: str | None = None, license: str | None = None, force: bool = False
) -> Path:
    """Makes a folder's card anew: `README.md` and, for scores on the Hub's data sets, `.eval_results/clmae.yaml`.

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
    license = license or _license_of(earlier) or DEFAULT_LICENSE
    text, scores = render_card(run, repo_id, license, author_section(earlier)), eval_results(run)
    scores_path = Path(folder, EVAL_RESULTS_NAME)
    if scores:
        write_whole(scores_path, scores)
    else:
        scores_path.unlink(missing_ok=True)
    write_whole(path, text)
    return path


__all__ = [
    "CARD_NAME",
    "DEFAULT_LICENSE",
    "EditedCardError",
    "author_section",
    "eval_results",
    "is_edited",
    "render_card",
    "write_card",
]
