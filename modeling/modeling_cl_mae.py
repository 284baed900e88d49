# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The curriculum-learned masked autoencoder (Madan et al., arXiv 2308.16572): MAE that learns its masks."""

# mypy: disable-error-code="override"
# (A family's methods take the family's own step.)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from clmae.configuration.configuration_cl_mae import CLMAEConfig
from clmae.configuration.errors import InputError
from clmae.modeling.losses import (
    diversity_loss,
    error_prediction_loss,
    gather_across_processes,
    gauss_loss,
    kl_loss,
    patch_errors,
    scale_gradient,
    sum_across_processes,
    world_size,
)
from clmae.modeling.masking import Masking, gumbel_scores, keep_lowest, select_patches
from clmae.modeling.modeling_mae import (
    MAEBackbone,
    MAEForImageClassification,
    MAEForPreTraining,
    MAEForPreTrainingOutput,
    MAELayer,
    MAEModel,
    MAEPreTrainedModel,
    PretrainingStep,
)

MASKINGS = ("learned", "random")
_MIN_TOKENS = 8192  # of a part of pass B: enough to keep a GPU busy


@dataclass
class CLMAEForPreTrainingOutput(MAEForPreTrainingOutput):
    """What [`CLMAEForPreTraining`] returns: [`MAEForPreTrainingOutput`] and the masking module's side.

    The loss terms stand before their weights, and are `None` where they were not computed.

    Args:
        loss (`torch.FloatTensor`, a scalar): L_rec, and the weighted terms below that were computed.
        soft_reconstruction_loss (`torch.FloatTensor`, a scalar): L_soft, reconstruction under the soft mask.
        gauss_loss (`torch.FloatTensor`, a scalar): L_gauss, distance of the keep probabilities from 0 and 1.
        kl_loss (`torch.FloatTensor`, a scalar): L_kl, departure from the mask ratio.
        diversity_loss (`torch.FloatTensor`, a scalar): L_div, likeness of the masks of different images.
        prediction_loss (`torch.FloatTensor`, a scalar): L_err of the predicted errors.
        keep_probabilities (`torch.FloatTensor` of shape `(batch_size, num_patches)`): m in (0, 1), float32 or wider;
            `None` with `masking="random"` unless pass B was computed, and with `masker_objective="error"`.
        predicted_errors (`torch.FloatTensor` of shape `(batch_size, num_patches)`): ê, float32 or wider, with
            `masker_objective="error"` where it was computed.
    """

    soft_reconstruction_loss: Tensor | None = None
    gauss_loss: Tensor | None = None
    kl_loss: Tensor | None = None
    diversity_loss: Tensor | None = None
    prediction_loss: Tensor | None = None
    keep_probabilities: Tensor | None = None
    predicted_errors: Tensor | None = None


