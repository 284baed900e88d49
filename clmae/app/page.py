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
    "keep": "Keep probability",
    "attention": "Attention of a patch",
    "components": "Patch tokens",
}
PATCH_CHOOSERS = ("image", "attention", "components")  # a click there chooses the patch whose attention is shown
CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.45rem; font-weight: 650; margin: 0; }
#head p, .note p { color: var(--body-text-color-subdued); margin: .1rem 0 0; font-size: .9rem; }
.note h2 { font-size: .95rem; font-weight: 600; margin: 0; }
.note p { font-size: .8rem; line-height: 1.3; }
.panel .note p { height: 3.9em; }
.message { background: #b3261e; color: white; border-radius: 6px; padding: .5rem .8rem; overflow-wrap: anywhere; }
.panel { gap: .3rem !important; }
.picture { border: 0 !important; background: none !important; }
.picture img { image-rendering: pixelated; border-radius: 4px; }
.clickable img { cursor: crosshair; }
#examples .grid-wrap, #neighbors .grid-wrap { padding: 0 !important; min-height: 0 !important; }
#examples .grid-container { grid-template-columns: repeat(4, 1fr) !important; gap: 4px; padding: 0 }
#neighbors .grid-container { grid-template-columns: repeat(3, 1fr) !important; gap: 4px; padding: 0 }
#examples .caption-label { display: none; }
#neighbors .caption-label { font-size: .7rem; padding: 1px 4px; max-width: 100%; }
.legend { white-space: nowrap; }
.scale { display: inline-block; width: 4.5em; height: .6em; border-radius: 2px; vertical-align: baseline; }
footer { display: none !important; }
"""


def _note(title: str, caption: str = "") -> str:
    return f"<h2>{title}</h2>" + (f"<p>{caption}</p>" if caption else "")


def _message(text: str) -> Any:
    """The update of the message's place; without a text there is none."""
    return gr.update(value=f'<div class="message" role="alert">{html.escape(text)}</div>', visible=bool(text))


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


def make_page(explorer: Explorer) -> gr.Blocks:
    """The page, not yet served."""
    names = [name for name in TITLES if name != "keep" or explorer.learns_masks]
    maskings = [*(["learned"] if explorer.learns_masks else []), "random", "own"]
    last = len(explorer.checkpoints) - 1
    notes: dict[str, gr.HTML] = {}
    images: dict[str, gr.Image] = {}

    def panel(name: str) -> None:
        classes = ["picture", "clickable"] if name in (*PATCH_CHOOSERS, "mask") else ["picture"]
        with gr.Column(min_width=190, elem_classes="panel"):
            notes[name] = gr.HTML(_note(TITLES[name]), elem_classes="note", padding=False)
            images[name] = gr.Image(
                show_label=False,
                container=False,
                format="png",
                interactive=False,
                buttons=[],
                elem_id=f"picture-{name}",
                elem_classes=classes,
                alt_text=TITLES[name],
            )

    with gr.Blocks(title=f"clmae: {explorer.name}", analytics_enabled=False, delete_cache=(900, 3600)) as page:
        session = gr.State(None)
        gr.HTML(
            f"<h1>{html.escape(os.path.basename(explorer.name.rstrip('/')))}</h1><p>{explorer.describe()}</p>",
            elem_id="head",
            padding=False,
        )
        message = gr.HTML(elem_id="message", visible=False, padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=230):
                limits = f"{', '.join(FORMATS)}; up to {MAX_BYTES >> 20} MB and {MAX_PIXELS // 10**6} megapixels."
                gr.HTML(_note("Your image", limits), elem_classes="note", padding=False)
                upload = gr.File(show_label=False, type="filepath", height=110, elem_id="upload")
                gr.HTML(_note("Or an example"), elem_classes="note", padding=False)
                examples = _gallery("examples", [thumbnail(image) for image in explorer.examples])
                masking = gr.Radio(
                    [(label.capitalize(), label) for label in maskings],
                    value=maskings[0],
                    label="Which patches are masked",
                    info="Own: click patches in the picture of the mask.",
                    elem_id="masking",
                )
                with gr.Row():
                    redraw = gr.Button("New random mask", size="sm", min_width=60, elem_id="redraw")
                    mask_all = gr.Button("Mask all", size="sm", min_width=60, elem_id="mask-all")
                    show_all = gr.Button("Show all", size="sm", min_width=60, elem_id="show-all")
                checkpoint = gr.Slider(
                    0,
                    max(last, 1),
                    value=last,
                    step=1,
                    label="Checkpoint",
                    info=explorer.describe_checkpoint(last),
                    visible=last > 0,
                    elem_id="checkpoint",
                )
            with gr.Column(scale=4):
                for row in (("image", "mask", "reconstruction", "error"), ("keep", "attention", "components")):
                    with gr.Row(equal_height=False):
                        for name in row:
                            if name in names:
                                panel(name)
                        if row[0] == "keep":
                            visible = explorer.features is not None
                            with gr.Column(min_width=190, visible=visible, elem_classes="panel"):
                                caption = (
                                    f"Of {len(explorer.rows):,} images of the dataset, by the features of the end of "
                                    "the run; with cosine similarity. Click one to open it."
                                )
                                gr.HTML(_note("Nearest images", caption), elem_classes="note", padding=False)
                                neighbors = _gallery("neighbors")

        outputs = [session, message, upload, masking, checkpoint, neighbors]
        outputs += [component for name in names for component in (notes[name], images[name])]

        def show(state: Session, image_changed: bool) -> dict[Any, Any]:
            """Updates of all components."""
            updates: dict[Any, Any] = {session: state, message: _message(""), masking: state.masking}
            if image_changed:
                updates[upload] = None
                updates[neighbors] = [
                    (thumbnail(explorer.read_row(row)), f"{name} {similarity:.3f}".strip())
                    for row, similarity, name in state.neighbors
                ]
            updates[checkpoint] = gr.update(value=state.checkpoint, info=explorer.describe_checkpoint(state.checkpoint))
            for name, picture in state.pictures().items():
                updates[notes[name]] = _note(TITLES[name], picture.caption)
                updates[images[name]] = picture.image
            return updates

        def respond(state: Session | None, act: Callable[[Session], None], opens: bool = False) -> dict[Any, Any]:
            """Acts on the session and shows it, or says why it could not."""
            try:
                if state is None:  # a new visitor, or one whose session was forgotten
                    state, opens = Session(explorer), True
                act(state)
                return show(state, opens)
            except InputError as error:
                text = str(error)
            except MemoryError:
                text = "this machine has too little memory for that: take a smaller image."
            except Exception as error:  # the page goes on, whatever one event ran into
                logger.exception("an event of the page failed")
                text = f"the program failed ({type(error).__name__}); the terminal says where."
            updates: dict[Any, Any] = {session: state, message: _message(text)}
            if state is not None:
                updates |= {masking: state.masking, checkpoint: state.checkpoint}
            return updates | ({upload: None} if opens else {})

        # One function an event: gradio reads from the annotation that an event has a place.
        def start(state: Session | None):
            return respond(state, lambda session: None)

        def open_upload(state: Session | None, path: str):
            return respond(state, lambda session: session.open(read_upload(path, explorer.num_channels)), opens=True)

        def open_example(state: Session | None, event: gr.SelectData):
            return respond(state, lambda session: session.open(explorer.examples[event.index]), opens=True)

        def open_neighbor(state: Session | None, event: gr.SelectData):
            def act(session: Session) -> None:
                session.open(explorer.read_row(session.neighbors[event.index][0]))

            return respond(state, act, opens=True)

        def choose_patch(state: Session | None, event: gr.SelectData):
            return respond(state, lambda session: setattr(session, "patch", session.patch_at(*event.index)))

        def toggle(state: Session | None, event: gr.SelectData):
            return respond(state, lambda session: session.toggle(session.patch_at(*event.index)))

        def choose_masking(state: Session | None, value: str):
            return respond(state, lambda session: session.choose_masking(value))

        def choose_checkpoint(state: Session | None, value: int):
            return respond(state, lambda session: session.choose_checkpoint(int(value)))

        def redraw_mask(state: Session | None):
            return respond(state, Session.draw_random_mask)

        def mask_everything(state: Session | None):
            return respond(state, lambda session: session.fill(True))

        def show_everything(state: Session | None):
            return respond(state, lambda session: session.fill(False))

        events: list[tuple[Callable, Callable, list[Any]]] = [
            (page.load, start, []),
            (upload.upload, open_upload, [upload]),
            (examples.select, open_example, []),
            (neighbors.select, open_neighbor, []),
            (images["mask"].select, toggle, []),
            (masking.input, choose_masking, [masking]),
            (checkpoint.release, choose_checkpoint, [checkpoint]),
            (redraw.click, redraw_mask, []),
            (mask_all.click, mask_everything, []),
            (show_all.click, show_everything, []),
            *[(images[name].select, choose_patch, []) for name in names if name in PATCH_CHOOSERS],
        ]
        for trigger, function, inputs in events:
            trigger(
                function,
                [session, *inputs],
                outputs,
                api_visibility="private",
                concurrency_id="model",
                show_progress="hidden",
                trigger_mode="multiple",
            )
    return page


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
    page = make_page(Explorer(model, dataset, split))
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
        raise InputError(f"--port {port} cannot be used: {error}") from error
    print(f"the page is at {public or local} (Ctrl+C ends it)", flush=True)
    page.block_thread()
