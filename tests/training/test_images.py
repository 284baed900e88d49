# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Decoding, cropping, resizing and normalising of single images."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tvF

from clmae.training import images
from clmae.training.images import (
    ImageDecodeError,
    center_crop_box,
    center_view,
    crop_and_resize,
    decode_image,
    normalize,
    random_resized_crop_box,
    sample_generator,
    scale_box,
)


def encode(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **kwargs)
    return buffer.getvalue()


def noise_image(height=24, width=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# -- decoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
@pytest.mark.parametrize(("num_channels", "target"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_every_8_bit_mode(mode, num_channels, target):
    opaque = Image.new("LAB", (32, 24), (128, 140, 90)) if mode == "LAB" else noise_image().convert(mode)
    array = decode_image(opaque, num_channels)
    assert array.shape == (24, 32, num_channels)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    assert array.flags.writeable
    if num_channels == 4:
        assert (array[..., 3] == 255).all()
    expected = np.array(opaque.convert("RGB").convert(target))
    np.testing.assert_allclose(array.squeeze(), expected, atol=1)  # grey: PIL's own ways differ by rounding


@pytest.mark.parametrize("mode", ["I;16", "I"])
@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_16_bits_are_scaled_and_not_clipped(mode, num_channels):
    pixels = np.array([[0, 257, 32768], [40000, 60000, 65535]], dtype=np.uint16)
    image = Image.fromarray(pixels.astype(np.int32) if mode == "I" else pixels)
    assert image.mode == mode
    array = decode_image(encode(image, "TIFF"), num_channels)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array[..., 0], pixels / 65535, atol=1e-7)
    assert (array[..., 3:] == 1).all()


def test_float_mode():
    pixels = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(pixels), "TIFF"), 3)[..., 1], pixels)
    for wrong in (pixels * 255, pixels - 0.1, np.where(pixels > 0.5, np.nan, pixels)):
        with pytest.raises(ImageDecodeError, match=r"float values go from .* scale them to \[0, 1\]"):
            decode_image(Image.fromarray(wrong), 1)


def test_int32_beyond_16_bits_is_an_error():
    with pytest.raises(ImageDecodeError, match=r"integer pixels go from 0 to 70000; save it with 16 bits"):
        decode_image(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), 1)


def test_transparency_is_laid_over_white():
    rgba = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    rgba.paste((0, 0, 100, 255), (0, 0, 2, 4))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for image, opaque in ((encode(rgba), (0, 0, 100)), (rgba, (0, 0, 100))):
        array = decode_image(image, 3)
        assert (array[:, :2] == opaque).all()
        assert (array[:, 2:] == 255).all()
    assert (decode_image(encode(palette), 3) == (40, 50, 60)).all()
    assert (decode_image(encode(palette, transparency=1), 3) == 255).all()
    assert (decode_image(encode(Image.new("LA", (4, 4), (7, 0))), 1) == 255).all()
    assert (decode_image(encode(rgba), 4)[0, 3] == (200, 0, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:8, :8] = 255  # the top left corner
    undo = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }.get(orientation, lambda a: a)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encode(Image.fromarray(np.ascontiguousarray(undo(upright))), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(stored, 3), upright)


def test_forms_in_which_an_image_comes(tmp_path):
    image = noise_image()
    data, path = encode(image), tmp_path / "a.png"
    path.write_bytes(data)
    expected = np.array(image)
    forms = [image, data, bytearray(data), path, str(path), {"bytes": data, "path": None}]
    forms += [{"bytes": None, "path": str(path)}, {"bytes": data, "path": "elsewhere.png"}]
    forms += [expected, expected.tolist(), expected.transpose(2, 0, 1), torch.from_numpy(expected).permute(2, 0, 1)]
    forms += [expected.astype(np.int64), torch.from_numpy(expected).int()]
    for form in forms:
        array = decode_image(form, 3)
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 5, 13])
def test_arrays_of_any_number_of_channels(num_channels):
    values = np.random.default_rng(0).random((num_channels, 6, 7))
    for form in (values, values.transpose(1, 2, 0), torch.from_numpy(values), values.tolist()):
        array = decode_image(form, num_channels)
        assert array.shape == (6, 7, num_channels)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, values.transpose(1, 2, 0), atol=1e-7)
    deep = (values * 65535).astype(np.uint16)
    np.testing.assert_allclose(decode_image(deep, num_channels), deep.transpose(1, 2, 0) / 65535, atol=1e-7)
    half = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(decode_image(half, num_channels), half.float().permute(1, 2, 0).numpy())


