# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Turn images into features: columns path (index, where images have no paths), label (if there is one) and
features. Any encoder that AutoModel loads. Stopped, the same command goes on where it was.

examples:
  clmae embed out/cl-mae ./my_photos --output features.parquet
  clmae embed out/cl-mae uoft-cs/cifar10 --split test --output cifar10.npy --plot pca
  clmae embed facebook/dinov2-base ./my_photos --output dinov2.parquet --batch_size 64 --device cuda:1
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from transformers import PreTrainedModel, set_seed
from transformers.hf_argparser import HfArg

from clmae.cli.options import CommandParser
from clmae.configuration.errors import InputError
from clmae.evaluation.features import default_feature, load_encoder, model_fingerprint, stream_features
from clmae.evaluation.images import LabelledImages, load_image_processor, readable_images
from clmae.model_cards.files import replacing, write_whole
from clmae.model_cards.record import read_json
from clmae.model_cards.run import read_model_config
from clmae.training.data import LABEL_NAMES, check_on_bad_image, load_image_dataset, take_samples
from clmae.training.integrity import run_lock
from clmae.training.pictures import save_figure

PART_ROWS = 4096  # of a part and a row group, up to a whole batch
MAX_POINTS = 3000  # of a picture


@dataclass
class EmbedArguments:
    """Which images, which features of them, and where to write these."""

    output: str = HfArg(help="A .parquet file; or a .npy file, with paths and labels in a .csv file beside it.")
    split: str = HfArg(default="train", help="Split to read, of data that has several.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of a Hub dataset that has several.")
    image_column: str | None = HfArg(default=None, help="Column of the images, if there are several.")
    label_column: str | None = HfArg(default=None, help="Column of the labels, if there are several.")
    max_samples: int | None = HfArg(default=None, help="At most this many images, drawn with a fixed seed.")
    on_bad_image: str = HfArg(default="raise", help="raise, or skip: leave out broken images; reads all once before.")
    feature: str | None = HfArg(default=None, help="pooler_output (our default), cls (others'), mean or cls+mean.")
    layer: int | None = HfArg(default=None, help="Take tokens after this block, before the last LayerNorm; -1: last.")
    batch_size: int = HfArg(default=256, help="Images per forward pass.")
    num_workers: int = HfArg(default=0, help="Processes that read images.")
    bf16: bool = HfArg(default=False, help="Encode in bfloat16.")
    device: str | None = HfArg(default=None, help="Where to compute: cpu, cuda:1 ...; a GPU if there is one.")
    plot: Literal["pca", "umap"] | None = HfArg(default=None, help="Draw the features into a .png file beside them.")


class EmbedData(NamedTuple):
    """Images without their labels; and what is written beside the features of each, as arrow tables of one column."""

    images: LabelledImages
    columns: dict[str, datasets.Dataset]


def run(argv: Sequence[str]) -> int:
    """Encodes images a part at a time, and makes one file of the parts at the end."""
    parser = CommandParser("clmae embed", __doc__, {"options": EmbedArguments}, takes_recipe=False)
    parser.usage = "clmae embed MODEL DATA --output FILE [--option value ...]"
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of an encoder.")
    parser.add_argument("data", metavar="DATA", help="Images: Hub id, folder, parquet file.")
    args, positional = parser.read(argv)
    _check(args)
    read_model_config(positional.model, "MODEL")  # what is wrong is reported before images are read
    data = _load_data(positional.model, positional.data, args)
    model = _load_model(positional.model, args.device)
    if args.plot is not None and len(data.images) < 3:
        raise InputError(f"`plot` needs at least 3 images, and DATA {positional.data!r} has {len(data.images)}.")
    folder = Path(f"{args.output}.parts")
    with run_lock(folder, "output"):
        _keep_request(_describe(model, data, args), folder, args.output)
        written = []
        try:
            _write_parts(model, data, args, folder)
            written = _merge(folder, Path(args.output), len(data.images), args.plot)
        except KeyboardInterrupt:
            print("Stopped. The same command goes on from here.")
            raise
        finally:
            if written or not _parts(folder):  # nothing to go on with
                shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {', '.join(map(str, written))}: {len(data.images)} images")
    return 0


