# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a run records of itself, the card made of it, and what goes to the Hub."""

from clmae.model_cards.card import EditedCardError, write_card
from clmae.model_cards.hub import check_folder, hub_files, upload
from clmae.model_cards.record import RunRecord, describe_data

__all__ = ["EditedCardError", "RunRecord", "check_folder", "describe_data", "hub_files", "upload", "write_card"]