def test_grey_and_bool_arrays():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(decode_image(grey, 1)[..., 0], grey)
    np.testing.assert_array_equal(decode_image(grey, 3), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(decode_image(grey > 5, 1)[..., 0], np.where(grey > 5, 255, 0))
    picture = np.zeros((3, 4, 3), np.uint8)
    decoded = decode_image(picture, 3)
    decoded[:] = 9
    assert not picture.any(), "the caller's array must not be written to"


def corrupt(data, offset, count=40):
    return data[:offset] + b"\xff" * count + data[offset + count :]


BROKEN = {
    "empty": b"",
    "text": b"this is no image at all",
    "html": b"<html><body>404</body></html>" * 10,
    "png header only": encode(noise_image())[:30],
    "png truncated": encode(noise_image())[:-600],
    "png broken chunk": corrupt(encode(noise_image()), 200),
    "jpeg truncated": encode(noise_image(), "JPEG")[:-300],
    "jpeg header only": encode(noise_image(), "JPEG")[:20],
    "gif truncated": encode(noise_image(), "GIF")[:-400],
    "bmp truncated": encode(noise_image(), "BMP")[:-400],
    "tiff truncated": encode(noise_image(), "TIFF")[:100],
    "tiff broken directory": corrupt(encode(noise_image(), "TIFF"), 8),
    "webp truncated": encode(noise_image(), "WEBP", lossless=True)[:-400],
    "ppm without pixels": b"P6 100 100 255\n",
    "zero bytes": bytes(500),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, tmp_path):
    path = tmp_path / "broken"
    path.write_bytes(BROKEN[name])
    for form in (BROKEN[name], path, {"bytes": None, "path": str(path)}):
        with pytest.raises(ImageDecodeError, match="cannot be decoded"):
            decode_image(form, 3)


def test_truncation_anywhere_is_an_error():
    for format in ("PNG", "JPEG"):
        data = encode(noise_image(16, 16), format)
        for end in range(0, len(data) - 40, 37):
            with pytest.raises(ImageDecodeError):
                decode_image(data[:end], 3)


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageDecodeError, match="DecompressionBombError"):
        decode_image(encode(noise_image()), 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 320)  # half as many as it has: PIL only warns
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ImageDecodeError, match=r"20 x 31 pixels, more than the limit of 320 .*MAX_IMAGE_PIXELS"),
    ):
        decode_image(encode(noise_image(31, 20)), 3)
    assert decode_image(noise_image(31, 20), 3).shape[2] == 3  # decoded long ago
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(encode(noise_image(31, 20)), 3).shape[2] == 3


@pytest.mark.parametrize("shape", [(4, 20_000), (20_000, 4), (1, 20_000), (1, 1)])
def test_extreme_shapes_take_no_extreme_memory(shape, monkeypatch):
    sizes = []
    resize = images.F.interpolate
    monkeypatch.setattr(images.F, "interpolate", lambda *a, size, **k: sizes.append(size) or resize(*a, size=size, **k))
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert center_view(array, (224, 224), 0.875).shape == (3, 224, 224)
    assert all(max(size) <= 16 * 256 for size in sizes)


