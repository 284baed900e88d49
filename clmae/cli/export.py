# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Write a model for other libraries: transformers' own classes (loaded without clmae and without remote
code), timm, ONNX, or facebookresearch/mae. The result is run and compared before it is left there.

examples:
  clmae export --to vit out/cl-mae out/cl-mae-vit
  clmae export --to timm out/cl-mae out/cl-mae-timm
  clmae export --to onnx out/classifier out/classifier-onnx
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoImageProcessor, BaseImageProcessor, BitImageProcessor
from transformers.image_utils import PILImageResampling

from clmae import FAMILIES
from clmae.cli.convert import not_in_weights, read_source
from clmae.cli.folders import load_whole, new_folder
from clmae.cli.options import CommandParser
from clmae.configuration.configuration_mae import pair
from clmae.configuration.errors import InputError
from clmae.model_cards.run import read_model_config
from clmae.modeling.conversion import Export, read_weights, to_beit, to_dinov2, to_mae, to_timm, to_vit, to_vit_mae
from clmae.modeling.modeling_mae import MAEForImageClassification, MAEForPreTraining, MAEModel, MAEPreTrainedModel

TOLERANCE = 1e-4
Outputs = dict[str, torch.Tensor]
# What an exporter gives: the exported model's outputs for the source's images and noise, and how to load it.
Exported = tuple[Outputs, str]


class Source(NamedTuple):
    """What is exported, and what it is checked on: random `images` `(2, C, H, W)` and `noise` `(2, N)` in [0, 1)."""

    model: MAEPreTrainedModel
    processor: BaseImageProcessor | None
    images: torch.Tensor
    noise: torch.Tensor


def run(argv: Sequence[str]) -> int:
    """Writes a model for another library, and checks it against the source before it is left there."""
    parser = CommandParser("clmae export", __doc__)
    parser.add_argument("source", metavar="SRC", help="Folder or Hub id of a model of ours.")
    parser.add_argument("destination", metavar="DST", help="Folder to write.")
    parser.add_argument("--to", required=True, choices=EXPORTERS, help="What to write.")
    (args,) = parser.read(argv)
    for package in NEEDED.get(args.to, ()):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--to {args.to} needs the package {package}: pip install 'clmae[export]'.")
    source = load_source(args.source)
    with new_folder(args.destination) as folder, torch.no_grad():
        outputs, loading = EXPORTERS[args.to](source, folder)
        check(outputs, run_source(source))
        if source.processor is not None:
            stock_processor(source.processor).save_pretrained(folder)
    if source.processor is None:
        print(f"SRC {args.source!r} has no image processor, and so there is none in DST.")
    print(f"wrote {args.destination}\n{loading.format(args.destination)}")
    return 0


def load_source(name: str) -> Source:
    """The model as it was saved (encoder, autoencoder, classifier), in float32, and its image processor if any."""
    config = read_model_config(name, "SRC", trust_remote_code=False)  # ours are local; no other's code runs
    if config.model_type not in FAMILIES:
        raise InputError(
            f"SRC {name!r} cannot be exported: it is a {config.model_type!r}, and no model of ours; `clmae convert` "
            "makes one of a MAE checkpoint."
        )
    _, *classes, _ = FAMILIES[config.model_type]
    saved_as = (config.architectures or [""])[0]
    model_class = next((known for known in classes if known.__name__ == saved_as), classes[0])
    model = load_whole(model_class, name, "SRC", dtype=torch.float32)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        processor = None
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.num_channels, *pair(config.image_size), generator=generator)
    return Source(model, processor, images, torch.rand(2, config.num_patches, generator=generator))


def stock_processor(processor: BaseImageProcessor) -> BaseImageProcessor:
    """Itself, or in place of ours, which converts images to grey, one of transformers' that takes grey images."""
    if not getattr(processor, "do_grayscale", False):
        return processor
    fields = BitImageProcessor.valid_kwargs.__annotations__
    return BitImageProcessor(**{name: value for name, value in processor.to_dict().items() if name in fields})


# -- the check ----------------------------------------------------------------------------------------------------


def run_source(source: Source) -> Outputs:
    """All that an export may be compared by: class scores, features, and a reconstruction under the mask of `noise`."""
    model, _, images, noise = source
    if isinstance(model, MAEForImageClassification):
        return {"logits": model(images).logits}
    features = _encoder(model)(images)
    outputs = {"last_hidden_state": features.last_hidden_state, "pooler_output": features.pooler_output}
    if isinstance(model, MAEForPreTraining):
        model.config.mask_sampler = "random"  # the one that every library has
        reconstruction = model(images, noise=noise, **({"masking": "random"} if model.config.learns_masks else {}))
        outputs |= {"logits": reconstruction.logits, "loss": reconstruction.loss}
    return outputs


def check(outputs: Outputs, expected: Outputs) -> None:
    """Prints the largest difference of each of the exported model's outputs; InputError if one is too large."""
    for name, output in outputs.items():
        difference = (output - expected[name]).abs().max().item()
        print(f"max abs difference from the source, {name}: {difference:.1e}")
        if not difference <= TOLERANCE:
            raise InputError(
                f"the exported model's `{name}` differs from the source's by {difference:.1e}, more than {TOLERANCE}: "
                "nothing was written. Please report this with the model's config.json."
            )


