# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Which heat map of a ViT finds the object? Evaluated on generated images whose object boxes are known.

    python benchmarks/contrastive_crop/heat_maps.py --seeds 0 1 2

Pretrains a tiny MAE and a tiny CMAE on generated images, takes each candidate's box on others, and writes the mean
IoU with the object's to `heat_maps.md`; the whole image is the baseline. Minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from object_images import object_images
from torchvision.ops import box_iou
from transformers import set_seed

from clmae import FAMILIES
from clmae.evaluation.tables import markdown_table
from clmae.model_cards.files import write_whole
from clmae.training import CurriculumTrainer, PretrainingArguments
from clmae.training.data import heat_map_box

HERE = Path(__file__).resolve().parent
SIZE, PATCH, GRID = 32, 4, (8, 8)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)


def component(tokens: torch.Tensor) -> torch.Tensor:
    """First principal component over the image's tokens, its sign such that fewer tokens are hot than cold."""
    centred = tokens - tokens.mean(1, keepdim=True)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    scores = left[..., 0] * values[..., :1]
    return scores * torch.where((scores > 0).float().mean(1, keepdim=True) > 0.5, -1.0, 1.0)


def border_distance(tokens: torch.Tensor) -> torch.Tensor:
    """Distance of each token to the mean token of the image's border, where objects seldom are."""
    rows, columns = GRID
    grid = torch.arange(rows * columns, device=tokens.device).view(rows, columns)
    border = torch.cat([grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]])
    return (tokens - tokens[:, border].mean(1, keepdim=True)).norm(dim=-1)


# Of tokens `(B, N, D)`: heat `(B, N)`.
CANDIDATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "norm": lambda tokens: tokens.norm(dim=-1),
    "distance to the mean": lambda tokens: (tokens - tokens.mean(1, keepdim=True)).norm(dim=-1),
    "first principal component": component,
    "distance to the border's mean": border_distance,
}


class Views(torch.utils.data.Dataset):
    """Generated images as training samples: one view or two, each mirrored at random; no crop, for speed."""

    def __init__(self, images: torch.Tensor, views: int):
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        views = [self.images[index].flip(-1) if torch.rand(()) < 0.5 else self.images[index] for _ in range(self.views)]
        return {"pixel_values": torch.stack(views) if self.views > 1 else views[0]}


def encoder(family: str, seed: int, steps: int, images: torch.Tensor) -> torch.nn.Module:
    """The encoder of a tiny model, pretrained for so many steps."""
    set_seed(seed)
    config_class, _, model_class, *_ = FAMILIES[family]
    sizes = dict(image_size=SIZE, patch_size=PATCH, hidden_size=96, num_hidden_layers=4, num_attention_heads=4)
    decoder = dict(decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4)
    config = config_class(**sizes, **(decoder if family == "mae" else {}))
    model = model_class._from_config(config, attn_implementation="eager")
    if steps:
        options = dict(use_cpu=not torch.cuda.is_available(), bf16=True, save_strategy="no", report_to="none")
        folder = f"outputs/heat_maps/{family}-{seed}"
        args = PretrainingArguments(folder, max_steps=steps, learning_rate=1e-3, seed=seed, **options)
        CurriculumTrainer(model, args, train_dataset=Views(images, getattr(config, "num_views", 1))).train()
    return model.vit.eval()


@torch.no_grad()
def scores(vit: torch.nn.Module, images: torch.Tensor, boxes: torch.Tensor) -> dict[str, float]:
    """Mean IoU of each candidate's box with the object's, at each threshold."""
    device = next(vit.parameters()).device
    hidden = [vit(part.to(device), output_hidden_states=True) for part in images.split(250)]
    tokens = {
        "last block": torch.cat([h.hidden_states[-1][:, 1:] for h in hidden]),
        "after the LayerNorm": torch.cat([h.last_hidden_state[:, 1:] for h in hidden]),
    }
    return {
        f"{name}, {place}, k = {threshold}": box_iou(
            heat_map_box(candidate(tokens[place]).unflatten(1, GRID), (SIZE, SIZE), threshold).cpu(), boxes
        )
        .diagonal()
        .mean()
        .item()
        for name, candidate in CANDIDATES.items()
        for place in tokens
        for threshold in THRESHOLDS
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--num_train", type=int, default=5000)
    parser.add_argument("--num_test", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()

    def normalised(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, boxes = object_images(count, SIZE, seed)
        return (images.float() / 255 - 0.5) / 0.25, boxes

    train, _ = normalised(options.num_train, 0)
    test, boxes = normalised(options.num_test, 1)
    whole = box_iou(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), boxes).mean().item()
    found = [
        {"heat map": name, "encoder": kind, "iou": value}
        for kind, family, steps in (
            *(("random encoder", "mae", 0), ("MAE", "mae", options.steps), ("CMAE", "cmae", options.steps)),
        )
        for seed in options.seeds
        for name, value in scores(encoder(family, seed, steps, train), test, boxes).items()
    ]
    groups = pd.DataFrame(found).groupby(["heat map", "encoder"])["iou"].agg(["mean", "std"])
    text = groups["mean"].map("{:.3f}".format) + groups["std"].map(" ± {:.3f}".format).where(groups["std"].notna(), "")
    best = groups["mean"].unstack()[["MAE", "CMAE"]].sum(axis=1).sort_values(ascending=False).index
    table = text.unstack().loc[best, ["random encoder", "MAE", "CMAE"]]
    table = pd.concat([pd.DataFrame(f"{whole:.3f}", ["whole image"], table.columns), table])
    text = markdown_table(table.reset_index(names="heat map"))
    write_whole(options.output / "heat_maps.md", text)
    print(text)


if __name__ == "__main__":
    main()
