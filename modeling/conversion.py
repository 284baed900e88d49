# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Weights from and to the layouts of other projects, as dictionaries of tensors; reading and writing files is not here.

One table for each layout says how it names our parameters; both directions come from that table. Our own names are
those of transformers 5's ViTMAE, which is therefore the layout without a table.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import BeitConfig, Dinov2Config, ViTConfig, ViTMAEConfig
from transformers.configuration_utils import PreTrainedConfig

from clmae.configuration.configuration_cl_mae import CLMAEConfig
from clmae.configuration.configuration_mae import SIZES, MAEConfig, pair
from clmae.configuration.errors import InputError
from clmae.modeling.modeling_cl_mae import CLMAEForPreTraining
from clmae.modeling.modeling_mae import MAEForImageClassification, MAEForPreTraining, MAEModel, MAEPreTrainedModel

# -- names --------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How a project names the parameters of our models.

    Attributes:
        name: What it is called in messages.
        rules: Substitutions (regular expression, replacement), applied one after the other to our name. A result
            `name#i` is the i-th of three equal parts of `name` along dimension 0.
    """

    name: str
    rules: tuple[tuple[str, str], ...]

    def place(self, ours: str) -> tuple[str, int | None]:
        """The layout's name for our parameter `ours`, and which third of that parameter it is, if not all of it."""
        for pattern, replacement in self.rules:
            ours = re.sub(pattern, replacement, ours)
        name, _, part = ours.partition("#")
        return name, int(part) if part else None

    def rename(self, ours: str) -> str:
        """The layout's name for our parameter `ours`."""
        return self.place(ours)[0]


