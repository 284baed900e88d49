# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae push`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from tqdm.auto import tqdm

from clmae.cli.card import make_card
from clmae.cli.folders import PathsParser
from clmae.configuration.errors import InputError
from clmae.model_cards.card import CARD_NAME, EditedCardError, author_section, is_edited
from clmae.model_cards.hub import check_card, check_folder, hub_files, upload

EXAMPLES = """\
  clmae push out/cl-mae org/cl-mae-vit-b
  clmae push out/cl-mae org/cl-mae-vit-b --private"""


def run(argv: Sequence[str]) -> int:
    """Checks an output folder, makes its card, and uploads what belongs on the Hub, in one commit."""
    parser = PathsParser(
        "clmae push",
        "Upload a model to the Hub: weights, configuration, the model's code, image processor, card and the pictures "
        "that it shows (they show held-out images), scores. No checkpoints, data or logs. Log in with `hf auth "
        "login`, or set HF_TOKEN.",
        EXAMPLES,
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="Folder that `clmae pretrain` wrote.")
    parser.add_argument("repo_id", metavar="ID", help="Where on the Hub: owner/name; made if it is not there.")
    parser.add_argument("--private", action="store_true", help="Make it private; refused if it is there and public.")
    parser.add_argument("--license", help="Of the weights; the earlier card's if there is one, else apache-2.0.")
    parser.add_argument("--message", default="Upload model", help="Of the commit.")
    parser.add_argument(
        "--force", action="store_true", help="Overwrite a card that was edited by hand, here or on the Hub."
    )
    args = parser.read(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo_id):
        raise InputError(f"ID {args.repo_id!r} is no name on the Hub; give owner/name.")
    check_folder(args.output_dir, lambda names: tqdm(names, desc="checking weights", leave=False))
    if huggingface_hub.get_token() is None:
        raise InputError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN.")
    _write_card(args.output_dir, args.repo_id, args.license, args.force)
    try:
        _push(args.output_dir, args.repo_id, args.private, args.message, args.force)
    except (HTTPError, OSError) as error:
        # The Hub's own words, which name no token; the first lines tell what happened.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the upload to {args.repo_id!r} failed, and no file was changed there: {reason[:400]}"
        ) from error
    return 0


def _write_card(folder: str, repo_id: str, license: str | None, force: bool) -> None:
    try:
        make_card(folder, repo_id, license, force)
    except EditedCardError:
        print(f"{CARD_NAME} was edited by hand and goes as it is; --force would make it anew.")
    check_card(folder)


def _push(folder: str, repo_id: str, private: bool, message: str, force: bool) -> None:
    api, names = HfApi(), hub_files(folder)
    api.create_repo(repo_id, private=private, exist_ok=True)
    there = api.model_info(repo_id)
    if private and not there.private:
        raise InputError(f"{repo_id!r} is there already, and public: make it private on the Hub, or take another name.")
    if not force:
        _check_remote_card(repo_id, folder)
    for name in names:
        print(f"  {_size(Path(folder, name).stat().st_size):>9}  {name}")
    print(f"{len(names)} files, {_size(sum(Path(folder, name).stat().st_size for name in names))}")
    commit = upload(folder, repo_id, commit_message=message)
    changed = commit.oid != there.sha
    print(f"pushed to {commit.repo_url}" if changed else f"nothing has changed at {commit.repo_url}")


def _check_remote_card(repo_id: str, folder: str) -> None:
    """Refuses to overwrite what somebody wrote into the card on the Hub."""
    try:
        text = Path(huggingface_hub.hf_hub_download(repo_id, CARD_NAME)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return
    own = Path(folder, CARD_NAME).read_text(encoding="utf-8")
    words = author_section(text)
    if text != own and (is_edited(text) or (words and words != author_section(own))):
        raise InputError(
            f"the card of {repo_id!r} was edited on the Hub: bring those words into {Path(folder, CARD_NAME)}, or "
            "overwrite them with `--force`."
        )


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
