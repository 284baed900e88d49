# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Who may import whom: configuration <- modeling <- model_cards <- training <- evaluation <- clmae, from the source."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import those before it, and itself.
ROOMS = ("configuration", "modeling", "model_cards", "training", "evaluation", "clmae")
# What travels to the Hub depends on nothing else; the configuration not even on torch.
THIRD_PARTY = {"configuration": {"transformers"}, "modeling": {"transformers", "torch"}}


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name; the links in `clmae/` are not followed."""
    found = {}
    for room in ROOMS:
        for folder, _, files in os.walk(ROOT / room):
            for path in (Path(folder, file) for file in sorted(files) if file.endswith(".py")):
                parts = path.relative_to(ROOT).with_suffix("").parts
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                found[".".join(parts if room == "clmae" else ("clmae", *parts))] = path
    return found


SOURCES = sources()


def imported(source: str) -> list[str]:
    """Dotted names of everything that `source` imports, at any depth; relative imports keep their dots."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def room_of(name: str) -> str:
    """The package that a dotted name under `clmae` belongs to; of the public API, `clmae` itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "clmae"


def complaints(room: str, source: str) -> list[str]:
    """What the imports of one module of `room` break."""
    found = []
    for name in imported(source):
        package = name.split(".")[0]
        if name.startswith("."):
            found.append(f"{name}: relative; write clmae.<room>.<module>")
        elif package in ROOMS and package != "clmae":
            found.append(f"{name}: the same module twice; write clmae.{name}")
        elif package == "clmae" and ROOMS.index(room_of(name)) > ROOMS.index(room):
            found.append(f"{name}: upwards from {room}")
        elif package != "clmae" and room in THIRD_PARTY:
            allowed = THIRD_PARTY[room] | sys.stdlib_module_names
            found += [] if package in allowed else [f"{name}: {room} may import only {sorted(THIRD_PARTY[room])}"]
    return found


def module_of(name: str) -> str | None:
    """The module of this package that holds the dotted `name`, or `None`."""
    return next((name.rsplit(".", i)[0] for i in range(name.count(".") + 1) if name.rsplit(".", i)[0] in SOURCES), None)


@pytest.mark.parametrize("module", SOURCES)
def test_imports(module):
    assert complaints(room_of(module), SOURCES[module].read_text()) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("configuration", "import torch"),
        ("configuration", "def f():\n    from torch import nn"),
        ("configuration", "from clmae.modeling import MAEModel"),
        ("modeling", "import numpy as np"),
        ("modeling", "from clmae.training.curriculum import CurriculumTrainer"),
        ("modeling", "from clmae import MAEConfig"),
        ("modeling", "from modeling.losses import kl_loss"),
        ("modeling", "from . import losses"),
        ("model_cards", "from clmae.training.pictures import curves_figure"),
        ("training", "import clmae.evaluation.knn"),
        ("evaluation", "import clmae"),
        ("clmae", "import training"),
    ],
)
def test_the_rule_finds_what_breaks_it(room, source):
    assert len(complaints(room, source)) == 1


def test_there_is_something_to_check():
    assert {"clmae", "clmae.configuration", "clmae.modeling.losses", "clmae.training"} <= set(SOURCES)


def test_no_import_cycles():
    edges = {
        module: {module_of(name) for name in imported(path.read_text())} - {None} for module, path in SOURCES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for needed in sorted(edges[module]):
                visit(needed, (*trail, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())


def test_tests_import_the_installed_names():
    for path in (ROOT / "tests").rglob("*.py"):
        packages = {name.split(".")[0] for name in imported(path.read_text())}
        assert not packages & set(ROOMS[:-1]), path


# What reads a file that somebody else may have made, and runs what is in it.
FREE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader", "yaml.Loader"),
    *("dill.load", "cloudpickle.load", "pandas.read_pickle", "pd.read_pickle", "eval", "exec", "os.system"),
}
CONSENT = {("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False), ("shell", True)}


def unsafe(source: str) -> list[str]:
    """What in `source` could run code that comes with data: free unpickling, free YAML, unasked consent."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) in FREE:
            found.append(ast.unparse(node))
        if isinstance(node, ast.ImportFrom):
            found += [name for name in imported(ast.unparse(node)) if name in FREE]
        if isinstance(node, ast.Call):
            given = {(word.arg, getattr(word.value, "value", None)) for word in node.keywords}
            found += [f"{name}={value}" for name, value in CONSENT & given]
            if ast.unparse(node.func) == "torch.load" and ("weights_only", True) not in given:
                found.append("torch.load without weights_only=True")
        if isinstance(node, ast.Dict):
            given = {(getattr(key, "value", None), getattr(value, "value", None)) for key, value in zip_dict(node)}
            found += [f"{name}: {value}" for name, value in CONSENT & given]
    return found


def zip_dict(node: ast.Dict) -> list[tuple[ast.expr | None, ast.expr]]:
    """Keys and values of a dictionary in source."""
    return list(zip(node.keys, node.values, strict=True))


def test_no_file_is_read_as_code():
    scripts = [path for room in ("benchmarks", "recipes") for path in (ROOT / room).rglob("*.py")]
    found = {str(path): unsafe(path.read_text()) for path in [*SOURCES.values(), *scripts]}
    assert {path: problems for path, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "from pickle import loads",
        "yaml.load(text, yaml.SafeLoader)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "dict(trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_what_reads_files_as_code_is_found(source):
    assert unsafe(source)


def test_what_reads_files_as_data_is_let_through():
    good = "torch.load(p, weights_only=True); yaml.safe_load(t); model.eval(); np.load(p, allow_pickle=False)"
    assert unsafe(good) == unsafe("except_ = pickle.UnpicklingError; f(trust_remote_code=False)") == []
