"""What the handler of Inference Endpoints refuses, and how it fetches images; test_hub.py serves with it."""

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import urlsplit

import pytest
from PIL import Image

from moeclip_hf.modeling import handler
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT


def png() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def serve() -> handler.EndpointHandler:
    return handler.EndpointHandler(str(EMBEDDED_CHECKPOINT))


@pytest.fixture
def server(monkeypatch):
    """Serves `/part.png` and a redirect at `/moved`; its port passes for a public address, and no other does."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", self.path.partition("?")[2])
                self.end_headers()
                return
            found = self.path == "/part.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(png() if found else b"")

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        port = listening.server_address[1]
        refuse_private = handler._refuse_private
        monkeypatch.setattr(
            handler, "_refuse_private", lambda url: None if urlsplit(url).port == port else refuse_private(url)
        )
        yield f"http://127.0.0.1:{port}"
        listening.shutdown()


def test_an_image_is_fetched_from_its_url_after_redirects_too(server):
    for url in (f"{server}/part.png", f"{server}/moved?{server}/part.png"):
        assert Image.open(BytesIO(handler.read_image(url))).size == (8, 6)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/gone.png", "HTTP Error 404"),
        ("/moved?http://127.0.0.1:1/part.png", "its address is not a public one"),
        ("/moved?http://10.0.0.7/part.png", "its address is not a public one"),
        ("/moved?http://[::ffff:127.0.0.1]/part.png", "its address is not a public one"),
        ("/moved?file:///etc/hostname", "is not allowed"),
    ],
)
def test_what_cannot_or_must_not_be_fetched_is_refused(server, path, words):
    with pytest.raises(ValueError, match=words):
        handler.read_image(f"{server}{path}")


def test_a_large_answer_is_not_read_to_its_end(server, monkeypatch):
    monkeypatch.setattr(handler, "MAX_BYTES", 20)
    with pytest.raises(ValueError, match="at most 20 bytes"):
        handler.read_image(f"{server}/part.png")


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        ("part.png", {}, "URL, base64 or bytes"),
        ("/etc/hostname", {}, "URL, base64 or bytes"),
        (None, {}, "not NoneType"),
        ([], {}, "1 to 16 images, not 0"),
        ([png()] * 17, {}, "1 to 16 images, not 17"),
        (base64.b64encode(b"no image").decode(), {}, "no image of a known format"),
        (png()[:50], {}, "cannot be read as an image"),
        ("http://127.0.0.1:1/x.png", {}, "not a public one"),
        ("http://169.254.169.254/latest/meta-data", {}, "not a public one"),
        ("http://[::1]/x.png", {}, "not a public one"),
        (png(), {"treshold": 0.5}, "class_name, threshold"),
        (png(), {"threshold": 2}, "from 0 to 1"),
        (png(), {"threshold": "high"}, "from 0 to 1"),
        (png(), {"return_heatmap": 1}, "true or false"),
        (png(), {"class_name": ""}, "printable"),
    ],
    ids=lambda value: "bytes" if isinstance(value, bytes) else None,
)
def test_a_request_that_cannot_be_answered_is_refused_in_one_line(serve, inputs, parameters, words):
    with pytest.raises(ValueError, match=words) as refusal:
        serve({"inputs": inputs, "parameters": parameters})
    assert "\n" not in str(refusal.value)


def test_a_large_image_is_refused(serve, monkeypatch):
    monkeypatch.setattr(handler, "MAX_PIXELS", 20)
    with pytest.raises(ValueError, match="at most 20 pixels, not 8 x 6"):
        serve({"inputs": png()})
    monkeypatch.setattr(handler, "MAX_BYTES", 10)
    for given in (png(), base64.b64encode(png()).decode()):
        with pytest.raises(ValueError, match="at most 10 bytes"):
            serve({"inputs": given})