def _check(args: EmbedArguments) -> None:
    check_on_bad_image(args.on_bad_image)
    if Path(args.output).suffix not in (".parquet", ".npy"):
        raise InputError(f"`output` is {args.output!r}; give the name of a .parquet or .npy file.")
    if args.plot == "umap" and importlib.util.find_spec("umap") is None:
        raise InputError("--plot umap needs the package umap-learn: pip install umap-learn; or take --plot pca.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("`clmae embed` runs in one process; start it without torchrun.")
    if args.batch_size < 1:
        raise InputError(f"`batch_size` is {args.batch_size}; give 1 or more.")


def _load_model(name: str, device: str | None) -> PreTrainedModel:
    set_seed(0)  # of layers that a checkpoint lacks, as a pooler, so that the model is the same when it goes on
    model = load_encoder(name, "MODEL")
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:  # torch's, of a name and of a device that is not there
        raise InputError(f"`device` is {device!r}, which cannot be used: {error}") from error


def _load_data(model: str, source: str, args: EmbedArguments) -> EmbedData:
    config_name, image_column = args.dataset_config_name, args.image_column
    dataset, image_column = load_image_dataset(source, args.split, config_name=config_name, image_column=image_column)
    index = take_samples(datasets.Dataset.from_dict({"index": np.arange(len(dataset))}), args.max_samples)
    dataset = take_samples(dataset, args.max_samples)
    label_column = _label_column(dataset, args.label_column)
    try:
        processor, num_channels = load_image_processor(model)
    except OSError as error:
        raise InputError(f"MODEL {model!r} has no image processor: {error}") from error
    if args.on_bad_image == "skip":
        good = readable_images(dataset, image_column, num_channels)
        dataset, index = dataset.select(good), index.select(good)
    options: dict[str, Any] = dict(image_column=image_column, num_channels=num_channels, ignore_labels=True)
    images = LabelledImages(dataset, processor, **options)
    columns = {"index": index}
    flat = dataset.select_columns([image_column]).flatten()
    if flat.column_names[-1] == f"{image_column}.path" and flat[0][f"{image_column}.path"]:
        columns = {"path": flat.select_columns([f"{image_column}.path"])}
    if label_column is not None:
        columns["label"] = dataset.select_columns([label_column])
    return EmbedData(images, {name: column.with_format("arrow") for name, column in columns.items()})


def _label_column(dataset: datasets.Dataset, name: str | None) -> str | None:
    """The column that is copied, of any type: the one named, else the classes, else one that is called like labels."""
    features = dataset.features
    if name is not None and name not in features:
        raise InputError(f"`label_column` is {name!r}, but the columns are {', '.join(map(repr, features))}.")
    if name is not None:
        return name
    columns = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    columns = columns or [column for column in LABEL_NAMES if column in features]
    if len(columns) > 1:
        raise InputError(f"DATA has several columns of labels: set `label_column` to one of {columns}.")
    return columns[0] if columns else None


# -- parts ------------------------------------------------------------------------------------------------------------


def _describe(model: PreTrainedModel, data: EmbedData, args: EmbedArguments) -> dict[str, Any]:
    """All that the features depend on, as JSON."""
    fingerprints = [column._fingerprint for column in data.columns.values()]
    options: dict[str, Any] = {name: getattr(args, name) for name in ("layer", "bf16", "batch_size", "label_column")}
    described = {"model": model_fingerprint(model), "data": [data.images.fingerprint(), fingerprints]}
    described |= options | {"feature": args.feature or default_feature(model, args.layer)}
    return json.loads(json.dumps(described))


def _keep_request(request: dict[str, Any], folder: Path, output: str) -> None:
    """Writes what the parts are made of, or checks that it is what was written; InputError if it is not."""
    earlier = read_json(folder / "request.json")
    if earlier is None or not _parts(folder):
        write_whole(folder / "request.json", json.dumps(request, indent=2) + "\n")
    elif earlier != request:
        changed = ", ".join(name for name in request if request[name] != earlier.get(name))
        raise InputError(
            f"`output` {output!r} was begun with other settings ({changed}), and {str(folder)!r} holds its parts: go "
            "on with the same model, data and options, name another file, or remove that folder to begin anew."
        )


def _parts(folder: Path) -> list[Path]:
    """The parts that are there, in order; each is whole, and none before it is missing."""
    return sorted(folder.glob("*.parquet"))


def _write_parts(model: PreTrainedModel, data: EmbedData, args: EmbedArguments, folder: Path) -> None:
    """Encodes the images of the parts that are not there."""
    rows = args.batch_size * max(1, PART_ROWS // args.batch_size)  # the same batches, wherever it begins
    start, size = sum(pq.read_metadata(part).num_rows for part in _parts(folder)), len(data.images)
    options = {name: getattr(args, name) for name in ("feature", "layer", "bf16", "batch_size", "num_workers")}
    batches = []
    for features, _ in stream_features(model, data.images, start=start, **options):
        if not torch.isfinite(features).all():
            raise InputError(
                f"the features of images {start} to {min(start + rows, size) - 1} hold NaN or infinity; look at the "
                "model's weights, or leave out --bf16."
            )
        batches.append(features)
        end = start + sum(map(len, batches))
        if end == min(start + rows, size):
            _write_part(folder / f"{start:012}.parquet", torch.cat(batches).numpy(), data, slice(start, end))
            batches, start = [], end


def _write_part(path: Path, values: np.ndarray, data: EmbedData, rows: slice) -> None:
    width = values.shape[1]
    features: dict[str, Any] = {name: next(iter(column.features.values())) for name, column in data.columns.items()}
    features["features"] = datasets.List(datasets.Value("float32"), length=width)
    columns: dict[str, Any] = {name: column[rows].column(0) for name, column in data.columns.items()}
    columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    schema = datasets.Features(features).arrow_schema  # with the names of classes
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary, use_dictionary=False)


# -- the file ---------------------------------------------------------------------------------------------------------


def _merge(folder: Path, output: Path, size: int, plot: str | None) -> list[Path]:
    """Makes one file of the parts, and a picture; the paths written."""
    parts, merged, written = _parts(folder), folder / "merged", [output]
    if output.suffix == ".parquet":
        with pq.ParquetWriter(merged, pq.read_schema(parts[0]), use_dictionary=False) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part))
    else:
        written.append(output.with_suffix(".csv"))
        with replacing(written[1]) as csv, merged.open("wb") as file:
            shape = size, pq.read_schema(parts[0]).field("features").type.list_size
            np.lib.format.write_array_header_1_0(file, dict(descr="<f4", fortran_order=False, shape=shape))
            for part in parts:
                table = pq.read_table(part)
                file.write(_values(table).astype("<f4", copy=False).tobytes())
                _named(table).to_csv(csv, index=False, mode="a", header=part == parts[0], lineterminator="\n")
    os.replace(merged, output)  # on the same disk, because `folder` is beside it
    if plot is not None:
        step = math.ceil(size / MAX_POINTS)
        points = pa.concat_tables(table.take(np.arange(0, len(table), step)) for table in map(pq.read_table, parts))
        written.append(save_figure(features_figure(points, plot), output.with_suffix(".png")))
    return written


