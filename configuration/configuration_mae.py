# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the masked autoencoder (MAE), and what every family shares."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from clmae.configuration.errors import InputError
from clmae.configuration.hub_code import hub_auto_map, hub_code, write_hub_code

logger = logging.get_logger(__name__)

MASK_SAMPLERS = ("random", "block", "grid")
POOLINGS = ("mean", "cls")
# Far beyond any model that was built: a file that asks for more is damaged or hostile.
MAX_WIDTH = 65_536  # also heads, and pixels per side of an image or patch
MAX_LAYERS = 1_000
MAX_CHANNELS = 4_096
MAX_LABELS = 10**6
MAX_PATCHES = 2**20
MAX_PARAMETERS = 10**11

# Width, blocks and heads of encoder and decoder. base, large, huge: MAE (arXiv 2111.06377), section 4; tiny, small: the
# encoders of DeiT (arXiv 2012.12877), with a decoder in proportion.
_STACK = ("hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES: dict[str, dict[str, int]] = {
    name: dict(zip((*_STACK, *(f"decoder_{field}" for field in _STACK)), numbers, strict=True))
    for name, numbers in (
        ("tiny", (192, 12, 3, 128, 4, 4)),
        ("small", (384, 12, 6, 256, 4, 8)),
        ("base", (768, 12, 12, 512, 8, 16)),
        ("large", (1024, 24, 16, 512, 8, 16)),
        ("huge", (1280, 32, 16, 512, 8, 16)),
    )
}
_SIZE_PATCH = {"huge": 14}  # the published huge model has patches of 14 pixels, the others of 16


def pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """`(height, width)` of a size given as one number or as two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


# -- rules: what a field must be, or `None` where it is --------------------------------------------------------------
# (huggingface_hub's validators raise errors that are no `ValueError` and name no remedy, and refuse 1 for a float.)

Rule = Callable[[Any], str | None]


def integer(most: int = MAX_WIDTH) -> Rule:
    """An int in 1..most."""

    def rule(value: Any) -> str | None:
        if type(value) is not int or value < 1:
            return "an int of at least 1"
        return None if value <= most else f"at most {most:,}"

    return rule


def number(interval: str) -> Rule:
    """A finite number in an interval, such as `"(0, 1]"`."""
    low, high = map(float, interval[1:-1].split(", "))
    ends = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")

    def rule(value: Any) -> str | None:
        if type(value) in (int, float) and math.isfinite(value) and (low < value < high or value in ends):
            return None
        return "a finite number" if low == -math.inf else f"a number in {interval}"

    return rule


def choice(*names: str) -> Rule:
    """One of the names."""
    return lambda value: None if value in names else f"one of {', '.join(names)}"


def boolean(value: Any) -> str | None:
    """True or false, and not 0 or 1."""
    return None if isinstance(value, bool) else "true or false"


def sides(value: Any) -> str | None:
    """Pixels per side, one number or two."""
    values = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if any(type(v) is not int or v < 1 for v in values):
        return "a positive int, or two as (height, width)"
    return None if max(values) <= MAX_WIDTH else f"at most {MAX_WIDTH:,} pixels per side"


def activation(value: Any) -> str | None:
    """A name that transformers knows."""
    try:
        from transformers.activations import ACT2FN
    except ImportError:  # without torch there are none, and no models either
        return None
    return None if isinstance(value, str) and value in ACT2FN else f"one of {', '.join(sorted(ACT2FN))}"


class MAEConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of [`MAEModel`], [`MAEForPreTraining`] and their siblings (He et al., arXiv 2111.06377).

    The defaults are ViT-B/16 at 224 pixels with the paper's decoder. Every field is checked when the configuration
    is made.

    Args:
        hidden_size (`int`, *optional*, defaults to 768): Encoder width; divisible by `num_attention_heads` and by 4.
        num_hidden_layers (`int`, *optional*, defaults to 12): Encoder blocks.
        num_attention_heads (`int`, *optional*, defaults to 12): Attention heads in each encoder block.
        intermediate_size (`int`, *optional*): Width of the encoder's MLP; `4 * hidden_size` if not given.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of every MLP, a name known to transformers.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of class and mask tokens.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6): Epsilon of the encoder's and decoder's LayerNorms.
        image_size (`int` or two, *optional*, defaults to 224): Image height and width in pixels.
        patch_size (`int` or two, *optional*, defaults to 16): Patch height and width; must divide `image_size`.
        num_channels (`int`, *optional*, defaults to 3): Channels of an image; any number from 1.
        qkv_bias (`bool`, *optional*, defaults to `True`): Whether queries, keys and values have a bias.
        drop_path_rate (`float`, *optional*, defaults to 0.0): Stochastic depth of the last encoder block, rising
            linearly from 0 at the first; for fine-tuning (MAE pretrains without). In [0, 1).
        pooling (`str`, *optional*, defaults to `"mean"`): What `pooler_output` and the classifier look at: the
            `"mean"` of the patch tokens or the `"cls"` token.
        decoder_hidden_size (`int`, *optional*, defaults to 512): Decoder width; divisible by its heads and by 4.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 8): Decoder blocks.
        decoder_num_attention_heads (`int`, *optional*, defaults to 16): Attention heads in each decoder block.
        decoder_intermediate_size (`int`, *optional*): Width of its MLP; `4 * decoder_hidden_size` if not given.
        mask_ratio (`float`, *optional*, defaults to 0.75): Share of the patches that is masked, in [0, 1);
            `int(N * (1 - mask_ratio))` of the N patches stay visible, at least one and not all.
        mask_sampler (`str`, *optional*, defaults to `"random"`): `"random"`, `"block"` or `"grid"` (MAE, figure 6).
        prediction_ratio (`float`, *optional*, defaults to 1.0): Share of the masked patches that the decoder predicts
            in training, in (0, 1], drawn anew for each image (CrossMAE, arXiv 2401.14391); less is cheaper.
        norm_pix_loss (`bool`, *optional*, defaults to `True`): Reconstruct each patch normalised by its own mean and
            variance (MAE, section 3: better representations; the released models' recipe) instead of raw pixels.
        apply_layernorm (`bool`, *optional*, defaults to `True`): Backbone: apply the final LayerNorm to feature maps.
        reshape_hidden_states (`bool`, *optional*, defaults to `True`): Backbone: give feature maps as
            `(batch_size, hidden_size, height, width)` instead of `(batch_size, 1 + num_patches, hidden_size)`.
        out_features, out_indices (`list`, *optional*): Backbone: which of `"stem", "stage1", ...` to return.

    Raises:
        InputError: A field has the wrong type or value; the message names field, value and remedy.
    """

    model_type = "mae"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = None  # type: ignore[assignment]  # filled in when the configuration is made
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    drop_path_rate: float = 0.0
    pooling: str = "mean"
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = None  # type: ignore[assignment]
    mask_ratio: float = 0.75
    mask_sampler: str = "random"
    prediction_ratio: float = 1.0
    norm_pix_loss: bool = True
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    # Rules and the fields that follow them; a field whose default is `None` may be `None`. A family adds its own.
    _rules: ClassVar[tuple[tuple[Rule, str], ...]] = (
        (integer(), "hidden_size num_attention_heads intermediate_size"),
        (integer(), "decoder_hidden_size decoder_num_attention_heads decoder_intermediate_size"),
        (integer(MAX_LAYERS), "num_hidden_layers decoder_num_hidden_layers"),
        (integer(MAX_CHANNELS), "num_channels"),
        (sides, "image_size patch_size"),
        (boolean, "qkv_bias norm_pix_loss apply_layernorm reshape_hidden_states"),
        (number("[0, inf)"), "initializer_range"),
        (number("(0, 1]"), "layer_norm_eps prediction_ratio"),
        (number("[0, 1)"), "drop_path_rate mask_ratio"),
        (activation, "hidden_act"),
        (choice(*MASK_SAMPLERS), "mask_sampler"),
        (choice(*POOLINGS), "pooling"),
    )
    _earlier: ClassVar[dict[str, Any]] = {}  # fields that files of earlier versions lack, with what those did
    _decoder_follows_size: ClassVar[bool] = True  # whether `from_size` sets the decoder too

    def __post_init__(self, **kwargs: Any) -> None:
        # Checked before anything is derived, so that a wrong value is reported and not its consequence.
        self.check()
        self._check_unknown(kwargs)
        self._fill_defaults()
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', which sets overrides (`from_pretrained(..., mask_ratio=0.5)`) unchecked.

        Raises:
            InputError: Whatever is wrong with `config_dict`, which may come from anywhere.
        """
        cls._check_unknown(kwargs)
        cls._check_entries(config_dict)
        # Of a later version or another program, say: kept, as all that is unknown; only keyword arguments are refused.
        misspelt = {name: value for name, value in config_dict.items() if cls._meant(name)}
        for name in misspelt:
            logger.warning(
                f"`{name}` is no field of {cls.__name__} and has no effect; did you mean `{cls._meant(name)}`?"
            )
        fields = {name: value for name, value in config_dict.items() if name not in misspelt}
        if config_dict.get("model_type") == cls.model_type:  # a file of the family itself
            fields = cls._earlier | fields
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            # A family that goes on from another's folder is itself, and says so when it is saved.
            fields.pop("auto_map", None)
            fields["model_type"] = cls.model_type
        try:
            loaded = super().from_dict(fields, **kwargs)
            config = loaded[0] if isinstance(loaded, tuple) else loaded
            config.__dict__.update(misspelt)
            config.check()
            config.to_json_string()
            if config.dtype is not None:
                _ = config.dtype.is_floating_point  # as a model will ask
        except InputError:
            raise
        except Exception as error:  # whatever transformers' own fields lead to, which it does not always check
            raise InputError(f"the configuration cannot be used: {type(error).__name__}: {error}") from error
        return loaded

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> MAEConfig:
        """As transformers', by [`from_dict`]."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def _fill_defaults(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size

    # -- the model's own code beside it ----------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers', with the family's code beside `config.json`: the folder loads without `clmae` too."""
        auto_map = hub_auto_map(type(self))
        if auto_map:
            ours = {f"{Path(name).stem}." for name in hub_code(self.model_type)}
            # What a subclass from elsewhere has registered for itself stays (`register_for_auto_class`).
            others = {
                auto_class: entry
                for auto_class, entry in (getattr(self, "auto_map", None) or {}).items()
                if not str(entry).rpartition("--")[2].startswith(tuple(ours))
            }
            self.auto_map = {**auto_map, **others}
        super().save_pretrained(save_directory)
        if auto_map:
            write_hub_code(self.model_type, save_directory)
        if push_to_hub:  # only now: transformers would upload what it wrote itself, and no code
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """As transformers', for a subclass from elsewhere; for the families' own classes there is nothing to do."""
        # `save_pretrained` writes their code and `auto_map`, and transformers' way would mix with it.
        if cls.__module__.rpartition(".")[2] != f"configuration_{cls.model_type}":
            super().register_for_auto_class(auto_class)

    # -- derived sizes ------------------------------------------------------------------------------------------

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch grid `(h, w)` at the configured image size."""
        (height, width), (patch_height, patch_width) = pair(self.image_size), pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """Patches N of an image of the configured size."""
        return math.prod(self.grid_size)

    @property
    def patch_dim(self) -> int:
        """Pixel values in a patch: `p_h * p_w * num_channels`."""
        return math.prod(pair(self.patch_size)) * self.num_channels

    @property
    def learns_masks(self) -> bool:
        """Whether a masking module chooses the masks of pretraining."""
        return False

    @property
    def num_views(self) -> int:
        """Views of an image that a training sample of pretraining holds."""
        return 1

    def num_visible(self, num_patches: int) -> int:
        """Patches K of `num_patches` that stay visible, `int(N * (1 - mask_ratio))` (METHODS: MAE's own rounding)."""
        return int(num_patches * (1 - self.mask_ratio))

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> MAEConfig:
        """The configuration of a size in `SIZES`, `"tiny"` to `"huge"`, with fields that differ from it as `kwargs`.

        Raises:
            InputError: The size has no such name, or a field is wrong.
        """
        if size not in SIZES:
            raise InputError(f"`model_size` is {size!r}; choose one of {', '.join(SIZES)}.")
        preset = {**SIZES[size], "patch_size": _SIZE_PATCH.get(size, 16)}
        if not cls._decoder_follows_size:
            preset = {name: value for name, value in preset.items() if not name.startswith("decoder_")}
        return cls(**{**preset, **kwargs})

    # -- checks -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises InputError for a field of the wrong type or value; done when the configuration or a model is made."""
        for rule, names in self._rules:
            for name in names.split():
                value = getattr(self, name)
                optional = value is None and getattr(type(self), name) is None
                if not optional and (right := rule(value)):
                    raise InputError(f"`{name}` is {value!r}; give {right}.")
        self._check_widths()
        self._check_geometry()
        self._check_total()

    @classmethod
    def _check_unknown(cls, kwargs: dict[str, Any]) -> None:
        # Configurations keep unknown entries (transformers' convention), but a misspelt field would be lost silently.
        for name in kwargs:
            if meant := cls._meant(name):
                raise InputError(f"`{name}` is no field of {cls.__name__}; did you mean `{meant}`?")
        labels = kwargs.get("num_labels")  # of which transformers makes a table
        if labels is not None and (type(labels) is not int or not 0 <= labels <= MAX_LABELS):
            raise InputError(f"`num_labels` is {labels!r}; give an int in 0..{MAX_LABELS:,}.")

    @classmethod
    def _meant(cls, name: str) -> str | None:
        """The field that `name`, which is none, resembles."""
        known = [f.name for f in dataclasses.fields(cls)]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        return close[0] if close and name not in known and not hasattr(cls, name) else None

    @classmethod
    def _check_entries(cls, config_dict: dict[str, Any]) -> None:
        """Refuses entries of a file that would take a method's place, and those of transformers that it fails on."""
        for name, value in config_dict.items():
            if name.startswith("__") or callable(getattr(cls, name, None)):
                raise InputError(f"`{name}` cannot be an entry of a configuration: {cls.__name__} has a method of it.")
            plan = name.startswith("base_model_") and name.endswith("_plan")
            table = plan or name in ("auto_map", "sub_configs")
            attention = name.lstrip("_").startswith("attn_implementation")
            if (table or attention) and not isinstance(value, (dict, type(None), str if attention else dict)):
                raise InputError(f"`{name}` is {value!r}; leave it out.")

    def _stacks(self) -> tuple[tuple[str, str], ...]:
        """The transformer stacks: their width and heads fields."""
        return ("hidden_size", "num_attention_heads"), ("decoder_hidden_size", "decoder_num_attention_heads")

    def _check_widths(self) -> None:
        for width_name, heads_name in self._stacks():
            width, heads = getattr(self, width_name), getattr(self, heads_name)
            # What every stack of this width can take.
            step = math.lcm(4, *(getattr(self, other) for name, other in self._stacks() if name == width_name))
            remedy = f"take {step * max(1, round(width / step))}, or another number of heads."
            if width % heads:
                raise InputError(f"`{width_name}` is {width}, which `{heads_name}` = {heads} does not divide; {remedy}")
            if width % 4:
                raise InputError(
                    f"`{width_name}` is {width}; the sin-cos position embeddings need a multiple of 4: {remedy}"
                )

    def _check_geometry(self) -> None:
        for side, size, patch in zip(("height", "width"), pair(self.image_size), pair(self.patch_size), strict=True):
            if size % patch:
                below, above = size // patch * patch, -(-size // patch) * patch
                options = " or ".join(str(v) for v in (below, above) if v)
                raise InputError(
                    f"`image_size` is {self.image_size} and `patch_size` {self.patch_size}: the {side} {size} is not a "
                    f"multiple of {patch}; take {options}, or another patch size."
                )
        if self.norm_pix_loss and self.patch_dim < 2:
            raise InputError(
                "`norm_pix_loss` is true, but a patch has one value and so no variance; set it to false, or take a "
                f"larger `patch_size` than {self.patch_size}."
            )
        if self.num_patches > MAX_PATCHES:
            raise InputError(
                f"`image_size` is {self.image_size} and `patch_size` {self.patch_size}: {self.num_patches:,} patches, "
                f"but at most {MAX_PATCHES:,} are possible; take larger patches."
            )
        visible = self.num_visible(self.num_patches)
        if not 0 < visible < self.num_patches:
            # Rounded inwards, so that both ratios are accepted.
            low, high = math.ceil(1e4 / self.num_patches) / 1e4, math.floor(1e4 - 1e4 / self.num_patches) / 1e4
            raise InputError(
                f"`mask_ratio` is {self.mask_ratio}, which leaves {visible} of {self.num_patches} patches visible; "
                f"at least one must be visible and one masked: take a ratio between {low:g} and {high:g}, or smaller "
                "patches."
            )

    def _check_total(self) -> None:
        """Refuses what no machine could hold before anything is allocated."""
        total = (self.patch_dim + self.num_patches) * (self.hidden_size + self.decoder_hidden_size)
        for part in ("", "decoder_", "masker_"):
            width = getattr(self, f"{part}hidden_size", None) or self.hidden_size
            inner = getattr(self, f"{part}intermediate_size", None) or 4 * width
            total += (getattr(self, f"{part}num_hidden_layers", None) or 0) * (4 * width**2 + 2 * width * inner)
        if total > MAX_PARAMETERS:
            raise InputError(
                f"a model with `hidden_size` {self.hidden_size} and `num_hidden_layers` {self.num_hidden_layers} would "
                f"have about {total:.0e} parameters, but at most {MAX_PARAMETERS:.0e} are possible; take fewer or "
                "smaller layers."
            )


__all__ = ["MASK_SAMPLERS", "POOLINGS", "SIZES", "MAEConfig", "pair"]
