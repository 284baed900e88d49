# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Decoding: every form of an image gives its pixels, or the error that says why not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from clmae.training.data import ImageDecodeError, decode_image


def encode(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **kwargs)
    return buffer.getvalue()


def noise_image(height=24, width=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


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
    with pytest.raises(ValueError, match="`num_channels` is 5, but the dataset holds encoded images") as caught:
        decode_image(noise_image(), 5)
    assert not isinstance(caught.value, ImageDecodeError), "a wrong setting is no bad image, and must not be skipped"


# -- JPEG at reduced size ---------------------------------------------------------------------------------------


def jpeg(width, height, **options):
    """A smooth picture, as a JPEG."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_decoded_as_pil_does(options, mode):
    Image.open(io.BytesIO(jpeg(75, 50))).convert(mode).save(buffer := io.BytesIO(), "JPEG", **options)
    pixels = decode_image(buffer.getvalue(), len(mode))
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels.squeeze(), np.array(Image.open(buffer)))


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
    pixels = decode_image(jpeg(*size), 3, lambda height, width: asked.append((width, height)) or reduction)
    assert asked == [size]
    assert pixels.shape == (*shape, 3)
    whole = torch.from_numpy(decode_image(jpeg(*size), 3)).permute(2, 0, 1)
    resized = tvF.resize(whole, list(shape), InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()
    assert np.abs(pixels.astype(int) - resized).mean() < 2


def test_photographs_of_several_frames_are_reduced_too():
    frames = [Image.open(io.BytesIO(jpeg(400, 300))), Image.open(io.BytesIO(jpeg(400, 300)))]
    frames[0].save(buffer := io.BytesIO(), "MPO", save_all=True, append_images=frames[1:])
    assert decode_image(buffer.getvalue(), 3, lambda *size: 4).shape == (75, 100, 3)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 1), ("RGB", 4), ("L", 3), ("CMYK", 3)])
def test_conversions_are_of_the_reduced_image(mode, channels):
    Image.open(io.BytesIO(jpeg(400, 300))).convert(mode).save(buffer := io.BytesIO(), "JPEG")
    assert decode_image(buffer.getvalue(), channels, lambda *size: 4).shape == (75, 100, channels)


def test_the_callers_errors_are_not_the_images_and_other_formats_are_decoded_whole():
    with pytest.raises(ZeroDivisionError):
        decode_image(jpeg(40, 30), 3, lambda *size: 1 / 0)
    assert decode_image(encode(noise_image(64, 64)), 3, lambda *size: 8).shape == (64, 64, 3)
