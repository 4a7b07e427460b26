"""Serving the page, on this machine alone unless told otherwise, and nothing but the page."""

from __future__ import annotations

import json
import socket
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeclip_hf.app.style import CSS, theme
from moeclip_hf.errors import MoECLIPError

# Where the page sends to: files to the first, and names and numbers, which are small, to the others.
_UPLOAD, _EVENTS = "/gradio_api/upload", ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")
_LARGEST_EVENT = 1 << 20
# What the page does not ask for: pages from elsewhere, by two ways, answers to programs, and sessions written to a
# folder that is never emptied.
_UNASKED = ("/gradio_api/proxy=", "/gradio_api/file/", "/gradio_api/call/", "/gradio_api/deep_link")


class OnlyThePage:
    """
    Lets through what the page asks for, and refuses the rest of what Gradio would do.

    Gradio takes a web address wherever it takes a file, and downloads it, of any size, on the visitor's behalf; it
    also converts recordings, and more. This page takes uploads and small events alone.

    Args:
        app: the ASGI application behind it.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal, path = None, scope.get("path", "").rstrip("/")
        sends = scope["type"] == "http" and scope["method"] == "POST"
        if _is_remote(path.partition("/file=")[2]):
            refusal = PlainTextResponse("Only uploaded files are served.", 403)
        elif sends and path.endswith(_EVENTS):
            body, receive = await _read(receive)
            if body is None:
                refusal = PlainTextResponse("The request is too large.", 413)
            elif _names_remote_file(body):
                refusal = PlainTextResponse("Only uploaded files are taken.", 403)
        # No name holds a NUL, and it would break the server's own checks of paths.
        elif any(part in path for part in (*_UNASKED, "\0")) or (sends and not path.endswith(_UPLOAD)):
            refusal = PlainTextResponse("The page does not ask for this.", 403)
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


def _check_address(host: str) -> None:
    """Listen at an address for a moment, or raise; Gradio would try a hundred ports of it, for minutes."""
    failure = None
    for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind) as probe:
                return probe.bind(address)
        except OSError as error:  # such as IPv6's, on a machine without
            failure = error
    if failure is not None:
        raise failure


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
        max_upload_mb (`float`): of a file, in MiB.
        block (`bool`): whether to serve until interrupted, or to come back at once.

    Returns:
        Its address.

    Raises:
        MoECLIPError: if the port is taken, or the address is not this machine's.
    """
    try:
        _check_address(host.strip("[]"))
        _, url, _ = page.launch(
            server_name=f"[{host.strip('[]')}]" if ":" in host else host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=int(max_upload_mb * (1 << 20)),
            state_session_capacity=256,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            num_workers=0,  # they would serve files, on ports of their own, past the guard
            footer_links=[],
            app_kwargs={"middleware": [Middleware(OnlyThePage)]},
            theme=theme(),
            css=CSS,
        )
    except (OSError, UnicodeError) as error:  # of the latter kind for names that no host has
        where = host if port is None else f"{host}, port {port}"
        raise MoECLIPError(f"cannot listen at {where}: taken already, or not an address of this machine") from error
    if block:
        print(f"The page is at {url}", flush=True)
        page.block_thread()
    return url


__all__ = ["OnlyThePage", "launch_app"]
