# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""From a command line, and a YAML recipe under it, to dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from clmae.configuration.errors import InputError


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The entries of a YAML recipe: option names and values, flat."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not a YAML file: {error}") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise InputError(f"--config {path}: a recipe is a list of `option: value` lines.")
    return recipe


def recipe_to_argv(recipe: dict[str, Any]) -> list[str]:
    """A recipe as the options that would say the same; an empty value is one that has no default."""
    argv: list[str] = []
    for name, value in recipe.items():
        if value is None:
            continue
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, (bool, dict)):
            argv.append(f"--{name}={json.dumps(value)}")
        else:
            argv.append(f"--{name}={value}")  # in one word: -1.0e-5 would else be taken for an option
    return argv


def split_recipe(argv: Sequence[str]) -> tuple[dict[str, Any], str | None, list[str]]:
    """`(recipe, its path, the other arguments)` of a command line that may hold `--config FILE`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        found, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise InputError("--config: give the path of a recipe.") from error
    return (read_recipe(found.config) if found.config else {}), found.config, rest


def split_options(argv: Sequence[str], own: type, taken: Mapping[str, str], what: str) -> tuple[list[str], list[str]]:
    """`(a command's own arguments, those that it passes on to `clmae pretrain`)`.

    Args:
        own: Dataclass of the command's options.
        taken: Options of `clmae pretrain` that the command sets by itself, and what to do instead.
        what: The command in words: `"a comparison"`.

    Raises:
        InputError: One of `taken` is given.
    """
    names = {f.name for f in dataclasses.fields(own)} | {"help", "help_all"}
    parts: tuple[list[str], list[str]] = ([], [])
    part = parts[0]
    for argument in argv:
        if argument.startswith("--") or argument == "-h":
            name = argument.partition("=")[0].lstrip("-").replace("-", "_")
            if name in taken:
                raise InputError(f"--{name} is not for {what}: {taken[name]}.")
            part = parts[0] if name in names or argument == "-h" else parts[1]
        part.append(argument)
    return parts


def parse(
    groups: dict[str, type],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    examples: str,
    shown: dict[str, set[str]] | None = None,
) -> tuple[Any, ...]:
    """One object of each dataclass in `groups`, from the command line and the recipe that it may name.

    Args:
        groups: Dataclasses by their titles in the help.
        argv: The arguments, possibly with `--config FILE`; what they say goes before what the recipe says.
        prog, description, examples: For the help.
        shown: For a group with very many options, those that `--help` explains; `--help_all` explains all.

    Raises:
        InputError: An option is unknown, missing or has a value of the wrong type.
        SystemExit: The help was asked for, and printed.
    """
    recipe, recipe_path, rest = split_recipe(argv)
    for title, dataclass in groups.items():
        dataclass._argument_group_name = title  # what HfArgumentParser makes an argument group of
    parser = HfArgumentParser(
        list(groups.values()),
        prog=prog,
        usage=f"{prog} [--config RECIPE.yaml] [--option value ...]",
        description=f"{description}\n\nexamples:\n{examples}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    defaults = {f.name: f.default for dataclass in groups.values() for f in dataclasses.fields(dataclass) if f.init}
    names = list(defaults)
    help_all = "--help_all" in rest or "--help-all" in rest
    if help_all or "-h" in rest or "--help" in rest:
        _print_help(parser, {} if help_all else shown or {})
        raise SystemExit(0)
    for name in recipe:
        if name not in names:
            raise InputError(f"recipe {recipe_path}: unknown entry {name!r}{nearest(name, names)}")
        if recipe[name] is None and defaults[name] is not None:  # a forgotten value, which no default may replace
            raise InputError(f"recipe {recipe_path}: `{name}` is empty; give a value, or leave it out.")
    for argument in rest:  # before argparse complains of what is missing because it was misspelt
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name.removeprefix("no_") not in names and name not in names:
            raise InputError(f"unknown option {argument.partition('=')[0]!r}{nearest(name, names)}")
    parser.error = _raise_usage_error  # argparse would print the whole usage and exit
    try:
        *objects, unknown = parser.parse_args_into_dataclasses(
            [*recipe_to_argv(recipe), *rest], return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # transformers' own, of TrainingArguments that do not go together
        raise InputError(str(error)) from error
    if unknown:
        raise InputError(f"unknown argument {unknown[0]!r}; options begin with --")
    return tuple(objects)


def _raise_usage_error(message: str) -> None:
    raise InputError(message.replace("the following arguments are required", "missing"))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Long names, short metavars, the default at the end."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = next(s for s in action.option_strings if "-" not in s.lstrip("-"))
        choices = (
            "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.rsplit("_")[-1].upper()
        )
        return name if action.nargs == 0 else f"{name} {choices}"

    def _expand_help(self, action: argparse.Action) -> str:
        text = (action.help or "").strip()
        hidden = action.default in (None, argparse.SUPPRESS, "") or action.required
        return text if hidden else f"{text} [{action.default}]"


def _print_help(parser: argparse.ArgumentParser, shown: dict[str, set[str]]) -> None:
    for group in parser._action_groups:
        for action in group._group_actions:
            if group.title in shown and action.dest not in shown[group.title]:
                action.help = argparse.SUPPRESS
            # HfArgumentParser adds `--no_x` beside every `--x` that defaults to true.
            if any(option.startswith("--no_") for option in action.option_strings):
                action.help = argparse.SUPPRESS
    if shown:
        parser.epilog = "--help_all explains every option, all of transformers' TrainingArguments among them."
    parser.print_help()


# -- a model's configuration as options --------------------------------------------------------------------------------

_NOT_OPTIONS = {"apply_layernorm", "reshape_hidden_states"}  # of backbones only


def config_options(config_class: type) -> type:
    """A dataclass with every field of a configuration class by its own name, all optional.

    Fields left out keep the size's preset; `image_size` and `patch_size` take one number or two.
    """
    helps = _field_helps(config_class)
    options = {}  # a family may repeat a field of its parent, with another default
    for owner in reversed(config_class.__mro__):
        if not owner.__module__.startswith("clmae."):
            continue
        for name, kind in inspect.get_annotations(owner, eval_str=True).items():
            if not name.startswith("_") and name not in _NOT_OPTIONS:
                option = dataclasses.field(default=None, metadata={"help": helps.get(name, "")})
                options[name] = (name, _option_type(kind), option)
    return dataclasses.make_dataclass("ModelOptions", options.values())


def _option_type(kind: Any) -> Any:
    """What the command line takes for a field of this type: `None` is what "not given" looks like."""
    members = getattr(kind, "__args__", (kind,))
    if any(getattr(member, "__origin__", None) in (list, tuple) for member in members):
        return list[int] | None
    return next(member for member in members if member is not type(None)) | None


def _field_helps(config_class: type) -> dict[str, str]:
    """What the configuration's docstring says of each field; the docstring is the one place that explains it."""
    helps = {}
    for owner in config_class.__mro__:
        text = owner.__doc__ or ""
        for match in re.finditer(r"^        (\w+) \(`[^)]*\): ((?:.+\n(?:            .+\n)*))", text, re.MULTILINE):
            helps.setdefault(match[1], " ".join(match[2].split()).replace("`", ""))
    return helps


def given(options: Any) -> dict[str, Any]:
    """The options that were given, as keyword arguments of the configuration."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in values.items()
        if value is not None
    }