def _encoder(model: MAEPreTrainedModel) -> MAEModel:
    return model if isinstance(model, MAEModel) else model.vit


# -- exporters ----------------------------------------------------------------------------------------------------


def transformers_exporter(convert: Callable[[MAEPreTrainedModel], Export]) -> Callable[..., Exported]:
    """The exporter to one of transformers' own models."""

    def write(source: Source, folder: Path) -> Exported:
        config, weights = convert(source.model)
        config.dtype = "float32"
        config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (name,) = config.architectures
        no_pooler = {"add_pooling_layer": False} if name == "ViTModel" else {}
        exported = load_whole(getattr(transformers, name), str(folder), "the export", **no_pooler)
        more = ", add_pooling_layer=False" if no_pooler else ""
        loading = f"load it with transformers.{name}.from_pretrained({{!r}}{more}), or the Auto class"
        result = exported(source.images, **({"noise": source.noise} if name == "ViTMAEForPreTraining" else {}))
        if name.endswith("Model") and source.model.config.pooling == "mean":
            loading += "; its features are last_hidden_state[:, 1:].mean(1)"
        compared = ("logits", "loss", "last_hidden_state")  # not `pooler_output`, which is another than ours
        return {key: result[key] for key in compared if result.get(key) is not None}, loading

    return write


def export_timm(source: Source, folder: Path) -> Exported:
    """timm's VisionTransformer, as `timm.create_model` reads it from a folder."""
    import timm

    details, weights = to_timm(source.model)
    if source.processor is not None:
        details["pretrained_cfg"] |= timm_view(source.processor, pair(source.model.config.image_size))
    (folder / "config.json").write_text(json.dumps(details, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    exported: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    loading = "load it with timm.create_model('local-dir:{}', pretrained=True)"
    if isinstance(source.model, MAEForImageClassification):
        return {"logits": exported(source.images)}, loading
    features = exported.forward_features(source.images)
    return {"last_hidden_state": features, "pooler_output": exported.forward_head(features)}, loading


def timm_view(processor: BaseImageProcessor, image_size: tuple[int, int]) -> dict[str, Any]:
    """What timm's `pretrained_cfg` says of how images are shown, for the view of this processor.

    timm resizes to `floor(side / crop_pct)`: the shorter side (`crop_mode` "center") or both ("squash").
    """
    channels = len(processor.image_mean)
    normalized = processor.do_normalize
    view: dict[str, Any] = dict(
        mean=list(processor.image_mean) if normalized else [0.0] * channels,
        std=list(processor.image_std) if normalized else [1.0] * channels,
        interpolation=PILImageResampling(processor.resample).name.lower(),
    )
    size = dict(processor.size)
    if "shortest_edge" in size:
        sides, view["crop_mode"] = [(min(image_size), size["shortest_edge"])], "center"
    elif "height" in size:
        sides, view["crop_mode"] = list(zip(image_size, (size["height"], size["width"]), strict=True)), "squash"
    else:
        return view
    crop_pct = min(shown / resized for shown, resized in sides)
    while any(math.floor(shown / crop_pct) < resized for shown, resized in sides):  # by a rounding of the quotient
        crop_pct = math.nextafter(crop_pct, 0)
    return view | {"crop_pct": crop_pct}


def export_onnx(source: Source, folder: Path) -> Exported:
    """The encoder or classifier as an ONNX graph of any batch size."""
    import onnxruntime

    classifier = isinstance(source.model, MAEForImageClassification)
    names = ["logits"] if classifier else ["last_hidden_state", "pooler_output"]
    path = folder / "model.onnx"
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports every step
        torch.onnx.export(
            source.model if classifier else _encoder(source.model),
            (source.images.repeat(2, 1, 1, 1),),
            str(path),
            input_names=["pixel_values"],
            output_names=names,
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch_size")}},
            dynamo=True,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(names, {"pixel_values": source.images.numpy()})
    loading = f"load it with onnxruntime.InferenceSession('{{}}/model.onnx'): pixel_values -> {', '.join(names)}"
    return dict(zip(names, map(torch.from_numpy, outputs), strict=True)), loading


def export_mae(source: Source, folder: Path) -> Exported:
    """A `.pth` in the layout of facebookresearch/mae and CL-MAE's authors, read back as `clmae convert` reads it."""
    path = folder / "mae.pth"
    weights = to_mae(source.model)
    fields = {name: getattr(source.model.config, name) for name in not_in_weights(weights)}
    torch.save({"model": weights, "config": fields}, path)
    weights, known = read_source(path)
    heads = fields["num_attention_heads"]
    loading = f"load {{}}/mae.pth with torch.load: its `model` is a state_dict (num_heads {heads})"
    return run_source(source._replace(model=read_weights(weights, **known).load())), loading


EXPORTERS: dict[str, Callable[..., Exported]] = {
    "vit": transformers_exporter(to_vit),
    "vit_mae": transformers_exporter(to_vit_mae),
    "beit": transformers_exporter(to_beit),
    "dinov2": transformers_exporter(to_dinov2),
    "timm": export_timm,
    "onnx": export_onnx,
    "mae": export_mae,
}
NEEDED = {"timm": ("timm",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
