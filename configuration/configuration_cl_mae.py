# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the curriculum-learned masked autoencoder (CL-MAE)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from clmae.configuration.configuration_mae import MAX_LAYERS, MAEConfig, Rule, choice, integer, number
from clmae.configuration.errors import InputError

CURRICULUM_SHAPES = ("linear", "cosine", "constant")
MASKER_OBJECTIVES = ("soft", "error")
KL_REDUCTIONS = ("mean", "sum")
SOFT_MASKINGS = ("attention", "tokens")


class CLMAEConfig(MAEConfig):
    r"""Configuration of [`CLMAEModel`], [`CLMAEForPreTraining`] and their siblings (Madan et al., arXiv 2308.16572).

    Everything of [`MAEConfig`], and the masking module, its losses and its curriculum.

    Args:
        masker_objective (`str`, *optional*, defaults to `"error"`): How the masking module learns. `"soft"`, the
            paper's: by the reconstruction loss under soft masks, in a pass of its own. `"error"`, this project's: it
            predicts each patch's error, which costs no further pass, and the visible patches are drawn with weights
            `exp(λ_CL * masker_error_scale * predicted error)`.
        masker_error_scale (`float`, *optional*, defaults to 1.0): With `"error"`, how far masks follow the predicted
            errors, which have mean 0 and deviation 1, instead of chance.
        masker_hidden_size (`int`, *optional*): With `"error"`, the masking module's width; about half of the encoder's
            if not given. (With `"soft"` it is the encoder's.)
        masker_num_hidden_layers (`int`, *optional*): Blocks of the masking module; 1, or 5 with `"soft"`, if not
            given.
        masker_num_attention_heads (`int`, *optional*, defaults to 4): Its attention heads; must divide its width.
        masker_intermediate_size (`int`, *optional*): Width of its MLP; four times its own width, or twice
            with `"error"`, if not given.
        masker_layer_norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of its LayerNorms.
        soft_masking (`str`, *optional*, defaults to `"attention"`): How pass B hides a patch with keep probability m:
            `"attention"`: the other patches attend to it m times as much, and the decoder gets m parts of its token and
            1 − m of the mask token, which at m = 0 and 1 is pass A's task; `"tokens"` (the authors'): its token is
            multiplied by m, and the decoder gets no mask tokens.
        gauss_loss_weight (`float`, *optional*, defaults to 0.1): Weight of the term that pushes the keep
            probabilities away from 1/2; the authors' is 1.
        gauss_sigma (`float`, *optional*, defaults to 0.12): Width of that term's Gaussian.
        kl_loss_weight (`float`, *optional*): Weight of the term that holds the mask ratio; 25.6 for the reduction
            `"mean"`, 0.1 for `"sum"` (equal at the authors' 256 images per device) if not given.
        kl_reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` over the batch, or the authors' `"sum"`.
        diversity_loss_weight (`float`, *optional*, defaults to 0.5): Weight of the term that keeps the masks of
            different images apart; the authors' is 2.
        diversity_scale (`float`, *optional*, defaults to 0.1): Factor of the distance in that term's exponent.
        curriculum_shape (`str`, *optional*, defaults to `"linear"`): How the factor λ_CL goes from start to end over
            the run: `"linear"`, `"cosine"`, or `"constant"` (stays at `curriculum_start`).
        curriculum_start (`float`, *optional*): λ_CL at the first step; positive is a partner. With `"soft"` the
            paper's 1 if not given; with `"error"` 0, random masks (docs/transfer.md).
        curriculum_end (`float`, *optional*, defaults to -1.0): λ_CL at the last step; negative is an adversary.

    Raises:
        InputError: A field has the wrong type or value; the message names field, value and remedy.
    """

    model_type = "cl_mae"

    masker_objective: str = "error"
    masker_error_scale: float = 1.0
    masker_hidden_size: int = None  # type: ignore[assignment]
    masker_num_hidden_layers: int = None  # type: ignore[assignment]
    masker_num_attention_heads: int = 4
    masker_intermediate_size: int = None  # type: ignore[assignment]  # filled in when it is made
    masker_layer_norm_eps: float = 1e-5
    soft_masking: str = "attention"
    gauss_loss_weight: float = 0.1
    gauss_sigma: float = 0.12
    kl_loss_weight: float = None  # type: ignore[assignment]  # filled in when it is made
    kl_reduction: str = "mean"
    diversity_loss_weight: float = 0.5
    diversity_scale: float = 0.1
    curriculum_shape: str = "linear"
    curriculum_start: float = None  # type: ignore[assignment]
    curriculum_end: float = -1.0

    _rules: ClassVar[tuple[tuple[Rule, str], ...]] = (
        *MAEConfig._rules,
        (integer(MAX_LAYERS), "masker_num_hidden_layers"),
        (integer(), "masker_hidden_size masker_num_attention_heads masker_intermediate_size"),
        (number("(0, 1]"), "masker_layer_norm_eps"),
        (number("(0, inf)"), "gauss_sigma"),
        (number("[0, inf)"), "gauss_loss_weight kl_loss_weight diversity_loss_weight diversity_scale"),
        (number("(-inf, inf)"), "curriculum_start curriculum_end"),
        (number("(0, inf)"), "masker_error_scale"),
        (choice(*MASKER_OBJECTIVES), "masker_objective"),
        (choice(*SOFT_MASKINGS), "soft_masking"),
        (choice(*KL_REDUCTIONS), "kl_reduction"),
        (choice(*CURRICULUM_SHAPES), "curriculum_shape"),
    )

    _earlier: ClassVar[dict[str, Any]] = {"masker_objective": "soft"}

    @property
    def learns_masks(self) -> bool:
        """True: this is what the family is for."""
        return True

    def _stacks(self) -> tuple[tuple[str, str], ...]:
        width = "hidden_size" if self.masker_hidden_size is None else "masker_hidden_size"
        by_errors = self.masker_objective == "error" and self.masker_hidden_size is None  # chosen to suit the heads
        return super()._stacks() if by_errors else (*super()._stacks(), (width, "masker_num_attention_heads"))

    def check(self) -> None:
        super().check()
        if self.masker_objective == "soft" and self.masker_hidden_size not in (None, self.hidden_size):
            raise InputError(
                f"`masker_hidden_size` is {self.masker_hidden_size}, but with `masker_objective` 'soft' the masking "
                f"module is as wide as the encoder, {self.hidden_size}: leave it out."
            )

    def _fill_defaults(self) -> None:
        super()._fill_defaults()
        by_errors = self.masker_objective == "error"
        if self.masker_num_hidden_layers is None:
            self.masker_num_hidden_layers = 1 if by_errors else 5
        if self.masker_hidden_size is None:
            step = math.lcm(4, self.masker_num_attention_heads)
            self.masker_hidden_size = -(-self.hidden_size // (2 * step)) * step if by_errors else self.hidden_size
        if self.masker_intermediate_size is None:
            self.masker_intermediate_size = (2 if by_errors else 4) * self.masker_hidden_size
        if self.curriculum_start is None:
            self.curriculum_start = 0.0 if by_errors else 1.0
        if self.kl_loss_weight is None:
            self.kl_loss_weight = 25.6 if self.kl_reduction == "mean" else 0.1


__all__ = ["CURRICULUM_SHAPES", "KL_REDUCTIONS", "MASKER_OBJECTIVES", "SOFT_MASKINGS", "CLMAEConfig"]
