# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""From a command line, and the YAML recipe that it may name, to dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import GenericAlias
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from clmae.configuration.errors import InputError

# Of transformers' TrainingArguments, those that `--help` explains for every command that trains, in fewer words.
MOST_USED = {
    "max_steps": "Train for so many steps, instead of num_train_epochs.",
    "gradient_accumulation_steps": "Batches per optimizer step.",
    "bf16": "Compute in bfloat16; weights stay float32.",
    "torch_compile": "Compile the model, for speed on a GPU.",
    "use_cpu": "Train on the CPU even where there is a GPU.",
    "seed": "Seed of everything random.",
    "dataloader_num_workers": "Processes that read images; 0: the main process.",
    "save_steps": "Save a checkpoint every that many steps.",
    "report_to": "none, all, or some of tensorboard, wandb, ...",
    "resume_from_checkpoint": "last (or true): go on from the newest whole checkpoint.",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


# -- recipes ----------------------------------------------------------------------------------------------------------


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


def recipe_to_argv(recipe: Mapping[str, Any]) -> list[str]:
    """A recipe as command-line options; an empty value is left out."""
    argv: list[str] = []
    for name, value in recipe.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, (bool, dict)) else value
            argv.append(f"--{name}={text}")  # one word: -1.0e-5 alone would be taken for an option
    return argv