_NORMS = ((r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."))
# facebookresearch/mae, with its decoder and classifier; timm's VisionTransformer; and the CL-MAE authors' masking net.
TIMM = Layout(
    "facebookresearch/mae, CL-MAE's authors or timm",
    (
        (r"^vit\.layers\.", "blocks."),
        (r"^decoder\.decoder_layers\.", "decoder_blocks."),
        (r"^masking_module\.layers\.", "masking_net.blocks."),
        *_NORMS,
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.attention\.q_proj\.(\w+)$", r".attn.qkv.\1#0"),
        (r"\.attention\.k_proj\.(\w+)$", r".attn.qkv.\1#1"),
        (r"\.attention\.v_proj\.(\w+)$", r".attn.qkv.\1#2"),
        (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
        (r"^vit\.embeddings\.cls_token$", "cls_token"),
        (r"^vit\.layernorm\.", "norm."),
        (r"^classifier\.", "head."),
        (r"^decoder\.", ""),
        (r"^masking_module\.layernorm\.", "masking_net.mlp_head.0."),
        (r"^masking_module\.head\.", "masking_net.mlp_head.1."),
        (r"^masking_module\.", "masking_net."),
    ),
)
_ATTENTION_4 = (
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
)
_MLP_4 = ((r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."))
TRANSFORMERS_4 = Layout("transformers 4", ((r"^vit\.layers\.", "vit.encoder.layer."), *_ATTENTION_4, *_MLP_4))
TRANSFORMERS_5 = Layout("transformers 5", ())
# Only written: transformers 4's names, which transformers 5 reads as well.
BEIT = Layout("BEiT", (*TRANSFORMERS_4.rules, (r"^vit\.", "beit."), (r"^fc_norm\.", "beit.pooler.layernorm.")))
DINOV2 = Layout("DINOv2", ((r"^vit\.layers\.", "vit.encoder.layer."), (r"^vit\.", "dinov2."), *_ATTENTION_4, *_NORMS))
_SIGN = "vit.layers.0.attention.q_proj.weight"  # each of the layouts that are read has another name for it
_ENCODER = ("embeddings.", "encoder.", "layers.", "layernorm.")

# -- import -------------------------------------------------------------------------------------------------------

# Heads leave no trace in the shapes. These widths have had these heads in every published ViT and MAE.
STANDARD_HEADS = {size["hidden_size"]: size["num_attention_heads"] for size in SIZES.values()}
STANDARD_DECODER_HEADS = {512: 16}
# How CL-MAE's authors train the masking module, where our defaults depart from them (recipes/cl_mae_authors.yaml).
CL_MAE_AUTHORS = dict(masker_objective="soft", soft_masking="tokens", gauss_loss_weight=1.0, diversity_loss_weight=2.0)


@dataclass
class Import:
    """What foreign weights are; [`Import.load`] makes the model.

    Attributes:
        layout (`Layout`): Whose names they have.
        model_class, config: What they are weights of.
        weights: The foreign weights, under names without wrappers' prefixes.
        assumed: Fields of `config` that neither weights nor caller give, and that change what the model computes.
        loaded, missing: Our names that have foreign weights, and those that have none.
        unexpected: Foreign names that we have no place for.
    """

    layout: Layout
    model_class: type[MAEPreTrainedModel]
    config: MAEConfig
    weights: dict[str, torch.Tensor]
    assumed: dict[str, Any]
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]

    def load(self) -> MAEPreTrainedModel:
        """The model with these weights, without a second copy of them but for fused queries, keys and values.

        Raises:
            InputError: Weights are missing, or one has another shape than the others ask for.
        """
        if self.missing:
            raise InputError(
                f"the weights are no whole {self.model_class.__name__}: {', '.join(self.missing[:5])}"
                f"{' …' if len(self.missing) > 5 else ''} are missing; give the complete checkpoint."
            )
        with torch.device("meta"):
            model = self.model_class(self.config)
        state = {}
        for ours, parameter in model.state_dict().items():
            theirs, part = self.layout.place(_full_name(self.model_class, ours))
            tensor = self.weights[theirs]
            # Cloned, because parameters that share memory cannot be saved.
            state[ours] = tensor if part is None else tensor.chunk(3)[part].clone()
            if state[ours].shape != parameter.shape:
                raise InputError(
                    f"`{theirs}` has shape {tuple(tensor.shape)}, and gives {tuple(state[ours].shape)} where the rest "
                    f"of the weights asks for {tuple(parameter.shape)}: these are no weights of one MAE."
                )
        model.load_state_dict(state, assign=True)
        return model.eval()


def read_weights(weights: Mapping[str, torch.Tensor], **fields: Any) -> Import:
    """Finds out what foreign `weights` are: layout, class, and every size that their shapes tell.

    Args:
        weights: Tensors by name, from facebookresearch/mae, CL-MAE's authors, timm, or ViTMAE of transformers 4 or 5.
        fields: Fields of the configuration, such as `num_attention_heads`, `image_size` or `norm_pix_loss`; they go
            before what is inferred.

    Raises:
        InputError: The layout is none of these, or a field that cannot be inferred was not given.
    """
    # DistributedDataParallel's prefix; and what transformers 5 calls the decoder's blocks in the files it writes, where
    # its renaming for version 4 reaches too far.
    weights = {
        name.removeprefix("module.").replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): tensor
        for name, tensor in weights.items()
    }
    if "embeddings.cls_token" in weights:  # the encoder alone, as transformers saves it
        weights = {f"vit.{name}" if name.startswith(_ENCODER) else name: value for name, value in weights.items()}
    layout = detect_layout(weights)
    if "masking_net.pos_embed" in weights:  # a constant vector that the authors add to the class token
        position = weights.pop("masking_net.pos_embed")
        weights["masking_net.cls_token"] = weights["masking_net.cls_token"] + position
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    model_class = _model_class(layout, shapes, fields)
    sizes, assumed = _infer_sizes(layout, model_class, shapes, fields)
    config_class = CLMAEConfig if issubclass(model_class, CLMAEForPreTraining) else MAEConfig
    config = config_class(**{**sizes, **assumed, **fields})
    with torch.device("meta"):
        names = list(model_class(config).state_dict())
    theirs = {ours: layout.rename(_full_name(model_class, ours)) for ours in names}
    loaded = [ours for ours in names if theirs[ours] in weights]
    missing = [ours for ours in names if theirs[ours] not in weights]
    unexpected = sorted(set(weights) - set(theirs.values()))
    return Import(layout, model_class, config, weights, assumed, loaded, missing, unexpected)


def detect_layout(names: Iterable[str]) -> Layout:
    """The layout that the parameter `names` are in; InputError if it is none that we know."""
    names = list(names)
    layouts = {layout.rename(_SIGN): layout for layout in (TIMM, TRANSFORMERS_4, TRANSFORMERS_5)}
    layout = next((layout for sign, layout in layouts.items() if sign in names), None)
    if layout is not None:
        return layout
    known = "; ".join(f"{layout.name} ({sign})" for sign, layout in layouts.items())
    raise InputError(
        f"the weights are in no known layout: they are named {', '.join(names[:3])} …; known are: {known}."
    )


def _full_name(model_class: type, ours: str) -> str:
    """Our name as it is in the whole model: the encoder alone has no `vit.` before its parameters."""
    return f"vit.{ours}" if issubclass(model_class, MAEModel) else ours


def _model_class(
    layout: Layout, shapes: Mapping[str, torch.Size], fields: Mapping[str, Any]
) -> type[MAEPreTrainedModel]:
    if layout.rename("masking_module.head.weight") in shapes:
        return CLMAEForPreTraining
    if layout.rename("decoder.decoder_pred.weight") in shapes:
        return MAEForPreTraining
    # timm's mean of tokens after the last LayerNorm is our encoder's feature, but no classifier of ours has it.
    mean_of_normed = fields.get("pooling") == "mean" and "fc_norm.weight" not in shapes
    classifier = layout.rename("classifier.weight") in shapes and not mean_of_normed
    return MAEForImageClassification if classifier else MAEModel


def _infer_sizes(
    layout: Layout, model_class: type, shapes: Mapping[str, torch.Size], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(what the shapes tell, what had to be assumed)`, as fields of the configuration."""

    def has(ours: str) -> bool:
        return layout.rename(ours) in shapes

    def shape(ours: str) -> torch.Size:
        if not has(ours):
            raise InputError(f"the weights lack `{layout.rename(ours)}`: this is no whole checkpoint of {layout.name}.")
        return shapes[layout.rename(ours)]

    def stack(prefix: str) -> tuple[int, int]:
        """Blocks, and the width of their MLP."""
        blocks = (i for i in itertools.count() if not has(f"{prefix}.{i}.layernorm_before.weight"))
        return next(blocks), shape(f"{prefix}.0.mlp.fc1.weight")[0]

    hidden_size, channels, *patch_size = shape("vit.embeddings.patch_embeddings.projection.weight")
    sizes: dict[str, Any] = dict(hidden_size=hidden_size, num_channels=channels, patch_size=_simplest(patch_size))
    sizes["num_hidden_layers"], sizes["intermediate_size"] = stack("vit.layers")
    sizes["qkv_bias"] = has("vit.layers.0.attention.q_proj.bias")
    if "image_size" not in fields:
        sizes["image_size"] = _infer_image_size(shape("vit.embeddings.position_embeddings")[1], patch_size)
    assumed: dict[str, Any] = {}
    heads = [("num_attention_heads", hidden_size, STANDARD_HEADS)]
    if model_class is MAEForImageClassification:
        sizes.update(num_labels=shape("classifier.weight")[0], pooling="mean" if has("fc_norm.weight") else "cls")
    if has("decoder.decoder_pred.weight"):
        sizes["decoder_hidden_size"] = shape("decoder.decoder_embed.weight")[0]
        sizes["decoder_num_hidden_layers"], sizes["decoder_intermediate_size"] = stack("decoder.decoder_layers")
        heads.append(("decoder_num_attention_heads", sizes["decoder_hidden_size"], STANDARD_DECODER_HEADS))
        assumed["norm_pix_loss"] = True
    if has("masking_module.head.weight"):
        sizes["masker_num_hidden_layers"], sizes["masker_intermediate_size"] = stack("masking_module.layers")
        assumed["masker_num_attention_heads"] = CLMAEConfig.masker_num_attention_heads
        assumed |= CL_MAE_AUTHORS
    for name, width, standard in heads:
        if width in standard:
            assumed[name] = standard[width]
        elif name not in fields:
            raise InputError(
                f"`{name}` cannot be inferred from the weights, and a width of {width} has no standard one: give it "
                f"(--{name})."
            )
    assumed["layer_norm_eps"] = MAEConfig.layer_norm_eps
    return sizes, {name: value for name, value in assumed.items() if name not in fields}


def _simplest(size: Iterable[int]) -> int | list[int]:
    height, width = size
    return height if height == width else [height, width]


def _infer_image_size(num_positions: int, patch_size: list[int]) -> int | list[int]:
    """The image size of a square patch grid with a class token before it."""
    side = math.isqrt(num_positions - 1)
    if side * side != num_positions - 1:
        raise InputError(
            f"`image_size` cannot be inferred from {num_positions} positions, which are no square and a class token: "
            "give it (--image_size HEIGHT WIDTH)."
        )
    return _simplest([side * size for size in patch_size])


# -- export -------------------------------------------------------------------------------------------------------


class Export(NamedTuple):
    """A model in a foreign layout: its configuration (`architectures` names the class) and its weights."""

    config: PreTrainedConfig
    weights: dict[str, torch.Tensor]


def export_weights(model: MAEPreTrainedModel, layout: Layout) -> dict[str, torch.Tensor]:
    """The model's weights under the layout's names; without those that only CMAE's pretraining has."""
    exported: dict[str, list[torch.Tensor]] = {}
    for ours, tensor in model.state_dict().items():
        if not ours.startswith(("projector.", "position_head.")):
            theirs = layout.rename(_full_name(type(model), ours))
            exported.setdefault(theirs, []).append(tensor)  # queries, keys and values come in this order
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in exported.items()}


def to_mae(model: MAEPreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights as facebookresearch/mae and CL-MAE's authors name them."""
    weights = export_weights(model, TIMM)
    if "masking_net.cls_token" in weights:
        weights["masking_net.pos_embed"] = torch.zeros_like(weights["masking_net.cls_token"])
    return weights


def to_vit(model: MAEPreTrainedModel) -> Export:
    """transformers' `ViTModel`, or `ViTForImageClassification` from a classifier on the class token."""
    _require(model, "vit", cls_pooling=True)
    config = ViTConfig(**_shared_fields(model), qkv_bias=model.config.qkv_bias)
    return _encoder_export(model, config, "ViT", export_weights(model, TRANSFORMERS_4), "vit.")


def to_vit_mae(model: MAEPreTrainedModel) -> Export:
    """transformers' `ViTMAEForPreTraining`, from any autoencoder."""
    if not isinstance(model, MAEForPreTraining):
        raise InputError(
            f"`--to vit_mae` needs an autoencoder, but the model is a {type(model).__name__}, which has no decoder; "
            "take `--to vit`, or the pretrained model."
        )
    _require(model, "vit_mae", square=True)
    decoder = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    more = (*(f"decoder_{name}" for name in decoder), "qkv_bias", "mask_ratio", "norm_pix_loss")
    config = ViTMAEConfig(**_shared_fields(model), **{name: getattr(model.config, name) for name in more})
    config.architectures = ["ViTMAEForPreTraining"]
    weights = export_weights(model, TRANSFORMERS_4)
    return Export(config, {name: value for name, value in weights.items() if name.startswith(("vit.", "decoder."))})


def to_beit(model: MAEPreTrainedModel) -> Export:
    """transformers' `BeitForImageClassification`, from a classifier on the mean of the patch tokens."""
    if not isinstance(model, MAEForImageClassification) or model.config.pooling != "mean":
        raise InputError(
            f"`--to beit` is for classifiers with `pooling` 'mean', but the model is a {type(model).__name__} with "
            f"{model.config.pooling!r}; take `--to vit`."
        )
    _require(model, "beit", square=True)
    config = BeitConfig(
        **_shared_fields(model),
        drop_path_rate=model.config.drop_path_rate,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,
        layer_scale_init_value=0.0,
    )
    weights = export_weights(model, BEIT)
    for name in [name for name in weights if name.endswith(".key.weight")]:
        # BEiT's keys have no bias: it adds the same to a query's scores for all keys, and the softmax undoes that.
        weights.pop(name.replace("key.weight", "key.bias"), None)
        for other in ("query", "value"):
            weights.setdefault(name.replace("key.weight", f"{other}.bias"), weights[name].new_zeros(len(weights[name])))
    return _encoder_export(model, config, "Beit", weights, "beit.")


def to_dinov2(model: MAEPreTrainedModel) -> Export:
    """transformers' `Dinov2Model`, or `Dinov2ForImageClassification` from a classifier on the class token."""
    _require(model, "dinov2", square=True, cls_pooling=True)
    fields = _shared_fields(model)
    width, intermediate = fields["hidden_size"], fields.pop("intermediate_size")
    if intermediate % width:
        raise InputError(
            f"`--to dinov2` needs an `intermediate_size` that is a multiple of `hidden_size` = {width}, but it is "
            f"{intermediate}; take another format."
        )
    config = Dinov2Config(
        **fields,
        mlp_ratio=intermediate // width,
        qkv_bias=model.config.qkv_bias,
        drop_path_rate=model.config.drop_path_rate,
        layerscale_value=1.0,
        use_mask_token=False,
    )
    weights = export_weights(model, DINOV2)
    for name in list(weights):
        if match := re.fullmatch(r"(.*)\.norm([12])\.weight", name):
            weights[f"{match[1]}.layer_scale{match[2]}.lambda1"] = torch.ones_like(weights[name])
    if "classifier.weight" in weights:  # it looks at the class token and at the mean of the patch tokens, side by side
        head = weights["classifier.weight"]
        weights["classifier.weight"] = torch.cat([head, torch.zeros_like(head)], 1)
    return _encoder_export(model, config, "Dinov2", weights, "dinov2.")


TIMM_FIELDS = {
    **dict(img_size="image_size", patch_size="patch_size", in_chans="num_channels", embed_dim="hidden_size"),
    **dict(depth="num_hidden_layers", num_heads="num_attention_heads", qkv_bias="qkv_bias"),
    "drop_path_rate": "drop_path_rate",
}


def to_timm(model: MAEPreTrainedModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`(config.json, weights)` of timm's `VisionTransformer`; encoder or classifier, with either pooling.

    Raises:
        InputError: timm's model has no such activation or epsilon.
    """
    config = model.config
    for name, only in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if getattr(config, name) != only:
            raise InputError(
                f"`--to timm` needs `{name}` = {only}, but it is {getattr(config, name)}; take `--to vit`."
            )
    classifier = isinstance(model, MAEForImageClassification)
    num_classes = config.num_labels if classifier else 0
    pool = "avg" if config.pooling == "mean" else "token"
    args = {timm: getattr(config, ours) for timm, ours in TIMM_FIELDS.items()}
    args |= {name: pair(args[name]) for name in ("img_size", "patch_size")}
    args |= dict(mlp_ratio=_ratio(config.intermediate_size, config.hidden_size), global_pool=pool)
    args["fc_norm"] = classifier and pool == "avg"  # else timm would pool before its final LayerNorm
    details = dict(
        architecture="vit_base_patch16_224",  # any of the family: `model_args` replaces all that differs
        num_classes=num_classes,
        num_features=config.hidden_size,
        global_pool=pool,
        model_args=args,
        pretrained_cfg=dict(
            num_classes=num_classes,
            input_size=[config.num_channels, *pair(config.image_size)],
            fixed_input_size=True,
            first_conv="patch_embed.proj",
            classifier="head",
        ),
    )
    if classifier:
        details["label_names"] = [config.id2label[i] for i in range(num_classes)]
    ours = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "fc_norm.", "head.")
    weights = {name: value for name, value in export_weights(model, TIMM).items() if name.startswith(ours)}
    return details, weights


def _ratio(part: int, whole: int) -> float:
    """The number that timm multiplies `whole` by and rounds down, to get `part`: a quotient may fall just below."""
    ratio = part / whole
    return ratio if int(whole * ratio) == part else math.nextafter(ratio, math.inf)


def _shared_fields(model: MAEPreTrainedModel) -> dict[str, Any]:
    """The fields that have the same name in all of transformers' ViTs."""
    config = model.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    fields = {name: getattr(config, name) for name in (*names, "initializer_range", "layer_norm_eps", "num_channels")}
    fields |= {name: _simplest(pair(getattr(config, name))) for name in ("image_size", "patch_size")}
    if isinstance(model, MAEForImageClassification):
        fields |= dict(id2label=config.id2label, label2id=config.label2id, problem_type=config.problem_type)
    return fields


def _require(model: MAEPreTrainedModel, target: str, square: bool = False, cls_pooling: bool = False) -> None:
    config = model.config
    if cls_pooling and isinstance(model, MAEForImageClassification) and config.pooling != "cls":
        raise InputError(
            f"`--to {target}` has no classifier with `pooling` {config.pooling!r}; take `--to beit` or `timm`."
        )
    for name in ("image_size", "patch_size") if square else ():
        if not isinstance(_simplest(pair(getattr(config, name))), int):
            raise InputError(
                f"`--to {target}` needs square images and patches, but `{name}` is {getattr(config, name)}; take "
                "`--to vit`, `timm` or `onnx`."
            )


def _encoder_export(
    model: MAEPreTrainedModel, config: PreTrainedConfig, name: str, weights: dict[str, torch.Tensor], prefix: str
) -> Export:
    """The classifier, or the encoder alone, whose parameters have no `prefix`."""
    if isinstance(model, MAEForImageClassification):
        config.architectures = [f"{name}ForImageClassification"]
        return Export(config, weights)
    config.architectures = [f"{name}Model"]
    return Export(config, {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
