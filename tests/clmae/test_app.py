# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""`clmae app`: what the page shows, as plain functions; and the page itself, in a browser, where there is one."""

from __future__ import annotations

import importlib.util
import io
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor

from clmae import FAMILIES
from clmae.app import Explorer, Session, read_upload
from clmae.app.explorer import MAX_BYTES, PICTURE_SIZE
from clmae.cli import main
from clmae.configuration.errors import InputError
from clmae.modeling.losses import patchify

KINDS = {"mae": {}, "cl_mae": {}, "cmae": {}, "cmae_learned": {"learned_masks": True, "norm_pix_loss": False}}


def photo(seed=0, size=(40, 32), mode="RGB"):
    coarse = np.random.default_rng(seed).uniform(0, 255, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, tiny_config):
    """`make_model(kind, seed)`: the folder of a tiny model, its position-dependent parts drawn far from 0."""

    def make(kind="cl_mae", seed=0, folder=None):
        folder = folder or tmp_path_factory.mktemp(kind)
        family = kind.removesuffix("_learned")
        torch.manual_seed(seed)
        model = FAMILIES[family][2](tiny_config(family, **KINDS[kind]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder)
        size = {"height": 16, "width": 16}
        BitImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with two classes of 6 pictures, and a broken one."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        path = folder / ("even", "odd")[i % 2]
        path.mkdir(exist_ok=True)
        photo(i).save(path / f"{i:02}.png")
    (folder / "odd" / "99.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="session")
def run_folder(make_model):
    """A run of three checkpoints, whose numbers do not sort as text."""
    folder = make_model(seed=3)
    for step, seed in ((5, 1), (10, 2)):
        checkpoint = make_model(seed=seed, folder=folder / f"checkpoint-{step}")
        state = f'{{"log_history": [{{"step": {step}, "curriculum_factor": {1 - step / 10}}}]}}'
        (checkpoint / "trainer_state.json").write_text(state)
    return folder


@pytest.fixture(scope="session")
def explorer(run_folder, photos):
    return Explorer(str(run_folder), str(photos))


@pytest.fixture
def session(explorer):
    return Session(explorer)


# -- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_is_what_the_model_does(make_model, kind):
    explorer = Explorer(str(make_model(kind)))
    learns = kind in ("cl_mae", "cmae_learned")
    session = Session(explorer)
    assert ("keep" in session.pictures()) == learns == explorer.learns_masks
    assert session.masking == ("learned" if learns else "random")
    pixel_values, model = session.pixel_values, explorer.model(0)
    session.choose_masking("random")
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))
    options = {"masking": "random"} if learns else {}
    expected = {"random": model(pixel_values, noise=noise, **options)}
    if learns:
        expected["learned"] = model(pixel_values)
        assert np.allclose(session.analysis.keep, expected["learned"].keep_probabilities[0].detach())
    for masking, outputs in expected.items():
        session.choose_masking(masking)
        reconstruction, errors = explorer.reconstruct(pixel_values, session.mask, 0)
        assert (session.mask == outputs.mask[0].bool().numpy()).all()
        assert errors[session.mask].mean() == pytest.approx(outputs.reconstruction_loss.item(), rel=1e-5)
        patches, shown = patchify(pixel_values, (4, 4))[0], patchify(reconstruction, (4, 4))[0]
        assert torch.equal(patches[~session.mask], shown[~session.mask])
        predicted = outputs.logits[0].detach()
        if model.config.norm_pix_loss:
            predicted = predicted * (patches.var(1, keepdim=True) + 1e-6).sqrt() + patches.mean(1, keepdim=True)
        assert torch.allclose(predicted[session.mask], shown[session.mask], atol=1e-4)
    attentions = model.vit(pixel_values, output_attentions=True).attentions[-1].detach()
    assert np.allclose(session.analysis.attention, attentions[0].mean(0)[1:, 1:])


