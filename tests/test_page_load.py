"""The page under load, and what its server does with names and paths that mean no good."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from moeclip_hf.app import build_app, inspector, launch_app
from moeclip_hf.prediction import detect, read_image
from moeclip_hf.pretrained import load_pretrained

# Clients at once and requests of all of them.
LOADS = {"quick": (8, 24), "whole": (32, 200)}
MEGABYTES_GAINED = 256
WAITING = 32


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, list[str]]]:
    """The address of a page, and the routes of its server that are read from and take a path or a name."""
    page = build_app(device="cpu")
    address = launch_app(page, block=False)
    yield address, [path for path, methods in page.app.openapi()["paths"].items() if "{" in path and "get" in methods]
    page.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Four images whose scores differ."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        grain = np.random.default_rng(number).normal(150, 8, (120, 160, 3)).clip(0, 255)
        grain[20 : 30 + 20 * number, 40:80] = 15
        Image.fromarray(grain.astype(np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


class Visitor:
    """What the page's own code does in a browser: upload a file, ask for it to be inspected, wait for the finding."""

    def __init__(self, address: str, session: str):
        self.client = httpx.Client(base_url=address, timeout=120)
        self.session = session
        events = self.client.get("config").json()["dependencies"]
        self.receive = next(event["id"] for event in events if event["api_name"] == "receive")

    def upload(self, content: bytes, name: str = "a.png") -> httpx.Response:
        return self.client.post("gradio_api/upload", files={"files": (name, content)})

    def ask(self, path: str, class_name: str = "object") -> httpx.Response:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = {"data": [file, class_name, None, 0.5, 0.5], "fn_index": self.receive, "session_hash": self.session}
        return self.client.post("gradio_api/queue/join", json=event)

    def wait(self) -> dict:
        """The message that ends an event."""
        with self.client.stream("GET", f"gradio_api/queue/data?session_hash={self.session}") as stream:
            messages = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        (completed,) = (message for message in messages if message["msg"] == "process_completed")
        return completed

    def inspect(self, content: bytes, name: str = "a.png", class_name: str = "object") -> str:
        """What the page shows of an image."""
        (path,) = self.upload(content, name).json()
        assert self.ask(path, class_name).status_code == 200
        completed = self.wait()
        assert completed["success"], completed
        return json.dumps(completed["output"], ensure_ascii=False)


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.parametrize("load", ["quick", pytest.param("whole", marks=pytest.mark.slow)])
def test_many_visitors_get_each_the_scores_of_their_own_images_in_bounded_memory(served, pictures, load):
    clients, requests = LOADS[load]
    pretrained = load_pretrained(device="cpu")
    anchors = pretrained.encode_class("object")
    expected = [f"{detect(pretrained, read_image(path), anchors).score:.4f}" for path in pictures]
    assert len(set(expected)) == len(pictures)
    address, _ = served
    shares = [range(first, requests, clients) for first in range(clients)]

    def visit(number: int) -> list[str]:
        visitor = Visitor(address, f"load-{load}-{number}")
        return [visitor.inspect(pictures[one % 4].read_bytes()) for one in shares[number]]

    visit(0)
    before = resident_megabytes()
    with ThreadPoolExecutor(clients) as visitors:
        shown = list(visitors.map(visit, range(clients)))
    assert sum(map(len, shown)) == requests
    for share, pages in zip(shares, shown, strict=True):
        for one, page in zip(share, pages, strict=True):
            assert f'<b class=\\"score\\">{expected[one % 4]}</b>' in page
    assert resident_megabytes() - before < MEGABYTES_GAINED


def test_a_flood_of_events_is_turned_away_and_others_are_served_after_it(served, pictures, monkeypatch):
    address, _ = served
    may_go_on, real = threading.Event(), inspector.detect

    def wait(*given):
        may_go_on.wait(60)
        return real(*given)

    monkeypatch.setattr(inspector, "detect", wait)
    content = pictures[0].read_bytes()
    flood = Visitor(address, "flood")
    (path,) = flood.upload(content).json()
    try:
        answers = Counter(flood.ask(path).status_code for _ in range(WAITING + 20))
    finally:
        may_go_on.set()
    # One event runs besides those that wait, and one may have left the line as it was being filled.
    assert answers.keys() == {200, 503}
    assert WAITING <= answers[200] <= WAITING + 2
    other = Visitor(address, "other")
    (path,) = other.upload(content).json()
    for _ in range(600):
        if other.ask(path).status_code == 200:
            break
        threading.Event().wait(0.1)
    assert other.wait()["success"]


NAMES = [
    "../../evil.png",
    "..\\..\\evil.png",
    "/etc/evil.png",
    "%2e%2e%2fevil.png",
    "a/../../evil.png",
    "..",
    ".",
    "evil\0.png",
    "two\nlines.png",
    "x" * 300 + ".png",
    "\U0001f600.png",
    "<script>alert(1)</script>.png",
    "'\"><img src=x onerror=alert(1)>.png",
    "${alert(1)}{{7*7}}.png",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_uploads_name_leads_nowhere_and_is_no_markup(served, pictures, name):
    address, _ = served
    visitor = Visitor(address, f"name-{NAMES.index(name)}")
    content = pictures[0].read_bytes()
    answer = visitor.upload(content, name)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        (path,) = answer.json()
        assert Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())
        assert Path(path).read_bytes() == content
        shown = visitor.inspect(content, name, class_name=f"nut {name}"[:90])
        assert "moeclip-" in shown
        assert not re.search(r"<(script|img src=x)", shown)


def secrets_of(tmp_path: Path) -> tuple[str, list[str]]:
    """A file that is none of the page's, what it holds, and ways to ask for it."""
    file, content = tmp_path / "secret.txt", "not for strangers: 7f3a91"
    file.write_text(content)
    up = "../" * 12
    plain = [
        str(file),
        f"/{file}",
        up + str(file)[1:],
        f"./{file}",
        f"file://{file}",
        f"{get_upload_folder()}/{up}{file}",
    ]
    return content, [*plain, *(quote(one, safe="") for one in plain), *(one.replace(".", "%2e") for one in plain),
                     str(file).replace("/", "\\"), f"{file}%00.png", f"{file}?x.png", f"{file};.png"]  # fmt: skip


def test_no_route_gives_a_file_that_is_not_the_pages(served, tmp_path):
    address, routes = served
    content, ways = secrets_of(tmp_path)
    assert len(routes) > 10
    client = httpx.Client(base_url=address, timeout=20)
    for route, way in product(routes, ways):
        if "heartbeat" in route:  # holds the line open until the visitor goes, and reads no file
            continue
        request = client.build_request("GET", "/")
        target = "".join(way if part.startswith("{") else part for part in re.split(r"({[^}]*})", route))
        request.url = request.url.copy_with(raw_path=target.encode())
        answer = client.send(request)
        assert content not in answer.text, target
        assert answer.status_code != 500, (target, answer.text)


def test_a_visit_writes_no_link_to_the_disk(served, pictures):
    address, _ = served
    visitor = Visitor(address, "linked")
    visitor.inspect(pictures[0].read_bytes())
    assert visitor.client.get("gradio_api/deep_link?session_hash=linked").status_code == 403
    assert not (Path(get_upload_folder()) / "deep_links").exists()
