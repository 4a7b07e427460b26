"""The page as a visitor sees it, in headless Chromium: `make test-browser`."""

import csv
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from moeclip_hf.app import build_app, inspector, launch_app
from moeclip_hf.data.textures import add_defect
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PATIENCE = 60_000  # milliseconds: what takes one may take a hundred times as long on a busy machine
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def address():
    page = build_app(device="cpu", choose_model=True, max_megapixels=4)
    yield launch_app(page, max_upload_mb=1, block=False)
    page.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """The page, open; whatever it asked for and whatever broke in it is looked at in the end."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    asked, refused, broken, dialogs = [], [], [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    expect(page.locator("#samples img").first).to_be_visible()
    yield page
    context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert refused == []
    assert broken == []
    assert dialogs == []


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> dict[str, Path]:
    """A photograph of bricks as it is, and with a hole cut in."""
    folder = tmp_path_factory.mktemp("photographs")
    bricks = np.repeat(skimage.data.brick()[256:512, :256, np.newaxis], 3, axis=2)
    damaged, _ = add_defect(bricks, "hole", np.random.default_rng(3))
    paths = {"good": folder / "good.jpg", "damaged": folder / "damaged.png"}
    Image.fromarray(bricks).save(paths["good"], quality=95)
    Image.fromarray(damaged).save(paths["damaged"])
    return paths


def upload(page: Page, *paths: Path, into: str = "upload") -> None:
    page.locator(f"#{into} input[type=file]").set_input_files(list(paths))


def move(page: Page, slider: str, value: float) -> None:
    page.locator(f"#{slider} input[type=range]").fill(str(value))


def score(page: Page) -> float:
    shown = page.locator("#verdict .score").inner_text()
    assert re.fullmatch(r"[01]\.\d{4}", shown)
    return float(shown)


def picture(page: Page, name: str) -> tuple[str, bytes]:
    """The address and the bytes of a picture that is shown."""
    image = page.locator(f"#{name} img")
    expect(image).to_be_visible()
    url = image.get_attribute("src") or ""
    answer = page.request.get(url)
    assert answer.ok
    return url, answer.body()


def test_an_upload_gets_a_score_a_verdict_and_an_overlay_that_follow_the_sliders(page, photographs, monkeypatch):
    page.get_by_label("Class name").fill("brick wall")
    upload(page, photographs["damaged"])
    verdict = page.locator("#verdict .word")
    expect(verdict).to_have_text(re.compile("Anomalous|Normal"))
    expect(page.locator("#verdict .facts")).to_contain_text("brick wall · damaged.png")
    before, (url, overlay) = score(page), picture(page, "overlay")
    assert picture(page, "image")[1] != overlay

    monkeypatch.setattr("moeclip_hf.app.inspector.detect", None)  # from here on nothing is scored
    move(page, "threshold", 1)
    expect(verdict).to_have_text("Normal")
    move(page, "threshold", 0)
    expect(verdict).to_have_text("Anomalous")
    move(page, "pixel-threshold", 1)
    expect(page.locator("#overlay img")).not_to_have_attribute("src", url)
    assert picture(page, "overlay")[1] != overlay
    expect(page.locator("#regions")).not_to_be_visible()
    move(page, "pixel-threshold", 0.01)
    expect(page.locator("#regions")).to_contain_text("area (pixels)")
    assert score(page) == before


def test_a_sample_is_inspected_as_what_it_shows(page):
    page.locator("#samples button").nth(3).click()
    expect(page.locator("#verdict .facts")).to_contain_text("knitted fabric · knitted_fabric_hole.png")
    expect(page.get_by_label("Class name")).to_have_value("knitted fabric")
    picture(page, "overlay")
    first = score(page)
    page.get_by_label("Class name").fill("wood")
    page.get_by_role("button", name="Inspect").click()
    expect(page.locator("#verdict .facts")).to_contain_text("wood · knitted_fabric_hole.png")
    assert score(page) != first


def test_a_bad_file_is_a_message_and_the_page_goes_on(page, photographs, tmp_path):
    upload(page, photographs["good"])
    expect(page.locator("#verdict .word")).to_be_visible()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page.get_by_label("Clear").click()
    upload(page, broken)
    message = page.locator("#verdict").get_by_role("alert")
    expect(message).to_have_text(
        "broken.png: cannot be read as an image (BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF or WEBP)"
    )
    expect(page.locator("#overlay img")).to_have_count(0)
    page.locator("#samples button").first.click()
    expect(page.locator("#verdict .word")).to_be_visible()


def test_a_file_that_is_too_large_is_a_message(page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * 2_000_000)
    upload(page, large)
    expect(page.get_by_text("exceed the maximum allowed size")).to_be_visible()
    page.reload()
    Image.new("RGB", (3000, 2000)).save(large)
    upload(page, large)
    expect(page.locator("#verdict").get_by_role("alert")).to_contain_text("4 megapixels are taken here at most")


def test_a_class_name_is_text_and_never_code(page):
    whole = "<script>alert(1)</script><img src=x onerror=alert(2)>${alert(3)}{{value}}"
    page.locator("#samples button").first.click()
    expect(page.locator("#verdict .facts")).to_contain_text("wire mesh")
    # What is shown is what the model read, so a long name is cut.
    for code, shown in ((whole, "<script>alert("), ("<img src=x>", "<img src=x>"), ("${1}{{v}}", "${1}{{v}}")):
        page.get_by_label("Class name").fill(code)
        page.get_by_label("Class name").press("Enter")
        expect(page.locator("#verdict .facts")).to_contain_text(shown)
        assert page.locator("#verdict script, #verdict img").count() == 0


def test_experts_are_shown_of_the_image_inspected_last(page):
    page.get_by_role("tab", name="Experts").click()
    expect(page.locator("#explained")).to_contain_text("Drop an image")
    page.get_by_role("tab", name="Inspect").click()
    page.locator("#samples button").first.click()
    expect(page.locator("#verdict .word")).to_be_visible()
    page.get_by_role("tab", name="Experts").click()
    expect(page.locator("#explained")).to_contain_text("wire mesh · wire_mesh_hole.png")
    assert picture(page, "routing")[1] != picture(page, "attributions")[1]


def test_a_batch_gives_a_table_and_the_same_to_download(page, photographs, tmp_path):
    broken = tmp_path / "<b>broken.png"
    broken.write_bytes(b"no image")
    page.get_by_label("Class name").fill("brick wall")
    page.get_by_role("tab", name="Batch").click()
    upload(page, *photographs.values(), broken, into="files")
    expect(page.locator("#files")).to_contain_text("broken")
    page.get_by_role("button", name="Score").click()
    expect(page.locator("#summary")).to_contain_text("1 unreadable")
    for words in ("good.jpg", "damaged.png", "cannot be read as an image"):
        expect(page.locator("#scores")).to_contain_text(words)
    assert page.locator("#scores td b").count() == 0

    page.locator("#threshold input[type=range]").press("Home")
    expect(page.locator("#summary")).to_contain_text("2 anomalous, 0 normal, 1 unreadable")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    with open(download.value.path(), encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert download.value.suggested_filename == "moeclip.csv"
    assert [row["verdict"] for row in rows] == ["anomalous", "anomalous", "unreadable"]
    assert all(0 < float(row["score"]) <= 1 for row in rows[:2])
    assert {row["class_name"] for row in rows} == {"brick wall"}


def test_a_batch_that_is_stopped_keeps_what_it_has(page, photographs, tmp_path, monkeypatch):
    detect, left, stopped = inspector.detect, iter(range(3)), threading.Event()

    def detect_until_stopped(*given):
        if next(left, None) is None:
            stopped.wait(PATIENCE / 1000)
        return detect(*given)

    monkeypatch.setattr(inspector, "detect", detect_until_stopped)
    copies = [shutil.copy(photographs["good"], tmp_path / f"{index}.jpg") for index in range(6)]
    page.get_by_role("tab", name="Batch").click()
    upload(page, *copies, into="files")
    expect(page.locator("#files")).to_contain_text("5")
    page.get_by_role("button", name="Score").click()
    expect(page.locator("#summary")).to_contain_text("3 of 6 scored")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#summary")).to_contain_text("normal")
    stopped.set()
    expect(page.get_by_role("button", name="Download as CSV")).to_be_visible()
    assert sum(map(int, re.findall(r"\d+", page.locator("#summary").inner_text()))) == 3


def test_a_model_that_cannot_be_loaded_is_a_message(page):
    page.get_by_role("button", name="Another model").click()
    page.get_by_label("Folder or Hub id").fill("nowhere/<b>model</b>")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.locator("#model").get_by_role("alert")).to_contain_text("nowhere/<b>model</b>: ")
    expect(page.locator("#model")).to_contain_text("Model: embedded demonstration")


def test_two_visitors_see_their_own_image_model_and_thresholds(page, browser, address, tmp_path):
    (tmp_path / "a copy").symlink_to(EMBEDDED_CHECKPOINT)
    context = browser.new_context()
    other = context.new_page()
    other.goto(address)
    page.locator("#samples button").first.click()
    other.locator("#samples button").nth(3).click()
    for visitor, facts in (page, "wire_mesh_hole.png"), (other, "knitted_fabric_hole.png"):
        expect(visitor.locator("#verdict .facts")).to_contain_text(facts)
    other.get_by_role("button", name="Another model").click()
    other.get_by_label("Folder or Hub id").fill(str(tmp_path / "a copy"))
    other.get_by_role("button", name="Load", exact=True).click()
    expect(other.locator("#verdict .facts")).to_have_text("knitted fabric · knitted_fabric_hole.png · a copy")
    move(other, "threshold", 1)
    expect(other.locator("#verdict .word")).to_have_text("Normal")
    move(page, "threshold", 0)
    expect(page.locator("#verdict .word")).to_have_text("Anomalous")
    page.get_by_role("button", name="Inspect").click()
    page.get_by_role("tab", name="Experts").click()
    expect(page.locator("#explained")).to_have_text("wire mesh · wire_mesh_hole.png")
    expect(page.locator("#verdict .facts")).to_have_text("wire mesh · wire_mesh_hole.png · embedded demonstration")
    expect(other.locator("#verdict .word")).to_have_text("Normal")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_and_follows_the_readers_colours(browser, address, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.locator("#samples button").first.click()
    expect(page.locator("#verdict .word")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(channel) for channel in re.findall(r"\d+", background)[:3]) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60
    context.close()
