# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Convert weights of facebookresearch/mae, CL-MAE's authors, timm or transformers' ViTMAE.

examples:
  clmae convert mae_visualize_vit_base.pth out/mae-base
  clmae convert checkpoint-799.pth out/cl-mae --num_attention_heads 8
  clmae convert ./vit-mae-base out/mae-base
"""

from __future__ import annotations

import argparse
import inspect
import math
import pathlib
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, BitImageProcessor, ViTMAEConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict

from clmae import FAMILIES
from clmae.cli.folders import new_folder
from clmae.cli.options import CommandParser, config_options, given
from clmae.configuration import CLMAEConfig, MAEConfig
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards.record import read_json
from clmae.modeling import MAEImageProcessor
from clmae.modeling.conversion import CL_MAE_AUTHORS, TIMM, Import, read_weights

# Fields of the configuration that weights do not tell, or not always; each is an option.
FIELDS = (
    *("num_attention_heads", "decoder_num_attention_heads", "masker_num_attention_heads", "image_size"),
    *("layer_norm_eps", "norm_pix_loss", "mask_ratio"),
    *("soft_masking", "gauss_loss_weight", "diversity_loss_weight"),
)
# Fields of the configuration that weights in a .pth do not tell, and our own export writes beside them.
NOT_IN_WEIGHTS = (
    *("num_attention_heads", "decoder_num_attention_heads", "layer_norm_eps", "hidden_act"),
    *("image_size", "norm_pix_loss", "mask_ratio", "pooling"),
)
NOT_IN_MASKING_NET = ("masker_num_attention_heads", "masker_layer_norm_eps", *CL_MAE_AUTHORS)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def run(argv: Sequence[str]) -> int:
    """Converts a checkpoint of another project into a folder of ours, and reports what became of each weight."""
    parser = CommandParser(
        "clmae convert",
        __doc__,
        {"what the weights do not tell": config_options(CLMAEConfig, FIELDS)},
        takes_recipe=False,
    )
    parser.usage = "clmae convert SRC DST [--option value ...]"
    parser.add_argument("source", metavar="SRC", help="File (.pth, .safetensors), or folder of transformers or timm.")
    parser.add_argument("destination", metavar="DST", help="Folder to write.")
    parser.add_argument("--ignore_unexpected", action="store_true", help="Drop weights that have no place here.")
    fields, args = parser.read(argv)
    source = Path(args.source)
    weights, known = read_source(source)
    imported = read_weights(weights, **(known | given(fields)))
    print(report(imported))
    if imported.unexpected and not args.ignore_unexpected:
        raise InputError(
            "a model with the unexpected weights computes something else than ours would; convert without them by "
            "--ignore_unexpected."
        )
    with new_folder(args.destination) as folder:
        imported.load().save_pretrained(folder)
        save_image_processor(source, imported, folder)
    print(f"wrote {args.destination}: a {imported.model_class.__name__}, for its from_pretrained or an Auto class.")
    return 0


def report(imported: Import) -> str:
    """What was loaded, missing, unexpected and assumed, for the reader."""

    def listed(names: list[str]) -> str:
        return f"{len(names)}{': ' if names else ''}{', '.join(names[:10])}{' …' if len(names) > 10 else ''}"

    lines = [
        f"layout: {imported.layout.name}; read as a {imported.model_class.__name__}",
        f"loaded: {len(imported.loaded)} weights",
        f"missing: {listed(imported.missing)}",
        f"unexpected: {listed(imported.unexpected)}",
    ]
    if imported.assumed:
        assumed = ", ".join(f"{name} = {value}" for name, value in imported.assumed.items())
        lines.append(f"not in the weights, and assumed: {assumed} (an option of the same name overrides each)")
    return "\n".join(lines)


def save_image_processor(source: Path, imported: Import, folder: Path) -> None:
    """The source's image processor if it has one, and ImageNet's for the layouts that come without."""
    from clmae.training.data import make_image_processor  # the help does not wait for it

    file, theirs, config = source / "preprocessor_config.json", timm_model(source), imported.config
    if file.is_file():  # transformers would read a folder of timm by timm
        processor = AutoImageProcessor.from_pretrained(source if theirs is None else file)
    elif theirs is not None:
        processor = timm_processor(theirs)
    elif imported.layout is TIMM and config.num_channels == 3:
        # As facebookresearch/mae evaluates its models: ImageNet's statistics, resized to 256, cropped to 224.
        mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        processor = make_image_processor(pair(config.image_size), 3, mean, std, crop_ratio=0.875)
        print("image processor: ImageNet's mean and standard deviation, resized to 8/7 and cropped, as in MAE's code")
    else:
        return
    if config.num_channels == 1 and type(processor) is BitImageProcessor:
        processor = MAEImageProcessor(**{**processor.to_dict(), "do_grayscale": True})
    processor.save_pretrained(folder)


# -- reading ------------------------------------------------------------------------------------------------------


def read_source(source: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """`(weights, fields of the configuration that stand beside them)` of a file or folder."""
    if not source.exists():
        raise InputError(f"SRC {str(source)!r} does not exist; give a file or folder (`hf download` fetches one).")
    if source.is_dir():
        return read_folder(source)
    return (load_file(source), {}) if source.suffix == ".safetensors" else read_pickle(source)


def read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights of a transformers or timm folder, sharded or not, and what its `config.json` tells."""
    config = read_json(folder / "config.json") or {}
    if config.get("model_type") in FAMILIES:
        raise InputError(f"SRC {str(folder)!r} is a model of this package already.")
    known = {}
    if config.get("model_type") == "vit_mae":
        vit_mae = ViTMAEConfig.from_dict(config)  # its defaults stand in for what the file leaves out
        known = {name: getattr(vit_mae, name) for name in inspect.get_annotations(MAEConfig) if hasattr(vit_mae, name)}
    elif (theirs := timm_model(folder)) is not None:
        known = timm_fields(theirs)
    for name in WEIGHT_FILES:
        index = read_json(folder / f"{name}.index.json")
        files = [name] if index is None else sorted(set(index["weight_map"].values()))
        if index is not None or (folder / name).is_file():
            parts = [read_source(folder / Path(file).name)[0] for file in files]
            return {name: tensor for part in parts for name, tensor in part.items()}, known
    raise InputError(f"SRC {str(folder)!r} holds none of {', '.join(WEIGHT_FILES)}; name the weights' file itself.")