@pytest.mark.parametrize(
    ("value", "num_channels", "message"),
    [
        (None, 3, "the value is None"),
        ({"bytes": None, "path": None}, 3, "neither bytes nor a path"),
        ({"bytes": None, "path": "/nowhere/x.png"}, 3, "the file /nowhere/x.png cannot be read"),
        ("/nowhere/x.png", 3, "cannot be read: FileNotFoundError"),
        ("nosuchscheme://x.png", 3, "cannot be read"),
        (np.zeros((4, 4, 2), np.uint8), 3, r"shape is \(4, 4, 2\), without an axis of 3 channels"),
        (np.zeros((4, 4), np.uint8), 5, r"shape is \(4, 4\), without an axis of 5 channels"),
        (np.zeros((2, 3, 4, 4), np.uint8), 3, "without an axis of 3 channels"),
        (np.zeros((0, 4, 3), np.uint8), 3, "it is empty"),
        (np.zeros((4, 0), np.float32), 1, "it is empty"),
        (np.full((4, 4, 3), 300), 3, "int64 values go from 300 to 300; store them as uint8 or uint16"),
        (np.full((4, 4, 3), -1), 3, "int64 values go from -1"),
        (np.full((4, 4, 3), 2.0), 3, r"float values go from 2.0 to 2.0; scale them to \[0, 1\]"),
        (np.full((4, 4, 3), np.inf), 3, r"scale them to \[0, 1\]"),
        ([[1, 2], [3]], 1, "it is no array"),
        ([["a", "b"]], 1, "is no image"),
        (object(), 1, "type object is no image"),
        (np.zeros((4, 4), np.complex64), 1, "is no image"),
    ],
)
def test_bad_values(value, num_channels, message):
    with pytest.raises(ImageDecodeError, match=message):
        decode_image(value, num_channels)


def test_encoded_image_cannot_have_5_channels():
    with pytest.raises(ValueError, match="`num_channels` is 5, but the data set holds encoded images") as caught:
        decode_image(noise_image(), 5)
    assert not isinstance(caught.value, ImageDecodeError), "a wrong setting is no bad image, and must not be skipped"


# -- views ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (48, 64, (0.2, 1.0), (3 / 4, 4 / 3)),
        (100, 33, (0.08, 1.0), (3 / 4, 4 / 3)),
        (64, 64, (0.5, 0.5), (1.0, 1.0)),
        (300, 20, (0.9, 1.0), (3 / 4, 4 / 3)),  # nothing fits: the central box
        (20, 300, (0.9, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_random_crop_is_distributed_as_torchvisions(height, width, scale, ratio):
    draws = 3000
    torch.manual_seed(0)
    blank = torch.zeros(1, height, width)
    expected = torch.tensor([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(draws)]).double()
    generator = torch.Generator().manual_seed(1)
    boxes = [random_resized_crop_box(height, width, generator, scale, ratio) for _ in range(draws)]
    actual = torch.tensor(boxes).double()
    assert (actual[:, :2] >= 0).all()
    assert (actual[:, 2:] >= 1).all()
    assert (actual[:, 0] + actual[:, 2] <= height).all()
    assert (actual[:, 1] + actual[:, 3] <= width).all()
    # Kolmogorov-Smirnov distance of each coordinate; 1.95 * sqrt(2 / n) is passed by chance once in a thousand.
    for column in range(4):
        a, b = actual[:, column].sort().values, expected[:, column].sort().values
        grid = torch.cat([a, b]).unique()
        distance = (torch.searchsorted(a, grid, right=True) - torch.searchsorted(b, grid, right=True)).abs().max()
        assert distance / draws < 1.95 * math.sqrt(2 / draws)


def test_random_crop_keeps_its_limits():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([random_resized_crop_box(400, 500, generator) for _ in range(2000)]).double()
    area, aspect = boxes[:, 2] * boxes[:, 3] / (400 * 500), boxes[:, 3] / boxes[:, 2]
    assert 0.195 < area.min() < 0.22
    assert 0.95 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.77
    assert 1.30 < aspect.max() < 1.35


def test_random_crop_is_a_pure_function_of_the_generator():
    boxes = [random_resized_crop_box(50, 60, sample_generator(0, 1, key)) for key in (5, 5, 6)]
    assert boxes[0] == boxes[1] != boxes[2]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_crops_of_tiny_images(height, width):
    for key in range(20):
        top, left, h, w = random_resized_crop_box(height, width, sample_generator(0, 0, key))
        assert 0 <= top <= height - h < height
        assert 0 <= left <= width - w < width
    top, left, h, w = center_crop_box(height, width, (8, 16), 0.5)
    assert 0 <= top <= height - h < height
    assert 0 <= left <= width - w < width


@pytest.mark.parametrize(
    ("shape", "size", "crop_ratio", "box"),
    [
        ((100, 200), (32, 32), 1.0, (0, 50, 100, 100)),
        ((200, 100), (32, 32), 1.0, (50, 0, 100, 100)),
        ((256, 256), (224, 224), 0.875, (16, 16, 224, 224)),
        ((100, 200), (32, 64), 1.0, (0, 0, 100, 200)),
        ((100, 100), (32, 64), 1.0, (25, 0, 50, 100)),
        ((100, 100), (64, 32), 0.5, (25, 37, 50, 25)),
        ((8, 8), (32, 32), 1.0, (0, 0, 8, 8)),
    ],
)
def test_center_crop_box(shape, size, crop_ratio, box):
    top, left, height, width = center_crop_box(*shape, size, crop_ratio)
    assert (height, width) == box[2:]
    assert (top, left) == box[:2]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(16, 16), (20, 48)])