def test_masks_of_ones_own(session, explorer):
    session.choose_masking("random")
    before = session.mask.copy()
    session.choose_masking("own")
    assert (session.mask == before).all()
    session.toggle(5)
    assert (session.mask != before).nonzero()[0].tolist() == [5]
    session.open(np.asarray(photo(7)))
    session.choose_checkpoint(0)
    assert (session.mask != before).nonzero()[0].tolist() == [5]  # it stays
    for masked, caption in ((True, "0 of 16"), (False, "16 of 16")):
        session.fill(masked)
        assert session.pictures()["mask"].caption.startswith(caption)
        reconstruction, errors = explorer.reconstruct(session.pixel_values, session.mask, 0)
        assert torch.equal(reconstruction, session.pixel_values) == (not masked)
        assert np.isfinite(errors).all()
    session.draw_random_mask()
    assert session.masking == "random"
    assert (session.mask != before).any()


def test_pictures_and_places(session):
    pictures = session.pictures()
    assert {picture.image.size for picture in pictures.values()} == {(PICTURE_SIZE, PICTURE_SIZE)}
    cell = PICTURE_SIZE / 4
    assert [session.patch_at(x, y) for x, y in ((0, 0), (cell * 1.5, cell * 2.5), (PICTURE_SIZE, PICTURE_SIZE))] == [
        0,
        9,
        15,
    ]
    session.choose_patch(0)
    changed = {name for name, picture in session.pictures().items() if picture.image != pictures[name].image}
    assert changed == {"image", "attention"}


def test_checkpoints(session, explorer, run_folder):
    assert [folder.name for folder in explorer.checkpoints] == ["checkpoint-5", "checkpoint-10", run_folder.name]
    assert [explorer.describe_checkpoint(i) for i in range(3)] == [
        "step 5, curriculum factor +0.50",
        "step 10, curriculum factor +0.00",
        "end of the run",
    ]
    last = session.analysis.keep
    session.choose_checkpoint(0)
    assert not np.allclose(session.analysis.keep, last)
    session.choose_checkpoint(2)
    assert np.allclose(session.analysis.keep, last)


def test_a_broken_checkpoint_leaves_the_session_as_it_was(make_model):
    folder = make_model(seed=4)
    (make_model(seed=5, folder=folder / "checkpoint-1") / "model.safetensors").write_bytes(b"broken")
    session = Session(Explorer(str(folder)))
    with pytest.raises(InputError, match="checkpoint-1"):
        session.choose_checkpoint(0)
    assert session.checkpoint == 1
    session.pictures()


def test_nearest_images(session, explorer, monkeypatch):
    assert len(explorer.rows) == 12  # without the broken one
    row = explorer.rows[4]
    image = explorer.read_row(row)
    session.open(image)
    assert row not in [found for found, *_ in session.neighbors]
    noisy = np.clip(image.astype(int) + np.random.default_rng(0).integers(-3, 4, image.shape), 0, 255)
    session.open(noisy.astype(np.uint8))
    (first, similarity, name), *others = session.neighbors
    assert (first, name) == (row, "even")
    assert all(similarity >= other > -1 for _, other, _ in others)
    # As of a test split without classes.
    unlabelled = explorer.dataset.map(lambda row: {"label": -1}, features=explorer.dataset.features)
    monkeypatch.setattr(explorer, "dataset", unlabelled)
    session.open(image)
    assert {name for *_, name in session.neighbors} == {""}


# -- what is refused --------------------------------------------------------------------------------------------------


def png(width, height, *chunks, bits=1, color=0):
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", encoded(photo()))
    return buffer.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
HOSTILE = {
    "bomb.png": png(30000, 30000, (b"IDAT", zlib.compress(bytes(3751 * 30000), 9))),
    "bomb.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02D\x01\x00;",
    "bomb.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
    "text_bomb.png": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 9)), (b"IDAT", b"")),
    "truncated.png": encoded(photo())[:-200],
    "truncated.jpg": encoded(photo(size=(200, 200)), "JPEG")[:900],
    "truncated.webp": encoded(photo(), "WEBP")[:60],
    "drawing.svg": SVG,
    "drawing.png": SVG,
    "one_pixel.png": encoded(photo(size=(1, 1))),
    "long.png": encoded(Image.new("RGB", (20000, 10))),
    "no_pixels.png": png(0, 0),
    "no_data.png": png(8, 8),
    "text.png": b"just some text",
    "empty.png": b"",
    "page.jpg": b"<html><script>alert(1)</script></html>",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "document.png": b"%PDF-1.7\n1 0 obj\n",
    "archive.png": zipped(),
    "pickle.png": pickle.dumps({"a": 1}),
    "loop.tif": b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00",
    "<img src=x onerror=alert(1)>.png": b"name",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads(tmp_path, name):
    path = tmp_path / "upload"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(InputError):
        read_upload(path, 3)


