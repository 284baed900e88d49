# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Faults, injected: runs that are killed, checkpoints that are damaged, images and configurations that are mutated.

    python benchmarks/faults.py --output benchmarks/faults                    # all, about 15 minutes on one core
    python benchmarks/faults.py kill files --scale 0.1 --output some_folder   # two of them, a tenth of the cases

Writes `results.json` and `results.md`: how many faults were tried, survived and lost. A run survives if, resumed, it
ends bit by bit with the weights of an undisturbed one, and `clmae verify` finds its folder whole. An image or a
configuration survives if it gives an image or a model, or the error that says why not, in reasonable time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining

import clmae
from clmae.training import CurriculumTrainer, InterruptCallback, PretrainingArguments
from clmae.training.data import ImageDataset
from clmae.training.images import ImageDecodeError, decode_image
from clmae.training.sealing import checkpoint_step, checkpoints, last_valid_checkpoint, verify

TINY = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    decoder_hidden_size=8,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
MASKER = dict(masker_num_hidden_layers=1, masker_num_attention_heads=2, masker_intermediate_size=32)
STEPS, SAVE_STEPS = 48, 2
PATIENCE = 60  # seconds that anything may take
_FORK = multiprocessing.get_context("fork")  # a new process would import for seconds

Row = dict[str, Any]


def row(fault: str, outcomes: Counter, survived: tuple[str, ...]) -> Row:
    """A line of the table, from how often each outcome was seen."""
    good = sum(outcomes[name] for name in survived)
    return {"fault": fault, "tried": outcomes.total(), "survived": good, "lost": outcomes.total() - good} | {
        "outcomes": dict(outcomes)
    }


# -- runs -------------------------------------------------------------------------------------------------------------


