# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What README and docs/ tell a reader to type runs, page by page, in order; and the site builds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from clmae.cli import main
from clmae.cli.pretrain import read_arguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SHORTER = {
    '"small"': '"tiny"',
    "image_size=96": "image_size=16",
    "num_train_epochs=100": "max_steps=1, picture_steps=0, per_device_train_batch_size=4, use_cpu=True",
    '"org/cl-mae-vit-b"': '"out/cl-mae"',
}
SIZES = "--model_size tiny --num_hidden_layers 1 --image_size 16 --patch_size 8 "
MODEL = SIZES + "--use_cpu true --disable_tqdm true "
STEP = MODEL + "--max_steps 1 --per_device_train_batch_size 4 --num_held_out 2 --picture_steps 0 "
OPTIONS = {
    "pretrain": STEP,
    "compare": MODEL + "--seeds 0 --dataset ./my_labelled_photos --images_seen 8 --num_points 1 --protocols knn "
    "--per_device_train_batch_size 4 --num_held_out 2 --picture_steps 0",
    "finetune": "--labels_per_class 2 --max_steps 1 --use_cpu true --report_to none ",
    "bench": MODEL + "--batch_sizes 2 --num_steps 1",
}
# Lines of the shell that need a network, another program or more than one process; those that name a recipe are parsed.
NOT_RUN = (
    *("git clone ", "make ", "pip install ", "torchrun ", "accelerate launch ", "RECIPE=recipes/"),
    *(
        "clmae push ",
        "clmae app ",
        "clmae convert mae_pretrain_vit_base.pth ",
        "python benchmarks/study.py ",
        "python CLMAE/benchmarks/study.py ",
        "python examples/",
        "for scale in ",
        "done",
    ),
)


def lines_of(block: str) -> list[str]:
    """The commands of a block of the shell."""
    return [line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """`(language, text)` of the blocks of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def reader(offline, tmp_path, monkeypatch):
    """In a folder that has what the pages name: small pictures, the recipes and the trained model."""
    monkeypatch.chdir(tmp_path)
    for name in ("recipes", "model_cards"):
        Path(name).symlink_to(ROOT / name)
    names = ["photo1.jpg", "photo2.jpg", "outputs/demo/digit.png", "photos/one.jpg"]
    names += [f"{folder}/{i}.png" for folder in ("my_photos", "my_icons", "photos") for i in range(12)]
    names += [f"{folder}labelled_photos/{label}/{i}.png" for folder in ("my_", "") for label in "ab" for i in range(10)]
    generator = np.random.default_rng(0)
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(name)


def run_command(line: str) -> None:
    """Runs `clmae ...` with small sizes; a run to be resumed is begun first."""
    _, command, *arguments = shlex.split(line, comments=True)
    options = OPTIONS.get("finetune" if "finetune" in arguments else command, "").split()
    if command == "pretrain" and not {"./my_photos", "./my_icons", "./photos"} & {*arguments}:
        options += ["--dataset", "./my_icons"]  # instead of the recipe's
    if "--init" in arguments:  # a stand-in for the released weights
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
        ViTMAEForPreTraining(ViTMAEConfig(**sizes, decoder_num_hidden_layers=1)).save_pretrained("released")
        arguments[arguments.index("--init") + 1] = "released"
        options = options[len(SIZES.split()) :]
    if "--resume_from_checkpoint" in arguments:
        place = arguments.index("--resume_from_checkpoint")
        begin = arguments[:place] + arguments[place + 2 :]
        if not any(Path(arguments[arguments.index("--output_dir") + 1]).glob("checkpoint-*")):
            assert main([command, *begin, *options, "--save_strategy", "steps", "--save_steps", "1"]) == 0
        options += ["--max_steps", "2"]
    assert main([command, *arguments, *options]) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_or_listed_as_not_run(monkeypatch, page):
    monkeypatch.chdir(ROOT)
    for language, block in blocks_of(page):
        for line in lines_of(block) if language == "bash" else ():
            assert line.startswith(("clmae ", *NOT_RUN)), line
            command = shlex.split(line, comments=True)
            if "clmae" in command[1:] and "pretrain" in command:  # in several processes
                read_arguments([*command[command.index("pretrain") + 1 :], "--use_cpu", "true"])
            for path in re.findall(r"(?:recipes|benchmarks)/[\w/]+\.\w+", line):
                assert (ROOT / path).is_file(), line


def test_what_is_listed_as_not_run_is_in_the_pages():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [prefix for prefix in NOT_RUN if prefix not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_the_snippets_of_a_page_run_in_order(reader, page):
    names: dict[str, object] = {"__name__": "__main__"}
    for language, block in blocks_of(page):
        if language == "python":
            for text, replacement in SHORTER.items():
                block = block.replace(text, replacement)
            exec(compile(block, str(page), "exec"), names)
        else:
            for line in lines_of(block):
                if not line.startswith(NOT_RUN):
                    run_command(line)


def build_site(folder):
    from mkdocs.__main__ import cli

    cli(["build", "--strict", "--site-dir", str(folder)])


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path, processes):
    processes.run(build_site, tmp_path, folder=ROOT)
    for name in ("index.html", "cli.html", "api.html", "guide.html"):
        assert (tmp_path / name).is_file()
    reference = (tmp_path / "cli.html").read_text(encoding="utf-8")
    assert "--adam_epsilon" in reference
    assert "clmae evaluate knn" in reference
