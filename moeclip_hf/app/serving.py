"""Serving the page, on this machine alone unless told otherwise, and nothing but the page."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeclip_hf.app.style import CSS, theme

# What events send is names and numbers; files come by another way.
_LARGEST_EVENT = 1 << 20


class NothingRemote:
    """
    Refuses to fetch for visitors what lies elsewhere.

    Gradio takes a web address wherever it takes a file, and downloads it, of any size, on the visitor's behalf. This
    page takes uploads alone. Events that are larger than any of its own are refused as well.

    Args:
        app: the ASGI application behind it.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["type"] == "http" and _is_remote(scope["path"].partition("/file=")[2]):
            refusal = PlainTextResponse("Only uploaded files are served.", 403)
        elif scope["type"] == "http" and scope["method"] == "POST" and not scope["path"].endswith("/upload"):
            body, receive = await _read(receive)
            if body is None:
                refusal = PlainTextResponse("The request is too large.", 413)
            elif _names_remote_file(body):
                refusal = PlainTextResponse("Only uploaded files are taken.", 403)
        await (refusal or self.app)(scope, receive, send)


async def _read(receive: Receive) -> tuple[bytes | None, Receive]:
    """Read a request's body, `None` if it is too large, and a way to receive it again."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > _LARGEST_EVENT:
            return None, receive
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return body, again


def _names_remote_file(body: bytes) -> bool:
    try:
        values: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # Gradio refuses it
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if _is_remote(value.get("path")):  # its "url" is where the page itself shows the file, and not read here
                return True
            values += value.values()
        elif isinstance(value, list):
            values += value
    return False


def _is_remote(path: object) -> bool:
    return isinstance(path, str) and path.lower().lstrip().startswith(("http:", "https:"))


def launch_app(
    page: gr.Blocks,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_upload_mb: float = 32,
    block: bool = True,
) -> str:
    """
    Serve the page.

    Args:
        page (`gr.Blocks`): from [`build_app`].
        host (`str`): address to listen at; `"0.0.0.0"` for all of this machine's.
        port (`int`, *optional*): the first free one from 7860 on by default.
        max_upload_mb (`float`): of a file, in megabytes.
        block (`bool`): whether to serve until interrupted, or to come back at once.

    Returns:
        Its address.

    Raises:
        OSError: if the port is taken.
    """
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=int(max_upload_mb * (1 << 20)),
        state_session_capacity=256,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(NothingRemote)], "docs_url": None, "redoc_url": None},
        theme=theme(),
        css=CSS,
    )
    if block:
        print(f"The page is at {url}", flush=True)
        page.block_thread()
    return url


__all__ = ["NothingRemote", "launch_app"]