def pictures(count: int, seed: int) -> datasets.Dataset:
    """Smooth random pictures of 20 pixels."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (count, 5, 5, 3))
    pixels = coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    return datasets.Dataset.from_dict({"image": list(pixels)}, datasets.Features({"image": datasets.Image()}))


def train(folder: Path, limit: int | None = None) -> None:
    """What a forked process does: a run with everything that has a state, from its newest valid checkpoint on.

    It ends with exit code 0, or 128 plus the signal that stopped it. `limit` bytes at most fit into a file.
    """
    torch.set_num_threads(1)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    views = dict(image_size=(16, 16), num_channels=3, num_patches=16, patch_size=(4, 4), mean=[0.5] * 3, std=[0.25] * 3)
    torch.manual_seed(0)
    config = clmae.CMAEConfig(**TINY, **MASKER, learned_masks=True)
    interrupt = InterruptCallback()
    trainer = CurriculumTrainer(
        clmae.CMAEForPreTraining(config),
        PretrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=1e-3,
            save_steps=SAVE_STEPS,
            eval_strategy="steps",
            eval_steps=3,
            logging_steps=1,
            difficulty_steps=0,
            picture_steps=0,
            dataloader_num_workers=int(limit is None),  # batches from workers would be files that cannot grow, too
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=ImageDataset(pictures(24, 0), "image", contrastive_crop=True, num_views=2, **views),
        eval_dataset=ImageDataset(pictures(8, 1), "image", train=False, **views),
        callbacks=[interrupt],
    )
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    if interrupt.received is not None:
        sys.exit(128 + interrupt.received)
    trainer.save_model()


def start(folder: Path, limit: int | None = None) -> Any:
    """Starts a run in a folder; one in which nothing was ever sealed is emptied, as there is nothing to go on from."""
    if last_valid_checkpoint(folder)[0] is None:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    process = _FORK.Process(target=train, args=(folder, limit))
    process.start()
    return process


def end(process: Any) -> int | None:
    """The exit code of a run; `None` if it hung."""
    deadline = time.perf_counter() + PATIENCE
    while process.exitcode is None:  # `join` would also wait for the workers of a run that was killed
        if time.perf_counter() > deadline:
            process.kill()
            process.join()
            return None
        time.sleep(0.01)
    return process.exitcode


def judge(folder: Path, expected: dict[str, torch.Tensor]) -> str:
    """Lets a run go on to its end, and compares."""
    code = end(start(folder))
    if code != 0:
        return f"the resumed run ended with {code}"
    weights = load_file(folder / "model.safetensors")
    if weights.keys() != expected.keys() or not all(torch.equal(weights[name], expected[name]) for name in expected):
        return "other weights"
    problems = [problem for path in [folder, *checkpoints(folder)] for problem in verify(path)]
    return f"not whole: {problems[0]}" if problems else "same weights"


@contextlib.contextmanager
def undisturbed() -> Iterator[tuple[Path, dict[str, torch.Tensor], float]]:
    """A scratch folder, the weights of an undisturbed run in its sub-folder `whole`, and the seconds that took."""
    with tempfile.TemporaryDirectory() as scratch:
        whole, begin = Path(scratch, "whole"), time.perf_counter()
        code = end(start(whole))
        if code != 0:
            raise RuntimeError(f"the undisturbed run ended with {code}: {(whole / 'log.txt').read_text()[-2000:]}")
        yield Path(scratch), load_file(whole / "model.safetensors"), time.perf_counter() - begin


def stop_runs(number: int, count: int, rng: random.Random) -> Row:
    """Sends a signal at random moments of runs, which are resumed and stopped again; at their ends, compares."""
    outcomes, exits, saving = Counter(), Counter(), 0
    with undisturbed() as (scratch, expected, seconds):
        folder, stopped, before = scratch / "run", 0, 0
        while outcomes.total() < count:
            process = start(folder)
            # Mostly early: several stops in each run.
            time.sleep(rng.uniform(0.05, 1) ** 2 * seconds)
            finished = process.exitcode is not None
            if not finished:
                os.kill(process.pid, number)
                exits[str(end(process))] += 1
                stopped += 1
                saving += any("not sealed" in verify(path)[0] for path in checkpoints(folder) if verify(path))
                last, _ = last_valid_checkpoint(folder)
                step = 0 if last is None else checkpoint_step(last)
                if step < before:
                    outcomes["a checkpoint was lost"] += 1
                before = step
            if finished or stopped + outcomes.total() >= count:
                outcomes[judge(folder, expected)] += stopped
                shutil.rmtree(folder)
                stopped = before = 0
    name = signal.Signals(number).name
    return row(f"{name} at a random moment", outcomes, ("same weights",)) | {"exits": exits, "during_a_save": saving}


def kill(scale: float, rng: random.Random) -> list[Row]:
    """SIGKILL, SIGTERM and SIGINT at random moments."""
    numbers = {signal.SIGKILL: 36, signal.SIGTERM: 12, signal.SIGINT: 12}
    return [stop_runs(number, max(1, round(count * scale)), rng) for number, count in numbers.items()]


def flip(path: Path, rng: random.Random) -> None:
    """Flips one bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, random.Random], Any]] = {
    "truncated": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "bit-flipped": flip,
    "emptied": lambda path, rng: path.write_bytes(b""),
    "missing": lambda path, rng: path.unlink(),
}


def files(scale: float, rng: random.Random) -> list[Row]:
    """Each kind of file of the newest checkpoint, damaged in each way."""
    rows = []
    with undisturbed() as (scratch, expected, _):
        newest = checkpoints(scratch / "whole")[-1]
        names = sorted(path.name for path in newest.iterdir())
        for fault, damage in DAMAGE.items():
            outcomes = Counter()
            for name in rng.sample(names, max(1, round(len(names) * scale))):
                folder = scratch / "run"
                shutil.copytree(scratch / "whole", folder)
                damage(folder / newest.name / name, rng)
                found = any(name in problem for problem in verify(folder / newest.name))
                outcomes[judge(folder, expected) if found else f"{name}: not found"] += 1
                shutil.rmtree(folder)
            rows.append(row(f"a file of a checkpoint {fault}", outcomes, ("same weights",)))
    return rows


def disk(scale: float, rng: random.Random) -> list[Row]:
    """Files that cannot grow beyond a random size, as on a full disk."""
    outcomes = Counter()
    with undisturbed() as (scratch, expected, _):
        largest = max(path.stat().st_size for path in checkpoints(scratch / "whole")[-1].iterdir())
        for _ in range(max(1, round(8 * scale))):
            folder = scratch / "run"
            code = end(start(folder, rng.randrange(1000, largest)))
            outcomes[judge(folder, expected) if code == 1 else f"ended with {code}"] += 1
            shutil.rmtree(folder)
    return [row("no space in the midst of a save", outcomes, ("same weights",))]


# -- images -----------------------------------------------------------------------------------------------------------


