"""How the handler of Inference Endpoints fetches images from the network; test_hub.py has the rest of it."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import urlsplit

import pytest
from PIL import Image

from moeclip_hf.modeling import handler


@pytest.fixture
def server(monkeypatch):
    """Serves `/part.png` and a redirect at `/moved`; its port passes for a public address, and no other does."""
    buffer = BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, format="PNG")

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
            self.wfile.write(buffer.getvalue() if found else b"")

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