def _values(table: pa.Table) -> np.ndarray:
    """Features `(n, d)`."""
    return table["features"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


def _named(table: pa.Table) -> pd.DataFrame:
    """Paths and labels, classes by their names; a number that is no class (-1) stays a number."""
    names = getattr(datasets.Features.from_arrow_schema(table.schema).get("label"), "names", [])
    frame = table.drop_columns("features").to_pandas()
    if names:
        frame["label"] = [names[i] if i in range(len(names)) else i for i in table["label"].to_pylist()]
    return frame


def features_figure(table: pa.Table, method: str) -> Figure:
    """A point for each image, by PCA or UMAP of its features, coloured by its label if it has one."""
    reducer = PCA(2, random_state=0) if method == "pca" else importlib.import_module("umap").UMAP(random_state=0)
    x, y = reducer.fit_transform(_values(table)).T
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=f"{method.upper()} 1", ylabel=f"{method.upper()} 2", title=f"{len(x)} images")
    rows = _named(table)
    codes, names = pd.factorize(rows["label"].astype(str) if "label" in rows else np.zeros(len(x)), sort=True)
    colours = 10 if len(names) <= 10 else 20  # of the map; of more classes some share one
    points = axes.scatter(x, y, s=6, c=codes % colours, cmap=f"tab{colours}", vmin=0, vmax=colours - 1)
    if 1 < len(names) <= colours:
        handles, _ = points.legend_elements(num=[*range(len(names))])
        axes.legend(handles, names, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
