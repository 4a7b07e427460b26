"""Serves a MoECLIP repository from Hugging Face Inference Endpoints, which call `EndpointHandler`.

A request is `{"inputs": image or list of images, "parameters": {...}}`. An image is a URL, base64, the bytes of a file
or a PIL image: never a path, lest strangers read the server's files. Every error is a `ValueError` of one line, which
Endpoints answer as a bad request.
"""

import base64
import ipaddress
import math
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit
from urllib.request import (
    AbstractHTTPHandler,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    Request,
    build_opener,
)

import torch
from PIL import Image
from transformers import pipeline

MAX_IMAGES = 16
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
MAX_NAME_LENGTH = 500

_TASK: Any = "zero-shot-anomaly-detection"
_PARAMETERS = ("class_name", "threshold", "pixel_threshold", "return_heatmap")
_TIMEOUT = 10  # seconds
_PART = 1 << 16
_BATCH_SIZE = 4
# Those of the image processor, whose file cannot be imported: this one is no part of a package on an endpoint.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# What IPv6 hands out to hosts, and what it has for addresses of IPv4: those that end in one (mapped, and translated by
# NAT64), and tunnels that lead to one (Teredo, 6to4), which serve nobody any more.
_IPV6_HOSTS = ipaddress.ip_network("2000::/3")
_ENDING_IN_IPV4 = [ipaddress.ip_network(network) for network in ("::ffff:0:0/96", "64:ff9b::/96")]
_TUNNELS = [ipaddress.ip_network(network) for network in ("2001::/32", "2002::/16")]


class EndpointHandler:
    """
    Answers requests, as Endpoints call it.

    Args:
        path (`str`): the repository's folder, whose own code is run.
    """

    def __init__(self, path: str = ""):
        dtype = torch.float16 if torch.cuda.is_available() else torch.float32
        self.detect = pipeline(_TASK, model=path, trust_remote_code=True, dtype=dtype)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """
        Score the images of a request.

        Args:
            data: `inputs`, and optional `parameters`: `class_name` (what the images show; "object" by default),
                `threshold` and `pixel_threshold` (0 to 1; by default those of the checkpoint), `return_heatmap`.

        Returns:
            A dict for an image, a list of them for a list: `class_name` (as it was read: cut where it is too long for
            the model), `score` (0 to 1), `is_anomalous`, `regions` (dicts with `box` [left, top, right, bottom],
            `area` and `score`), `width`, `height` and, with `return_heatmap`, `heatmap`, a grey PNG of the image's
            size in base64.

        Raises:
            ValueError: for a request that cannot be answered.
        """
        parameters = _checked_parameters(data.get("parameters") or {})
        with_heatmap = parameters.pop("return_heatmap", False)
        inputs = data.get("inputs")
        given = inputs if isinstance(inputs, list) else [inputs]
        if not 1 <= len(given) <= MAX_IMAGES:
            raise ValueError(f"A request takes 1 to {MAX_IMAGES} images, not {len(given)}.")
        images = [read_image(image) for image in given]
        # Of an iterator the pipeline makes one: maps are let go of one by one, large ones among them.
        results = self.detect((image for image in images), batch_size=_BATCH_SIZE, **parameters)
        read_as = self.detect.processor.fit_class_name(parameters.get("class_name", "object"))
        answers = [{"class_name": read_as, **_answer(result, with_heatmap)} for result in results]
        return answers if isinstance(inputs, list) else answers[0]


def read_image(source: Any) -> bytes | Image.Image:
    """
    Take an image of a request, if it is one and not too large.

    Raises:
        ValueError: saying why not.
    """
    if isinstance(source, Image.Image):  # an image that was the whole request, as it was opened
        _check_pixels(*source.size)
        with _decoding():
            if source.format not in (None, "MPO", *_FORMATS):  # not decoded yet, and what decodes it may be a program
                raise ValueError
            source.load()
            return source  # the pipeline turns it upright
    if isinstance(source, str):
        data = _download(source) if source.startswith(("http://", "https://")) else _decode_base64(source)
    elif isinstance(source, (bytes, bytearray)):
        data = bytes(source)
    else:
        raise ValueError(f"An image is a URL, base64 or bytes, not {type(source).__name__}.")
    if len(data) > MAX_BYTES:
        raise ValueError(f"An image has at most {MAX_BYTES} bytes.")
    with _decoding(), Image.open(BytesIO(data), formats=_FORMATS) as image:
        size = image.size
    _check_pixels(*size)
    return data


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except Exception:  # decoders raise whatever a damaged file leads them to
        raise ValueError("An input is no image of a known format, is damaged, or far too large.") from None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"An image has at most {MAX_PIXELS} pixels, not {width} x {height}.")


