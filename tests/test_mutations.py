# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Mutated image files and configurations give an image or a model, or the error that says why not, in reasonable time.

A few of each kind; `MUTATIONS=2000 python -m pytest tests/test_mutations.py` tries more.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import time
import warnings

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForPreTraining

import clmae
from clmae.training.data import ImageDecodeError, decode_image

pytestmark = pytest.mark.slow
TRIES = settings(
    **dict(max_examples=int(os.environ.get("MUTATIONS", "60")), deadline=None, derandomize=True, database=None),
    suppress_health_check=list(HealthCheck),
)


def encoded_images() -> dict[str, list[bytes]]:
    """Small images by format, in the modes and compressions that take different ways through the decoders."""
    coarse = np.random.default_rng(0).uniform(0, 255, (24, 32, 3)).astype(np.uint8)
    picture = Image.fromarray(coarse).resize((48, 40))
    grey, palette, alpha = picture.convert("L"), picture.convert("P"), picture.convert("RGBA")
    turned, exif = dict(save_all=True, append_images=[picture.rotate(90)]), Image.Exif()
    exif[274] = 6
    deep = [(grey.convert(mode), {}) for mode in ("F", "I;16")]
    images = {
        "JPEG": [
            (picture, {"exif": exif}),
            (grey, {}),
            (picture, {"progressive": True}),
            (picture.convert("CMYK"), {}),
        ],
        "PNG": [(image, {}) for image in (picture, grey, palette, alpha, picture.convert("1"), grey.convert("I;16"))],
        "WEBP": [(picture, {}), (alpha, {"lossless": True}), (picture, turned)],
        "GIF": [(palette, {}), (palette, {"transparency": 3}), (picture, turned)],
        "TIFF": [
            *((picture, {"compression": c}) for c in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
            *deep,
            (picture.convert("LAB"), {}),
        ],
        "BMP": [(picture, {}), (palette, {}), (alpha, {}), (picture.convert("1"), {})],
    }
    encoded: dict[str, list[bytes]] = {}
    for kind, variants in images.items():
        for image, options in variants:
            image.save(buffer := io.BytesIO(), kind, **options)
            encoded.setdefault(kind, []).append(buffer.getvalue())
    return encoded


IMAGES = encoded_images()


@st.composite
def mutated(draw: st.DrawFn, sources: st.SearchStrategy[bytes]) -> bytes:
    """Bytes overwritten, cut out, doubled or cut off, one to three times, half of them in the header."""
    data = draw(sources)
    for _ in range(draw(st.integers(1, 3))):
        end = min(len(data), 64) if draw(st.booleans()) else len(data)
        at, count = draw(st.integers(0, max(end - 1, 0))), draw(st.sampled_from((1, 2, 4, 16, 64)))
        new = draw(
            st.one_of(st.just(b""), st.binary(min_size=count, max_size=count), st.just(2 * data[at : at + count]))
        )
        data = data[:at] if draw(st.integers(0, 5)) == 0 else data[:at] + new + data[at + count :]
    return data


@pytest.mark.parametrize("kind", IMAGES)
def test_mutated_images(kind):
    @TRIES
    @given(mutated(st.sampled_from(IMAGES[kind])), st.booleans())
    @example(IMAGES[kind][0], False)
    def check(data, reduced):
        begin = time.perf_counter()
        try:
            pixels = decode_image(data, 3, (lambda height, width: 4.0) if reduced else None)
        except ImageDecodeError:
            return
        finally:
            assert time.perf_counter() - begin < 10
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert 0 not in pixels.shape
        assert np.isfinite(pixels).all()
        assert 0 <= pixels.min() <= pixels.max() <= (1 if pixels.dtype == np.float32 else 255)

    check()


SIZES = dict(
    **dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4),
    **dict(decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2),
)
# fmt: off
VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 7, 0.5, -0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf, 2**31, 10**9, 10**30,
    -(10**9), "", "gelu", "float16", "x" * 5000, "\u0000", "../../etc/passwd", [], [1], [8, 8], [1, 2, 3], [None],
    ["a", "b"], {}, {"a": 1}, {"rope_type": "x"}, [[[]]] * 3,
)
FOREIGN = (  # entries that transformers or Python know
    "dtype", "torch_dtype", "architectures", "id2label", "label2id", "num_labels", "attn_implementation", "auto_map",
    "_attn_implementation", "output_attentions", "output_hidden_states", "return_dict", "model_type", "problem_type",
    "out_features", "out_indices", "_out_features", "_out_indices", "stage_names", "quantization_config",
    "tie_word_embeddings", "chunk_size_feed_forward", "is_encoder_decoder", "transformers_version", "_commit_hash",
    "name_or_path", "rope_scaling", "sub_configs", "check", "num_visible", "grid_size", "base_model_tp_plan",
    "__class__", "__dict__", "use_return_dict", "_stacks", "text_config",
)
# fmt: on


@pytest.mark.parametrize("family", clmae.FAMILIES)
def test_mutated_configurations(family, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging._get_library_root_logger(), "level", logging.CRITICAL + 1)
    config_class = clmae.FAMILIES[family][0]
    original = json.loads(config_class(**SIZES).to_json_string(use_diff=False))
    names = st.sampled_from([*original, *FOREIGN])
    scaled = st.tuples(
        st.sampled_from([name for name, value in original.items() if type(value) in (int, float)]),
        st.sampled_from((-1, 2, 10, 1000, 10**9, 0.1)),
    )

    @TRIES
    @given(
        st.dictionaries(names, st.sampled_from(VALUES), max_size=3),
        st.lists(scaled, max_size=1),
        st.sets(st.sampled_from(list(original)), max_size=1),
        st.integers(0, 9),
        st.data(),
    )
    def check(changed, scaled, dropped, damaged, draw):
        config = {name: value for name, value in original.items() if name not in dropped} | changed
        config |= {name: original[name] * factor for name, factor in scaled}
        content = json.dumps(config).encode()
        content = draw.draw(mutated(st.just(content))) if damaged == 0 else content
        (tmp_path / "config.json").write_bytes(content)
        begin = time.perf_counter()
        try:
            with torch.device("meta"), warnings.catch_warnings():  # no memory for the weights
                warnings.simplefilter("ignore")
                AutoModelForPreTraining.from_config(config_class.from_pretrained(tmp_path))
        except ValueError:
            pass
        except OSError as error:
            if "valid JSON" not in str(error):
                raise
        assert time.perf_counter() - begin < 30

    check()
