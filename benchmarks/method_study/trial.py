# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""One selection run of the method study: pretrains one variant on CIFAR-10 and evaluates it on held-out images.

`trial.py VARIANT --seed 10 --data FOLDER --output results.jsonl`. The plan is in PLAN.md, the variants are below. Every
run gets the compute of 400,000 images of MAE, so that a variant which costs more sees fewer images. The last 10,000
images of the training set are held out: never trained on, used for all figures. The test set is not read.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from clmae import CLMAEConfig, CLMAEForPreTraining, MAEConfig, MAEForPreTraining
from clmae.modeling.losses import contrastive_loss, masked_mean, patch_errors, patch_targets, patchify
from clmae.modeling.masking import Masking, keep_lowest
from clmae.modeling.modeling_mae import MAELayer, select_visible
from clmae.training.data import crop_and_resize_batch, random_resized_crop_box
from clmae.training.flops import FlopCounter

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255
BATCH, GRID, PATCH = 256, (8, 8), (4, 4)
ENCODER = dict(
    image_size=32, patch_size=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384
)
DECODER = dict(decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4)
SMALL_DECODER = DECODER | dict(decoder_num_hidden_layers=1)

# What a variant changes; everything else is MAE. `masks`: how they are chosen ("random", "error": the predicted error,
# "soft": CL-MAE's pass B in the package's form). See `Trial` for the other options.
VARIANTS: dict[str, dict[str, Any]] = {
    "mae": {},
    "mae_small_decoder": dict(decoder=SMALL_DECODER),
    "mae_ratio_60": dict(ratio=0.6),
    "mae_blocks": dict(granularity=2),
    "mae_raw": dict(raw_targets=True),
    "cl_soft": dict(masks="soft", interval=4),
    "cl_soft_cooldown": dict(masks="soft", interval=4, cooldown=0.8),
    "error_1": dict(masks="error", beta=1.0),
    "error_3": dict(masks="error", beta=3.0),
    "error_1_cooldown": dict(masks="error", beta=1.0, cooldown=0.8),
    "error_3_cooldown": dict(masks="error", beta=3.0, cooldown=0.8),
    "error_3_raw": dict(masks="error", beta=3.0, raw_errors=True),
    "error_3_task": dict(masks="error", beta=3.0, error_task=True),
    "error_1_blocks": dict(masks="error", beta=1.0, granularity=2),
    "error_3_blocks": dict(masks="error", beta=3.0, granularity=2),
    "error_1_adversary": dict(masks="error", beta=1.0, start=0.0),
    "error_3_adversary": dict(masks="error", beta=3.0, start=0.0),
    "error_1_raw_adversary": dict(masks="error", beta=1.0, start=0.0, raw_errors=True),
    "error_3_raw_adversary": dict(masks="error", beta=3.0, start=0.0, raw_errors=True),
    "error_3_small_decoder": dict(masks="error", beta=3.0, decoder=SMALL_DECODER),
    "cmae_01": dict(decoder=SMALL_DECODER, contrast=0.1),
    "cmae_01_jitter": dict(decoder=SMALL_DECODER, contrast=0.1, jitter=True),
    "cmae_03_jitter": dict(decoder=SMALL_DECODER, contrast=0.3, jitter=True),
    "cmae_1_jitter": dict(decoder=SMALL_DECODER, contrast=1.0, jitter=True),
    "cmae_1_jitter_one": dict(decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1),
    "cmae_1_jitter_one_norm": dict(
        decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1, projector_norm=True
    ),
    "cmae_03_jitter_one_norm": dict(
        decoder=SMALL_DECODER, contrast=0.3, jitter=True, decoded_views=1, projector_norm=True
    ),
    "cmae_1_jitter_one_norm_frozen": dict(
        decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1, projector_norm=True, frozen_patches=True
    ),
    "cmae_1_jitter_one_norm_error": dict(
        decoder=SMALL_DECODER,
        contrast=1.0,
        jitter=True,
        decoded_views=1,
        projector_norm=True,
        masks="error",
        beta=3.0,
    ),
    "cmae_1_jitter_one_norm_positions": dict(
        decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1, projector_norm=True, positions=0.1
    ),
    "cmae_3_jitter_one_norm": dict(
        decoder=SMALL_DECODER, contrast=3.0, jitter=True, decoded_views=1, projector_norm=True
    ),
    "cmae_1_jitter_both_one_norm": dict(
        decoder=SMALL_DECODER, contrast=1.0, jitter=True, jitter_both=True, decoded_views=1, projector_norm=True
    ),
    "cmae_1_jitter_one_layernorm": dict(
        decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1, projector_norm="layer"
    ),
    "cmae_1_jitter_one_norm_cool": dict(
        decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1, projector_norm=True, temperature=0.5
    ),
    "cmae_1_jitter_one_norm_sharp": dict(
        decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1, projector_norm=True, temperature=0.1
    ),
    "cmae_1_jitter_one_norm_sharper": dict(
        decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1, projector_norm=True, temperature=0.05
    ),
    "cmae_1_jitter_one_norm_sharp_error": dict(
        **dict(decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1, projector_norm=True),
        **dict(temperature=0.1, masks="error", beta=1.0),
    ),
    "cmae_1_jitter_one_norm_ratio_60": dict(
        decoder=SMALL_DECODER, contrast=1.0, jitter=True, decoded_views=1, projector_norm=True, ratio=0.6
    ),
    "error_1_partner": dict(masks="error", beta=1.0, end=0.0),
    "error_3_partner": dict(masks="error", beta=3.0, end=0.0),
}