def _decode_base64(text: str) -> bytes:
    encoded = "".join((text.partition(",")[2] if text.startswith("data:") else text).split())
    if len(encoded) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"An image has at most {MAX_BYTES} bytes.")
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError:
        raise ValueError(f"An image is a URL, base64 or bytes, and this text is neither: {text[:40]!r}.") from None


def _download(url: str) -> bytes:
    try:
        _refuse_private(url)
        opener = build_opener(_CheckedRedirects, _CheckedHTTP, _CheckedHTTPS)
        with opener.open(Request(url, headers={"User-Agent": "moeclip-hf"}), timeout=_TIMEOUT) as response:
            return _read_in_time(response)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"{url[:200]}: cannot be fetched ({error}).") from None


def _read_in_time(response: Any) -> bytes:
    """Read what is taken of an answer; a server may send its bytes so slowly that none of them is late."""
    content, end = bytearray(), time.monotonic() + _TIMEOUT
    while len(content) <= MAX_BYTES and (part := response.read1(_PART)):
        content += part
        if time.monotonic() > end:
            raise OSError(f"it takes longer than {_TIMEOUT} seconds")
    return bytes(content)


class _CheckedRedirects(HTTPRedirectHandler):
    def redirect_request(self, request: Any, file: Any, code: Any, message: Any, headers: Any, new_url: str) -> Any:
        _refuse_private(new_url)
        return super().redirect_request(request, file, code, message, headers, new_url)


class _Checked(AbstractHTTPHandler):
    """
    Connects to the very addresses that were checked: of a name that is looked up twice, a stranger's server may give
    another one the second time. A proxy, which the server's owner chose, looks names up itself.
    """

    def do_open(self, http_class: Any, req: Any, **http_conn_args: Any) -> Any:
        def connection(*arguments: Any, **keywords: Any) -> Any:
            made = http_class(*arguments, **keywords)
            if not (req.has_proxy() or req._tunnel_host):
                made._create_connection = _connect  # the rest, and TLS too, goes by the name
            return made

        return super().do_open(connection, req, **http_conn_args)


class _CheckedHTTP(_Checked, HTTPHandler):
    pass


class _CheckedHTTPS(_Checked, HTTPSHandler):
    pass


def _connect(host_and_port: tuple[str, int], *settings: Any) -> socket.socket:
    host, port = host_and_port
    failure: OSError | None = None
    for address in _public_addresses(host, port):
        try:
            return socket.create_connection((address, port), *settings)
        except OSError as error:
            failure = error
    raise failure or OSError("it has no address")


def _refuse_private(url: str) -> None:
    """Refuse what only the server can reach: itself, its network, its cloud's metadata service."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an address of http or https")
    _public_addresses(parts.hostname, parts.port or 443)


def _public_addresses(host: str, port: int) -> list[str]:
    """Look a host's addresses up; a `ValueError` if one of them is not public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in found]
    if not all(map(_is_public, addresses)):
        raise ValueError("its address is not a public one")
    return addresses


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if any(address in network for network in _ENDING_IN_IPV4):
        address = ipaddress.IPv4Address(address.packed[-4:])
    if address.version == 6 and (address not in _IPV6_HOSTS or any(address in network for network in _TUNNELS)):
        return False
    return address.is_global and not address.is_multicast


def _checked_parameters(parameters: Any) -> dict[str, Any]:
    if not isinstance(parameters, dict) or set(parameters) - set(_PARAMETERS):
        raise ValueError(f"parameters is a dict with some of {', '.join(_PARAMETERS)}, not {str(parameters)[:200]}.")
    name = parameters.get("class_name", "object")
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"class_name is a printable text of 1 to {MAX_NAME_LENGTH} characters.")
    for key in ("threshold", "pixel_threshold"):
        value = parameters.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{key} is a number from 0 to 1, not {str(value)[:40]!r}.")
        if value is not None and not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"{key} is a number from 0 to 1, not {value}.")
    if not isinstance(parameters.get("return_heatmap", False), bool):
        raise ValueError("return_heatmap is true or false.")
    return dict(parameters)


def _answer(result: dict[str, Any], with_heatmap: bool) -> dict[str, Any]:
    heatmap = result["heatmap"]
    answer = {name: result[name] for name in ("score", "is_anomalous", "regions")}
    answer |= {"width": heatmap.width, "height": heatmap.height}
    if with_heatmap:
        buffer = BytesIO()
        heatmap.save(buffer, format="PNG")
        answer["heatmap"] = base64.b64encode(buffer.getvalue()).decode()
    return answer