def test_resizing_equals_torchvisions(channels, size):
    array = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    box = (3, 5, 30, 40)
    actual = crop_and_resize(array, box, size)
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    expected = tvF.resized_crop(pixels.float(), *box, list(size), InterpolationMode.BICUBIC, antialias=True)
    assert actual.shape == (channels, *size)
    assert actual.dtype == torch.uint8
    assert actual.is_contiguous()
    assert (actual - expected.clamp(0, 255)).abs().mean() < 1
    floats = crop_and_resize((array / 255).astype(np.float32), box, size)
    assert floats.dtype == torch.float32
    torch.testing.assert_close(floats, (expected / 255).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(40, 60), (61, 40), (32, 32), (20, 21)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.8])
def test_center_view_is_resize_and_centre_crop(shape, crop_ratio):
    array = np.random.default_rng(0).random((*shape, 2)).astype(np.float32)
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    resized = tvF.resize(pixels, [32 if crop_ratio == 1 else 40], InterpolationMode.BICUBIC, antialias=True)
    margins = [side - 32 for side in resized.shape[1:]]
    expected = resized[:, margins[0] // 2 :, margins[1] // 2 :][:, :32, :32].clamp(0, 1)
    torch.testing.assert_close(center_view(array, (32, 32), crop_ratio), expected, atol=1e-5, rtol=0)


def test_center_view_of_another_shape():
    array = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    expected = torch.from_numpy(array[10:20, 5:25]).permute(2, 0, 1)
    assert torch.equal(center_view(array, (10, 20), 2 / 3), expected)


def test_float_overshoot_is_clamped():
    array = np.zeros((8, 8, 1), np.float32)
    array[:, 4:] = 1
    pixels = crop_and_resize(array, (0, 0, 8, 8), (32, 32))
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_a_box_of_the_right_size_is_copied_exactly():
    array = np.array(noise_image(20, 20))
    pixels = crop_and_resize(array, (2, 4, 8, 8), (8, 8))
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), array[2:10, 4:12])


def test_normalize():
    pixels = torch.tensor([[[0, 255]], [[51, 102]]], dtype=torch.uint8)
    expected = torch.tensor([[[-1.0, 1.0]], [[0.0, 2.0]]])
    torch.testing.assert_close(normalize(pixels, [0.5, 0.2], [0.5, 0.1]), expected)
    torch.testing.assert_close(normalize(pixels / 255, [0.5, 0.2], [0.5, 0.1]), expected)
    assert normalize((pixels / 255).double(), [0.5, 0.2], [0.5, 0.1]).dtype == torch.float32


# -- randomness -------------------------------------------------------------------------------------------------


def test_sample_generator_is_pure_and_neighbours_are_uncorrelated():
    def draw(*args):
        return torch.rand(4000, generator=sample_generator(*args)).double()

    base = draw(0, 0, 0)
    assert torch.equal(base, draw(0, 0, 0))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, "noise"), (0, 0, -1), (0, 0, 2**40)):
        assert abs(torch.corrcoef(torch.stack([base, draw(*other)]))[0, 1]) < 0.08
    assert not torch.equal(draw(1, 2, 3), draw(3, 2, 1))
    assert not torch.equal(draw(1, 12, 3), draw(11, 2, 3))


def test_first_draws_over_keys_are_uniform():
    firsts = torch.tensor([torch.rand((), generator=sample_generator(7, 3, key)).item() for key in range(4000)])
    counts = torch.histc(firsts, bins=20, min=0, max=1)
    assert ((counts - 200).square() / 200).sum() < 45  # chi squared, 19 degrees of freedom: p < 0.001
    assert abs(torch.corrcoef(torch.stack([firsts[1:], firsts[:-1]]))[0, 1]) < 0.06


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    random_resized_crop_box(40, 40, sample_generator(0, 0, 0))
    assert torch.equal(before, torch.get_rng_state())


