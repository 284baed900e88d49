# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The masked autoencoder (He et al., arXiv 2111.06377): the ViT encoder and the decoder that every family shares."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from clmae.configuration.configuration_mae import MAEConfig, pair
from clmae.configuration.errors import InputError
from clmae.modeling.losses import masked_mean, patch_errors, patch_targets
from clmae.modeling.masking import (
    SAMPLERS,
    Masking,
    finer_digits,
    full_precision,
    gather_tokens,
    keep_lowest,
    select_patches,
)

# -- outputs ----------------------------------------------------------------------------------------------------------


@dataclass
class MAEModelOutput(ModelOutput):
    """What the encoder returns.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, 1 + n, hidden_size)`): Class token and the n
            patch tokens that were seen, after the final LayerNorm.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`): Mean of the patch tokens, or the
            class token, as `config.pooling` says.
        mask (`torch.FloatTensor` of shape `(batch_size, num_patches)`): 1 = masked, 0 = visible; where `noise` asked
            for masking.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`): Rank of each patch by its score.
        hidden_states (`tuple` of `(batch_size, 1 + n, hidden_size)`): Embeddings and each block's output, before the
            final LayerNorm; with `output_hidden_states=True`.
        attentions (`tuple` of `(batch_size, num_heads, 1 + n, 1 + n)`): With `output_attentions=True`.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    mask: Tensor | None = None
    ids_restore: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MAEForPreTrainingOutput(ModelOutput):
    """What the autoencoder returns.

    Args:
        loss (`torch.FloatTensor`, a scalar): What is minimised.
        reconstruction_loss (`torch.FloatTensor`, a scalar): L_rec, mean squared error over the masked patches.
        logits (`torch.FloatTensor` of shape `(batch_size, num_patches, p_h * p_w * num_channels)`): Predicted
            patches, visible ones too; normalised per patch where `config.norm_pix_loss`. `(batch_size, P, …)` where a
            part is predicted.
        mask (`torch.FloatTensor` of shape `(batch_size, num_patches)`): 1 = masked, 0 = visible.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`): Rank of each patch by its score.
        ids_predicted (`torch.LongTensor` of shape `(batch_size, P)`): The masked patches that were predicted; `None`:
            all (see `config.prediction_ratio`).
        hidden_states, attentions (`tuple`): The encoder's, as in [`MAEModelOutput`].
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None
    ids_restore: Tensor | None = None
    ids_predicted: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# -- positions --------------------------------------------------------------------------------------------------------


def sincos_positions(width: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos positions `(1, 1 + h * w, width)`, float32, the class token's zero (MAE, appendix A.1).

    A patch's vector is `[sin(x) | cos(x) | sin(y) | cos(y)]`, each `width / 4` wide, frequencies
    `10000^(−i / (width / 4))`, x the column and y the row. Column first is the layout of all released MAE weights.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid_size)
    y, x = (axis.reshape(-1, 1) * frequencies for axis in torch.meshgrid(rows, columns, indexing="ij"))
    positions = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    return torch.cat([positions.new_zeros(1, width), positions]).float().unsqueeze(0)


def resize_positions(positions: Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int]) -> Tensor:
    """Positions `(1, 1 + h * w, width)` for another patch grid, bicubic in two dimensions; the class token's stays."""
    if new_grid_size == grid_size:
        return positions
    class_position, patches = positions[:, :1], positions[:, 1:]
    patches = patches.reshape(1, *grid_size, -1).permute(0, 3, 1, 2).float()
    patches = nn.functional.interpolate(patches, size=new_grid_size, mode="bicubic", align_corners=False)
    patches = patches.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat([class_position, patches], dim=1)


# -- blocks -----------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention on `(batch_size, num_heads, length, head_dim)` tensors; gives the weights too.

    `attention_mask`, broadcastable to the scores, is added to them.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    # In half precision the kernel itself computes in float32; a copy in float32 took 7 % of a small model's step.
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MAEAttention(nn.Module):
    """Multi-head self-attention through transformers' attention interface (eager, sdpa, flash, flex)."""

    def __init__(self, config: MAEConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_bias: Tensor | None = None, num_queries: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """With `num_queries` only the first so many tokens attend, to all."""
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, tokens in (
                (self.q_proj, hidden_states[:, :num_queries]),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )
        implementation = self.config._attn_implementation
        if attention_bias is not None and implementation != "eager":
            implementation = "sdpa"  # the one fused kernel that adds to the scores, and differentiates what it adds
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self, query, key, value, attention_bias, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class MAEMLP(nn.Module):
    """The block's two-layer perceptron."""

    def __init__(self, config: MAEConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class MAELayer(GradientCheckpointingLayer):
    """A pre-norm transformer block, used by encoder, decoder and masking module alike."""

    def __init__(
        self,
        config: MAEConfig,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        layer_norm_eps: float,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = MAEAttention(config, hidden_size, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = MAEMLP(config, hidden_size, intermediate_size)
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: Tensor, num_queries: int | None = None, **kwargs: Any) -> Tensor:
        """Tokens `(B, L, D)` to `(B, L, D)`; with `num_queries` only the first so many, which attend to all."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), num_queries=num_queries, **kwargs)
        hidden_states = hidden_states[:, :num_queries] + self._drop_path(attended)
        return hidden_states + self._drop_path(self.mlp(self.layernorm_after(hidden_states)))

    def _drop_path(self, branch: Tensor) -> Tensor:
        # Stochastic depth (arXiv 1603.09382): the branch is dropped per sample, the kept ones scaled up.
        if self.drop_path_rate == 0.0 or not self.training:
            return branch
        keep = 1 - self.drop_path_rate
        return branch * (branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep) / keep)


class MAEPatchEmbeddings(nn.Module):
    """Pixels `(B, C, H, W)` to patch tokens `(B, N, hidden_size)` by a convolution with kernel = stride = patch."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        patch_size = pair(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class MAEEmbeddings(nn.Module):
    """Class token and patch tokens with their positions: `(B, 1 + N, hidden_size)`."""

    position_embeddings: Tensor

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = MAEPatchEmbeddings(config)
        # A buffer, because it is never trained: what `from_pretrained` loads into a parameter gets a gradient.
        # Set here too, not by `_init_weights` alone, which may be switched off.
        positions = sincos_positions(config.hidden_size, config.grid_size)
        self.register_buffer("position_embeddings", positions.to(torch.get_default_dtype()))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:
        grid_size = check_pixel_values(self.config, pixel_values, interpolate_pos_encoding)
        positions = resize_positions(self.position_embeddings, self.config.grid_size, grid_size)
        patches = self.patch_embeddings(pixel_values) + positions[:, 1:]
        class_token = (self.cls_token + positions[:, :1]).expand(patches.shape[0], -1, -1)
        return torch.cat([class_token, patches], dim=1)


def check_pixel_values(
    config: MAEConfig, pixel_values: Tensor, interpolate_pos_encoding: bool | None, views: bool = False
) -> tuple[int, int]:
    """The patch grid `(h, w)` of `pixel_values`; InputError where they are not what the configuration expects.

    With `views` every image has several: `(B, V, C, H, W)`.
    """
    if pixel_values.ndim != 4 + views or pixel_values.shape[-3] != config.num_channels:
        raise InputError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (batch_size, {'views, ' * views}"
            f"{config.num_channels}, height, width): the model was made with `num_channels` = {config.num_channels}."
        )
    if not pixel_values.is_floating_point():
        raise InputError(
            f"`pixel_values` has dtype {pixel_values.dtype}; give normalised images of a floating-point type, as the "
            "model's image processor makes them."
        )
    if pixel_values.shape[0] == 0:
        raise InputError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}, an empty batch; give at least one image."
        )
    size, patch_size = tuple(pixel_values.shape[-2:]), pair(config.patch_size)
    if size != pair(config.image_size) and not interpolate_pos_encoding:
        raise InputError(
            f"`pixel_values` are {size[0]}x{size[1]} pixels, the model was made for {pair(config.image_size)[0]}x"
            f"{pair(config.image_size)[1]}: resize the images, or pass `interpolate_pos_encoding=True`."
        )
    if not min(size) or size[0] % patch_size[0] or size[1] % patch_size[1]:
        raise InputError(
            f"`pixel_values` are {size[0]}x{size[1]} pixels, no multiple of the patch size {patch_size[0]}x"
            f"{patch_size[1]}: resize or crop the images."
        )
    return patch_grid(config, pixel_values)


def patch_grid(config: MAEConfig, pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of `pixel_values` `(…, H, W)`."""
    (height, width), (patch_height, patch_width) = pixel_values.shape[-2:], pair(config.patch_size)
    return height // patch_height, width // patch_width


class MAEDecoder(nn.Module):
    """Visible tokens to predicted patches `(B, N, p_h * p_w * C)`."""

    decoder_pos_embed: Tensor

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = sincos_positions(width, config.grid_size)
        self.register_buffer("decoder_pos_embed", positions.to(torch.get_default_dtype()))
        sizes = width, config.decoder_num_attention_heads, config.decoder_intermediate_size, config.layer_norm_eps
        self.decoder_layers = nn.ModuleList(MAELayer(config, *sizes) for _ in range(config.decoder_num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_dim)

    def forward(
        self,
        hidden_states: Tensor,
        ids_keep: Tensor | None,
        grid_size: tuple[int, int],
        keep: Tensor | None = None,
        ids_predicted: Tensor | None = None,
    ) -> Tensor:
        """Predicts every patch, or those in `ids_predicted`.

        Args:
            hidden_states (`(B, 1 + K, hidden_size)`): The encoder's output, class token first.
            ids_keep (`(B, K)` or `None`): Which patches those are; `None`: all of them, in order (no mask tokens).
            grid_size (`tuple[int, int]`): The patch grid.
            keep (`(B, N)`, *optional*): With all patches, how much of each token is visible, in [0, 1]; the mask token
                makes up the rest.
            ids_predicted (`(B, P)`, *optional*): The masked patches that are decoded beside the visible ones, and
                predicted: `(B, P, p_h * p_w * C)`.
        """
        hidden_states = self.decoder_embed(hidden_states)
        if ids_keep is not None:
            # The mask token everywhere, the visible tokens written over it: no unshuffling.
            batch_size, _, width = hidden_states.shape
            tokens = self.mask_token.to(hidden_states.dtype).expand(batch_size, math.prod(grid_size), width)
            tokens = tokens.scatter(1, ids_keep.unsqueeze(-1).expand(-1, -1, width), hidden_states[:, 1:])
            hidden_states = torch.cat([hidden_states[:, :1], tokens], dim=1)
        elif keep is not None:
            keep = keep.unsqueeze(-1).to(hidden_states.dtype)
            tokens = keep * hidden_states[:, 1:] + (1 - keep) * self.mask_token.to(hidden_states.dtype)
            hidden_states = torch.cat([hidden_states[:, :1], tokens], dim=1)
        hidden_states = hidden_states + resize_positions(self.decoder_pos_embed, self.config.grid_size, grid_size)
        first = 1
        if ids_keep is not None and ids_predicted is not None:
            patches = gather_tokens(hidden_states[:, 1:], torch.cat([ids_keep, ids_predicted], dim=1))
            hidden_states = torch.cat([hidden_states[:, :1], patches], dim=1)
            first += ids_keep.shape[1]
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        return self.decoder_pred(self.decoder_norm(hidden_states[:, first:]))


# -- models -----------------------------------------------------------------------------------------------------------


# What callers within transformers may pass to any model.
_KEYWORDS = {"return_dict", *TransformersKwargs.__annotations__}
# transformers' ViTMAE is ours parameter for parameter, but its folders keep the names of version 4 (those that version
# 5 writes have one more, `decoder_encoder`). Applied in this order.
_VIT_MAE_NAMES = {
    r"decoder_encoder\.layer\.": "decoder_layers.",
    r"encoder\.layer\.": "layers.",
    r"attention\.attention\.query": "attention.q_proj",
    r"attention\.attention\.key": "attention.k_proj",
    r"attention\.attention\.value": "attention.v_proj",
    r"attention\.output\.dense": "attention.o_proj",
    r"intermediate\.dense": "mlp.fc1",
    r"output\.dense": "mlp.fc2",
}


class MAEPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every model of the families."""

    config_class = MAEConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The Trainer divides the loss by the accumulation steps itself; no model here takes `num_items_in_batch`.
    accepts_loss_kwargs = False
    _no_split_modules = ["MAEEmbeddings", "MAELayer", "MAEDecoder"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MAELayer, "attentions": MAEAttention}
    _input_embed_layer = "patch_embeddings"
    # Parts of the family's other models, which a folder may hold too. A family adds its own.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier\.", r"^fc_norm\.", r"^vit\.layernorm\."]

    def __init__(self, config: MAEConfig, *args: Any, **kwargs: Any):
        config.check()  # its fields may have been set since it was made
        if config._attn_implementation is None and not torch.accelerator.is_available():
            # On a CPU the fused kernel, transformers' default, takes up to 2.8 times as long at these lengths.
            config._attn_implementation = "eager"
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', from a folder of its ViTMAE too; what is saved afterwards has the native names."""
        if kwargs.get("key_mapping") is not None:
            return super().from_pretrained(*args, **kwargs)
        loaded = super().from_pretrained(*args, **{**kwargs, "key_mapping": _VIT_MAE_NAMES})
        # Or else saving would go back to the names that were read.
        (loaded[0] if isinstance(loaded, tuple) else loaded)._weight_conversions = None
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers.initialization leaves weights alone that were loaded; so only its functions are used, on whole
        # parameters (a view loses the mark).
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # Xavier on the flattened weight, as for a linear layer on patches (MAE, appendix A.1).
            bound = math.sqrt(6 / (module.weight[0].numel() + module.weight.shape[0]))
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d):
            for ones in (module.weight, module.running_var):
                init.ones_(ones)
            for zeros in (module.bias, module.running_mean, module.num_batches_tracked):
                init.zeros_(zeros)
        elif isinstance(module, MAEEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.copy_(module.position_embeddings, sincos_positions(self.config.hidden_size, self.config.grid_size))
        elif isinstance(module, MAEDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            width = self.config.decoder_hidden_size
            init.copy_(module.decoder_pos_embed, sincos_positions(width, self.config.grid_size))

    def _check_kwargs(self, kwargs: dict[str, Any]) -> None:
        for name, value in kwargs.items():
            if name not in _KEYWORDS:
                names = [name for name in inspect.signature(self.forward).parameters if name != "kwargs"]
                raise InputError(
                    f"`{name}` (here a {type(value).__name__}) is no argument of {type(self).__name__}: leave it out, "
                    f"or give one of {', '.join(names)}."
                )
        # The fused kernels have no attention weights to give; transformers would return an empty tuple.
        wanted = kwargs.get("output_attentions", self.config.output_attentions)
        if wanted and self.config._attn_implementation != "eager":
            raise InputError(
                f"`output_attentions=True` needs the eager attention, but `attn_implementation` is "
                f"{self.config._attn_implementation!r}: load the model with `attn_implementation='eager'`."
            )


class MAEModel(MAEPreTrainedModel):
    """The ViT encoder. It sees **all** patches, unless `noise` asks for masking.

    Args:
        config ([`MAEConfig`]): The configuration.
        add_final_layernorm (`bool`, *optional*, defaults to `True`): Without it, `last_hidden_state` is the last
            block's output (for classifiers that normalise after pooling).
    """

    def __init__(self, config: MAEConfig, add_final_layernorm: bool = True):
        super().__init__(config)
        self.embeddings = MAEEmbeddings(config)
        sizes = config.hidden_size, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps
        last = max(1, config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(
            MAELayer(config, *sizes, drop_path_rate=config.drop_path_rate * i / last)
            for i in range(config.num_hidden_layers)
        )
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_final_layernorm else nn.Identity()
        )
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_bias: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MAEModelOutput:
        """Encodes images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalised images.
            noise (`torch.FloatTensor` of shape `(batch_size, num_patches)`, *optional*): Uniform in [0, 1). If given,
                only the patches that `config.mask_sampler` picks by it are encoded.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, 1 + n, hidden_size)`, *optional*): Class token
                and any selection of patch tokens, as [`MAEEmbeddings`] makes them, instead of `pixel_values`.
            attention_bias (`torch.FloatTensor` broadcastable to `(batch_size, num_heads, 1 + n, 1 + n)`, *optional*):
                Added to the attention scores of every block, before the softmax.
            interpolate_pos_encoding (`bool`, *optional*): Accept images of another size than the configured one.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            InputError: The images have another shape than the configuration says, or not exactly one of
                `pixel_values` and `inputs_embeds` was given.
        """
        self._check_kwargs(kwargs)
        if (pixel_values is None) == (inputs_embeds is None):
            raise InputError("give either `pixel_values` or `inputs_embeds`, not both or neither.")
        hidden_states, masking = inputs_embeds, None
        if pixel_values is not None:
            hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
            if noise is not None:
                masking = sample_masking(self.config, noise, len(pixel_values), patch_grid(self.config, pixel_values))
                hidden_states = select_visible(hidden_states, masking)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_bias=attention_bias, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        pooled = hidden_states[:, 1:].mean(1) if self.config.pooling == "mean" else hidden_states[:, 0]
        return MAEModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            mask=masking.mask if masking else None,
            ids_restore=masking.ids_restore if masking else None,
        )


def sample_masking(config: MAEConfig, noise: Tensor, batch_size: int, grid_size: tuple[int, int]) -> Masking:
    """The masking that `config.mask_sampler` makes of uniform `noise` `(batch_size, num_patches)`."""
    num_patches = math.prod(grid_size)
    if noise.shape != (batch_size, num_patches):
        raise InputError(
            f"`noise` has shape {tuple(noise.shape)}; expected ({batch_size}, {num_patches}): a row per image, a "
            "number per patch."
        )
    num_visible = config.num_visible(num_patches)
    if not 0 < num_visible < num_patches:
        raise InputError(
            f"`mask_ratio` = {config.mask_ratio} leaves {num_visible} of these images' {num_patches} patches visible; "
            "use larger images or another ratio."
        )
    return keep_lowest(SAMPLERS[config.mask_sampler](noise, grid_size, num_visible), num_visible)


def select_visible(embeddings: Tensor, masking: Masking) -> Tensor:
    """Class token and visible patch tokens `(B, 1 + K, D)` of all tokens `(B, 1 + N, D)`."""
    return torch.cat([embeddings[:, :1], gather_tokens(embeddings[:, 1:], masking.ids_keep)], dim=1)


@dataclass
class PretrainingStep:
    """A batch on its way through [`MAEForPreTraining.pretrain`], whose methods read it; each field is set once.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(B, num_channels, height, width)`): Normalised images.
        noise (`torch.FloatTensor` of shape `(B, num_patches)`, *optional*): Uniform in [0, 1); fixes what is drawn.
        grid_size (`tuple[int, int]`): Rows and columns of patches.
        targets (`torch.FloatTensor` of shape `(B, num_patches, p_h * p_w * num_channels)`): What is to be predicted.
        tokens (`torch.FloatTensor` of shape `(B, 1 + num_patches, hidden_size)`): Embedded class token and patches.
        masking ([`Masking`]): The patches that stay visible.
        hidden_states (`torch.FloatTensor` of shape `(B, 1 + K, hidden_size)`): The encoder's output.
        ids_predicted (`torch.LongTensor` of shape `(D, P)`, *optional*): The patches that are predicted of the D images
            that are decoded; `None`: all.
        errors (`torch.FloatTensor` of shape `(D, num_patches)` or `(D, P)`): Mean squared error of these patches.
    """

    pixel_values: Tensor
    noise: Tensor | None = None
    grid_size: tuple[int, int] = field(init=False)
    targets: Tensor = field(init=False)
    tokens: Tensor = field(init=False)
    masking: Masking = field(init=False)
    hidden_states: Tensor = field(init=False)
    ids_predicted: Tensor | None = field(init=False)
    errors: Tensor = field(init=False)


class MAEForPreTraining(MAEPreTrainedModel):
    """The masked autoencoder: mask, encode what is visible, decode, compare with what was masked.

    [`pretrain`] is the template of every family. A family overrides its methods ([`choose_mask`], [`train_masker`],
    [`visible_tokens`], [`decoded_rows`], [`task_terms`], [`term_weights`]). If these need more than a
    [`PretrainingStep`] holds, the family makes a subclass of it in a `forward` of its own.

    Example:

    ```python
    >>> model = MAEForPreTraining(MAEConfig.from_size("tiny", image_size=32, patch_size=4))
    >>> outputs = model(torch.rand(2, 3, 32, 32))
    >>> outputs.logits.shape, outputs.mask.mean()
    (torch.Size([2, 64, 48]), tensor(0.7500))
    ```
    """

    output_class: type[MAEForPreTrainingOutput] = MAEForPreTrainingOutput

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.vit = MAEModel(config)
        self.decoder = MAEDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MAEForPreTrainingOutput:
        """Reconstructs masked patches.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalised images.
            noise (`torch.FloatTensor` of shape `(batch_size, num_patches)`, *optional*): Uniform in [0, 1); fixes the
                mask. Drawn from PyTorch's global generator if not given.
            interpolate_pos_encoding (`bool`, *optional*): Accept images of another size than the configured one.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.
        """
        return self.pretrain(PretrainingStep(pixel_values, noise), interpolate_pos_encoding, **kwargs)

    def pretrain(
        self, step: Any, interpolate_pos_encoding: bool | None, **kwargs: Unpack[TransformersKwargs]
    ) -> MAEForPreTrainingOutput:
        """Masks, encodes, decodes and compares a [`PretrainingStep`], or the family's subclass of it."""
        self._check_kwargs(kwargs)
        step.tokens = self.vit.embeddings(step.pixel_values, interpolate_pos_encoding)
        step.grid_size = patch_grid(self.config, step.pixel_values)
        step.targets = patch_targets(step.pixel_values, pair(self.config.patch_size), self.config.norm_pix_loss)
        if step.noise is not None and self.training:
            step.noise = full_precision(step.noise)  # once: what is drawn by it in several methods must agree

        step.masking = self.choose_mask(step)
        # Before encoding, so that its graph is freed before the autoencoder's is built.
        terms = self.train_masker(step)
        encoded = self.vit(inputs_embeds=self.visible_tokens(step), **kwargs)
        step.hidden_states = encoded.last_hidden_state
        rows, ids = self.decoded_rows(step), self.predicted_patches(step)
        step.ids_predicted = ids = None if ids is None else ids[rows]
        logits = self.decoder(step.hidden_states[rows], step.masking.ids_keep[rows], step.grid_size, ids_predicted=ids)
        step.errors = patch_errors(logits, select_patches(step.targets[rows], ids))
        reconstruction_loss = masked_mean(step.errors, select_patches(step.masking.mask[rows], ids))
        terms |= self.task_terms(step)

        loss = reconstruction_loss
        for name, weight in self.term_weights(step).items():
            loss = loss + weight * terms[name] if name in terms else loss
        return self.output_class(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            logits=logits,
            mask=step.masking.mask,
            ids_restore=step.masking.ids_restore,
            ids_predicted=ids,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            **terms,
        )

    def choose_mask(self, step: PretrainingStep) -> Masking:
        """Which patches stay visible; here by `config.mask_sampler` and the noise."""
        noise, tokens = step.noise, step.tokens
        if noise is None:
            noise = torch.rand(len(tokens), math.prod(step.grid_size), device=tokens.device)
        return sample_masking(self.config, noise, len(tokens), step.grid_size)

    def train_masker(self, step: PretrainingStep) -> dict[str, Any]:
        """Output fields of what chose the mask, loss terms before their weights among them; random noise has none."""
        return {}

    def visible_tokens(self, step: PretrainingStep) -> Tensor:
        """What the encoder sees, `(B, 1 + K, hidden_size)`: class token and visible patches."""
        return select_visible(step.tokens, step.masking)

    def predicted_patches(self, step: PretrainingStep) -> Tensor | None:
        """The masked patches that are decoded, `(B, P)`; `None`: all, as outside training.

        A share `config.prediction_ratio` of them (CrossMAE, arXiv 2401.14391), drawn by the noise's finer digits.
        """
        if not self.training or self.config.prediction_ratio == 1:
            return None
        mask = step.masking.mask
        num_masked = mask.shape[1] - step.masking.ids_keep.shape[1]
        draws = torch.rand_like(mask) if step.noise is None else finer_digits(step.noise)
        return (draws - mask).argsort(dim=1)[:, : max(1, round(self.config.prediction_ratio * num_masked))]

    def decoded_rows(self, step: PretrainingStep) -> slice:
        """Which images of the batch are decoded; here all."""
        return slice(None)

    def task_terms(self, step: PretrainingStep) -> dict[str, Any]:
        """Output fields of further tasks, loss terms before their weights; here none."""
        return {}

    def term_weights(self, step: PretrainingStep) -> dict[str, Tensor | float]:
        """Weights, by the output field's name, of the terms that are added to the reconstruction loss."""
        return {}


class MAEForImageClassification(MAEPreTrainedModel):
    """The encoder and a linear classifier.

    `config.pooling` `"mean"`: mean of the patch tokens, then LayerNorm (MAE's fine-tuning, appendix A.1); `"cls"`: the
    class token after the encoder's LayerNorm.
    """

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        mean_pooling = config.pooling == "mean"
        self.vit = MAEModel(config, add_final_layernorm=not mean_pooling)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if mean_pooling else nn.Identity()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalised images.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Classes; other shapes as
                `config.problem_type` says. With them, the output has a `loss`.
            interpolate_pos_encoding (`bool`, *optional*): Accept images of another size than the configured one.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.
        """
        self._check_kwargs(kwargs)
        outputs = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.classifier(self.fc_norm(outputs.pooler_output))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MAEBackbone(BackboneMixin, MAEModel):
    """The encoder as a backbone: feature maps `(batch_size, hidden_size, h, w)` of the blocks in `out_features`."""

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = True, **kwargs: Unpack[TransformersKwargs]
    ) -> BackboneOutput:
        """Feature maps of images.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Normalised images,
                each side at least a patch long; what is left over of it beyond whole patches, at the bottom and the
                right, is not seen (as in `Dinov2Backbone`).
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`): Accept images of another size than the
                configured one.
            kwargs: `output_hidden_states` (also the numbers of those that are wanted), `output_attentions`,
                `return_dict`.
        """
        self._check_kwargs(kwargs)
        if interpolate_pos_encoding:
            height, width = (
                size - size % patch if size > patch else size
                for size, patch in zip(pixel_values.shape[-2:], pair(self.config.patch_size), strict=True)
            )
            pixel_values = pixel_values[..., :height, :width]
        grid_size = check_pixel_values(self.config, pixel_values, interpolate_pos_encoding)
        # Not super(): BackboneMixin stands between and has a forward of its own.
        outputs = MAEModel.forward(self, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        feature_maps = []
        for stage, hidden_state in zip(self.stage_names, outputs.hidden_states, strict=True):
            if stage in self.out_features:
                feature_map = self.layernorm(hidden_state) if self.config.apply_layernorm else hidden_state
                if self.config.reshape_hidden_states:
                    feature_map = feature_map[:, 1:].transpose(1, 2).unflatten(2, grid_size).contiguous()
                feature_maps.append(feature_map)
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "MAEBackbone",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEForPreTrainingOutput",
    "MAEModel",
    "MAEModelOutput",
    "MAEPreTrainedModel",
]