def peek(argv: Sequence[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """The values of the options `names`, `None` where they are not given, and all the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(f"--{name}")
    try:
        return parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error


# -- parsers ----------------------------------------------------------------------------------------------------------


class CommandParser(HfArgumentParser):
    """The parser of one command.

    Args:
        prog: The command, `clmae` included.
        description: For the help: what the command does, then examples.
        groups: Dataclasses of options, by their titles in the help; others are added by `add_argument`.
        takes_recipe: Whether the command takes `--config RECIPE.yaml`.
        shown: The options that `--help` explains, in a sentence each; `--help-all` explains all. `None`: both do.
        refused: For a command that passes options on to `clmae pretrain`: those that it sets by itself, and what to do
            instead. All other unknown options are passed on, `--config` among them.
    """

    def __init__(
        self,
        prog: str,
        description: str | None,
        groups: Mapping[str, Any] | None = None,
        *,
        takes_recipe: bool = True,
        shown: Iterable[str] | None = None,
        refused: Mapping[str, str] | None = None,
    ):
        for title, group in (groups or {}).items():
            if title != "options":  # argparse's own name of the first group
                group._argument_group_name = title  # what HfArgumentParser makes an argument group of
        recipe = "[--config RECIPE.yaml] " if takes_recipe else ""
        super().__init__(
            list((groups or {}).values()),
            prog=prog,
            usage=f"{prog} {recipe}[--option value ...]" if groups else None,
            description=(description or "").strip(),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.takes_recipe = bool(groups) and takes_recipe and refused is None  # those that are passed on go on with it
        self.shown, self.refused = None if shown is None else set(shown), refused

    def error(self, message: str) -> NoReturn:
        """Where argparse would print the usage and exit."""
        raise InputError(message.replace("the following arguments are required", "missing"))

    def read(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """One object of each dataclass, then a namespace of what `add_argument` added, if anything was.

        What the command line says goes before what the recipe says. A command that passes options on gets them last.

        Raises:
            InputError: An option is unknown, missing, refused or has a value of the wrong type.
            SystemExit: The help was asked for, and printed.
        """
        argv, recipe = list(argv), {}
        if {"-h", "--help", "--help_all", "--help-all"} & {*argv}:
            self._explain(everything="--help_all" in argv or "--help-all" in argv)
        if self.takes_recipe:
            known, argv = peek(argv, "config")
            if known.config is not None:
                recipe = read_recipe(known.config)
                self._check_recipe(recipe, known.config)
        self._check_names(argv)
        try:
            *values, others = self.parse_args_into_dataclasses(
                [*recipe_to_argv(recipe), *argv], return_remaining_strings=True, look_for_args_file=False
            )
        except ValueError as error:  # transformers' own, of TrainingArguments that do not go together
            raise InputError(str(error)) from error
        if self.refused is not None:
            return (*values, others)
        if others:
            raise InputError(f"unknown argument {others[0]!r}; options begin with --")
        return tuple(values)

    def _explain(self, everything: bool) -> NoReturn:
        for action in self._actions:
            # HfArgumentParser adds `--no_x` beside every `--x` that defaults to true.
            complement = any(option.startswith("--no_") for option in action.option_strings)
            if self.shown is not None:
                action.help = MOST_USED.get(action.dest, action.help)
            if complement or not (everything or self.shown is None or action.dest in self.shown):
                action.help = argparse.SUPPRESS
            elif self.shown is not None and not everything:
                action.help = re.split(r"(?<=\.) (?=[A-Z\"])", action.help or "")[0]
        if self.shown is not None and not everything:
            self.epilog = "--help-all explains every option."
        self.print_help()
        raise SystemExit(0)

    def _check_recipe(self, recipe: Mapping[str, Any], path: str) -> None:
        actions = {action.dest: action for action in reversed(self._actions)}  # `--no_x` has the dest of `--x`
        for name, value in recipe.items():
            if name not in actions:
                raise InputError(f"recipe {path}: unknown entry {name!r}{nearest(name, actions)}")
            if value is None and (actions[name].required or actions[name].default is not None):
                raise InputError(f"recipe {path}: `{name}` is empty; give a value, or leave it out.")

    def _check_names(self, argv: Sequence[str]) -> None:
        """Names a misspelt option, before argparse says that the right one is missing."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for option in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
            name = option.removeprefix("--").replace("-", "_")
            if self.refused is None and option not in known and f"--{name}" not in known:
                raise InputError(f"unknown option {option!r}{nearest(f'--{name}', known)}")
            if self.refused is not None and name in self.refused:
                raise InputError(f"--{name} is not for `{self.prog}`: {self.refused[name]}.")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Long names, short metavars, the default at the end."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next(s for s in reversed(action.option_strings) if "-" not in s.lstrip("-"))
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar
        return name if action.nargs == 0 else f"{name} {value or action.dest.rsplit('_')[-1].upper()}"

    def _expand_help(self, action: argparse.Action) -> str:
        text = (action.help or "").strip()
        hidden = action.default in (None, argparse.SUPPRESS, "") or action.required or action.nargs == 0
        return text if hidden else f"{text} [{action.default}]"


# -- dataclasses of options -------------------------------------------------------------------------------------------

_NOT_OPTIONS = {"apply_layernorm", "reshape_hidden_states"}  # of backbones only


def config_options(config_class: type, names: Iterable[str] | None = None) -> type:
    """A dataclass with every field of a configuration class (or those in `names`) by its own name, all optional.

    Fields left out keep the size's preset; `image_size` and `patch_size` take one number or two.
    """
    owners = [owner for owner in config_class.__mro__ if owner.__module__.startswith("clmae.")]
    helps = _field_helps(owners)
    options = {}  # a family may repeat a field of its parent, with another default
    for owner in reversed(owners):
        for name, kind in inspect.get_annotations(owner, eval_str=True).items():
            if not name.startswith("_") and name not in _NOT_OPTIONS if names is None else name in names:
                option = dataclasses.field(default=None, metadata={"help": helps.get(name, "")})
                options[name] = (name, _option_type(kind), option)
    return dataclasses.make_dataclass("ModelOptions", options.values())


def protocol_options(protocol: type) -> type:
    """A dataclass with the fields of an evaluation protocol; `seed` is one for all, and tuples are lists."""
    kinds = get_type_hints(protocol)
    options = []
    for field in dataclasses.fields(protocol):
        kind: Any = kinds[field.name]
        default: dict[str, Any] = {"default": field.default}
        if get_origin(kind) is tuple:
            kind, default = GenericAlias(list, get_args(kind)[:1]), {"default_factory": partial(list, field.default)}
        if field.name != "seed":
            options.append((field.name, kind, dataclasses.field(**default, metadata=field.metadata)))
    return dataclasses.make_dataclass(f"{protocol.__name__}Options", options)


def given(options: Any) -> dict[str, Any]:
    """The options that were given, as keyword arguments of the configuration."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in values.items()
        if value is not None
    }


def _option_type(kind: Any) -> Any:
    """What the command line takes for a field of this type: `None` is what "not given" looks like."""
    members = get_args(kind) or (kind,)
    if any(get_origin(member) in (list, tuple) for member in members):
        return list[int] | None
    return next(member for member in members if member is not type(None)) | None


def _field_helps(owners: Iterable[type]) -> dict[str, str]:
    """What the docstrings of configurations, the one place that explains their fields, say of each."""
    helps: dict[str, str] = {}
    for owner in owners:
        text = owner.__doc__ or ""
        for entry in re.finditer(r"^        (\w+) \(`[^)]*\): ((?:.+\n(?:            .+\n)*))", text, re.MULTILINE):
            helps.setdefault(entry[1], " ".join(entry[2].split()).replace("`", ""))
    return helps
