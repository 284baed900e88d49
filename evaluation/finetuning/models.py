# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""A pretrained encoder with a new classifier, and the same from random initialisation."""

import contextlib
import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging

from clmae.configuration import MAEConfig
from clmae.configuration.errors import InputError
from clmae.evaluation.features import random_encoder
from clmae.evaluation.finetuning.arguments import ClassificationArguments, FinetuningArguments, LinearLarsArguments
from clmae.evaluation.finetuning.parameters import freeze_all_but_last, layer_ids
from clmae.model_cards.run import read_model_config
from clmae.modeling import MAEForImageClassification, MAEModel
from clmae.training.build import fastest_attention

logger = logging.get_logger(__name__)

_HEAD_STD = {"finetune": 2e-5, "partial": 2e-5, "linear-lars": 0.01}  # as in MAE's published code


class LinearProbe(nn.Module):
    """A frozen encoder, BatchNorm without affine parameters, and a linear classifier.

    Args:
        encoder: Gives `last_hidden_state` `(B, 1 + R + N, D)`, class token first, R register tokens; never trained.
        num_classes: Outputs of the classifier.
        feature: `"cls"` or `"mean"` (of the patch tokens).
    """

    def __init__(self, encoder: PreTrainedModel, num_classes: int, feature: str = "cls") -> None:
        super().__init__()
        self.encoder, self.feature = encoder.requires_grad_(False), feature
        self.config = encoder.config  # which the Trainer asks for
        self.norm = nn.BatchNorm1d(encoder.config.hidden_size, affine=False, eps=1e-6)
        self.classifier = nn.Linear(encoder.config.hidden_size, num_classes)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Logits `(B, num_classes)` of images `(B, C, H, W)`."""
        with torch.no_grad():
            tokens = self.encoder(pixel_values).last_hidden_state
        num_other = 1 + getattr(self.encoder.config, "num_register_tokens", 0)
        features = tokens[:, 0] if self.feature == "cls" else tokens[:, num_other:].mean(1)
        if len(features) > 1:
            features = self.norm(features)
        else:  # a lone image at the end of an epoch has no variance of its own
            features = F.batch_norm(features, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
        return ImageClassifierOutput(logits=self.classifier(features))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the encoder as its own class does, and beside it `linear_probe.safetensors`.

        That holds `weight` `(num_classes, D)` and `bias` `(num_classes,)`, with BatchNorm's running mean and variance
        in them, so that logits are `features @ weight.T + bias`; its metadata name the feature.
        """
        self.encoder.save_pretrained(folder)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        weight = self.classifier.weight.double() * (self.norm.running_var.double() + self.norm.eps).rsqrt()
        bias = self.classifier.bias.double() - weight @ self.norm.running_mean.double()
        layer = {"weight": weight.float().contiguous(), "bias": bias.float()}
        save_file(layer, Path(folder, "linear_probe.safetensors"), metadata={"feature": self.feature})


def load_classifier(
    model_path: str | os.PathLike, args: ClassificationArguments, num_classes: int, class_names: list[str] | None = None
) -> nn.Module:
    """A pretrained encoder with a new head, its untrained parts without gradients.

    This project's families pool the mean of the patch tokens, as does transformers' ViTMAE, which becomes an
    [`MAEForImageClassification`]; others do as their `<family>ForImageClassification` does. A family without stochastic
    depth is trained without; that is warned of.

    Args:
        model_path: Folder or Hub id of what `AutoModelForImageClassification` loads; for the probe, `AutoModel`.
        args: Says how; with `trained_blocks` the other blocks are frozen.
        num_classes, class_names: Of the head.

    Raises:
        InputError: There is no such checkpoint, it is of another kind, or lacks weights of the encoder.
    """
    config = read_model_config(model_path)
    encoder_class, classifier_class = AutoModel, AutoModelForImageClassification
    if config.model_type == "vit_mae":  # transformers' own has no classifier, and always masks
        fields = inspect.get_annotations(MAEConfig).keys() & config.to_dict().keys()
        config = MAEConfig(**{name: getattr(config, name) for name in fields if not name.startswith("_")})
        encoder_class, classifier_class = MAEModel, MAEForImageClassification
    if isinstance(args, FinetuningArguments):
        names = class_names or [str(i) for i in range(num_classes)]
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        if isinstance(config, MAEConfig):
            config.pooling = "mean"
        if hasattr(config, "drop_path_rate"):
            config.drop_path_rate = args.drop_path_rate
        elif args.drop_path_rate:
            logger.warning(
                f"A model of type {config.model_type!r} has no stochastic depth: it is trained without "
                "(`drop_path_rate`)."
            )
    options: dict[str, Any] = {"dtype": torch.float32}
    if fastest_attention(args.device) == "eager":  # which every model has
        options["attn_implementation"] = "eager"
    loader = encoder_class if isinstance(args, LinearLarsArguments) else classifier_class
    with _no_load_report():
        model, info = loader.from_pretrained(
            model_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    _check_loaded(model_path, model, info["missing_keys"])
    if isinstance(args, LinearLarsArguments):
        model = LinearProbe(model, num_classes, args.feature)
    _new_head(model, args)
    return model


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    """Without transformers' warning that the classifier is new; [`_check_loaded`] looks at what else is."""
    logger = logging.get_logger("transformers.modeling_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def from_scratch(model: nn.Module, args: ClassificationArguments) -> nn.Module:
    """The same architecture at random initialisation, what is trained as in `model`."""
    if isinstance(model, LinearProbe):
        encoder = random_encoder(model.encoder, args.seed)
        fresh: nn.Module = LinearProbe(encoder, model.classifier.out_features, model.feature)
    else:
        fresh = random_encoder(model, args.seed)
    _new_head(fresh, args)
    return fresh


def _check_loaded(model_path: str | os.PathLike, model: nn.Module, missing: Sequence[str]) -> None:
    ids, depth = layer_ids(model)
    lacking = sorted(name for name in missing if ids.get(name, depth + 1) <= depth)
    if lacking:
        raise InputError(
            f"`model` {os.fspath(model_path)!r} lacks {len(lacking)} weights of its encoder, {lacking[0]} among them, "
            "which would start at random; give a complete checkpoint."
        )


def _new_head(model: nn.Module, args: ClassificationArguments) -> None:
    """Draws the classifier anew, from `args.seed` alone, and freezes what is not trained."""
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Linear):
        raise InputError(
            f"`model` is a {type(model).__name__}, whose `classifier` is no linear layer; take another kind of model."
        )
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        weight = torch.empty(classifier.weight.shape)
        nn.init.trunc_normal_(weight, std=_HEAD_STD[args.protocol], a=-1.0, b=1.0, generator=generator)
        classifier.weight.copy_(weight)
        classifier.bias.zero_()
    if isinstance(args, FinetuningArguments) and args.trained_blocks is not None:
        freeze_all_but_last(model, args.trained_blocks)
