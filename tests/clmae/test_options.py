# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""From a command line and a recipe to dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from transformers.hf_argparser import HfArg

from clmae import CLMAEConfig, MAEConfig
from clmae.cli.options import CommandParser, config_options, given, nearest, read_recipe, recipe_to_argv
from clmae.configuration.errors import InputError


@dataclass
class Animal:
    """A group of options."""

    name: str = HfArg(help="What it is called.")
    legs: int = HfArg(default=4, help="How many.")
    weight: float | None = HfArg(default=None, help="In kg.")
    tame: bool = HfArg(default=False, help="Whether it bites.")
    awake: bool = HfArg(default=True, help="Whether it sleeps.")
    sizes: list[int] | None = HfArg(default=None, help="Height and width.")


@dataclass
class House:
    """Another."""

    rooms: int = HfArg(default=3, help="Rooms.")
    hidden_room: int = HfArg(default=0, help="Rarely used.")


def parse_both(*argv, **options):
    groups = {"animals": Animal, "houses": House}
    return CommandParser("zoo keep", "Keep a zoo.\n\nexamples:\n  zoo keep --name Leo", groups, **options).read(argv)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# -- the command line -------------------------------------------------------------------------------------------------


def test_options_and_defaults():
    animal, house = parse_both("--name", "Leo", "--weight", "2.5", "--rooms=7", "--sizes", "32", "64")
    assert animal == Animal("Leo", weight=2.5, sizes=[32, 64])
    assert house == House(rooms=7)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("True", True), ("0", False)])
def test_booleans_take_a_value(text, value):
    animal, _ = parse_both("--name", "Leo", "--tame", text, "--awake", text)
    assert (animal.tame, animal.awake) == (value, value)


def test_arguments_without_a_dataclass():
    parser = CommandParser("zoo open", "Open it.")
    parser.add_argument("gate", metavar="GATE")
    parser.add_argument("--force", action="store_true")
    (args,) = parser.read(["north", "--force"])
    assert (args.gate, args.force) == ("north", True)
    for argv, message in (
        ([], "missing: GATE"),
        (["a", "--forse"], "unknown option '--forse'; did you mean '--force'"),
    ):
        with pytest.raises(InputError, match=message):
            parser.read(argv)


def test_options_that_are_passed_on():
    parser = CommandParser("zoo move", "Move it.", {"houses": House}, refused={"name": "names stay"})
    argv = ["--config", "r.yaml", "--rooms", "2", "--legs", "-1", "3", "--tame", "--hidden-room=1", "--sizes=1"]
    assert parser.read(argv) == (House(2, 1), ["--config", "r.yaml", "--legs", "-1", "3", "--tame", "--sizes=1"])
    with pytest.raises(InputError, match="--name is not for `zoo move`: names stay"):
        parser.read(["--name", "Leo"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "missing: --name"),
        (("--name", "Leo", "--legs", "abc"), "--legs.*invalid int value: 'abc'"),
        (("--name", "Leo", "--weight", "heavy"), "--weight.*invalid float value: 'heavy'"),
        (("--name", "Leo", "--tame", "maybe"), "--tame.*maybe"),
        (("--name", "Leo", "--leggs", "3"), r"unknown option '--leggs'; did you mean '--legs'\?"),
        (("--name", "Leo", "--hidden-romm=3"), r"unknown option '--hidden-romm'; did you mean '--hidden_room'\?"),
        (("--name", "Leo", "--zzzzqqq"), r"unknown option '--zzzzqqq'$"),
        (("--name", "Leo", "stray"), "unknown argument 'stray'"),
        (("--nam", "Leo"), r"unknown option '--nam'; did you mean '--name'\?"),  # no abbreviations
        (("--name",), "--name.*expected one argument"),
        (("--name", "Leo", "--config"), "--config: expected one argument"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(InputError, match=message):
        parse_both(*argv)


def test_nearest():
    assert nearest("learning_rat", ["learning_rate", "seed"]) == "; did you mean 'learning_rate'?"
    assert nearest("xyz", ["learning_rate", "seed"]) == ""


@pytest.mark.parametrize("flag", ["-h", "--help", "--help_all", "--help-all"])
def test_help_comes_before_complaints(capsys, flag, recipe):
    with pytest.raises(SystemExit) as stop:
        parse_both("--config", recipe("leggs: 3"), flag, shown={"name", "legs", "awake", "rooms"})
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: zoo keep [--config RECIPE.yaml]")
    places = [text.index(part) for part in ("Keep a zoo.", "examples:\n  zoo keep --name Leo", "animals:", "--legs")]
    assert places == sorted(places)
    assert "How many. [4]" in text
    assert ("Rarely used." in text) == ("all" in flag)
    assert ("--help-all explains" in text) == ("all" not in flag)
    assert "--no_awake" not in text


# -- recipes --------------------------------------------------------------------------------------------------------


def test_the_command_line_goes_before_the_recipe(recipe):
    path = recipe("name: Leo\nlegs: 3\nweight: 1.5\ntame: true\nawake: false\nsizes: [32, 64]\nrooms: 5\n")
    assert parse_both(f"--config={path}") == (Animal("Leo", 3, 1.5, True, False, [32, 64]), House(rooms=5))
    argv, config = ["--legs", "2", "--awake", "true"], ["--config", path]
    for order in (config + argv, argv + config):
        assert parse_both(*order)[0] == Animal("Leo", 2, 1.5, True, True, [32, 64])


@pytest.mark.parametrize("value", ["-1.0", "-1.0e-5", "-0.5", "1.0e-5", "1e-5"])
def test_numbers_in_recipes(recipe, value):
    animal, _ = parse_both("--config", recipe(f"name: Leo\nweight: {value}\n"))
    assert animal.weight == float(value)


@pytest.mark.parametrize("text", ["with spaces", "-dash", "--dashes", "a=b", "täglich"])
def test_strings_in_recipes(recipe, text):
    assert parse_both("--config", recipe(f"name: '{text}'"))[0].name == text


def test_an_empty_value_is_that_of_an_option_that_has_none_by_default(recipe):
    assert parse_both("--config", recipe("name: Leo\nweight: null\nsizes:\n"))[0] == Animal("Leo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: Leo\nleggs: 3\n", r"recipe .*recipe.yaml: unknown entry 'leggs'; did you mean 'legs'\?"),
        ("name: Leo\nconfig: other.yaml\n", "unknown entry 'config'"),
        ("name: [Leo\n", "not a YAML file"),
        ("name: Leo: lion\n", "not a YAML file"),
        ("- name\n- Leo\n", "a recipe is a list of `option: value` lines"),
        ("just words\n", "a recipe is a list of `option: value` lines"),
        ("", "a recipe is a list of `option: value` lines"),
        ("1: Leo\n", "a recipe is a list of `option: value` lines"),
        ("name: Leo\nlegs:\n", r"recipe .*recipe.yaml: `legs` is empty; give a value, or leave it out"),
        ("name: null\n", r"recipe .*recipe.yaml: `name` is empty; give a value"),
        ("name: Leo\nawake:\n", r"recipe .*recipe.yaml: `awake` is empty; give a value"),
        ("name: Leo\nlegs: many\n", "--legs.*invalid int value: 'many'"),
    ],
)
def test_bad_recipes(recipe, text, message):
    with pytest.raises(InputError, match=message):
        parse_both("--config", recipe(text))


