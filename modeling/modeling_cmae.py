# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""CMAE (Mao et al., arXiv 2205.10546): MAE with a small decoder, and tasks for the encoder itself.

The abstract fixes the ideas; architecture and losses here are this project's reading of it.
"""

# mypy: disable-error-code="override"
# (A family's methods take the family's own step.)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from clmae.configuration.configuration_cmae import CMAEConfig
from clmae.configuration.errors import InputError
from clmae.modeling.losses import contrastive_loss, gather_across_processes
from clmae.modeling.masking import Masking, finer_digits, gather_tokens
from clmae.modeling.modeling_cl_mae import CLMAEForPreTrainingOutput, CLMAEPreTrainedModel, CurriculumStep, LearnedMasks
from clmae.modeling.modeling_mae import MAEBackbone, MAEForImageClassification, MAEModel, check_pixel_values


@dataclass
class CMAEForPreTrainingOutput(CLMAEForPreTrainingOutput):
    """What [`CMAEForPreTraining`] returns: [`CLMAEForPreTrainingOutput`] and the encoder's tasks.

    With two views, everything that has a row for each image has two: `logits` `(batch_size, 2, num_patches, …)`,
    `mask`, `ids_restore`, `keep_probabilities` and `predicted_errors` `(batch_size, 2, num_patches)`. (`logits` have
    one where one view is decoded: `config.decoded_views`.) `hidden_states` and `attentions` are those of the
    `2 * batch_size` views, an image's two side by side. Losses stand before their weights.

    Args:
        contrastive_loss (`torch.FloatTensor`, a scalar): L_con, symmetric InfoNCE between the views.
        position_loss (`torch.FloatTensor`, a scalar): L_pos, cross-entropy over the N positions.
        position_accuracy (`torch.FloatTensor`, a scalar): Share of withheld positions that were found. Chance is
            1 / (N − positions given) under random masks, and more where the masks themselves tell which patches stay
            visible (`mask_sampler="block"`, learned masks that differ little between images).
        projections (`torch.FloatTensor` of shape `(batch_size, 2, projection_size)`): What L_con compares, before it
            is normalised.
    """

    contrastive_loss: Tensor | None = None
    position_loss: Tensor | None = None
    position_accuracy: Tensor | None = None
    projections: Tensor | None = None


class CMAEProjector(nn.Module):
    """From an image's mean token `(B, hidden_size)` to what is compared `(B, projection_size)`.

    With `config.projection_batch_norm` the hidden layer is normalised over the process's batch, views together.
    """

    def __init__(self, config: CMAEConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.projection_hidden_size)
        self.norm = nn.BatchNorm1d(config.projection_hidden_size) if config.projection_batch_norm else nn.Identity()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.projection_hidden_size, config.projection_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.norm(self.fc1(tokens))))


class CMAEPositionHead(nn.Module):
    """What stands for a withheld position, and which of the N positions an encoder's output `(…, hidden_size)` has."""

    def __init__(self, config: CMAEConfig):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.classifier = nn.Linear(config.hidden_size, config.num_patches)

    def forward(self, tokens: Tensor, withhold: bool = False) -> Tensor:
        """Scores of the N positions; with `withhold`, patch tokens without position get what stands for it."""
        # Both here: a module's parameters may be present only while its forward runs (sharding, offloading).
        return tokens + self.mask_token if withhold else self.classifier(tokens)


class CMAEPreTrainedModel(CLMAEPreTrainedModel):
    """What transformers needs to know about every CMAE model."""

    config_class = CMAEConfig
    _keys_to_ignore_on_load_unexpected = [
        *CLMAEPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^projector\.",
        r"^position_head\.",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CMAEPositionHead):
            init.normal_(module.mask_token, std=self.config.initializer_range)


class CMAEModel(CMAEPreTrainedModel, MAEModel):
    """The ViT encoder of a CMAE: the same as [`MAEModel`]; positions are always given."""


