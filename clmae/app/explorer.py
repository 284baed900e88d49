# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What the page of `clmae app` shows, computed and drawn without a page.

[`Explorer`] holds what all visitors share: models, features, examples. [`Session`] holds what one visitor chose.
Patches are numbered row by row, from 0.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images
from sklearn.decomposition import PCA
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForPreTraining

from clmae import FAMILIES
from clmae.cli.folders import load_whole
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards.run import FAMILIES as FAMILY_NAMES
from clmae.model_cards.run import read_model_config
from clmae.modeling.losses import patch_errors, patch_moments, patch_targets, patchify, unpatchify
from clmae.training.data import decode_image, load_image_dataset

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
MIN_SIDE, MAX_ASPECT = 4, 16
# Formats that Pillow decodes by itself: no vector graphics, no format that starts another program (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_NEIGHBORS, MAX_FEATURES, NUM_EXAMPLES = 6, 2000, 8

PICTURE_SIZE = 384  # pixels of a picture's longer side, about
MASKED, NOT_APPLICABLE, MARK = (0.5, 0.5, 0.5), (0.9, 0.9, 0.9), "#ff6a00"


class Picture(NamedTuple):
    """One picture of the page, and the sentence under its title."""

    image: Image.Image
    caption: str


@dataclass
class Analysis:
    """What a model says of an image before anything is masked.

    Attributes:
        keep: Keep probabilities `(N,)` in (0, 1), or predicted errors in standard deviations, by which the masking
            module chooses; `None` for a model without one.
        learned_mask: `(N,)` bool, true = masked; `None` likewise.
        attention: `(N, N)`, what each patch (row) attends to: last block, mean over heads.
        components: `(N, 3)` in [0, 1]: the first three principal components of the patch tokens.
    """

    keep: np.ndarray | None
    learned_mask: np.ndarray | None
    attention: np.ndarray
    components: np.ndarray


def read_upload(path: str | os.PathLike, num_channels: int) -> np.ndarray:
    """The pixels `(H, W, num_channels)` of an uploaded file, uint8 or float32 in [0, 1].

    Raises:
        InputError: It is too large, too small, too long, damaged, or no image of [`FORMATS`].
    """
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise InputError(f"the file has {size / 2**20:.0f} MB; at most {MAX_BYTES >> 20} MB are read: make it smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(io.BytesIO(Path(path).read_bytes()), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise InputError(f"the image has far more than {MAX_PIXELS:,} pixels: make it smaller.") from error
    except Exception as error:  # the parsers of headers raise almost anything on broken input
        raise InputError(f"the file is no image in any of the formats {', '.join(FORMATS)}.") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS:,}: make it smaller.")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"the image has {width} x {height} pixels; each side needs at least {MIN_SIDE}.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"the image has {width} x {height} pixels, one side more than {MAX_ASPECT} times the other: crop it."
        )
    return decode_image(image, num_channels)


