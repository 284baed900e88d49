# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Configuration of CMAE: a small decoder, and tasks for the encoder itself."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from clmae.configuration.configuration_cl_mae import CLMAEConfig
from clmae.configuration.configuration_mae import Rule, boolean, integer, number
from clmae.configuration.errors import InputError


class CMAEConfig(CLMAEConfig):
    r"""Configuration of [`CMAEModel`], [`CMAEForPreTraining`] and their siblings (Mao et al., arXiv 2205.10546).

    The abstract of the paper fixes the three ideas (smaller decoder, contrast and token positions as tasks for the
    encoder, ContrastiveCrop); all sizes and weights below are this project's reading of it.

    Everything of [`MAEConfig`], with a decoder of 1 block and width 128 whatever the size of the encoder, and of
    [`CLMAEConfig`], which takes effect with `learned_masks`.

    Args:
        decoder_hidden_size (`int`, *optional*, defaults to 128): Decoder width.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 1): Decoder blocks.
        decoder_num_attention_heads (`int`, *optional*, defaults to 4): Attention heads in each decoder block.
        contrastive_loss_weight (`float`, *optional*, defaults to 1.0): Weight of the contrast between two views of an
            image; 0: not computed, and one view is enough.
        contrastive_temperature (`float`, *optional*, defaults to 0.1): What similarities are divided by.
        projection_size (`int`, *optional*, defaults to 128): Width of the vectors that are compared.
        projection_hidden_size (`int`, *optional*): Width of the projector's hidden layer; four times the encoder's, at
            least 512, if not given.
        projection_batch_norm (`bool`, *optional*, defaults to `True`): BatchNorm in the projector's hidden layer.
        decoded_views (`int`, *optional*, defaults to 1): Views of an image that are decoded while two are contrasted, 1
            or 2; with 1 the second view trains the encoder by contrast alone.
        position_loss_weight (`float`, *optional*, defaults to 0.0): Weight of predicting where a token came from; 0:
            not computed.
        position_mask_ratio (`float`, *optional*, defaults to 0.75): Share of the visible tokens whose position is
            withheld, in (0, 1].
        learned_masks (`bool`, *optional*, defaults to `False`): Mask by a masking module under the curriculum of
            CL-MAE, instead of at random.

    Raises:
        InputError: A field has the wrong type or value; the message names field, value and remedy.
    """

    model_type = "cmae"

    decoder_hidden_size: int = 128
    decoder_num_hidden_layers: int = 1
    decoder_num_attention_heads: int = 4
    contrastive_loss_weight: float = 1.0
    contrastive_temperature: float = 0.1
    projection_size: int = 128
    projection_batch_norm: bool = True
    decoded_views: int = 1
    projection_hidden_size: int = None  # type: ignore[assignment]  # filled in when it is made
    position_loss_weight: float = 0.0
    position_mask_ratio: float = 0.75
    learned_masks: bool = False

    _rules: ClassVar[tuple[tuple[Rule, str], ...]] = (
        *CLMAEConfig._rules,
        (number("[0, inf)"), "contrastive_loss_weight position_loss_weight"),
        (number("(0, inf)"), "contrastive_temperature"),
        (number("(0, 1]"), "position_mask_ratio"),
        (integer(), "projection_size projection_hidden_size"),
        (integer(2), "decoded_views"),
        (boolean, "learned_masks projection_batch_norm"),
    )
    _earlier: ClassVar[dict[str, Any]] = CLMAEConfig._earlier | {"projection_batch_norm": False, "decoded_views": 2}
    _decoder_follows_size: ClassVar[bool] = False

    @property
    def learns_masks(self) -> bool:
        """As `learned_masks` says."""
        return self.learned_masks

    @property
    def num_views(self) -> int:
        """Views of an image that a training sample holds: two where they are contrasted."""
        return 2 if self.contrastive_loss_weight else 1

    def _fill_defaults(self) -> None:
        super()._fill_defaults()
        if self.projection_hidden_size is None:
            self.projection_hidden_size = max(512, 4 * self.hidden_size)

    def check(self) -> None:
        super().check()
        visible = self.num_visible(self.num_patches)
        if self.position_loss_weight and not int(visible * self.position_mask_ratio):
            raise InputError(
                f"`position_mask_ratio` is {self.position_mask_ratio}, which withholds the position of none of the "
                f"{visible} visible patches; take at least {math.ceil(1e4 / visible) / 1e4:g}, or set "
                "`position_loss_weight` to 0."
            )
        if self.position_loss_weight and self.mask_sampler == "grid" and self.position_mask_ratio < 1:
            raise InputError(
                f"`position_mask_ratio` is {self.position_mask_ratio} with `mask_sampler` 'grid', where one given "
                "position tells those of all visible patches; set `position_mask_ratio` to 1, or take another sampler."
            )


__all__ = ["CMAEConfig"]