def encoded_images() -> dict[str, list[bytes]]:
    """Small images by format, in the modes and compressions that take different ways through the decoders."""
    coarse = np.random.default_rng(0).uniform(0, 255, (24, 32, 3)).astype(np.uint8)
    picture = Image.fromarray(coarse).resize((48, 40))
    grey, palette, alpha = picture.convert("L"), picture.convert("P"), picture.convert("RGBA")
    turned, exif = dict(save_all=True, append_images=[picture.rotate(90)]), Image.Exif()
    exif[274] = 6
    images: dict[str, list[tuple[Image.Image, dict]]] = {
        "JPEG": [
            (picture, {"exif": exif}),
            (grey, {}),
            (picture, {"progressive": True}),
            (picture.convert("CMYK"), {}),
        ],
        "PNG": [(image, {}) for image in (picture, grey, palette, alpha, picture.convert("1"), grey.convert("I;16"))],
        "WEBP": [(picture, {}), (alpha, {"lossless": True}), (picture, turned)],
        "GIF": [(palette, {}), (palette, {"transparency": 3}), (picture, turned)],
        "TIFF": [(picture, {"compression": c}) for c in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")],
        "BMP": [(picture, {}), (palette, {}), (alpha, {}), (picture.convert("1"), {})],
    }
    images["TIFF"] += [(grey.convert(mode), {}) for mode in ("F", "I;16")] + [(picture.convert("LAB"), {})]
    found: dict[str, list[bytes]] = {}
    for kind, variants in images.items():
        for image, options in variants:
            image.save(buffer := io.BytesIO(), kind, **options)
            found.setdefault(kind, []).append(buffer.getvalue())
    return found


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, overwritten, cut out, doubled or cut off, one to three times, half of them in the header."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        count = rng.choice((1, 2, 4, 16, 64))
        at = rng.randrange(min(len(changed), 64) if rng.random() < 0.5 else len(changed))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + count] = rng.randbytes(count)
        elif kind == 2:
            changed[at : at + count] = bytes([rng.choice((0, 127, 128, 255))]) * count
        elif kind == 3:
            del changed[at : at + count]
        elif kind == 4:
            changed[at:at] = changed[at : at + count]
        else:
            del changed[at:]
        changed = changed or bytearray(1)
    return bytes(changed)


def decode_mutated(kind: str, first: int, count: int) -> Counter:
    """Outcomes of some mutated images."""
    outcomes, sources = Counter(), encoded_images()[kind]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff's own complaints
    for i in range(first, first + count):
        rng = random.Random(f"{kind}/{i}")
        data, begin = mutate(rng.choice(sources), rng), time.perf_counter()
        try:
            pixels = decode_image(data, 3)
            good = pixels.ndim == 3 and pixels.shape[2] == 3 and 0 not in pixels.shape and np.isfinite(pixels).all()
            good = good and pixels.min() >= 0 and pixels.max() <= (1 if pixels.dtype == np.float32 else 255)
            outcome = "an image" if good else "a wrong image"
        except ImageDecodeError:
            outcome = "ImageDecodeError"
        except Exception as error:
            outcome = type(error).__name__
        outcomes["slow" if time.perf_counter() - begin > 10 else outcome] += 1
    return outcomes


def in_processes(function: Callable[[str, int, int], Counter], kind: str, count: int) -> Counter:
    """Outcomes of `count` cases of a kind, in processes that may crash or hang without taking this one along."""
    outcomes = Counter()
    for first in range(0, count, 100):
        size = min(100, count - first)
        with ProcessPoolExecutor(1, mp_context=_FORK) as pool:
            future = pool.submit(function, kind, first, size)
            try:
                outcomes += future.result(2 * PATIENCE)
            except Exception as error:
                outcomes[f"{type(error).__name__} among {kind} {first} to {first + size}: crash or hang"] += size
                for process in list((pool._processes or {}).values()):
                    process.kill()
    return outcomes


def images(scale: float, rng: random.Random) -> list[Row]:
    """Mutated image files."""
    count = max(1, round(1800 * scale))
    good = ("an image", "ImageDecodeError")
    return [row(f"mutated {kind} files", in_processes(decode_mutated, kind, count), good) for kind in encoded_images()]


# -- configurations ---------------------------------------------------------------------------------------------------

