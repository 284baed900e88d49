# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae push`."""

from __future__ import annotations

import glob
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from tqdm.auto import tqdm

import clmae
from clmae.cli.card import make_card
from clmae.cli.folders import PathsParser
from clmae.configuration.errors import InputError
from clmae.model_cards.card import CARD_NAME, EditedCardError, author_section, is_edited
from clmae.model_cards.hub import check_card, check_folder, hub_files, upload

EXAMPLES = """\
  clmae push out/cl-mae org/cl-mae-vit-b
  clmae push out/cl-mae org/cl-mae-vit-b --private
  clmae push org/cl-mae-vit-b org/cl-mae-page --space"""

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
SPACE_README = """\
---
title: {name}
sdk: gradio
app_file: app.py
pinned: false
{models}---

Masks, reconstructions and features of a masked autoencoder. Made by `clmae push --space`.
"""
SPACE_APP = """\
from clmae.app.page import serve

serve({model!r}, host=None, port=None)  # where the Space says
"""


def run(argv: Sequence[str]) -> int:
    """Checks an output folder, makes its card, and uploads what belongs on the Hub, in one commit."""
    parser = PathsParser(
        "clmae push",
        "Upload a model to the Hub: weights, configuration, the model's code, image processor, card and the pictures "
        "that it shows (they show held-out images), scores. No checkpoints, data or logs. Log in with `hf auth "
        "login`, or set HF_TOKEN.",
        EXAMPLES,
    )
    parser.add_argument(
        "output_dir",
        metavar="OUTPUT_DIR",
        help="Folder that `clmae pretrain` wrote; with --space also a model's Hub id.",
    )
    parser.add_argument("repo_id", metavar="ID", help="Where on the Hub: owner/name; made if it is not there.")
    parser.add_argument("--private", action="store_true", help="Make it private; refused if it is there and public.")
    parser.add_argument("--license", help="Of the weights; the earlier card's if there is one, else apache-2.0.")
    parser.add_argument("--message", default="Upload model", help="Of the commit.")
    parser.add_argument(
        "--force", action="store_true", help="Overwrite a card that was edited by hand, here or on the Hub."
    )
    parser.add_argument(
        "--space",
        action="store_true",
        help="Upload a Space instead, which shows the page of `clmae app` for the model.",
    )
    args = parser.read(argv)
    if not REPO_ID.fullmatch(args.repo_id):
        raise InputError(f"ID {args.repo_id!r} is no name on the Hub; give owner/name.")
    if not args.space or Path(args.output_dir).exists() or not REPO_ID.fullmatch(args.output_dir):
        check_folder(args.output_dir, lambda names: tqdm(names, desc="checking weights", leave=False))
    if huggingface_hub.get_token() is None:
        raise InputError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN.")
    if not args.space:
        _write_card(args.output_dir, args.repo_id, args.license, args.force)
    try:
        if args.space:
            _push_space(args.output_dir, args.repo_id, args.private, args.message)
        else:
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


def _push_space(model: str, repo_id: str, private: bool, message: str) -> None:
    """A Space with the page for a model: one on the Hub, or a folder, whose files then go with it."""
    folder, package = Path(model), Path(clmae.__file__).parent
    names = hub_files(folder) if folder.is_dir() else []
    requirements = [line for line in importlib.metadata.requires("clmae") or [] if "extra ==" not in line]
    name, models = repo_id.split("/")[1], "" if names else f"models: [{model}]\n"
    files: dict[str, bytes | Path] = {f"model/{file}": folder / file for file in names}
    # The package goes along: of what a Space installs by name, anybody could be the author.
    files |= {f"clmae/{file}": package / file for file in glob.glob("**/*.py", root_dir=package, recursive=True)}
    files |= {
        "README.md": SPACE_README.format(name=name, models=models).encode(),
        "app.py": SPACE_APP.format(model="model" if names else model).encode(),
        "requirements.txt": "\n".join([*requirements, "gradio>=6\n"]).encode(),
    }
    api = HfApi()
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    if private and not api.space_info(repo_id).private:
        raise InputError(f"{repo_id!r} is there already, and public: make it private on the Hub, or take another name.")
    operations = [CommitOperationAdd(file, content) for file, content in files.items()]
    commit = api.create_commit(repo_id, operations, commit_message=message, repo_type="space")
    print(f"pushed {len(files)} files to {commit.repo_url}")


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