class Explorer:
    """A model of any family with its checkpoints, and the images that may be looked at.

    Args:
        model: Folder of a run, or Hub id. Only safetensors are read, and no code that comes with a model is run.
        dataset: Folder or Hub id of images among which neighbours are searched; at most [`MAX_FEATURES`] of them,
            drawn with a fixed seed.
        split: Of that dataset.

    Raises:
        InputError: The model or the dataset cannot be loaded.
    """

    def __init__(self, model: str, dataset: str | None = None, split: str = "train"):
        self.name = model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # In training order; the folder itself, the end of the run, is last.
        folders = [path.parent for path in Path(model).glob("checkpoint-*/config.json")]
        self.checkpoints = [*sorted(folders, key=_step_of), Path(model)]
        self.model = lru_cache(maxsize=3)(self._load)
        self.last = len(self.checkpoints) - 1
        config = self.model(self.last).config
        if config.num_channels not in (1, 3, 4):
            raise InputError(f"the model's `num_channels` is {config.num_channels}; the page shows 1, 3 or 4 channels.")
        try:
            self.processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"MODEL {model!r} has no image processor that can be loaded: {error}") from error
        self.num_channels: int = config.num_channels
        self.patch_size: tuple[int, int] = pair(config.patch_size)
        self.grid: tuple[int, int] = config.grid_size
        self.dataset: Any = None  # a `datasets.Dataset`
        self.rows: list[int] = []  # of the dataset, those that can be decoded
        self.features: torch.Tensor | None = None  # theirs, (n, D), of length 1
        if dataset is not None:
            self.dataset, self.column = load_image_dataset(dataset, split, max_samples=MAX_FEATURES)
            self.features = self._encode()
        self.examples = self._choose_examples()
        self.learns_masks: bool = config.learns_masks
        self.predicts_errors: bool = self.learns_masks and config.masker_objective == "error"

    def _load(self, index: int) -> Any:
        """The model of one checkpoint; the last ones that were asked for stay in memory."""
        path = self.name if index == self.last else str(self.checkpoints[index])
        config = read_model_config(path, "MODEL", trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise InputError(f"MODEL {path!r} is of type {config.model_type!r}; the page shows {', '.join(FAMILIES)}.")
        # The other implementations of attention give no weights of it.
        options = dict(trust_remote_code=False, use_safetensors=True, attn_implementation="eager")
        return load_whole(AutoModelForPreTraining, path, "MODEL", **options).to(self.device)

    def describe(self) -> str:
        """The model in one line."""
        model = self.model(self.last)
        config, millions = model.config, sum(p.numel() for p in model.parameters()) / 1e6
        height, width = self.patch_size
        return (
            f"{FAMILY_NAMES[config.model_type]}, {millions:.1f} million parameters, "
            f"{config.num_patches} patches of {height} × {width} pixels, {config.mask_ratio:.0%} masked in pretraining"
        )

    def curriculum_factor(self, index: int) -> float | None:
        """λ_CL at a checkpoint; `None` if its folder does not tell."""
        try:
            state = (self.checkpoints[index] / "trainer_state.json").read_text(encoding="utf-8")
            history = json.loads(state)["log_history"]
            return float([entry["curriculum_factor"] for entry in history if "curriculum_factor" in entry][-1])
        except (OSError, ValueError, TypeError, LookupError):  # none was saved, or not of a curriculum
            return None

    def describe_checkpoint(self, index: int) -> str:
        """Step and curriculum factor of a checkpoint, as far as its folder tells."""
        folder, factor = self.checkpoints[index], self.curriculum_factor(index)
        name = "end of the run" if index == self.last else folder.name.replace("checkpoint-", "step ")
        return name if factor is None else f"{name}, curriculum factor {factor:+.2f}"

    def preprocess(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Normalised `(B, C, H, W)` of decoded images `(H, W, C)`, uint8 or float32 in [0, 1]."""
        # Processors divide by 255, whatever the type.
        arrays = [image if image.dtype == np.uint8 else image * np.float32(255) for image in images]
        batch = self.processor(arrays, return_tensors="pt", input_data_format="channels_last")
        return batch["pixel_values"].to(self.device)

    # -- the model ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def analyze(self, pixel_values: torch.Tensor, checkpoint: int) -> Analysis:
        """Keep probabilities, attention and principal components of one image `(1, C, H, W)`."""
        model = self.model(checkpoint)
        options: dict[str, Any] = {}
        if model.config.learns_masks:
            factor = self.curriculum_factor(checkpoint)
            options["curriculum_factor"] = model.config.curriculum_end if factor is None else factor
        outputs = model(pixel_values, noise=self._noise(0), **options)
        keep = outputs.get("keep_probabilities")
        keep = outputs.get("predicted_errors") if keep is None else keep
        encoded = model.vit(pixel_values, output_attentions=True)
        return Analysis(
            keep=None if keep is None else keep[0].float().cpu().numpy(),
            learned_mask=None if keep is None else outputs.mask[0].bool().cpu().numpy(),
            attention=encoded.attentions[-1][0].float().mean(0)[1:, 1:].cpu().numpy(),
            components=_principal_components(encoded.last_hidden_state[0, 1:].float().cpu().numpy()),
        )

    @torch.inference_mode()
    def random_mask(self, pixel_values: torch.Tensor, seed: int, checkpoint: int) -> np.ndarray:
        """`(N,)` bool, true = masked, as `config.mask_sampler` draws it."""
        return self.model(checkpoint).vit(pixel_values, noise=self._noise(seed)).mask[0].bool().cpu().numpy()

    def _noise(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(1, math.prod(self.grid), generator=generator).to(self.device)

    @torch.inference_mode()
    def reconstruct(
        self, pixel_values: torch.Tensor, mask: np.ndarray, checkpoint: int
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Encodes the visible patches, predicts the others.

        Args:
            pixel_values (`(1, C, H, W)`): A normalised image.
            mask (`(N,)` bool): True = masked; any number of patches.
            checkpoint: Index into `checkpoints`.

        Returns:
            The image `(1, C, H, W)`, normalised, visible patches as they were; and each patch's error `(N,)`, whose
            mean over the masked ones is the reconstruction loss.
        """
        model = self.model(checkpoint)
        ids_keep = torch.from_numpy(np.flatnonzero(~mask)).to(self.device)[None]
        tokens = model.vit.embeddings(pixel_values)
        visible = torch.cat([tokens[:, :1], tokens[:, 1:][:, ids_keep[0]]], dim=1)
        predicted = model.decoder(model.vit(inputs_embeds=visible).last_hidden_state, ids_keep, self.grid).float()
        patches, normalized = patchify(pixel_values, self.patch_size), model.config.norm_pix_loss
        errors = patch_errors(predicted, patch_targets(pixel_values, self.patch_size, normalized))
        if normalized:
            # The model predicts patches normalised by their own moments; only the original knows those.
            mean, std = patch_moments(patches)
            predicted = predicted * std + mean
        hidden = torch.from_numpy(mask).to(self.device)[None, :, None]
        return unpatchify(torch.where(hidden, predicted, patches), self.patch_size, self.grid), errors[0].cpu().numpy()

    # -- images -------------------------------------------------------------------------------------------------------

    def to_pixels(self, pixel_values: torch.Tensor) -> np.ndarray:
        """RGB `(H, W, 3)` in [0, 1] of a normalised image `(1, C, H, W)`."""
        pixels = pixel_values[0].permute(1, 2, 0).float().cpu().numpy()
        pixels = (pixels * self.processor.image_std + self.processor.image_mean).clip(0, 1)
        return np.broadcast_to(pixels[..., :3], (*pixels.shape[:2], 3))

    def read_row(self, row: int) -> np.ndarray:
        """The decoded image in one row of the dataset."""
        return decode_image(self.dataset[row][self.column], self.num_channels)

    def _choose_examples(self) -> list[np.ndarray]:
        """Decoded images: some of the dataset, else what scikit-learn brings: scans of digits, or photographs."""
        if self.rows:
            chosen = np.linspace(0, len(self.rows) - 1, min(NUM_EXAMPLES, len(self.rows))).astype(int)
            return [self.read_row(self.rows[i]) for i in chosen]
        if self.num_channels == 1:
            images = np.round(load_digits().images[:NUM_EXAMPLES] * (255 / 16)).astype(np.uint8)
        else:
            images = load_sample_images().images
        return [decode_image(Image.fromarray(image), self.num_channels) for image in images]

    @torch.inference_mode()
    def _encode(self) -> torch.Tensor:
        """Features of the images that can be decoded, whose `rows` it sets; the others are named, and left out."""
        dataset = self.dataset
        model, features = self.model(self.last), []
        batches = tqdm(range(0, len(dataset), 64), desc="features of the dataset", unit="batch")
        for start in batches:
            images = []
            for row in range(start, min(start + 64, len(dataset))):
                try:
                    images.append(self.read_row(row))
                    self.rows.append(row)
                except InputError as error:
                    batches.write(f"image {row} is left out: {error}", file=sys.stderr)
            if images:
                features.append(model.vit(self.preprocess(images)).pooler_output.float().cpu())
        if not features:
            raise InputError("`dataset` holds no image that can be decoded.")
        return torch.nn.functional.normalize(torch.cat(features), dim=1)

    @torch.inference_mode()
    def neighbors(self, pixel_values: torch.Tensor) -> list[tuple[int, float, str]]:
        """`(row, cosine similarity, class or "")` of the nearest images, by the last checkpoint; the image itself not.

        Empty without a dataset.
        """
        if self.features is None:
            return []
        query = self.model(self.last).vit(pixel_values).pooler_output.float().cpu()
        similarities = self.features @ torch.nn.functional.normalize(query, dim=1)[0]
        similarities[similarities > 1 - 1e-5] = -2  # the image itself
        best = similarities.topk(min(MAX_NEIGHBORS, len(similarities)))
        label = self.dataset.features.get("label")
        nearest = []
        for similarity, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            row = self.rows[index]
            number = self.dataset[row]["label"] if isinstance(label, datasets.ClassLabel) else None
            name = "" if number is None or number < 0 else label.int2str(number)  # -1: without a class
            nearest += [(row, similarity, name)] if similarity > -2 else []
        return nearest


class Session:
    """What one visitor looks at: an image (at first an example), a checkpoint, a mask, a patch.

    A method that raises leaves it as it was.
    """

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self.checkpoint = explorer.last
        self.masking = "learned" if explorer.learns_masks else "random"
        self.seed = 0
        rows, columns = explorer.grid
        self.patch = (rows // 2) * columns + columns // 2
        self.open(explorer.examples[0])

    def open(self, image: np.ndarray) -> None:
        """Another image `(H, W, C)`, as decoded."""
        pixel_values = self.explorer.preprocess([image])
        self._look(pixel_values, self.checkpoint)
        self.neighbors = self.explorer.neighbors(pixel_values)

    def choose_checkpoint(self, index: int) -> None:
        """Another step of the run."""
        self._look(self.pixel_values, index)

    def _look(self, pixel_values: torch.Tensor, checkpoint: int) -> None:
        analysis = self.explorer.analyze(pixel_values, checkpoint)
        self.pixel_values, self.checkpoint, self.analysis = pixel_values, checkpoint, analysis
        self.choose_masking(self.masking)

    def choose_masking(self, masking: str) -> None:
        """`"learned"`, `"random"` or `"own"`, which begins with the mask that is there."""
        self.masking = masking
        if masking == "learned" and self.analysis.learned_mask is not None:
            self.mask = self.analysis.learned_mask.copy()
        elif masking == "random":
            self.mask = self.explorer.random_mask(self.pixel_values, self.seed, self.checkpoint)

    def draw_random_mask(self) -> None:
        """Another random mask."""
        self.seed += 1
        self.choose_masking("random")

    def choose_patch(self, patch: int) -> None:
        """Another patch whose attention is shown."""
        self.patch = patch

    def toggle(self, patch: int) -> None:
        """Masks a patch or shows it."""
        self.masking, self.mask[patch] = "own", not self.mask[patch]

    def fill(self, masked: bool) -> None:
        """Masks all patches or shows all."""
        self.masking, self.mask = "own", np.full_like(self.mask, masked)

    def patch_at(self, x: float, y: float) -> int:
        """The patch at a point of a picture, in the picture's pixels."""
        rows, columns = self.explorer.grid
        width, height = self._canvas(np.zeros((rows, columns, 3))).size
        row, column = int(y * rows / height), int(x * columns / width)
        return min(max(row, 0), rows - 1) * columns + min(max(column, 0), columns - 1)

    # -- drawing ------------------------------------------------------------------------------------------------------

    def pictures(self) -> dict[str, Picture]:
        """All pictures by their names; `keep` only where masks are learned."""
        explorer, analysis, (rows, columns) = self.explorer, self.analysis, self.explorer.grid
        pixels, hidden = explorer.to_pixels(self.pixel_values), self.mask.reshape(rows, columns)
        reconstruction, errors = explorer.reconstruct(self.pixel_values, self.mask, self.checkpoint)
        patch_height, patch_width = explorer.patch_size
        hole = hidden.repeat(patch_height, 0).repeat(patch_width, 1)[..., None]
        attention = analysis.attention[self.patch].reshape(rows, columns)
        shown = np.where(self.mask, errors, 0).reshape(rows, columns)
        loss = f"mean squared error {errors[self.mask].mean():.3f}" if self.mask.any() else "nothing is masked"
        place = f"row {self.patch // columns + 1}, column {self.patch % columns + 1}"
        pictures = {
            "image": Picture(self._canvas(pixels, mark=True), "Click a patch to see its attention."),
            "mask": Picture(
                self._canvas(np.where(hole, MASKED, pixels), lines=True),
                f"{(~self.mask).sum()} of {self.mask.size} patches visible. Click to mask or show one.",
            ),
            "reconstruction": Picture(
                self._canvas(explorer.to_pixels(reconstruction)), "Visible patches kept, masked ones predicted."
            ),
            "error": Picture(
                self._canvas(np.where(hidden[..., None], _heat(shown, "magma"), NOT_APPLICABLE)),
                f"{loss[0].upper()}{loss[1:]}. {_scale('magma', '0', f'{shown.max():.2g}')}",
            ),
            "attention": Picture(
                self._canvas(_heat(attention, "viridis"), mark=True),
                f"Of {place}; last block, all heads. {_scale('viridis', '0', f'{attention.max():.2g}')}",
            ),
            "components": Picture(
                self._canvas(analysis.components.reshape(rows, columns, 3)),
                "First three principal components of the patch tokens as red, green, blue.",
            ),
        }
        if analysis.keep is not None:
            keep = analysis.keep.reshape(rows, columns)
            caption = f"Probability that a patch stays visible. {_scale('cividis', '0', '1')}"
            if self.explorer.predicts_errors:
                keep = (keep.clip(-2, 2) + 2) / 4
                caption = f"Predicted error, in standard deviations. {_scale('cividis', '−2', '2')}"
            pictures["keep"] = Picture(self._canvas(_heat(keep, "cividis", peak=1.0)), caption)
        return pictures

    def _canvas(self, pixels: np.ndarray, mark: bool = False, lines: bool = False) -> Image.Image:
        """Pixels of the image, or one for each patch, `(…, …, 3)` in [0, 1], as a picture of [`PICTURE_SIZE`]."""
        (rows, columns), (patch_height, patch_width) = self.explorer.grid, self.explorer.patch_size
        zoom = max(1, round(PICTURE_SIZE / max(rows * patch_height, columns * patch_width)))
        high, wide = patch_height * zoom, patch_width * zoom
        image = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
        image = image.resize((columns * wide, rows * high), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(image, "RGBA")
        if lines:
            for x in range(wide, image.width, wide):
                draw.line((x, 0, x, image.height), (255, 255, 255, 70))
            for y in range(high, image.height, high):
                draw.line((0, y, image.width, y), (255, 255, 255, 70))
        if mark:
            left, top = self.patch % columns * wide, self.patch // columns * high
            draw.rectangle((left, top, left + wide - 1, top + high - 1), outline=MARK, width=max(3, zoom // 3))
        return image


def thumbnail(image: np.ndarray, side: int = 96) -> Image.Image:
    """A small square picture `side` wide, of the centre of a decoded image."""
    pixels = image if image.dtype == np.uint8 else np.round(image * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    method = Image.Resampling.NEAREST if edge < side else Image.Resampling.LANCZOS
    return picture.resize((side, side), method, box=(left, top, left + edge, top + edge))


def _step_of(path: Path) -> int:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _principal_components(tokens: np.ndarray) -> np.ndarray:
    """`(N, 3)` in [0, 1] of tokens `(N, D)`; components that do not exist are 0.5."""
    count = min(3, *tokens.shape)
    components = PCA(count).fit_transform(tokens)
    low, high = components.min(0), components.max(0)
    colors = np.full((len(tokens), 3), 0.5)
    colors[:, :count] = (components - low) / np.maximum(high - low, 1e-12)
    return colors


def _heat(values: np.ndarray, colormap: str, peak: float | None = None) -> np.ndarray:
    """Colours `(…, 3)` of values from 0 to `peak`, their maximum if not given."""
    peak = max(float(values.max()), 1e-12) if peak is None else peak
    return colormaps[colormap](values / peak)[..., :3]


def _scale(colormap: str, low: str, high: str) -> str:
    """A bar of colours between two numbers, as HTML."""
    colors = ", ".join(
        f"rgb({r:.0f}, {g:.0f}, {b:.0f})" for r, g, b, _ in colormaps[colormap](np.linspace(0, 1, 6)) * 255
    )
    bar = f'<span class="scale" style="background: linear-gradient(90deg, {colors})"></span>'
    return f'<span class="legend">{low} {bar} {high}</span>'


__all__ = ["Analysis", "Explorer", "Picture", "Session", "read_upload", "thumbnail"]