# fmt: off
VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 7, 0.5, -0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf, 2**31, 10**9, 10**30,
    -(10**9), "", "gelu", "float16", "x" * 5000, "\u0000", "../../etc/passwd", [], [1], [8, 8], [1, 2, 3], [None],
    ["a", "b"], {}, {"a": 1}, {"rope_type": "x"}, [[[]]] * 3,
)
FOREIGN = (  # entries that transformers or Python know
    "dtype", "torch_dtype", "architectures", "id2label", "label2id", "num_labels", "attn_implementation", "auto_map",
    "_attn_implementation", "output_attentions", "output_hidden_states", "return_dict", "model_type", "problem_type",
    "out_features", "out_indices", "_out_features", "_out_indices", "stage_names", "quantization_config",
    "tie_word_embeddings", "chunk_size_feed_forward", "is_encoder_decoder", "transformers_version", "_commit_hash",
    "name_or_path", "rope_scaling", "sub_configs", "check", "num_visible", "grid_size", "base_model_tp_plan",
    "__class__", "__dict__", "use_return_dict", "_stacks", "text_config",
)
# fmt: on


def mutate_config(config: dict[str, Any], rng: random.Random) -> bytes:
    """The JSON of a configuration with one to four entries changed, added or left out, sometimes itself damaged."""
    changed = dict(config)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name, draw = rng.choice([*changed, *FOREIGN]), rng.random()
        if draw < 0.1:
            changed.pop(name, None)
        elif draw < 0.25 and isinstance(changed.get(name), (int, float)):
            changed[name] *= rng.choice((-1, 2, 10, 1000, 10**9, 0.1))
        else:
            changed[name] = rng.choice(VALUES)
    data = json.dumps(changed).encode()
    return mutate(data, rng) if rng.random() < 0.1 else data


def load_mutated(family: str, first: int, count: int) -> Counter:
    """Outcomes of some mutated configurations; models are made without memory for their weights."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(logging.CRITICAL + 1)
    outcomes, config_class = Counter(), clmae.FAMILIES[family][0]
    original = json.loads(config_class(**TINY).to_json_string(use_diff=False))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(first, first + count):
            Path(folder, "config.json").write_bytes(mutate_config(original, random.Random(f"{family}/{i}")))
            begin = time.perf_counter()
            try:
                config = config_class.from_pretrained(folder)
                with torch.device("meta"):
                    AutoModelForPreTraining.from_config(config)
                outcome = "a model"
            except ValueError:
                outcome = "ValueError"
            except OSError as error:
                outcome = "no JSON" if "valid JSON" in str(error) else f"OSError: {error}"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"[:200]
            outcomes["slow" if time.perf_counter() - begin > 30 else outcome] += 1
    return outcomes


def configs(scale: float, rng: random.Random) -> list[Row]:
    """Mutated `config.json` files."""
    count = max(1, round(2000 * scale))
    good = ("a model", "ValueError", "no JSON")
    return [
        row(f"mutated config.json of {family}", in_processes(load_mutated, family, count), good)
        for family in clmae.FAMILIES
    ]


# -- the table --------------------------------------------------------------------------------------------------------

FAULTS = {"kill": kill, "files": files, "disk": disk, "images": images, "configs": configs}


def to_markdown(rows: list[Row]) -> str:
    """A line a fault; what was lost is explained below the table."""
    lines = ["| fault | tried | survived | lost | outcomes |", "| --- | ---: | ---: | ---: | --- |"]
    for found in rows:
        outcomes = ", ".join(f"{name}: {count:,}" for name, count in found["outcomes"].items())
        numbers = " | ".join(f"{found[name]:,}" for name in ("tried", "survived", "lost"))
        lines.append(f"| {found['fault']} | {numbers} | {outcomes.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Injects the faults that were asked for; the exit code: 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", help=f"some of {', '.join(FAULTS)}; all, if none is named")
    parser.add_argument("--output", required=True, type=Path, help="folder for results.json and results.md")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the cases")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unknown = [name for name in args.faults if name not in FAULTS]
    if unknown:
        parser.error(f"unknown faults {unknown}; choose from {', '.join(FAULTS)}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.faults or FAULTS:
        begin = time.perf_counter()
        rows += FAULTS[name](args.scale, random.Random(f"{args.seed}/{name}"))
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
        (args.output / "results.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
        (args.output / "results.md").write_text(to_markdown(rows))
    print(to_markdown(rows), end="")
    return 1 if any(found["lost"] for found in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