class MaskingHead(nn.Linear):
    """A linear layer computed in float32 or wider, even under autocast.

    Rounded logits tie, and a tie would be decided by the patch's place.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            return nn.functional.linear(hidden_states.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class MaskingModule(nn.Module):
    """From patch tokens to the probability that each patch stays visible (CL-MAE, section 3)."""

    def __init__(self, config: CLMAEConfig):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        sizes = config.masker_num_attention_heads, config.masker_intermediate_size, config.masker_layer_norm_eps
        self.layers = nn.ModuleList(
            MAELayer(config, config.hidden_size, *sizes) for _ in range(config.masker_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.masker_layer_norm_eps)
        self.head = MaskingHead(config.hidden_size, config.num_patches)

    def forward(self, tokens: Tensor) -> Tensor:
        """Keep probabilities m `(B, N)` in (0, 1) of patch tokens `(B, N, D)`, in float32 or wider."""
        hidden_states = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        *layers, last = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states)
        # The last block computes the class token alone: 5 % of a step (width 192, 6 blocks, on a CPU).
        logits = self.head(self.layernorm(last(hidden_states, num_queries=1)[:, 0]))
        # A replacement of the head (quantised, say) may compute in lower precision.
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


class ErrorPredictor(nn.Module):
    """From patch tokens to the error that each patch would have if it were masked (this project's masking module)."""

    def __init__(self, config: CLMAEConfig):
        super().__init__()
        width = config.masker_hidden_size
        self.reduction = nn.Linear(config.hidden_size, width)
        self.layers = nn.ModuleList(
            MAELayer(
                *(config, width, config.masker_num_attention_heads, config.masker_intermediate_size),
                layer_norm_eps=config.masker_layer_norm_eps,
            )
            for _ in range(config.masker_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.masker_layer_norm_eps)
        self.head = MaskingHead(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Standardised log errors ê `(B, N)` of patch tokens `(B, N, D)`, in float32 or wider."""
        hidden_states = self.reduction(tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        predictions = self.head(self.layernorm(hidden_states)).squeeze(-1)
        return predictions.to(torch.promote_types(predictions.dtype, torch.float32))


class CLMAEPreTrainedModel(MAEPreTrainedModel):
    """What transformers needs to know about every CL-MAE model."""

    config_class = CLMAEConfig
    _keys_to_ignore_on_load_unexpected = [*MAEPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^masking_module\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskingModule):
            init.normal_(module.cls_token, std=self.config.initializer_range)


class CLMAEModel(CLMAEPreTrainedModel, MAEModel):
    """The ViT encoder of a CL-MAE: the same as [`MAEModel`]. The masking module serves pretraining only."""


@dataclass
class CurriculumStep(PretrainingStep):
    """A [`PretrainingStep`] of a model that may learn its masks.

    Args:
        learned_masks (`bool`): Whether the masking module chooses the masks.
        compute_masker_loss (`bool`): Whether the masking module is trained.
        curriculum_factor (`float` or 0-d `torch.Tensor`): λ_CL.
        keep_probabilities (`torch.FloatTensor` of shape `(B, num_patches)`, *optional*): m, by the masking module.
        predicted_errors (`torch.FloatTensor` of shape `(B, num_patches)`, *optional*): ê, by the masking module.
    """

    learned_masks: bool = False
    compute_masker_loss: bool = False
    curriculum_factor: Tensor | float = 0.0
    keep_probabilities: Tensor | None = None
    predicted_errors: Tensor | None = None


class LearnedMasks(MAEForPreTraining):
    """Autoencoder and masking module, trained together; where `config.learns_masks` is false, the autoencoder alone.

    Pass A trains encoder and decoder under the mask that the module chooses. The module learns by
    `config.masker_objective`: `"soft"` (the paper's), in pass B through the frozen autoencoder, towards masks that are
    easier (curriculum factor > 0) or harder (< 0) to reconstruct; `"error"` (this project's), by predicting the
    errors that pass A has, and patches are drawn by them. One `loss.backward()` does both: each gradient reaches its
    own half of the parameters alone.

    The curriculum factor is the caller's to move: `clmae.training.CurriculumTrainer` does it; in any other training
    loop it stays at `config.curriculum_start` unless it is passed.
    """

    output_class = CLMAEForPreTrainingOutput

    def __init__(self, config: CLMAEConfig):
        super().__init__(config)
        if config.learns_masks:
            # Initialised by `post_init` of the class that this is mixed in.
            self.masking_module = (ErrorPredictor if config.masker_objective == "error" else MaskingModule)(config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        masking: str | None = None,
        curriculum_factor: Tensor | float | None = None,
        compute_masker_loss: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLMAEForPreTrainingOutput:
        """Reconstructs masked patches and, in training, evaluates the masks.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalised images.
            noise (`torch.FloatTensor` of shape `(batch_size, num_patches)`, *optional*): Uniform in [0, 1); fixes the
                mask with `masking="random"` and, with `masker_objective="error"`, with `"learned"`.
            masking (`str`, *optional*): `"learned"`: the masking module's masks, the default where there is one; or
                `"random"` ones by `config.mask_sampler`.
            curriculum_factor (`float` or 0-d `torch.Tensor`, *optional*): λ_CL. A tensor does not make a compiled
                model recompile as it changes. `config.curriculum_start` if not given.
            compute_masker_loss (`bool`, *optional*): Whether to train the masking module; if not given: in training
                with learned masks.
            interpolate_pos_encoding (`bool`, *optional*): Accept images of another size than the configured one (with
                `masking="random"`: soft masks have one output per patch).
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            InputError: `masking` has no such value, or the images another shape than the configuration says.
        """
        step = CurriculumStep(pixel_values, noise)
        self.set_curriculum(step, masking, curriculum_factor, compute_masker_loss)
        return self.pretrain(step, interpolate_pos_encoding, **kwargs)

    def set_curriculum(
        self,
        step: CurriculumStep,
        masking: str | None,
        curriculum_factor: Tensor | float | None,
        compute_masker_loss: bool | None,
    ) -> None:
        """Sets what of a step [`forward`]'s arguments say, by the configuration where they are `None`."""
        config = self.config
        if masking is None:
            masking = "learned" if config.learns_masks else "random"
        if masking not in MASKINGS:
            raise InputError(f"`masking` is {masking!r}; choose one of {', '.join(MASKINGS)}.")
        if compute_masker_loss is None:
            compute_masker_loss = self.training and masking == "learned"
        if (masking == "learned" or compute_masker_loss) and not config.learns_masks:
            cause = "`masking` is 'learned'" if masking == "learned" else "`compute_masker_loss` is true"
            raise InputError(f"{cause}, but `learned_masks` is false: this model has no masking module.")
        step.learned_masks, step.compute_masker_loss = masking == "learned", compute_masker_loss
        step.curriculum_factor = config.curriculum_start if curriculum_factor is None else curriculum_factor

    def choose_mask(self, step: CurriculumStep) -> Masking:
        """By the masking module; with `masking="random"`, by the noise alone.

        The patches with the largest keep probabilities m stay visible. With predicted errors ê, they are drawn with
        weights `exp(λ_CL·β·ê)`: what is hard to reconstruct stays visible for a partner, is masked for an adversary.
        """
        if not step.learned_masks and not step.compute_masker_loss:
            return super().choose_mask(step)
        config = self.config
        by_errors = config.masker_objective == "error"
        if step.grid_size != config.grid_size and not by_errors:
            raise InputError(
                f"The masking module needs images of {config.image_size} pixels: it has one output for each of "
                f"{config.num_patches} patches. Resize the images, or pass `masking='random'` and no "
                "`compute_masker_loss`."
            )
        with torch.set_grad_enabled(step.compute_masker_loss and torch.is_grad_enabled()):
            outputs = self.masking_module(step.tokens[:, 1:].detach())
        setattr(step, "predicted_errors" if by_errors else "keep_probabilities", outputs)
        if not step.learned_masks:
            return super().choose_mask(step)
        outputs = outputs.detach()  # choosing has no gradient
        scores = -outputs
        if by_errors:
            noise = torch.rand_like(outputs) if step.noise is None else step.noise
            scores = gumbel_scores(noise, step.curriculum_factor * config.masker_error_scale * outputs)
        return keep_lowest(scores, config.num_visible(outputs.shape[1]))

    def train_masker(self, step: CurriculumStep) -> dict[str, Any]:
        """m, and with `compute_masker_loss` pass B's terms; or ê, which pass A trains."""
        terms: dict[str, Any] = {}
        if step.keep_probabilities is not None and step.compute_masker_loss:
            terms = self.masker_terms(step.tokens, step.keep_probabilities, step.targets, step.grid_size)
        return {"keep_probabilities": step.keep_probabilities, "predicted_errors": step.predicted_errors, **terms}

    def task_terms(self, step: CurriculumStep) -> dict[str, Any]:
        """L_err, where errors are predicted."""
        terms = super().task_terms(step)
        if step.compute_masker_loss and step.predicted_errors is not None:
            rows, ids = self.decoded_rows(step), step.ids_predicted
            predictions, mask = (
                select_patches(step.predicted_errors[rows], ids),
                select_patches(step.masking.mask[rows], ids),
            )
            terms |= {"prediction_loss": error_prediction_loss(predictions, step.errors, mask, self.training)}
        return terms

    def masker_terms(
        self, tokens: Tensor, keep: Tensor, targets: Tensor, grid_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The four terms of L_mask, before their weights."""
        config = self.config
        # Evaluation may happen in one process alone, and then must not wait for the others.
        everyone = gather_across_processes(keep) if self.training else keep
        return {
            "soft_reconstruction_loss": self.soft_reconstruction_loss(tokens, keep, targets, grid_size),
            "gauss_loss": gauss_loss(keep, config.gauss_sigma),
            "kl_loss": kl_loss(keep, config.mask_ratio, config.kl_reduction),
            "diversity_loss": diversity_loss(everyone, config.diversity_scale),
        }

    def term_weights(self, step: CurriculumStep) -> dict[str, Tensor | float]:
        """Those of `L_mask = λ_CL·L_soft + λ_g·L_gauss + λ_kl·L_kl + λ_d·L_div`, and of L_err, which stands alone."""
        config = self.config
        return {
            "soft_reconstruction_loss": step.curriculum_factor,
            "gauss_loss": config.gauss_loss_weight,
            "kl_loss": config.kl_loss_weight,
            "diversity_loss": config.diversity_loss_weight,
            "prediction_loss": 1.0,
        }

    def soft_reconstruction_loss(
        self, embeddings: Tensor, keep: Tensor, targets: Tensor, grid_size: tuple[int, int]
    ) -> Tensor:
        """`L_soft = Σ (1 − m_i)·e_i / Σ (1 − m_i)` over the global batch, with a gradient for m alone.

        `e_i` is a patch's error where each patch is hidden to the degree of its m (see [`soft_logits`]).

        The gradient is taken here, with respect to m only, and handed on by a term of value 0. So autograd computes
        no weight gradients in this pass, frees its graph at once, and touches no gradient hook of the backbone: the
        separation holds under gradient checkpointing, DDP and accumulation by construction. (Detached weights through
        `torch.func.functional_call`, or `requires_grad` switched off within `forward`, break under checkpointing.)

        Images do not interact here, so a large batch goes through in parts, each freed before the next: as many as
        make this pass's memory no more than pass A's, which encodes visible patches alone.
        """
        differentiate = torch.is_grad_enabled() and keep.requires_grad
        keep_values, numerators, gradients = keep.detach(), [], []
        count = self.soft_parts(*embeddings.shape[:2])
        # No loss scaling reaches this pass: in float16 small gradients would be lost. A power of two alters no other.
        scale = 2.0 ** math.floor(math.log2(self.config.patch_dim))
        for part, leaf, part_targets in zip(
            *(tensor.tensor_split(count) for tensor in (embeddings.detach(), keep_values, targets)), strict=True
        ):
            leaf = leaf.detach().requires_grad_(differentiate)
            # A view, because hooks that follow gradients (of `FlopCounterMode`, say) fail at a leaf in `autograd.grad`.
            part_keep = leaf.view_as(leaf)
            errors = patch_errors(self.soft_logits(part, part_keep, grid_size), part_targets)
            numerator = ((1 - part_keep) * errors).sum()
            numerators.append(numerator.detach())
            if differentiate:
                gradients += torch.autograd.grad(numerator, leaf, torch.full_like(numerator, scale))
        totals = torch.stack([torch.stack(numerators).sum(), (1 - keep_values).sum()])
        total, weight = sum_across_processes(totals) if self.training else totals
        weight = weight.clamp_min(torch.finfo(weight.dtype).eps)  # nothing masked at all
        value = total / weight
        if not differentiate:
            return value
        gradient = torch.cat(gradients)
        # d(A / S) = dA / S + A / S² · dm, since S = Σ (1 − m).
        gradient = gradient / (scale * weight) + total / weight**2
        return value + scale_gradient(((keep - keep.detach()) * gradient).sum(), world_size() if self.training else 1)

    def soft_parts(self, batch_size: int, num_tokens: int) -> int:
        """In how many parts pass B takes a batch: up to `1 / (1 − mask_ratio)`, with enough tokens in each."""
        by_size, by_memory = batch_size * num_tokens // _MIN_TOKENS, round(1 / (1 - self.config.mask_ratio))
        return max(1, min(batch_size, by_size, by_memory))

    def soft_logits(self, embeddings: Tensor, keep: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Predicted patches `(B, N, p_h * p_w * C)` from all tokens `(B, 1 + N, D)`, patch i visible to the degree m_i.

        `config.soft_masking` `"attention"`: the attention weights on patch i are multiplied by m_i and made to sum to
        1 again, and the decoder gets `m_i · token + (1 − m_i) · mask token`. Where m is 0 or 1 that is pass A's task.
        `"tokens"` (CL-MAE, section 3): the tokens are multiplied by m_i, and the decoder gets no mask tokens. Then a
        pre-norm block's LayerNorm undoes the factor, and hardly anything is hidden before m_i is as small as ε.
        """
        if self.config.soft_masking == "tokens":
            scaled = embeddings[:, 1:] * keep.unsqueeze(-1).to(embeddings.dtype)
            encoded = self.vit(inputs_embeds=torch.cat([embeddings[:, :1], scaled], dim=1))
            return self.decoder(encoded.last_hidden_state, None, grid_size)
        # To multiply a weight is to add to its score. 1e-8 bounds the logarithm; the class token is always visible.
        scores = nn.functional.pad((keep + 1e-8).log(), (1, 0))[:, None, None, :].to(embeddings.dtype)
        encoded = self.vit(inputs_embeds=embeddings, attention_bias=scores)
        return self.decoder(encoded.last_hidden_state, None, grid_size, keep)


class CLMAEForPreTraining(CLMAEPreTrainedModel, LearnedMasks):
    """The curriculum-learned masked autoencoder: [`LearnedMasks`] and nothing else."""

    def __init__(self, config: CLMAEConfig):
        super().__init__(config)
        self.post_init()


class CLMAEForImageClassification(CLMAEPreTrainedModel, MAEForImageClassification):
    """The encoder of a CL-MAE and a linear classifier, as [`MAEForImageClassification`]."""


class CLMAEBackbone(CLMAEPreTrainedModel, MAEBackbone):
    """The encoder of a CL-MAE as a backbone, as [`MAEBackbone`]."""


__all__ = [
    "CLMAEBackbone",
    "CLMAEForImageClassification",
    "CLMAEForPreTraining",
    "CLMAEForPreTrainingOutput",
    "CLMAEModel",
    "CLMAEPreTrainedModel",
]
