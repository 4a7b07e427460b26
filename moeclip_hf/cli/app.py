"""`moeclip app`: the page."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from moeclip_hf.cli.usage import refuse_nan


def app(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or Hub id.", show_default="the embedded demonstration")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a checkpoint on the Hub.", show_default="main")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port to listen at.", show_default="the first free from 7860 on"),
    ] = None,
    choose_model: Annotated[
        bool | None,
        typer.Option(
            "--choose-model/--fixed-model",
            help="Whether visitors may load other models, from folders and the Hub.",
            show_default="only where no other machine reaches the page",
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of images to choose from; folders within it name classes.",
            show_default="rendered textures",
        ),
    ] = None,
    max_upload_mb: Annotated[
        float, typer.Option(min=0.1, max=1 << 20, callback=refuse_nan, help="MiB of a file.")
    ] = 32,
    max_image_megapixels: Annotated[
        float, typer.Option(min=0.1, callback=refuse_nan, help="Megapixels of an image.")
    ] = 64,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.", show_default="the best there is")] = None,
) -> None:
    """Serve a page to try a model on: drop an image and see where it is damaged, look at its experts, score many."""
    from importlib.util import find_spec

    from moeclip_hf.errors import MoECLIPError

    if find_spec("gradio") is None:
        raise MoECLIPError("the page needs gradio: pip install 'moeclip-hf[app]'")
    from transformers.utils import logging

    from moeclip_hf.app import build_app, launch_app

    logging.disable_progress_bar()
    if choose_model is None:
        choose_model = is_loopback(host)
    page = build_app(model, device, choose_model, max_image_megapixels, samples, revision)
    launch_app(page, host, port, max_upload_mb)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's to itself."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