def test_a_file_that_is_too_large(tmp_path):
    (tmp_path / "large.png").write_bytes(encoded(photo()) + bytes(MAX_BYTES))
    with pytest.raises(InputError, match="at most 20 MB"):
        read_upload(tmp_path / "large.png", 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_uploads_of_every_kind(tmp_path, channels):
    deep = Image.fromarray(np.full((8, 9), 40000, np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    files = [
        encoded(photo(size=(9, 8), mode="CMYK"), "TIFF"),
        encoded(photo(size=(9, 8), mode="P")),
        encoded(photo(size=(9, 8), mode="LA")),
        encoded(photo(size=(8, 9)), "JPEG", exif=exif),
        encoded(deep),
    ]
    for data in files:
        (tmp_path / "upload").write_bytes(data)
        assert read_upload(tmp_path / "upload", channels).shape == (8, 9, channels)
    assert read_upload(tmp_path / "upload", 1)[0, 0, 0] == pytest.approx(40000 / 65535)


def test_models_that_cannot_be_shown(make_model, tmp_path):
    model = make_model("mae", seed=6, folder=tmp_path / "pickled")
    FAMILIES["mae"][1].from_pretrained(model).save_pretrained(tmp_path / "encoder")
    BitImageProcessor().save_pretrained(tmp_path / "encoder")
    torch.save({}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    for name, reason in {"pickled": "safetensors", "encoder": "lack decoder", "other": "'vit'", "none": "none"}.items():
        with pytest.raises(InputError, match=reason):
            Explorer(str(tmp_path / name))


@pytest.mark.parametrize(
    ("gradio", "options", "reason"),
    [(False, [], r"clmae\[app\]"), (True, ["--port", "99999"], "--port"), (True, ["--prot", "1"], "--port")],
)
def test_command_refuses(monkeypatch, capsys, gradio, options, reason):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if gradio else None)
    assert main(["app", "nowhere", *options]) == 2
    assert re.search(reason, capsys.readouterr().err)


# -- the page ---------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_gradio = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def address(run_folder, photos):
    """Where `clmae app` serves its page, from a process of its own; which Ctrl+C ends well."""
    command = [sys.executable, "-m", "clmae", "app", str(run_folder), "--dataset", str(photos)]
    command += ["--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "the page is at http://127.0.0.1:" in line, line
            yield re.search(r"http://\S+", line)[0]
            assert process.poll() is None  # it still runs
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser_page(address):
    """The page in a browser that reaches nothing but this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1400, "height": 1100})
        context.set_default_timeout(60_000)
        context.route(lambda url: not url.startswith((address, "data:", "blob:")), lambda route: route.abort())
        page = context.new_page()
        page.dialogs = []
        page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        page.wait_for_selector("#picture-mask img")
        yield page
        browser.close()


class Pictures:
    """The pictures of the page, before and after something was done."""

    def __init__(self, page):
        self.page = page

    def source(self, name):
        return self.page.locator(f"#picture-{name} img").get_attribute("src")

    def get(self, name):
        return np.asarray(Image.open(io.BytesIO(self.page.request.get(self.source(name)).body())).convert("RGB"))

    def change(self, action, name):
        """`(before, after)` of a picture that an action changes."""
        source, before = self.source(name), self.get(name)
        action()
        self.page.wait_for_function(
            "([name, source]) => document.querySelector(`#picture-${name} img`).getAttribute('src') != source",
            arg=[name, source],
        )
        return before, self.get(name)

    def click(self, name, row, column):
        """Clicks on the middle of a patch, of 4 by 4."""
        box = self.page.locator(f"#picture-{name} img").bounding_box()
        self.page.mouse.click(box["x"] + (column + 0.5) * box["width"] / 4, box["y"] + (row + 0.5) * box["height"] / 4)


def changed_patches(before, after):
    cells = np.abs(before.astype(int) - after).reshape(4, PICTURE_SIZE // 4, 4, PICTURE_SIZE // 4, 3).max((1, 3, 4))
    return [tuple(index) for index in np.argwhere(cells > 0).tolist()]


@pytest.mark.slow
@needs_gradio
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
class TestPage:
    def test_every_control(self, browser_page, tmp_path):
        page, pictures = browser_page, Pictures(browser_page)
        masking = page.locator("#masking")
        assert masking.locator("input:checked").input_value() == "learned"

        before, after = pictures.change(lambda: pictures.click("mask", 1, 2), "mask")
        assert changed_patches(before, after) == [(1, 2)]
        assert masking.locator("input:checked").input_value() == "own"
        pictures.change(lambda: pictures.click("mask", 3, 0), "reconstruction")
        pictures.change(lambda: masking.get_by_text("Learned").click(), "mask")
        assert (pictures.get("mask") == before).all()
        pictures.change(lambda: masking.get_by_text("Random").click(), "mask")
        pictures.change(lambda: page.locator("#redraw").click(), "mask")
        shown = pictures.get("mask")
        _, after = pictures.change(lambda: page.locator("#mask-all").click(), "mask")
        assert (after[5, 5] == after[205, 300]).all()
        _, after = pictures.change(lambda: page.locator("#show-all").click(), "mask")
        assert (after != shown).any()
        assert masking.locator("input:checked").input_value() == "own"

        for name, place in (("image", (0, 0)), ("attention", (3, 3)), ("components", (0, 3))):
            mask = pictures.source("mask")
            before, after = pictures.change(lambda name=name, place=place: pictures.click(name, *place), "attention")
            assert place in changed_patches(before, after)
            assert pictures.source("mask") == mask

        slider = page.locator("#checkpoint input[type=range]")
        assert "end of the run" in page.locator("#checkpoint").inner_text()
        before, _ = pictures.change(lambda: slider.fill("0"), "keep")
        assert "step 5" in page.locator("#checkpoint").inner_text()
        _, after = pictures.change(lambda: slider.fill("2"), "keep")
        assert (before == after).all()

        pictures.change(lambda: page.locator("#examples button").nth(3).click(), "image")
        neighbors = page.locator("#neighbors button")
        assert re.search(r"(even|odd) 0\.\d\d\d", neighbors.first.inner_text())
        pictures.change(lambda: neighbors.first.click(), "image")
        photo(99, (60, 50)).save(tmp_path / "mine.jpg")
        _, after = pictures.change(
            lambda: page.locator("#upload input").set_input_files(tmp_path / "mine.jpg"), "image"
        )
        expected = np.asarray(photo(99, (60, 50)).crop((5, 0, 55, 50)).resize((4, 4), Image.Resampling.BOX)).astype(int)
        mean = after.reshape(4, PICTURE_SIZE // 4, 4, PICTURE_SIZE // 4, 3).mean((1, 3))
        assert np.abs(mean - expected).mean() < 12

    def test_hostile_uploads(self, browser_page, tmp_path):
        page, pictures = browser_page, Pictures(browser_page)
        seen = {}
        for number, (name, data) in enumerate({**HOSTILE, "large.png": encoded(photo()) + bytes(MAX_BYTES)}.items()):
            good = tmp_path / f"good-{number}.png"
            photo(100 + number).save(good)
            (tmp_path / name).write_bytes(data)
            source = pictures.source("image")
            page.locator("#upload input").set_input_files(tmp_path / name)
            message = page.locator(".message:visible, .toast-body:visible").first
            message.wait_for()
            seen[name] = message.inner_text()
            assert pictures.source("image") == source
            pictures.change(lambda good=good: page.locator("#upload input").set_input_files(good), "image")
            page.locator(".message:visible").wait_for(state="detached")
        assert all(len(text) > 20 for text in seen.values()), seen
        assert page.dialogs == []  # no script ran