class Trial(nn.Module):
    """An autoencoder of the package, its mask and its further tasks as a variant says.

    Options: `ratio` (mask ratio), `granularity` (masks of g x g patches), `beta` (weight of the predicted error against
    Gumbel noise), `raw_errors` (errors in pixel units), `error_task` (the predictor's gradient reaches the patch
    embedding), `start`, `end` and `cooldown` (curriculum from `start` to `end`, ending with random masks at that share
    of the run), `contrast` (weight of InfoNCE between two views), `temperature` (of InfoNCE), `jitter` (colours of the
    second view), `jitter_both` (of both), `decoded_views`, `projector_norm` (BatchNorm, or `layer`: LayerNorm, in the
    projector), `frozen_patches` (patch embedding), `positions` (weight of the position regression, positions staying in
    the input).
    """

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options
        fields = ENCODER | options.get("decoder", DECODER)
        fields |= dict(mask_ratio=options.get("ratio", 0.75), norm_pix_loss=not options.get("raw_targets", False))
        self.soft = options.get("masks") == "soft"
        if self.soft:
            config = CLMAEConfig(**fields, masker_num_hidden_layers=1, masker_intermediate_size=96)
            config._attn_implementation = "eager"
            self.model = CLMAEForPreTraining(config)
        else:
            config = MAEConfig(**fields)
            config._attn_implementation = "eager"
            self.model = MAEForPreTraining(config)
        self.config = config
        width = config.hidden_size
        self.views = 2 if options.get("contrast") else 1
        if options.get("masks") == "error":
            self.predictor = nn.ModuleDict(
                dict(
                    reduce=nn.Linear(width, 48),
                    layer=MAELayer(config, 48, 4, 96, 1e-5),
                    norm=nn.LayerNorm(48),
                    head=nn.Linear(48, 1),
                )
            )
        if self.views == 2:
            kind = options.get("projector_norm")
            norm = [nn.LayerNorm(512) if kind == "layer" else nn.BatchNorm1d(512)] if kind else []
            self.projector = nn.Sequential(nn.Linear(width, 512), *norm, nn.GELU(), nn.Linear(512, 128))
        if options.get("positions"):
            self.position_head = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, 64))
        if options.get("frozen_patches"):
            self.model.vit.embeddings.patch_embeddings.requires_grad_(False)

    def predict_errors(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Standardised log error `(B, N)` of each patch, from all tokens `(B, 1 + N, D)`."""
        tokens = embeddings[:, 1:] if self.options.get("error_task") else embeddings[:, 1:].detach()
        hidden = self.predictor["layer"](self.predictor["reduce"](tokens))
        return self.predictor["head"](self.predictor["norm"](hidden)).squeeze(-1)

    def choose(self, noise: torch.Tensor, factor: float, predicted: torch.Tensor | None) -> Masking:
        """Masks from uniform `noise` `(B, N)`: random, or `factor * beta * predicted + Gumbel`, highest kept."""
        size = self.options.get("granularity", 1)

        def blocks(values: torch.Tensor, reduce: Any) -> torch.Tensor:
            if size == 1:
                return values
            rows, columns = GRID[0] // size, GRID[1] // size
            values = reduce(values.view(-1, rows, size, columns, size).permute(0, 1, 3, 2, 4).flatten(3))
            return values.repeat_interleave(size, 1).repeat_interleave(size, 2).flatten(1)

        gumbel = blocks(-torch.log(-torch.log(noise.clamp(1e-7, 1 - 1e-7))), lambda v: v[..., 0])
        scores = gumbel
        if predicted is not None:
            scores = scores + factor * self.options["beta"] * blocks(predicted, lambda v: v.mean(-1))
        if size > 1:  # equal scores within a block are told apart by their place, the same in every image
            scores = scores + 1e-6 * noise
        return keep_lowest(-scores, self.config.num_visible(noise.shape[1]))

    def forward(
        self, pixels: torch.Tensor, noise: torch.Tensor, factor: float, random_masks: bool, masker: bool = True
    ) -> dict[str, torch.Tensor]:
        """Loss terms for images `(B * views, C, H, W)`, an image's views side by side."""
        if self.soft:
            output = self.model(
                pixels,
                noise=noise,
                masking="random" if random_masks else "learned",
                curriculum_factor=torch.tensor(factor),
                compute_masker_loss=masker and not random_masks and self.training,
            )
            return {"loss": output.loss, "reconstruction": output.reconstruction_loss}
        options, model = self.options, self.model
        targets = patch_targets(pixels, PATCH, self.config.norm_pix_loss)
        embeddings = model.vit.embeddings(pixels)
        predicted = self.predict_errors(embeddings) if hasattr(self, "predictor") else None
        masking = self.choose(noise, factor, None if random_masks or predicted is None else predicted.detach())
        encoded = model.vit(inputs_embeds=select_visible(embeddings, masking)).last_hidden_state
        decoded, ids, mask, goal = encoded, masking.ids_keep, masking.mask, targets
        if options.get("decoded_views") == 1 and self.views == 2 and self.training:
            decoded, ids, mask, goal = (values[::2] for values in (encoded, ids, mask, targets))
        errors = patch_errors(model.decoder(decoded, ids, GRID), goal)
        terms = {"reconstruction": masked_mean(errors, mask)}
        loss = terms["reconstruction"]
        if predicted is not None:
            if len(errors) < len(predicted):
                predicted = predicted[::2]
                pixels = pixels[::2]
            goal = errors.detach()
            if options.get("raw_errors"):
                goal = goal * (patchify(pixels, PATCH).var(-1) + 1e-4)
            goal = (goal + 1e-6).log()
            mean = (goal * mask).sum() / mask.sum()
            std = (((goal - mean) ** 2 * mask).sum() / mask.sum()).sqrt() + 1e-6
            terms["prediction"] = ((predicted - (goal - mean) / std) ** 2 * mask).sum() / mask.sum()
            loss = loss + terms["prediction"]
        if self.training and self.views == 2:
            first, second = self.projector(encoded[:, 1:].mean(1)).unflatten(0, (-1, 2)).unbind(1)
            terms["contrast"] = contrastive_loss(first, second, options.get("temperature", 0.2))
            loss = loss + options["contrast"] * terms["contrast"]
        if self.training and options.get("positions"):
            scores = self.position_head(encoded[:, 1:])
            one_hot = nn.functional.one_hot(masking.ids_keep, 64).float()
            terms["positions"] = (scores - one_hot).square().sum(-1).mean()
            loss = loss + options["positions"] * terms["positions"]
        return terms | {"loss": loss}


def colour_jitter(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness and contrast 0.4, saturation 0.2, hue 0.1 (p 0.8), grey (p 0.2), of `(B, 3, H, W)` in 0..255."""
    draws = torch.rand(len(pixels), 6, 1, 1, 1, generator=generator)
    change = (draws[:, 4] < 0.8).float()
    grey_weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    jittered = pixels * (1 + 0.4 * (2 * draws[:, 0] - 1))
    mean = (jittered * grey_weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    jittered = mean + (jittered - mean) * (1 + 0.4 * (2 * draws[:, 1] - 1))
    grey = (jittered * grey_weights).sum(1, keepdim=True)
    jittered = grey + (jittered - grey) * (1 + 0.2 * (2 * draws[:, 2] - 1))
    # Hue: a rotation of the colour plane around the grey axis (Rodrigues' formula), up to 0.1 of a turn.
    angle = 2 * math.pi * 0.1 * (2 * draws[:, 3, 0, 0] - 1)
    cosine, sine = angle.cos()[:, :, None], angle.sin()[:, :, None] / math.sqrt(3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    rotation = cosine * torch.eye(3) + (1 - cosine) / 3 + sine * cross
    jittered = torch.einsum("bij,bjhw->bihw", rotation, jittered)
    pixels = change * jittered + (1 - change) * pixels
    grey = (pixels * grey_weights).sum(1, keepdim=True)
    return torch.where(draws[:, 5] < 0.2, grey, pixels).clamp(0, 255)


def load_cifar(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The 50,000 training images `(N, 3, 32, 32)`, uint8, and their labels."""
    import pyarrow.parquet as parquet

    cache = Path("cifar10-train.pt")
    if not cache.exists():
        table = parquet.read_table(folder / "train-00000-of-00001.parquet")
        images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()])
        torch.save(
            (torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())), cache
        )
    return torch.load(cache, weights_only=True)