def jpeg(width, height, **options):
    """A smooth picture, as a JPEG."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_decoded_as_pil_does(monkeypatch, options, mode):
    data = jpeg(75, 50, **options)
    if mode == "L":
        Image.open(io.BytesIO(data)).convert("L").save(buffer := io.BytesIO(), "JPEG", **options)
        data = buffer.getvalue()
    channels = 3 if mode == "RGB" else 1
    found = decode_image(data, channels)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    monkeypatch.setattr(images, "_decode_jpeg", lambda *args: None)
    np.testing.assert_array_equal(found, decode_image(data, channels))


def test_boxes_of_the_same_image_at_another_size():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        height, width = torch.randint(1, 400, (2,), generator=generator).tolist()
        box = random_resized_crop_box(height, width, generator, (0.01, 1.0))
        reduced = -(-height // 4), -(-width // 4)  # as a JPEG is
        top, left, box_height, box_width = scale_box(box, (height, width), reduced)
        assert top >= 0 <= left
        assert box_height >= 1 <= box_width
        assert top + box_height <= reduced[0]
        assert left + box_width <= reduced[1]
        scales = [new / old for new, old in zip(reduced, (height, width), strict=True)]
        for found, exact in zip((top, left, box_height, box_width), np.array(box) * (scales * 2), strict=True):
            assert abs(found - exact) <= 1.5
        assert scale_box(box, (height, width), (height, width)) == box
        assert scale_box((0, 0, height, width), (height, width), reduced) == (0, 0, *reduced)


@pytest.mark.parametrize(("orientation", "shape"), [(1, (30, 40)), (3, (30, 40)), (6, (40, 30)), (8, (40, 30))])
def test_turned_jpeg(orientation, shape):
    exif, asked = Image.Exif(), []
    exif[274] = orientation
    assert decode_image(jpeg(40, 30, exif=exif), 3).shape == (*shape, 3)
    half = decode_image(jpeg(40, 30, exif=exif), 3, lambda *size: asked.append(size) or 2)
    assert asked == [shape], "the size that is asked about is the upright image's"
    assert half.shape == (shape[0] // 2, shape[1] // 2, 3)


@pytest.mark.parametrize(
    ("size", "reduction", "shape"),
    [
        ((500, 375), 2, (188, 250)),
        ((500, 375), 1.99, (375, 500)),
        ((500, 375), 0.5, (375, 500)),
        ((500, 375), 7.5, (94, 125)),
        ((1000, 1601), 100, (201, 125)),
    ],
)
def test_jpeg_is_decoded_no_larger_than_it_must_be(size, reduction, shape):
    asked = []
    found = decode_image(jpeg(*size), 3, lambda height, width: asked.append((width, height)) or reduction)
    assert asked == [size]
    assert found.shape == (*shape, 3)
    whole = torch.from_numpy(decode_image(jpeg(*size), 3)).permute(2, 0, 1)
    resized = tvF.resize(whole, list(shape), InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - resized).mean() < 2


def test_photographs_of_several_frames_are_reduced_too():
    frames = [Image.open(io.BytesIO(jpeg(400, 300))), Image.open(io.BytesIO(jpeg(400, 300)))]
    frames[0].save(buffer := io.BytesIO(), "MPO", save_all=True, append_images=frames[1:])
    assert decode_image(buffer.getvalue(), 3, lambda *size: 4).shape == (75, 100, 3)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 1), ("RGB", 4), ("L", 3), ("CMYK", 3)])
def test_conversions_are_of_the_reduced_image(mode, channels):
    Image.open(io.BytesIO(jpeg(400, 300))).convert(mode).save(buffer := io.BytesIO(), "JPEG")
    assert decode_image(buffer.getvalue(), channels, lambda *size: 4).shape == (75, 100, channels)


def test_errors_of_the_caller_are_not_the_images():
    with pytest.raises(ZeroDivisionError):
        decode_image(jpeg(40, 30), 3, lambda *size: 1 / 0)


def test_other_formats_are_decoded_whole():
    assert decode_image(encode(noise_image(64, 64)), 3, lambda *size: 8).shape == (64, 64, 3)
