"""The page's layout, and which event calls which handler."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from moeclip_hf.app import markup
from moeclip_hf.app.handlers import LARGEST_BATCH, Handlers
from moeclip_hf.app.inspector import LONGEST_CLASS_NAME, Inspector, shown_threshold
from moeclip_hf.app.samples import render_samples, samples_of_folder

# Everything that runs the model waits in one line; what only redraws does not.
_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
_REDRAW: dict[str, Any] = {
    "concurrency_id": "redraw",
    "concurrency_limit": 2,
    "api_visibility": "private",
    "trigger_mode": "always_last",
    "show_progress": "hidden",
}
_SECONDS_KEPT = 3600


class _Settings(NamedTuple):
    """What all tabs go by, and the event of another model having been loaded, where one can be."""

    class_name: gr.Textbox
    model: gr.State
    threshold: gr.Slider
    pixel_threshold: gr.Slider
    loaded: Any


def build_app(
    model: str | None = None,
    device: str | None = None,
    choose_model: bool = False,
    max_megapixels: float = 64,
    samples: Path | None = None,
    revision: str | None = None,
) -> gr.Blocks:
    """
    Build the page: inspect one image, look at the experts, score many.

    Args:
        model (`str`, *optional*): checkpoint folder or Hub id; the embedded checkpoint by default.
        device (`str`, *optional*): such as `"cuda"`; the best there is by default.
        choose_model (`bool`): whether visitors may load other models. They can then learn which folders there are on
            the machine, and fill its disk and memory: leave it off where strangers reach the page.
        max_megapixels (`float`): of an image; larger ones are refused before they are decoded.
        samples (`Path`, *optional*): folder of images to choose from; rendered textures by default.
        revision (`str`, *optional*): of a model on the Hub; a commit's stays the same whatever is pushed.

    Returns:
        `gr.Blocks`, for [`launch_app`].

    Raises:
        CheckpointError: if the model cannot be loaded.
        MoECLIPError: if the folder of samples holds no images, or one that cannot be read.
    """
    inspector = Inspector(model, device, max_megapixels, revision)
    choices = render_samples() if samples is None else samples_of_folder(samples, max_megapixels)
    handlers = Handlers(inspector, choices)
    page = gr.Blocks(title="MoECLIP", analytics_enabled=False, delete_cache=(_SECONDS_KEPT, _SECONDS_KEPT))
    with page:
        gr.HTML(
            "<h1>MoECLIP</h1><p>Zero-shot anomaly detection: say what an image shows, see where it is damaged.</p>",
            elem_id="head",
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                settings = _add_settings(handlers, choose_model)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Inspect"):
                    inspection = _add_inspection(handlers, settings)
                with gr.Tab("Experts") as experts:
                    _add_experts(handlers, inspection, experts)
                with gr.Tab("Batch"):
                    _add_batch(handlers, settings)
    return page.queue(max_size=32, api_open=False, default_concurrency_limit=4)


def _add_settings(handlers: Handlers, choose_model: bool) -> _Settings:
    own = handlers.inspector.model
    model = gr.State(own)
    class_name = gr.Textbox(
        "object", label="Class name", info="What the images show.", max_length=LONGEST_CLASS_NAME, max_lines=1
    )
    # Gradio resets a slider to what it was made with, which is not another model's own.
    buttons: Any = [] if choose_model else ["reset"]
    threshold, pixel_threshold = (
        gr.Slider(0, 1, shown_threshold(value), step=0.001, label=label, info=info, elem_id=name, buttons=buttons)
        for name, value, label, info in (
            ("threshold", own.image_threshold, "Image threshold", "Score from which on an image is anomalous."),
            ("pixel-threshold", own.pixel_threshold, "Pixel threshold", "Map value that regions begin at."),
        )
    )
    in_use = gr.HTML(markup.model_in_use(own), elem_id="model")
    loaded = None
    if choose_model:
        with gr.Accordion("Another model", open=False):
            name = gr.Textbox(
                label="Folder or Hub id", info="Empty for the embedded demonstration.", max_length=500, max_lines=1
            )
            button = gr.Button("Load", size="sm")
        loaded = gr.on(
            [button.click, name.submit],
            handlers.load,
            [name, model],
            [model, in_use, threshold, pixel_threshold],
            show_progress_on=in_use,
            **_MODEL,
        )
    return _Settings(class_name, model, threshold, pixel_threshold, loaded)


def _add_inspection(handlers: Handlers, settings: _Settings) -> gr.State:
    source, inspection = gr.State(None), gr.State(None, time_to_live=_SECONDS_KEPT)
    upload = gr.File(label="An image of yours, or a sample below", height=150, elem_id="upload")
    samples = gr.Gallery(
        [(sample.thumbnail, sample.class_name) for sample in handlers.samples],
        label="Samples",
        show_label=False,
        columns=6,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="samples",
    )
    run = gr.Button("Inspect", variant="primary")
    verdict = gr.HTML(markup.notice(markup.INVITATION), elem_id="verdict")
    with gr.Row():
        picture, overlay = (
            gr.Image(label=label, interactive=False, elem_id=label.lower(), buttons=["download", "fullscreen"])
            for label in ("Image", "Overlay")
        )
    regions = gr.Dataframe(
        label="Regions",
        headers=["left", "top", "right", "bottom", "area (pixels)", "score"],
        datatype="str",
        interactive=False,
        visible=False,
        max_height=240,
        buttons=[],
        elem_id="regions",
    )

    chosen = [settings.model, settings.threshold, settings.pixel_threshold]
    found = [inspection, verdict, picture, overlay, regions]
    again: dict[str, Any] = {
        "fn": handlers.inspect,
        "inputs": [source, settings.class_name, *chosen],
        "outputs": found,
        "show_progress_on": overlay,
        **_MODEL,
    }
    received = {"fn": handlers.receive, "inputs": [upload, settings.class_name, *chosen]}
    for event in (upload.upload, upload.clear):
        event(**(again | received | {"outputs": [source, *found]}))
    samples.select(
        **(
            again
            | {"fn": handlers.choose_sample, "inputs": chosen}
            | {"outputs": [source, settings.class_name, upload, *found]}
        )
    )
    gr.on([run.click, settings.class_name.submit], **again)
    if settings.loaded is not None:
        settings.loaded.success(**again)
    moved = [inspection, settings.threshold, settings.pixel_threshold]
    for slider in (settings.threshold, settings.pixel_threshold):
        slider.change(handlers.redraw, moved, [verdict, overlay, regions], **_REDRAW)
    return inspection


def _add_experts(handlers: Handlers, inspection: gr.State, tab: gr.Tab) -> None:
    explained = gr.State(None, time_to_live=_SECONDS_KEPT)
    status = gr.HTML(markup.notice(markup.INVITATION), elem_id="explained")
    pictures = []
    for name, heading in (
        ("routing", "#### Routing\nThe weight of each expert at every patch, the hotter the larger."),
        ("attributions", "#### Attributions\nWhat each expert adds to the map: red raises it, blue lowers it."),
    ):
        gr.Markdown(heading)
        pictures.append(
            gr.Image(show_label=False, interactive=False, elem_id=name, buttons=["download", "fullscreen"])
        )
    tab.select(
        handlers.explain,
        [inspection, explained],
        [explained, status, *pictures],
        show_progress_on=pictures[0],
        **_MODEL,
    )


def _add_batch(handlers: Handlers, settings: _Settings) -> None:
    rows = gr.State([], time_to_live=_SECONDS_KEPT)
    files = gr.File(label=f"Images, {LARGEST_BATCH} at most", file_count="multiple", height=180, elem_id="files")
    with gr.Row():
        run = gr.Button("Score", variant="primary")
        stop = gr.Button("Stop")
    summary = gr.HTML(markup.notice("Add images, then score them."), elem_id="summary")
    table = gr.Dataframe(
        label="Scores",
        headers=["verdict", "score", "file", "reason"],
        column_widths=["110px", "80px", "300px", "400px"],
        datatype="str",
        interactive=False,
        visible=False,
        wrap=True,
        max_height=480,
        buttons=[],
        elem_id="scores",
    )
    download = gr.DownloadButton("Download as CSV", visible=False, elem_id="csv")

    concluded: dict[str, Any] = {
        "fn": handlers.conclude,
        "inputs": [rows, settings.model, settings.threshold],
        "outputs": [summary, table, download],
        **_REDRAW,
    }
    scoring = run.click(
        handlers.score,
        [files, settings.class_name, settings.model, settings.threshold],
        [rows, summary, table, download],
        show_progress="minimal",
        show_progress_on=files,
        **_MODEL,
    )
    for event in (scoring.success, settings.threshold.change):
        event(**concluded)
    # One after the other: side by side, a score that was on its way could still take the summary's place.
    stop.click(fn=None, cancels=scoring).then(**concluded)


__all__ = ["build_app"]