def step_flops(options: dict[str, Any]) -> float:
    """Counted FLOPs of a step per image; pass B's step counts for its share of the steps."""
    pixels = torch.randn(16, 3, 32, 32)

    def count(options: dict[str, Any], **kwargs: bool) -> float:
        trial = Trial(options).train()
        batch = pixels.repeat_interleave(trial.views, 0)
        with FlopCounter() as counter:
            trial(batch, torch.rand(len(batch), 64), 0.5, **kwargs)["loss"].backward()
        return counter.flops / len(pixels)

    interval, learned_share = options.get("interval", 1), options.get("cooldown", 1.0)
    learned = count(options, random_masks=False) / interval
    if interval > 1:
        learned += count(options, random_masks=False, masker=False) * (1 - 1 / interval)
    if learned_share == 1:
        return learned
    return learned_share * learned + (1 - learned_share) * count(options, random_masks=True)


@torch.no_grad()
def evaluate(
    trial: Trial, images: torch.Tensor, labels: torch.Tensor, bank_size: int, linear: bool = False
) -> dict[str, float]:
    """k-NN (cosine, k = 20, T = 0.07) and logistic regression, of all images after the first `bank_size`, by these."""
    trial.eval()
    features = torch.cat([trial.model.vit((batch.float() - MEAN) / STD).pooler_output for batch in images.split(500)])
    trial.train()
    bank, queries, known, wanted = features[:bank_size], features[bank_size:], labels[:bank_size], labels[bank_size:]
    normal_bank, hits = nn.functional.normalize(bank, dim=1).T, 0
    for query, label in zip(queries.split(1000), wanted.split(1000), strict=True):
        similarity, index = (nn.functional.normalize(query, dim=1) @ normal_bank).topk(20)
        votes = torch.zeros(len(query), 10).scatter_add_(1, known[index], (similarity / 0.07).exp())
        hits += (votes.argmax(1) == label).sum().item()
    result = {"knn": hits / len(queries) * 100}
    if linear:
        mean, std = bank.mean(0), bank.std(0) + 1e-6
        bank, queries = (bank - mean) / std, (queries - mean) / std

        def accuracy(x, y, x_test, y_test, strength):
            weight, bias = torch.zeros(x.shape[1], 10, requires_grad=True), torch.zeros(10, requires_grad=True)
            optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

            def closure():
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(x @ weight + bias, y) + strength * weight.square().sum()
                loss.backward()
                return loss

            with torch.enable_grad():
                optimizer.step(closure)
            return ((x_test @ weight + bias).argmax(1) == y_test).float().mean().item() * 100

        cut = 32000
        strengths = {s: accuracy(bank[:cut], known[:cut], bank[cut:], known[cut:], s) for s in (1e-4, 1e-3, 1e-2)}
        result["linear"] = accuracy(bank, known, queries, wanted, max(strengths, key=strengths.get))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's parquet files")
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--thousands", type=float, default=400, help="compute, in thousands of images of MAE")
    arguments = parser.parse_args()
    options = VARIANTS[arguments.variant]
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(1000 + arguments.seed)
    images, labels = load_cifar(arguments.data)
    cost = step_flops(options) / step_flops({})
    steps = round(arguments.thousands * 1000 / BATCH / cost)
    torch.manual_seed(arguments.seed)
    trial = Trial(options).train()
    masker = [p for name, p in trial.named_parameters() if "masking_module" in name or "predictor" in name]
    others = [p for name, p in trial.named_parameters() if "masking_module" not in name and "predictor" not in name]
    groups = [
        dict(params=[p for p in others if p.ndim > 1 and p.requires_grad], weight_decay=0.05),
        dict(params=[p for p in others if p.ndim <= 1 and p.requires_grad], weight_decay=0.0),
    ]
    if masker:
        groups.append(dict(params=masker, weight_decay=0.05, masker=True))
    rate = 1.5e-3
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    warm_up = max(1, int(0.05 * steps))
    held_out = (images[40000:40256].float() - MEAN) / STD
    held_out_noise = torch.rand(256, 64, generator=torch.Generator().manual_seed(7))
    record: dict[str, Any] = dict(
        variant=arguments.variant, seed=arguments.seed, options=options, cost=cost, steps=steps
    )
    record["log"], record["curve"] = [], {}
    order, position, spent = torch.randperm(40000, generator=generator), 0, 0.0
    began = time.time()
    for step in range(steps):
        start, cooldown = options.get("start", 1.0), options.get("cooldown", 1.0)
        progress = step / steps
        factor = start + (options.get("end", -1.0) - start) * min(1.0, progress / cooldown)
        random_masks = progress >= cooldown or options.get("masks", "random") == "random"
        ramp = min(1.0, (step + 1) / warm_up)
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / (steps - warm_up)))
        for group in optimizer.param_groups:
            group["lr"] = rate * ramp * (1.0 if group.get("masker") else decay)
        if position + BATCH > len(order):
            order, position = torch.randperm(40000, generator=generator), 0
        index = order[position : position + BATCH].repeat_interleave(trial.views)
        position += BATCH
        draws = torch.rand(40, len(index), generator=generator, dtype=torch.float64).numpy()
        flips = torch.rand(len(index), generator=generator) < 0.5
        scale = (0.4, 1.0) if trial.views == 1 else (0.25, 1.0)
        boxes = torch.from_numpy(random_resized_crop_box(32, 32, draws.__getitem__, scale))
        pixels = crop_and_resize_batch(images[index], boxes, flips, (32, 32))
        if options.get("jitter"):
            pixels[1::2] = colour_jitter(pixels[1::2], generator)
        if options.get("jitter_both"):
            pixels[::2] = colour_jitter(pixels[::2], generator)
        pixels = (pixels - MEAN) / STD
        noise = torch.rand(len(index), 64, generator=generator)
        terms = trial(pixels, noise, factor, random_masks, masker=step % options.get("interval", 1) == 0)
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            trial.eval()
            with torch.no_grad():
                usual = trial(held_out, held_out_noise, 0.0, True)["reconstruction"]
                now = trial(held_out, held_out_noise, factor, False)["reconstruction"]
                adversary = trial(held_out, held_out_noise, -1.0, False)["reconstruction"]
            trial.train()
            entry = {name: round(value.item(), 4) for name, value in terms.items()}
            entry |= dict(step=step, factor=round(factor, 3), random=round(usual.item(), 4))
            entry |= dict(difficulty=round((now / usual).item(), 3), adversary=round((adversary / usual).item(), 3))
            record["log"].append(entry)
            print(arguments.variant, arguments.seed, json.dumps(entry), flush=True)
        if (step + 1) % max(1, steps // 4) == 0 and step + 1 < steps - 4:
            spent -= time.time()
            record["curve"][(step + 1) * BATCH] = evaluate(trial, images[30000:45000], labels[30000:45000], 10000)[
                "knn"
            ]
            spent += time.time()
    record["seconds"] = round(time.time() - began - spent, 1)
    record |= evaluate(trial, images, labels, 40000, linear=True)
    with arguments.output.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print("RESULT", json.dumps({k: v for k, v in record.items() if k != "log"}), flush=True)


if __name__ == "__main__":
    main()