def timm_model(folder: Path) -> Any:
    """The model that timm would make of a folder, without weights; `None` for a folder that is not timm's.

    Raises:
        InputError: timm is missing, does not know it, or it is no plain vision transformer.
    """
    config = (read_json(folder / "config.json") if folder.is_dir() else None) or {}
    if "architecture" not in config:
        return None
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"SRC {str(folder)!r} is timm's, and only timm knows what its names stand for: pip install 'clmae[export]'."
        ) from error
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
        raise InputError(f"SRC {str(folder)!r} is timm's, but timm cannot make a model of it: {error}") from error
    model.drop_path_rate = config.get("model_args", {}).get("drop_path_rate", 0.0)
    model.label_names = config.get("label_names")
    if type(model) is not timm.models.VisionTransformer:
        raise InputError(f"SRC {str(folder)!r} is a {type(model).__name__} of timm, and no VisionTransformer.")
    return model


def timm_fields(model: Any) -> dict[str, Any]:
    """Fields of the configuration that timm's weights do not tell.

    Raises:
        InputError: No field of ours says what the model does.
    """
    height, width = model.patch_embed.img_size
    act, norm = model.blocks[0].mlp.act, model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    acts = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
    pools = {"token": "cls", "avg": "mean", "": MAEConfig.pooling}  # without pooling there is nothing to be equal to
    name = "GELUTanh" if getattr(act, "approximate", "none") == "tanh" else type(act).__name__
    for value, known, what in ((name, acts, "activation"), (model.global_pool, pools, "global_pool")):
        if value not in known:
            raise InputError(
                f"timm's {what} {value!r} has no counterpart here; these have one: {', '.join(filter(None, known))}."
            )
    fields = dict(
        num_attention_heads=model.blocks[0].attn.num_heads,
        image_size=height if height == width else [height, width],
        hidden_act=acts[name],
        layer_norm_eps=getattr(norm, "eps", MAEConfig.layer_norm_eps),
        pooling=pools[model.global_pool],
        drop_path_rate=float(model.drop_path_rate),
    )
    names = model.label_names
    if isinstance(names, list) and len(names) == model.num_classes and model.num_classes:
        fields |= dict(id2label=dict(enumerate(names)), label2id={label: i for i, label in enumerate(names)})
    return fields


