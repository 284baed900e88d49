# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Upload a model to the Hub: weights, configuration, the model's code, image processor, card and the pictures
that it shows (they show held-out images), scores. No checkpoints, data or logs. Log in with `hf auth
login`, or set HF_TOKEN.

examples:
  clmae push out/cl-mae org/cl-mae-vit-b
  clmae push out/cl-mae org/cl-mae-vit-b --private
  clmae push org/cl-mae-vit-b org/cl-mae-page --space
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from tqdm.auto import tqdm

import clmae
from clmae.cli.card import add_card_arguments, make_card
from clmae.cli.options import CommandParser
from clmae.configuration.errors import InputError
from clmae.model_cards.card import CARD_NAME, EditedCardError, author_section, is_edited
from clmae.model_cards.hub import check_card, check_folder, hub_files, upload

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # ./folder is none
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
    parser = CommandParser("clmae push", __doc__)
    add_card_arguments(parser)
    parser.add_argument("repo_id", metavar="ID", help="Where on the Hub: owner/name; created if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Make it private; refused if it exists and is public.")
    parser.add_argument("--message", default="Upload model", help="Message of the commit.")
    parser.add_argument(
        "--space",
        action="store_true",
        help="Upload a Space instead, which shows the page of `clmae app` for the model; OUTPUT_DIR may be a Hub id.",
    )
    (args,) = parser.read(argv)
    if not REPO_ID.fullmatch(args.repo_id):
        raise InputError(f"ID {args.repo_id!r} is no name on the Hub; give owner/name.")
    if not args.space or Path(args.output_dir).exists() or not REPO_ID.fullmatch(args.output_dir):
        check_folder(args.output_dir, lambda names: tqdm(names, desc="checking weights", leave=False))
    if huggingface_hub.get_token() is None:
        raise InputError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN.")
    if not args.space:
        _write_card(args)
    try:
        (_push_space if args.space else _push)(args.output_dir, args)
    except (HTTPError, OSError) as error:
        # The Hub's message, which names no token.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the upload to {args.repo_id!r} failed, and no file was changed there: {reason[:400]}"
        ) from error
    return 0


def _write_card(args: argparse.Namespace) -> None:
    try:
        make_card(args.output_dir, args.repo_id, args.license, args.force)
    except EditedCardError:
        print(f"{CARD_NAME} was edited by hand and is uploaded as it is; --force would make it anew.")
    check_card(args.output_dir)


def _push(folder: str, args: argparse.Namespace) -> None:
    repo_id = args.repo_id
    before = _create_repository(args)
    if not args.force:
        _check_remote_card(repo_id, folder)
    sizes = {name: Path(folder, name).stat().st_size for name in hub_files(folder)}
    for name, size in sizes.items():
        print(f"  {tqdm.format_sizeof(size, 'B'):>9}  {name}")
    print(f"{len(sizes)} files, {tqdm.format_sizeof(sum(sizes.values()), 'B')}")
    commit = upload(folder, repo_id, commit_message=args.message)
    changed = commit.oid != before.sha
    print(f"pushed to {commit.repo_url}" if changed else f"nothing has changed at {commit.repo_url}")


def _create_repository(args: argparse.Namespace, repo_type: str = "model", **options: str) -> Any:
    """What the Hub says of the repository, which is made if there is none; one that is public stays public."""
    api, repo_id = HfApi(), args.repo_id
    api.create_repo(repo_id, repo_type=repo_type, private=args.private, exist_ok=True, **options)
    info = api.repo_info(repo_id, repo_type=repo_type)
    if args.private and not info.private:
        raise InputError(
            f"{repo_id!r} exists already, and is public: make it private on the Hub, or take another name."
        )
    return info


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


def _push_space(model: str, args: argparse.Namespace) -> None:
    """A Space with the page for a model: one on the Hub, or a folder, whose files then go with it."""
    repo_id, folder, package = args.repo_id, Path(model), Path(clmae.__file__).parent
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
    _create_repository(args, repo_type="space", space_sdk="gradio")
    operations = [CommitOperationAdd(file, content) for file, content in files.items()]
    commit = HfApi().create_commit(repo_id, operations, commit_message=args.message, repo_type="space")
    print(f"pushed {len(files)} files to {commit.repo_url}")
