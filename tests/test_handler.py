"""What the handler of Inference Endpoints refuses, and how it fetches images; test_hub.py serves with it."""

import base64
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from PIL import EpsImagePlugin, Image

from moeclip_hf.modeling import handler
from moeclip_hf.modeling.image_processing_moeclip import FORMATS
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
        its_port = listening.server_address[1]
        public_addresses = handler._public_addresses
        monkeypatch.setattr(
            handler,
            "_public_addresses",
            lambda host, port: ["127.0.0.1"] if port == its_port else public_addresses(host, port),
        )
        yield f"http://127.0.0.1:{its_port}"
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


@pytest.mark.parametrize(
    ("host", "is_public"),
    [
        ("[::ffff:100.100.100.200]", False),  # Alibaba's metadata service
        ("[64:ff9b::a9fe:a9fe]", False),  # 169.254.169.254 behind NAT64
        ("[64:ff9b:1::a9fe:a9fe]", False),
        ("[2002:7f00:1::]", False),  # 127.0.0.1 by 6to4
        ("[2001:0:1::1]", False),
        ("[::7f00:1]", False),
        ("[fec0::1]", False),
        ("[fe80::1%25eth0]", False),
        ("[ff02::1]", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("2130706433", False),  # 127.0.0.1 in one number
        ("93.184.216.34", True),
        ("[2606:2800:220:1::1]", True),
        ("[::ffff:93.184.216.34]", True),
        ("[64:ff9b::5db8:d822]", True),  # what a network of IPv6 alone makes of 93.184.216.34
    ],
)
def test_only_public_addresses_are_connected_to_however_they_are_written(monkeypatch, host, is_public):
    def connect(address, *settings):
        raise OSError(f"connected to {address[0]}")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ValueError, match="connected to " if is_public else "cannot be fetched") as refusal:
        handler.read_image(f"http://{host}/part.png")
    assert is_public == ("connected to" in str(refusal.value))


@pytest.mark.parametrize("lookups", [0, 1, 2])
def test_a_name_that_changes_its_address_leads_to_no_private_one(monkeypatch, lookups):
    """The name server gives a public address at first, that of this machine afterwards."""
    connected, answers = [], iter([*["93.184.216.34"] * lookups, *["127.0.0.1"] * 9])
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *settings, **more):
        return look_up(next(answers) if host == "rebound.test" else host, *settings, **more)

    def connect(address, *settings):
        connected.append(address[0])
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ValueError, match="no network" if lookups == 2 else "not a public one"):
        handler.read_image("http://rebound.test/part.png")
    assert connected == ["93.184.216.34"] * (lookups == 2)


@pytest.fixture
def first_words():
    """A server that hangs up on what it is told; its port, and what that was."""
    told = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def listen():
            with listening.accept()[0] as connection:
                told.append(connection.recv(4096))

        threading.Thread(target=listen, daemon=True).start()
        yield listening.getsockname()[1], told


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_is_told_the_name_that_it_was_asked_for_by(first_words, monkeypatch, scheme):
    port, told = first_words
    monkeypatch.setattr(handler, "_public_addresses", lambda host, port: ["127.0.0.1"])
    with pytest.raises(ValueError, match="cannot be fetched"):
        handler.read_image(f"{scheme}://parts.test:{port}/part.png")
    assert (b"\r\nHost: parts.test:" in told[0]) if scheme == "http" else (b"parts.test" in told[0])


@pytest.mark.parametrize(("scheme", "words"), [("http", b"GET http://93.184.216.34/"), ("https", b"CONNECT 93.184.")])
def test_a_proxy_may_have_a_private_address(first_words, monkeypatch, scheme, words):
    port, told = first_words
    monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ValueError, match="cannot be fetched"):
        handler.read_image(f"{scheme}://93.184.216.34/part.png")
    assert told[0].startswith(words)


def test_formats_are_those_of_the_rest_and_no_others_are_decoded(monkeypatch):
    assert handler._FORMATS == FORMATS
    buffer = BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *settings: pytest.fail("a program was started"))
    for given in (buffer.getvalue(), Image.open(buffer)):
        with pytest.raises(ValueError, match="no image of a known format"):
            handler.read_image(given)


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