@dataclass
class CMAEStep(CurriculumStep):
    """A [`CurriculumStep`] with the encoder's tasks; the views of an image are side by side in the batch.

    Args:
        contrast (`bool`): Whether the two views are contrasted.
        withhold (`bool`): Whether positions are withheld.
        withheld (`torch.LongTensor` of shape `(B, n)`, *optional*): Which of the K visible tokens are without their
            position; `None`: none.
    """

    contrast: bool = False
    withhold: bool = False
    withheld: Tensor | None = None


class CMAEForPreTraining(CMAEPreTrainedModel, LearnedMasks):
    """Autoencoder with a small decoder, whose encoder also contrasts two views and finds its tokens' positions.

    `L = L_rec + λ_con·L_con + λ_pos·L_pos`. A task of weight 0 has no parameters and is not computed; without both
    tasks, and with one view, this is [`MAEForPreTraining`]. With `config.learned_masks` the masks of all views are
    chosen by a masking module, and `L_mask` is added as in [`CLMAEForPreTraining`].
    """

    output_class = CMAEForPreTrainingOutput

    def __init__(self, config: CMAEConfig):
        super().__init__(config)
        if config.contrastive_loss_weight:
            self.projector = CMAEProjector(config)
        if config.position_loss_weight:
            self.position_head = CMAEPositionHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        masking: str | None = None,
        curriculum_factor: Tensor | float | None = None,
        compute_masker_loss: bool | None = None,
        compute_task_losses: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CMAEForPreTrainingOutput:
        """Reconstructs masked patches, contrasts views and predicts positions.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 2, num_channels, height, width)` or
                `(batch_size, num_channels, height, width)`): Normalised images, two views of each or one.
            noise (`torch.FloatTensor` of shape `(batch_size, 2, num_patches)` or `(batch_size, num_patches)`,
                *optional*): Uniform in [0, 1); fixes the random masks, and whose positions are withheld.
            masking (`str`, *optional*): `"random"`, or `"learned"` with `config.learned_masks`, where it is the
                default.
            curriculum_factor, compute_masker_loss, interpolate_pos_encoding: As in [`CLMAEForPreTraining`].
            compute_task_losses (`bool`, *optional*): Whether to withhold positions and compute the encoder's tasks;
                if not given: in training. Without, all positions are given.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            InputError: The views are to be contrasted, but there is one of each image, or one image; or the images
                have another shape than the configuration says.
        """
        self._check_kwargs(kwargs)
        several = pixel_values.ndim == 5
        views = pixel_values.shape[1] if several else 1
        grid_size = check_pixel_values(self.config, pixel_values, interpolate_pos_encoding, several)
        shape = (*pixel_values.shape[:-3], math.prod(grid_size))
        if noise is not None and noise.shape != shape:
            raise InputError(f"`noise` has shape {tuple(noise.shape)}; for these `pixel_values` give {shape}.")
        tasks = self.training if compute_task_losses is None else compute_task_losses
        contrast = tasks and self.config.contrastive_loss_weight > 0
        withhold = tasks and self.config.position_loss_weight > 0
        self._check_tasks(contrast, withhold, views, grid_size)
        if noise is None and withhold:
            noise = torch.rand(shape, device=pixel_values.device)
        if several:
            pixel_values, noise = pixel_values.flatten(0, 1), None if noise is None else noise.flatten(0, 1)
        step = CMAEStep(pixel_values, noise, contrast=contrast, withhold=withhold)
        self.set_curriculum(step, masking, curriculum_factor, compute_masker_loss)
        outputs: Any = self.pretrain(step, interpolate_pos_encoding, **kwargs)
        rows = ("logits", "mask", "ids_restore", "ids_predicted", "keep_probabilities", "predicted_errors")
        for name in rows if several else ():
            if name in outputs:
                outputs[name] = outputs[name].unflatten(0, (shape[0], -1))
        return outputs

    def _check_tasks(self, contrast: bool, withhold: bool, views: int, grid_size: tuple[int, int]) -> None:
        if contrast and views != 2:
            raise InputError(
                f"`pixel_values` has {views} view(s) of each image, but two are contrasted; give (batch_size, 2, "
                "num_channels, height, width), or set `contrastive_loss_weight` to 0."
            )
        if withhold and grid_size != self.config.grid_size:
            raise InputError(
                f"`position_loss_weight` is {self.config.position_loss_weight}, which needs images of "
                f"{self.config.image_size} pixels: the position head has one output for each of "
                f"{self.config.num_patches} positions. Resize the images, or set it to 0."
            )

    def decoded_rows(self, step: CMAEStep) -> slice:
        """With `config.decoded_views` 1, the first of an image's two views."""
        return slice(None, None, 2) if step.contrast and self.config.decoded_views == 1 else slice(None)

    def withheld_tokens(self, noise: Tensor, masking: Masking) -> Tensor:
        """Which of the K visible tokens are without their position: `(B, int(K * position_mask_ratio))`.

        The finer digits of the noise `(B, N)` draw them, so that one noise fixes everything.
        """
        digits = finer_digits(noise).gather(1, masking.ids_keep)  # the visible tokens' noise itself is small
        return digits.argsort(dim=1)[:, : int(digits.shape[1] * self.config.position_mask_ratio)]

    def visible_tokens(self, step: CMAEStep) -> Tensor:
        """Class token and visible tokens `(B, 1 + K, D)`, the position of some replaced by one learned vector."""
        visible = super().visible_tokens(step)
        if not step.withhold:
            return visible
        assert step.noise is not None  # `forward` has drawn it
        step.withheld = self.withheld_tokens(step.noise, step.masking)
        # The patches anew: to subtract positions from the tokens would leave traces of them in half precision.
        patches = self.vit.embeddings.patch_embeddings(step.pixel_values)
        ids = step.masking.ids_keep.gather(1, step.withheld)
        bare = self.position_head(gather_tokens(patches, ids), withhold=True)
        return visible.scatter(1, (1 + step.withheld).unsqueeze(-1).expand_as(bare), bare)

    def task_terms(self, step: CMAEStep) -> dict[str, Any]:
        """CL-MAE's, L_pos and its accuracy, L_con and its projections."""
        terms, tokens = super().task_terms(step), step.hidden_states[:, 1:]
        if step.withheld is not None:
            terms |= self.predict_positions(tokens, step.masking, step.withheld)
        if step.contrast:
            terms |= self.contrast_views(tokens)
        return terms

    def term_weights(self, step: CMAEStep) -> dict[str, Tensor | float]:
        """CL-MAE's, λ_pos and λ_con."""
        config = self.config
        tasks = {"position_loss": config.position_loss_weight, "contrastive_loss": config.contrastive_loss_weight}
        return super().term_weights(step) | tasks

    def predict_positions(self, tokens: Tensor, chosen: Masking, withheld: Tensor) -> dict[str, Tensor]:
        """L_pos and accuracy from the encoder's output `(B, K, D)` for the `withheld` `(B, n)` of its tokens."""
        scores = self.position_head(gather_tokens(tokens, withheld)).flatten(0, 1)
        places = chosen.ids_keep.gather(1, withheld).flatten()
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return {
            "position_loss": nn.functional.cross_entropy(scores, places),
            "position_accuracy": (scores.detach().argmax(1) == places).float().mean(),
        }

    def contrast_views(self, tokens: Tensor) -> dict[str, Tensor]:
        """L_con between the views' mean tokens, from the encoder's output `(2 * B, K, D)`, views side by side."""
        projections = self.projector(tokens.mean(1)).unflatten(0, (-1, 2))
        first, second = projections.unbind(1)
        if self.training:
            first, second = gather_across_processes(first), gather_across_processes(second)
        return {
            "contrastive_loss": contrastive_loss(first, second, self.config.contrastive_temperature),
            "projections": projections,
        }


class CMAEForImageClassification(CMAEPreTrainedModel, MAEForImageClassification):
    """The encoder of a CMAE and a linear classifier, as [`MAEForImageClassification`]."""


class CMAEBackbone(CMAEPreTrainedModel, MAEBackbone):
    """The encoder of a CMAE as a backbone, as [`MAEBackbone`]."""


__all__ = [
    "CMAEBackbone",
    "CMAEForImageClassification",
    "CMAEForPreTraining",
    "CMAEForPreTrainingOutput",
    "CMAEModel",
    "CMAEPreTrainedModel",
]