def test_recipe_that_is_not_there_or_no_text(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name, message in (("none.yaml", "none.yaml: No such file"), (".", "--config"), ("binary.yaml", "not a YAML")):
        with pytest.raises(InputError, match=message):
            read_recipe(tmp_path / name)


def test_recipe_to_argv():
    argv = recipe_to_argv({"a": 1, "b": None, "c": True, "d": [1, 2], "e": {"k": 1}, "f": "x y"})
    # However an option and its value are joined.
    assert " ".join(argv).replace("=", " ") == '--a 1 --c true --d 1 2 --e {"k": 1} --f x y'


# -- a configuration as options -------------------------------------------------------------------------------------


def parse_config(config_class, *argv):
    (options,) = CommandParser("p", "d", {"model": config_options(config_class)}).read(argv)
    return given(options)


@pytest.mark.parametrize("config_class", [MAEConfig, CLMAEConfig])
def test_every_field_of_a_configuration_is_an_option_with_a_help(config_class):
    fields = dataclasses.fields(config_options(config_class))
    names = {f.name for f in fields}
    assert len(fields) == len(names)
    assert {"hidden_size", "image_size", "mask_ratio", "norm_pix_loss", "decoder_hidden_size"} <= names
    assert ("masker_num_hidden_layers" in names) == ("curriculum_start" in names) == (config_class is CLMAEConfig)
    # Every one is a field of the configuration, and what transformers itself adds is left out.
    assert names < {f.name for f in dataclasses.fields(config_class)}
    assert not names & {"return_dict", "id2label", "apply_layernorm", "_out_features"}
    assert [f.name for f in fields if len(f.metadata["help"]) < 10 or "`" in f.metadata["help"]] == []


def test_only_what_was_given_reaches_the_configuration():
    assert parse_config(CLMAEConfig) == {}
    values = dict(hidden_size=64, mask_ratio=0.5, norm_pix_loss=False, curriculum_end=-0.5, curriculum_shape="cosine")
    argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    assert parse_config(CLMAEConfig, *argv) == values


def test_sizes_are_one_number_or_two():
    values = parse_config(MAEConfig, "--image_size", "32", "64", "--patch_size", "8")
    assert values == {"image_size": [32, 64], "patch_size": 8}
    assert MAEConfig(**values).grid_size == (4, 8)
