# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The architecture, read from the source: who imports whom, what is declared, how long functions are, what is safe."""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import transformers

from clmae.training import CurriculumTrainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
# Each may import those before it, and itself.
LAYERS = ("configuration", "modeling", "model_cards", "training", "evaluation", "clmae")
# What travels to the Hub depends on nothing else; the configuration not even on torch.
THIRD_PARTY = {"configuration": {"transformers"}, "modeling": {"transformers", "torch"}}


def python_files(folder: str) -> list[Path]:
    """The Python files below a folder, without following the links in `clmae/`."""
    return [Path(path, name) for path, _, names in os.walk(ROOT / folder) for name in names if name.endswith(".py")]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "clmae" else ("clmae", *parts))


SOURCES = {module_name(path): path.read_text() for layer in LAYERS for path in sorted(python_files(layer))}
SCRIPTS = {str(path): path.read_text() for folder in ("benchmarks", "recipes") for path in python_files(folder)}


def imported(source: str) -> list[str]:
    """Dotted names of everything that `source` imports, at any depth; relative imports keep their dots."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


# -- imports ----------------------------------------------------------------------------------------------------------


def layer_of(name: str) -> str:
    """The package that a dotted name under `clmae` belongs to; of the public API, `clmae` itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "clmae"


def violations(layer: str, source: str) -> list[str]:
    """What the imports of one module of `layer` break."""
    broken = []
    for name in imported(source):
        package = name.split(".")[0]
        if name.startswith("."):
            broken.append(f"{name}: relative; write clmae.<package>.<module>")
        elif package in LAYERS and package != "clmae":
            broken.append(f"{name}: the same module twice; write clmae.{name}")
        elif package == "clmae" and LAYERS.index(layer_of(name)) > LAYERS.index(layer):
            broken.append(f"{name}: upwards from {layer}")
        elif package not in {"clmae", *THIRD_PARTY.get(layer, {package}), *sys.stdlib_module_names}:
            broken.append(f"{name}: {layer} may import only {sorted(THIRD_PARTY[layer])}")
    return broken


def test_nothing_imports_upwards():
    assert {"clmae", "clmae.configuration", "clmae.modeling.losses", "clmae.training"} <= set(SOURCES)
    assert {name: broken for name, text in SOURCES.items() if (broken := violations(layer_of(name), text))} == {}


def test_no_import_cycles():
    def module_of(name: str) -> str | None:
        prefixes = (name.rsplit(".", i)[0] for i in range(name.count(".") + 1))
        return next((prefix for prefix in prefixes if prefix in SOURCES), None)

    edges = {module: {module_of(name) for name in imported(text)} - {None} for module, text in SOURCES.items()}
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
    for path in python_files("tests"):
        assert not {name.split(".")[0] for name in imported(path.read_text())} & set(LAYERS[:-1]), path


# -- dependencies -----------------------------------------------------------------------------------------------------

# Not imported here, but by `report_to: tensorboard` of the recipes, huggingface_hub's card templates, torch.onnx.
NOT_IMPORTED = {"tensorboard", "jinja2", "onnx", "onnxscript"}


def declared(*extras: str) -> set[str]:
    """Distributions in pyproject.toml: of the package itself, and of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {re.match(r"[\w-]+", line)[0].lower() for line in lines}


installed = functools.cache(packages_distributions)  # which takes seconds


def needed(sources: dict[str, str]) -> set[str]:
    """Distributions of the third-party packages that some modules import."""
    packages = {name.split(".")[0] for text in sources.values() for name in imported(text)}
    packages -= {"clmae", *sys.stdlib_module_names, *(Path(path).stem for path in SCRIPTS)}
    distributions = installed()
    return {distributions.get(package, [package])[0].lower().replace("_", "-") for package in packages}


def test_what_the_package_imports_is_declared():
    assert needed(SOURCES) - declared("export") - declared("app") == set()


def test_what_is_declared_is_imported():
    assert declared("export") - needed(SOURCES) == NOT_IMPORTED


def test_benchmarks_need_no_more_than_the_package():
    scripts = {path: text for path, text in SCRIPTS.items() if "benchmarks" in path}
    assert needed(scripts) - declared() == set()


# -- size -------------------------------------------------------------------------------------------------------------


def code_lines(node: ast.AST, source: str) -> int:
    """Non-blank lines of a definition."""
    return sum(bool(line.strip()) for line in source.splitlines()[node.lineno - 1 : node.end_lineno])


def definitions(kind: type, sources: dict[str, str]) -> dict[str, int]:
    """Non-blank lines of all definitions of a kind, by module and name."""
    nodes = ((name, text, node) for name, text in sources.items() for node in ast.walk(ast.parse(text)))
    return {f"{name}.{node.name}": code_lines(node, text) for name, text, node in nodes if isinstance(node, kind)}


def test_no_function_is_longer_than_60_lines():
    functions = definitions((ast.FunctionDef, ast.AsyncFunctionDef), SOURCES)
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}


def test_the_trainer_is_small():
    assert definitions(ast.ClassDef, SOURCES)["clmae.training.trainer.CurriculumTrainer"] <= 350


def test_the_trainer_overrides_at_most_two_private_methods():
    chain = [owner for owner in CurriculumTrainer.__mro__ if owner.__module__.startswith("clmae.")]
    private = {name for owner in chain for name, value in vars(owner).items() if name[0] == "_" and callable(value)}
    assert len({name for name in private if not name.startswith("__") and hasattr(transformers.Trainer, name)}) <= 2


def test_no_model_is_asked_for_the_parts_of_a_family():
    pattern = re.compile(r"""(?:has|get)attr\([^()]*,\s*["'](?:masking_module|position_head)["']""")
    assert {name: hits for name, text in SOURCES.items() if (hits := pattern.findall(text))} == {}


# -- what reads a file that somebody else may have made, and runs what is in it ---------------------------------------

FREE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader", "yaml.Loader"),
    *("dill.load", "cloudpickle.load", "pandas.read_pickle", "pd.read_pickle", "eval", "exec", "os.system"),
}
CONSENT = {("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False), ("shell", True)}


def unsafe(source: str) -> list[str]:
    """What in `source` could run code that comes with data: free unpickling, free YAML, unasked consent."""
    hits = []
    for node in ast.walk(ast.parse(source)):
        given: set[tuple] = set()
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) in FREE:
            hits.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            hits += [name for name in imported(ast.unparse(node)) if name in FREE]
        elif isinstance(node, ast.Call):
            given = {(word.arg, getattr(word.value, "value", None)) for word in node.keywords}
            if ast.unparse(node.func) == "torch.load" and ("weights_only", True) not in given:
                hits.append("torch.load without weights_only=True")
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            given = {(getattr(key, "value", None), getattr(value, "value", None)) for key, value in pairs}
        hits += [f"{name}={value}" for name, value in CONSENT & given]
    return hits


def test_no_file_is_read_as_code():
    assert {path: hits for path, text in (SOURCES | SCRIPTS).items() if (hits := unsafe(text))} == {}