def timm_processor(model: Any) -> BitImageProcessor:
    """The image processor that shows images as timm does for this model; where none can, the nearest, with a note."""
    import timm

    from clmae.training.data import make_image_processor

    view = timm.data.resolve_model_data_config(model)
    channels, *size = view["input_size"]
    processor = make_image_processor(tuple(size), channels, list(view["mean"]), list(view["std"]))
    height, width = (math.floor(side / view["crop_pct"]) for side in size)
    shorter = view["crop_mode"] == "center" and height == width
    processor.size = SizeDict(shortest_edge=height) if shorter else SizeDict(height=height, width=width)
    processor.resample = PILImageResampling[view["interpolation"].upper()]
    if not shorter and view["crop_mode"] != "squash":
        print(f"image processor: timm's crop mode {view['crop_mode']!r} does not exist here; both sides are resized")
    return processor


def read_pickle(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights of a `.pth`, and what the arguments of the run in it tell; nothing in the file is executed."""
    payload = load_safely(path)
    weights = payload
    if isinstance(payload, dict):
        names = ("model", "state_dict", "model_state_dict")
        weights = next((payload[name] for name in names if isinstance(payload.get(name), dict)), payload)
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(f"SRC {str(path)!r} holds no weights by name, under `model` or `state_dict` or directly.")
    known: dict[str, Any] = {}
    if isinstance(payload.get("args"), argparse.Namespace):
        for name, kind in (("norm_pix_loss", bool), ("mask_ratio", float)):
            value = getattr(payload["args"], name, None)
            value = value.item() if isinstance(value, np.generic) else value
            known |= {name: value} if isinstance(value, kind) else {}
    if isinstance(payload.get("config"), dict):
        known |= {name: payload["config"][name] for name in not_in_weights(weights) if name in payload["config"]}
    return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}, known


# What the arguments of a run may hold beside plain values, under the names of any version of Python and numpy. Paths
# are read as pure ones, which touch no file; numpy's scalars are those that hold no objects.
_ARGUMENTS: list[Any] = [
    argparse.Namespace,
    *(
        (getattr(pathlib, f"Pure{system}Path"), f"{module}.{pure}{system}Path")
        for module in ("pathlib", "pathlib._local")
        for system in ("Posix", "Windows")
        for pure in ("", "Pure")
    ),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdgU"},
]


def not_in_weights(weights: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """Fields of the configuration that these weights, of facebookresearch/mae or CL-MAE's authors, do not tell."""
    return NOT_IN_WEIGHTS + (NOT_IN_MASKING_NET if "masking_net.cls_token" in weights else ())


def load_safely(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors, plain containers and `_ARGUMENTS`, and refused otherwise."""
    with torch.serialization.safe_globals(_ARGUMENTS):
        try:
            # Mapped into memory, which files from before PyTorch 1.6 cannot be.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            culprit = re.search(r"GLOBAL (\S+)", str(error))
            what = f"`{culprit[1]}`" if culprit else "something else than tensors"
            raise InputError(
                f"SRC {str(path)!r} is refused, and nothing in it was run: it holds {what}, and to load more than "
                "tensors could run code. If you trust the file, load it yourself and save the weights alone with "
                "`safetensors.torch.save_file`."
            ) from error
        except (RuntimeError, EOFError, OSError, TypeError, ValueError) as error:
            raise InputError(f"SRC {str(path)!r} cannot be read as a file of `torch.save`: {error}") from error
