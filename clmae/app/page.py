# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The page of `clmae app`: what is where, and what happens at a click. Needs gradio."""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Callable
from typing import Any

from clmae.app.explorer import FORMATS, MAX_BYTES, MAX_PIXELS, Explorer, Session, read_upload, thumbnail
from clmae.configuration.errors import InputError

# Before gradio is imported, which reads them then.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

logger = logging.getLogger(__name__)

TITLES = {
    "image": "Image",
    "mask": "Mask",
    "reconstruction": "Reconstruction",
    "error": "Error of each masked patch",
    "keep": "Masking module",
    "attention": "Attention of a patch",
    "components": "Patch tokens",
}
Action = Callable[[Session, Any], None]  # what an event does to a visitor's session with the event's value
PATCH_CHOOSERS = ("image", "attention", "components")  # a click there chooses the patch whose attention is shown
CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
#head, .note, #head *, .note * { padding: 0 !important; margin: 0; }
#head h1 { font-size: 1.45rem; font-weight: 650; }
#head p, .note p { color: color-mix(in srgb, var(--body-text-color) 75%, transparent); font-size: .9rem; }
.note h2 { font-size: .95rem; font-weight: 600; }
.note p { font-size: .8rem; line-height: 1.3; margin-top: .15rem; }
.tall p { height: 2.6em; }
#message:not(:has(.message)) { display: none; }
.message { background: #b3261e; color: white; border-radius: 6px; padding: .5rem .8rem; overflow-wrap: anywhere; }
.picture { border: 0 !important; background: none !important; }
.picture img { border-radius: 4px; }
.picture .icon-button-wrapper { display: none; }
.picture .thumbnail-item { height: auto; aspect-ratio: 1; }
.clickable img { cursor: crosshair; }
#masking { padding: 8px; }
#masking .wrap { gap: 5px; }
#masking label { padding: 3px 6px; font-size: .8rem; }
#masking label span { margin-left: 4px; }
.buttons { gap: 5px !important; }
.buttons button { font-size: .8rem; white-space: nowrap; padding: 4px 6px; }
#upload .wrap { font-size: .85rem; padding: .3rem 0; }
#upload .icon-wrap { display: none; }
#examples .grid-wrap, #neighbors .grid-wrap { padding: 0 !important; min-height: 0 !important; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); }
.picture .grid-container { grid-template-rows: none; grid-auto-rows: auto; gap: 4px; padding: 0; }
#neighbors .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); }
#neighbors .caption-label { font-size: .65rem; padding: 0 3px; max-width: 100%; }
.legend { white-space: nowrap; }
.scale { display: inline-block; width: 4.5em; height: .6em; border-radius: 2px; vertical-align: baseline; }
footer { display: none !important; }
"""


def _note(title: str, caption: str = "") -> str:
    return f"<h2>{title}</h2>" + (f"<p>{caption}</p>" if caption else "")


def _message(text: str) -> str:
    return f'<div class="message" role="alert">{html.escape(text[:1].upper() + text[1:])}</div>' if text else ""


def _gallery(name: str, pictures: list[Any] | None = None) -> gr.Gallery:
    return gr.Gallery(
        pictures,
        show_label=False,
        container=False,
        height="auto",
        allow_preview=False,
        buttons=[],
        interactive=False,
        elem_id=name,
        elem_classes="picture",
    )


class Page:
    """The page of an [`Explorer`]; `blocks` is what gradio serves."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self.names = [name for name in TITLES if name != "keep" or explorer.learns_masks]
        self.notes: dict[str, gr.HTML] = {}
        self.images: dict[str, gr.Image] = {}
        name = html.escape(os.path.basename(explorer.name.rstrip("/")))
        with gr.Blocks(title=f"clmae: {name}", analytics_enabled=False, delete_cache=(900, 3600)) as self.blocks:
            self.session = gr.State(None)
            gr.HTML(f"<h1>{name}</h1><p>{explorer.describe()}</p>", elem_id="head", padding=False)
            self.message = gr.HTML(elem_id="message", padding=False)
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=250):
                    self._add_image_controls()
                    self._add_mask_controls()
                with gr.Column(scale=4):
                    with gr.Row(equal_height=False):
                        for name in ("image", "mask", "reconstruction", "error"):
                            self._add_picture(name)
                    with gr.Row(equal_height=False):
                        for name in ("keep", "attention", "components"):
                            if name in self.names:
                                self._add_picture(name)
                        self._add_neighbors()
                        num_absent = (not explorer.learns_masks) + (explorer.features is None)
                        for _ in range(num_absent):  # so that all rows have columns of one width
                            with gr.Column(min_width=190):
                                gr.HTML()
            self._connect()

    # -- layout -------------------------------------------------------------------------------------------------------

    def _add_image_controls(self) -> None:
        limits = f"{', '.join(FORMATS)}; up to {MAX_BYTES >> 20} MB and {MAX_PIXELS // 10**6} megapixels."
        gr.HTML(_note("Your image", limits), elem_classes="note", padding=False)
        self.upload = gr.File(show_label=False, type="filepath", height=110, elem_id="upload")
        gr.HTML(_note("Or an example"), elem_classes="note", padding=False)
        self.examples = _gallery("examples", [thumbnail(image) for image in self.explorer.examples])

    def _add_mask_controls(self) -> None:
        maskings = [*(["learned"] if self.explorer.learns_masks else []), "random", "own"]
        self.masking = gr.Radio(
            [(masking.capitalize(), masking) for masking in maskings],
            value=maskings[0],
            label="Which patches are masked",
            info="Own: click in the picture of the mask.",
            elem_id="masking",
        )
        with gr.Row(elem_classes="buttons"):
            self.redraw = gr.Button("New random", size="sm", min_width=60, elem_id="redraw")
            self.mask_all = gr.Button("Mask all", size="sm", min_width=60, elem_id="mask-all")
            self.show_all = gr.Button("Show all", size="sm", min_width=60, elem_id="show-all")
        last = self.explorer.last
        self.checkpoint = gr.Slider(
            0,
            max(last, 1),
            value=last,
            step=1,
            label="Checkpoint",
            info=self.explorer.describe_checkpoint(last),
            visible=last > 0,
            elem_id="checkpoint",
        )

    def _add_picture(self, name: str) -> None:
        with gr.Column(min_width=190):
            self.notes[name] = gr.HTML(_note(TITLES[name]), elem_classes=["note", "tall"], padding=False)
            self.images[name] = gr.Image(
                show_label=False,
                container=False,
                format="png",
                interactive=False,
                buttons=[],
                elem_id=f"picture-{name}",
                elem_classes=["picture", "clickable"] if name in (*PATCH_CHOOSERS, "mask") else ["picture"],
            )

    def _add_neighbors(self) -> None:
        caption = f"Of {len(self.explorer.rows):,} images, by cosine similarity of features. Click one to open it."
        with gr.Column(min_width=190, visible=self.explorer.features is not None):
            gr.HTML(_note("Nearest images", caption), elem_classes=["note", "tall"], padding=False)
            self.neighbors = _gallery("neighbors")

    # -- events -------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Each event with the component that gives its value, what is done with it, and whether that opens an image.

        Without a component the value is what was clicked on: the index of a picture in a gallery, or a place in one.
        """
        explorer = self.explorer
        outputs = [self.session, self.message, self.upload, self.masking, self.checkpoint, self.neighbors]
        outputs += [*self.notes.values(), *self.images.values()]
        events: list[tuple[Callable, Any, Action, bool]] = [
            (self.upload.upload, self.upload, lambda s, path: s.open(read_upload(path, explorer.num_channels)), True),
            (self.examples.select, None, lambda s, index: s.open(explorer.examples[index]), True),
            (self.neighbors.select, None, lambda s, index: s.open(explorer.read_row(s.neighbors[index][0])), True),
            (self.images["mask"].select, None, lambda s, place: s.toggle(s.patch_at(*place)), False),
            (self.masking.input, self.masking, Session.choose_masking, False),
            (self.checkpoint.input, self.checkpoint, lambda s, index: s.choose_checkpoint(int(index)), False),
        ]
        for name in PATCH_CHOOSERS:
            events.append((self.images[name].select, None, lambda s, place: s.choose_patch(s.patch_at(*place)), False))
        # These give no value but the session itself.
        events += [
            (self.blocks.load, self.session, lambda s, _: None, True),
            (self.redraw.click, self.session, lambda s, _: s.draw_random_mask(), False),
            (self.mask_all.click, self.session, lambda s, _: s.fill(True), False),
            (self.show_all.click, self.session, lambda s, _: s.fill(False), False),
        ]
        for trigger, component, act, opens in events:
            trigger(
                self._handler(act, opens, clicked=component is None),
                [self.session] if component is None else [self.session, component],
                outputs,
                api_visibility="private",
                concurrency_id="model",
                show_progress="hidden",
                # While a slider is dragged only where it ends counts; every click counts.
                trigger_mode="always_last" if component is self.checkpoint else "multiple",
            )

    def _handler(self, act: Action, opens: bool, clicked: bool) -> Callable:
        """What gradio calls; it reads from the annotations which functions take the place of a click."""

        def on_click(session: Session | None, event: gr.SelectData) -> dict[Any, Any]:
            return self._respond(session, act, event.index, opens)

        def on_value(session: Session | None, value: Any) -> dict[Any, Any]:
            return self._respond(session, act, value, opens)

        return on_click if clicked else on_value

    def _respond(self, session: Session | None, act: Action, value: Any, opens: bool) -> dict[Any, Any]:
        """Acts on the session; updates of the page that show it, or say why that could not be done."""
        updates: dict[Any, Any] = {}
        try:
            if session is None:  # a new visitor, or one whose session was forgotten
                session, opens = Session(self.explorer), True
                updates[self.checkpoint] = session.checkpoint
            act(session, value)
            updates |= self._show(session, opens)
            text = ""
        except InputError as error:
            text = str(error)
        except MemoryError:
            text = "this machine has too little memory for that: take a smaller image."
        except Exception as error:  # the page goes on, whatever one event ran into
            logger.exception("an event of the page failed")
            text = f"the program failed ({type(error).__name__}); the terminal says where."
        if text and session is not None:
            updates |= {self.masking: session.masking, self.checkpoint: session.checkpoint}
        if opens:
            updates[self.upload] = None
        return updates | {self.session: session, self.message: _message(text)}

    def _show(self, session: Session, image_changed: bool) -> dict[Any, Any]:
        updates: dict[Any, Any] = {
            self.masking: session.masking,
            self.checkpoint: gr.update(info=self.explorer.describe_checkpoint(session.checkpoint)),
        }
        if image_changed:
            updates[self.neighbors] = [
                (thumbnail(self.explorer.read_row(row)), f"{name} {similarity:.3f}".strip())
                for row, similarity, name in session.neighbors
            ]
        for name, picture in session.pictures().items():
            updates[self.notes[name]] = _note(TITLES[name], picture.caption)
            updates[self.images[name]] = picture.image
        return updates


def serve(
    model: str,
    dataset: str | None = None,
    split: str = "train",
    *,
    host: str | None = "127.0.0.1",
    port: int | None = 7860,
    share: bool = False,
) -> None:
    """Makes the page of a model, says where it is, and serves it until interrupted.

    Args:
        model, dataset, split: As [`Explorer`]'s.
        host, port: `None`: as the environment says (`GRADIO_SERVER_NAME`, `GRADIO_SERVER_PORT`).
        share: Also give it a public address, through gradio's servers.

    Raises:
        InputError: Model or dataset cannot be loaded, or the port is taken.
    """
    page = Page(Explorer(model, dataset, split)).blocks
    font = ["Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]  # the system's; none is fetched
    theme = gr.themes.Base(primary_hue="orange", neutral_hue="slate", font=font, font_mono=["Consolas", "monospace"])
    page.queue(default_concurrency_limit=1, max_size=64)
    try:
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme,
            css=CSS,
            max_file_size=MAX_BYTES,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise InputError(f"--port {port} cannot be used, another program may have it: give another number.") from error
    print(f"the page is at {public or local} (Ctrl+C ends it)", flush=True)
    page.block_thread()
