# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The code that travels with a checkpoint, so that it loads where `clmae` is not installed.

One module of a family, `modeling_<model_type>`, is the entry: every `auto_map` line points at it. It and what it
imports from `clmae`, directly or not, are written flat beside `config.json`, `from clmae.a.b import x` as
`from .b import x`. A model that was itself loaded from such a folder writes the same files again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

# What follows the family's name in the name of its class.
AUTO_CLASSES = {
    "AutoConfig": "Config",
    "AutoModel": "Model",
    "AutoModelForPreTraining": "ForPreTraining",
    "AutoModelForImageClassification": "ForImageClassification",
    "AutoBackbone": "Backbone",
}

_HERE = Path(__file__).parent
_FLAT = not __name__.startswith("clmae.")  # whether this very module was loaded from a checkpoint's folder
_IMPORT = re.compile(r"^([ \t]*from )(?:clmae((?:\.\w+)*))?\.(\w+)(?= import )", re.MULTILINE)


def hub_auto_map(config_class: type[Any]) -> dict[str, str]:
    """`auto_map` of the family that `config_class` belongs to; empty for a family from outside of this package."""
    module = f"configuration_{config_class.model_type}"
    for owner in config_class.__mro__:
        if owner.__module__.rpartition(".")[2] == module:
            family = owner.__name__.removesuffix("Config")
            entry = f"modeling_{config_class.model_type}"
            return {auto_class: f"{entry}.{family}{suffix}" for auto_class, suffix in AUTO_CLASSES.items()}
    return {}


def hub_code(model_type: str) -> dict[str, str]:
    """Flat file names and sources of all that a family needs, the entry module first."""
    root = _HERE if _FLAT else _HERE.parent / "modeling"
    pending, sources = [root / f"modeling_{model_type}.py"], {}
    while pending:
        path = pending.pop(0)
        if path.name in sources:
            continue
        source = path.read_text(encoding="utf-8")
        for _, packages, module in _IMPORT.findall(source):
            folder = _HERE if _FLAT else _HERE.parent.joinpath(*packages.split("."))
            pending.append(folder / f"{module}.py")
        sources[path.name] = _IMPORT.sub(r"\1.\3", source)
    return sources


def write_hub_code(model_type: str, folder: str | os.PathLike) -> None:
    """Writes the files of [`hub_code`] into an existing folder."""
    for name, source in hub_code(model_type).items():
        Path(folder, name).write_text(source, encoding="utf-8", newline="\n")


__all__ = ["AUTO_CLASSES", "hub_auto_map", "hub_code", "write_hub_code"]
