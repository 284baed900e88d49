# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Make the model card (README.md) of an output folder from what the run recorded there, with the results that
`clmae evaluate --output FOLDER/NAME.json` wrote into the folder. The author's section is kept when the card
is made again; a card that was edited in other places is refused.

examples:
  clmae card out/cl-mae
  clmae card out/cl-mae --repo_id org/cl-mae-vit-b --license cc-by-4.0
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clmae.cli.options import CommandParser
from clmae.configuration.errors import InputError
from clmae.model_cards.card import CARD_NAME, DEFAULT_LICENSE, write_card
from clmae.model_cards.run import read_run


def run(argv: Sequence[str]) -> int:
    """Makes `README.md` in an output folder, from what the run and its evaluations wrote there."""
    parser = CommandParser("clmae card", __doc__)
    add_card_arguments(parser)
    parser.add_argument("--repo_id", metavar="ID", help="Where on the Hub the model is: owner/name.")
    (args,) = parser.read(argv)
    print(f"wrote {make_card(args.output_dir, args.repo_id, args.license, args.force)}")
    return 0


def add_card_arguments(parser: CommandParser) -> None:
    """The arguments of all commands that make a card."""
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="Folder that `clmae pretrain` wrote.")
    parser.add_argument(
        "--license", help="Licence of the weights; the earlier card's if there is one, else apache-2.0."
    )
    parser.add_argument("--force", action="store_true", help="Overwrite a card that was written or edited by hand.")


def make_card(folder: str, repo_id: str | None = None, license: str | None = None, force: bool = False) -> Path:
    """Draws the curves and writes the card; arguments and errors as [`write_card`]'s."""
    from clmae.training.pictures import curves_figure, save_figure  # the help does not wait for it

    if not Path(folder).is_dir():
        raise InputError(f"OUTPUT_DIR {folder!r} is no folder.")
    history = read_run(folder).state.get("log_history")
    if history:
        save_figure(curves_figure(history), Path(folder, "pictures", "curves.png"))
    if license is None and not Path(folder, CARD_NAME).exists():
        print(f"the weights' licence is {DEFAULT_LICENSE}, because no --license was given")
    return write_card(folder, repo_id, license, force)
