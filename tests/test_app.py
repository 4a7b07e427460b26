"""The page's work, its handlers, and what its server gives away: without a browser."""

import csv
import io
import json
import re
import runpy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
import yaml
from gradio_client import Client
from PIL import Image
from typer.testing import CliRunner

from moeclip_hf.app import build_app, launch_app, markup
from moeclip_hf.app import handlers as handlers_module
from moeclip_hf.app.handlers import Handlers
from moeclip_hf.app.inspector import (
    EMBEDDED,
    BatchRow,
    Inspector,
    ModelChoice,
    batch_csv,
    read_upload,
    shown_threshold,
    threshold_meant,
)
from moeclip_hf.app.samples import render_samples, samples_of_folder
from moeclip_hf.cli import app as cli
from moeclip_hf.errors import MoECLIPError, MoECLIPWarning, UnreadableImageError
from moeclip_hf.prediction import Detection, detect, predict, read_image
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, load_pretrained
from moeclip_hf.writing import save_picture

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "examples" / "space"


@pytest.fixture(scope="module")
def inspector():
    return Inspector(device="cpu", max_megapixels=1)


@pytest.fixture(scope="module")
def handlers(inspector):
    return Handlers(inspector, render_samples())


@pytest.fixture(scope="module")
def spotted(tmp_path_factory) -> Path:
    """Grain of 300 x 200 pixels with a dark spot in it."""
    grain = np.random.default_rng(0).normal(150, 8, (200, 300, 1)).repeat(3, axis=2)
    grain[60:110, 180:240] = 15
    path = tmp_path_factory.mktemp("images") / "spot.png"
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def address():
    page = build_app(device="cpu")
    yield launch_app(page, block=False)
    page.close()


def test_a_detection_is_a_prediction_whose_thresholds_can_move(spotted):
    pretrained = load_pretrained(device="cpu")
    found = detect(pretrained, read_image(spotted), pretrained.encode_class("granite"))
    for threshold in (0.05, 0.1, 0.3):
        expected = next(predict(pretrained, [spotted], "granite", pixel_threshold=threshold))
        assert found.score == pytest.approx(expected.score, abs=1e-6)
        assert np.allclose(found.anomaly_map(), expected.anomaly_map, atol=1e-6)
        assert [region["box"] for region in found.regions(threshold)] == [r["box"] for r in expected.regions]
    assert found.anomaly_map((20, 30)).shape == (20, 30)
    assert found.grid.numel() < 2000


def test_pictures_are_small_and_regions_in_the_images_own_pixels(inspector, spotted, tmp_path):
    large = tmp_path / "large.png"
    Image.open(spotted).resize((1200, 800)).save(large)
    inspection = inspector.inspect(large, "granite", inspector.model)
    assert inspection.picture.size == (1024, 683)
    grid = torch.zeros(9, 13)  # values 100 pixels apart, from corner to corner
    grid[2:5, 6:9] = 1
    inspection = replace(inspection, detection=Detection(0.9, grid, (800, 1200)))
    (region,) = regions = inspection.detection.regions(0.5)
    assert region["box"] == pytest.approx([550, 150, 850, 450], abs=2)
    framed = np.asarray(inspection.overlay(regions, 0.5))
    rows, columns = np.nonzero((framed == (0, 255, 255)).all(axis=2))
    assert columns.min() == pytest.approx(550 * 1024 / 1200, abs=6)
    assert rows.max() == pytest.approx(450 * 1024 / 1200, abs=6)


def test_a_slider_means_the_checkpoints_own_threshold_until_it_is_moved():
    own = 0.28664
    assert shown_threshold(own) == 0.287
    assert threshold_meant(0.287, own) == own
    assert threshold_meant(0.288, own) == 0.288


def test_moving_a_slider_changes_verdict_overlay_and_regions_and_runs_no_model(handlers, spotted, monkeypatch):
    inspection, verdict, picture, overlay, regions = handlers.inspect(
        spotted, "granite", handlers.inspector.model, 0.0, 0.05
    )
    monkeypatch.setattr("moeclip_hf.app.inspector.detect", None)
    moved_verdict, moved_overlay, moved_regions = handlers.redraw(inspection, 1.0, 1.0)
    assert ">Anomalous<" in verdict
    assert ">Normal<" in moved_verdict
    assert f"{inspection.detection.score:.4f}" in verdict
    assert f"{inspection.detection.score:.4f}" in moved_verdict
    assert "anomalous from <b>0.6598</b>" in handlers.redraw(inspection, 0.65977, 1.0)[0]
    assert picture.size == overlay.size == moved_overlay.size
    assert np.asarray(overlay).tobytes() != np.asarray(moved_overlay).tobytes()
    assert regions["visible"] and regions["value"]
    assert not moved_regions["visible"]


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory) -> dict[str, Path]:
    """Files that no image can be read from here, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("unreadable")
    files = {}
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 60).save(whole, "PNG")
    contents = {
        "text": b"no image",
        "empty": b"",
        "cut": whole.getvalue()[: len(whole.getvalue()) // 2],
        # Pillow would have Ghostscript run this.
        "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    }
    for name, content in contents.items():
        files[name] = folder / f"{name}.png"
        files[name].write_bytes(content)
    for name, size in (("large", (1500, 1000)), ("bomb", (20_000, 20_000)), ("strip", (1000, 4))):
        files[name] = folder / f"{name}.png"
        Image.new("1", size).save(files[name])
    files["gone"] = folder / "gone.png"
    return files


REASONS = {
    "text": "text.png: cannot be read as an image (BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF or WEBP)",
    "empty": "empty.png: cannot be read as an image",
    "cut": "cut.png: cannot be read as an image",
    "program": "program.png: cannot be read as an image",
    "large": "large.png: has 1500 x 1000 pixels, and 1 megapixels are taken here at most",
    "bomb": "bomb.png: has more pixels than are taken here",
    "strip": "strip.png: has 1000 x 4 pixels: a side may be 8 times the other at most",
    "gone": "gone.png: is no longer here: upload it again",
}


def test_what_cannot_be_read_is_named_with_the_reason_and_without_its_folder(unreadable):
    for name, reason in REASONS.items():
        with pytest.raises(UnreadableImageError) as caught:
            read_upload(unreadable[name], max_megapixels=1)
        assert str(caught.value).startswith(reason)
        assert str(unreadable[name].parent) not in str(caught.value)


@pytest.mark.parametrize("name", ["text", "gone"])
def test_a_bad_file_takes_the_place_of_the_last_result_with_a_message(handlers, unreadable, name):
    path = unreadable[name]
    source, inspection, message, picture, overlay, regions = handlers.receive(
        str(path), "object", handlers.inspector.model, 0.5, 0.5
    )
    assert source == path
    assert inspection is picture is overlay is None
    assert 'role="alert"' in message and REASONS[name] in message
    assert not regions["visible"]


def test_a_class_name_that_is_none_is_a_message(handlers, spotted):
    for class_name in (" ", "two\nlines", "nut" * 1000):
        _, message, *_ = handlers.inspect(spotted, class_name, handlers.inspector.model, 0.5, 0.5)
        assert 'role="alert"' in message
        assert "class name" in message


def test_names_are_escaped_wherever_they_become_html(handlers, spotted, tmp_path):
    name = "<script>alert(1)</script>"
    file = tmp_path / "<img src=x onerror=alert(2)>.png"
    file.write_bytes(spotted.read_bytes())
    inspection, verdict, *_ = handlers.inspect(file, name, handlers.inspector.model, 0.5, 0.5)
    _, explained, *_ = handlers.explain(inspection, None)
    refusal = handlers.load("<b>nowhere</b>", handlers.inspector.model)[1]
    choice = ModelChoice("<i>model</i>", 0.5, 0.5)
    for html in (verdict, explained, refusal, markup.notice(name), markup.model_in_use(choice)):
        assert not re.search(r"<(script|img|b>nowhere|i>model)", html)
    assert "&lt;script&gt;" in verdict
    assert "&lt;img src=x" in verdict


def test_experts_are_drawn_once_an_image(handlers, spotted, monkeypatch):
    inspection, *_ = handlers.inspect(spotted, "granite", handlers.inspector.model, 0.5, 0.5)
    explained, _, routing, attributions = handlers.explain(inspection, None)
    config = load_pretrained(device="cpu").model.config
    assert routing.height > routing.width * len(config.moe_layers) / (config.num_experts + 2) * 0.9
    assert attributions.size != routing.size
    monkeypatch.setattr(handlers.inspector, "explain", None)
    again, *unchanged = handlers.explain(inspection, explained)
    assert again is inspection
    assert unchanged == [gr.skip()] * 3
    assert "Drop an image" in handlers.explain(None, None)[1]


def test_a_batch_names_what_cannot_be_read_and_scores_the_rest_as_predict_does(handlers, spotted, unreadable):
    model = handlers.inspector.model
    files = [str(path) for path in (spotted, unreadable["text"], unreadable["large"])]
    threshold = shown_threshold(model.image_threshold)
    *_, (rows, _, growing, _) = handlers.score(files, "granite", model, threshold)
    summary, table, download = handlers.conclude(rows, model, threshold)
    pretrained = load_pretrained(device="cpu")
    expected = next(predict(pretrained, [spotted], "granite"))
    assert [row.file for row in rows] == ["spot.png", "text.png", "large.png"]
    assert rows[0].score == pytest.approx(expected.score, abs=1e-6)
    assert growing == table
    assert [line[0] for line in table["value"]] == [
        "anomalous" if expected.is_anomalous else "normal",
        "unreadable",
        "unreadable",
    ]
    assert "2 unreadable" in summary
    with open(download["value"], encoding="utf-8-sig", newline="") as file:
        written = list(csv.DictReader(file))
    assert [line["file"] for line in written] == ["spot.png", "text.png", "large.png"]
    assert {line["model"] for line in written} == {"embedded demonstration"}
    assert float(written[0]["score"]) == pytest.approx(expected.score, abs=1e-5)
    assert float(written[0]["threshold"]) == pytest.approx(pretrained.processor.image_threshold, abs=1e-6)
    assert written[1]["score"] == ""
    assert written[1]["error"] == REASONS["text"]


def test_a_batch_tells_how_far_it_is_and_follows_the_threshold_without_the_model(handlers, spotted, monkeypatch):
    steps = list(handlers.score([str(spotted)] * 3, "granite", handlers.inspector.model, 1.0))
    assert [re.findall(r"(\d) of 3", step[1]) for step in steps] == [["0"], ["1"], ["2"], ["3"]]
    assert {line[0] for line in steps[-1][2]["value"]} == {"normal"}
    monkeypatch.setattr("moeclip_hf.app.inspector.detect", None)
    summary, table, _ = handlers.conclude(steps[-1][0], handlers.inspector.model, 0.0)
    assert "3 anomalous, 0 normal" in summary
    assert {line[0] for line in table["value"]} == {"anomalous"}


def test_the_model_does_one_thing_at_a_time_though_a_stopped_batch_ends_its_step(inspector, spotted, monkeypatch):
    inspection = inspector.inspect(spotted, "granite", inspector.model)
    at_once, most = [], []

    def work(*given):
        at_once.append(given)
        time.sleep(0.02)
        most.append(len(at_once))
        at_once.pop()
        return inspection.detection

    for name in ("detect", "explain"):
        monkeypatch.setattr(f"moeclip_hf.app.inspector.{name}", work)
    for name in ("draw_routing", "draw_attributions"):
        monkeypatch.setattr(f"moeclip_hf.app.inspector.{name}", lambda *given: None)
    with ThreadPoolExecutor() as visitors:
        for _ in range(3):
            visitors.submit(inspector.explain, inspection)
            visitors.submit(inspector.inspect, spotted, "granite", inspector.model)
            visitors.submit(list, inspector.score([spotted], "granite", inspector.model))
    assert most == [1] * 9


def test_a_batch_of_nothing_or_of_too_much_is_refused(handlers, spotted, monkeypatch):
    monkeypatch.setattr(handlers_module, "LARGEST_BATCH", 2)
    for files, words in ((None, "Add files first"), ([str(spotted)] * 3, "3 files are more than the 2")):
        ((rows, message, *_),) = handlers.score(files, "granite", handlers.inspector.model, 0.5)
        assert rows == []
        assert words in message
    *_, (_, message, *_) = handlers.score([str(spotted)], " ", handlers.inspector.model, 0.5)
    assert "class name" in message


@pytest.mark.parametrize("name", ["=1+1.png", "+1.png", "-1.png", "@SUM(A1).png", "\t=1.png"])
def test_a_spreadsheet_takes_no_cell_for_a_formula(name):
    (row,) = csv.DictReader(io.StringIO(batch_csv([BatchRow(name, name, name, 0.25)], 0.5)))
    assert row["file"] == row["class_name"] == row["model"] == f"'{name}"
    assert (row["score"], row["verdict"]) == ("0.250000", "normal")


def test_a_name_with_commas_and_quotes_survives_the_table():
    name = 'a, "b"\n.png'
    (row,) = csv.DictReader(io.StringIO(batch_csv([BatchRow(name, "nut", "m", error="why")], 0.5), newline=""))
    assert (row["file"], row["verdict"], row["error"]) == (name, "unreadable", "why")


def test_a_model_is_chosen_by_folder_and_a_wrong_one_leaves_the_last(handlers, spotted, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in EMBEDDED_CHECKPOINT.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((other / "processor_config.json").read_text())
    settings |= {"image_threshold": 0.123456, "pixel_threshold": 0.654321}
    (other / "processor_config.json").write_text(json.dumps(settings))

    choice, line, *thresholds = handlers.load(f" {other} ", handlers.inspector.model)
    assert thresholds == [0.123, 0.654]
    assert "other" in line
    assert str(tmp_path) not in line
    inspection, verdict, *_ = handlers.inspect(spotted, "granite", choice, 0.123, 0.654)
    assert inspection.model.image_threshold == 0.123456
    assert "other" in verdict

    kept, message, *unchanged = handlers.load(str(tmp_path / "nowhere"), choice)
    assert kept == choice
    assert "nowhere: " in message and 'role="alert"' in message
    assert unchanged == [gr.skip(), gr.skip()]
    assert handlers.load("", choice)[0] == handlers.inspector.model
    assert handlers.inspector.model.name == EMBEDDED


def test_samples_of_a_folder_are_named_after_the_folders_within(spotted, tmp_path):
    for name in ("metal_nut", "moeclip-output"):
        (tmp_path / name).mkdir()
    for name in ("a.png", "metal_nut/b.png"):
        (tmp_path / name).write_bytes(spotted.read_bytes())
    save_picture(Image.open(spotted), tmp_path / "moeclip-output" / "a_overlay.png")
    with pytest.warns(MoECLIPWarning, match=r"1 results of predict or explain.*a_overlay\.png"):
        samples = samples_of_folder(tmp_path, max_megapixels=1)
    assert [(sample.path.name, sample.class_name) for sample in samples] == [
        ("a.png", "object"),
        ("b.png", "metal nut"),
    ]
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"c\.png"):
        samples_of_folder(tmp_path, max_megapixels=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MoECLIPError, match="holds no images"):
        samples_of_folder(tmp_path / "empty", max_megapixels=1)


def labels(page: gr.Blocks) -> set[str]:
    return {str(getattr(block, "label", None) or getattr(block, "value", None)) for block in page.blocks.values()}


def test_visitors_choose_the_model_only_where_that_is_allowed():
    assert "Folder or Hub id" not in labels(build_app(device="cpu"))
    assert "Folder or Hub id" in labels(build_app(device="cpu", choose_model=True))


def test_events_that_run_the_model_wait_in_one_line_of_bounded_length():
    page = build_app(device="cpu", choose_model=True)
    names = {"load", "receive", "choose_sample", "inspect", "explain", "score"}
    running = [fn for fn in page.fns.values() if fn.name in names]
    assert {fn.name for fn in running} == names
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in running} == {("model", 1)}
    assert page._queue.max_size == 32
    assert not page.api_open
    assert not page.analytics_enabled


FOREIGN = [
    "/etc/passwd",
    "//etc/passwd",
    "%2Fetc%2Fpasswd",
    "../../../../etc/passwd",
    "..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/proc/self/environ",
    str(ROOT / "setup.cfg"),
    "setup.cfg",
    ".git/config",
    str(EMBEDDED_CHECKPOINT / "config.json"),
    "/tmp/gradio/../../etc/passwd",
    "/tmp/gradio/%2e%2e/%2e%2e/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:1/secret",
    "HTTPS://example.org/image.png",
]


def get(address: str, path: str) -> httpx.Response:
    """Ask for a path as it is: clients tidy up dots."""
    client = httpx.Client(base_url=address.rstrip("/"))
    request = client.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())
    return client.send(request)


@pytest.mark.parametrize("path", FOREIGN)
def test_no_file_beyond_the_pages_own_is_served(address, path):
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
        answer = get(address, route + path)
        assert answer.status_code in {400, 403, 404}, route
        assert "root:" not in answer.text
    if path.lower().startswith("http"):
        assert get(address, f"/gradio_api/file={path}").text == "Only uploaded files are served."


@pytest.mark.parametrize("url", ["http://example.org/x", "http%3A%2F%2Fexample.org/x", "https://example.org/x"])
def test_the_way_to_files_that_gradio_has_beside_leads_to_no_address_of_the_web(address, url):
    answer = get(address, f"/gradio_api/file/{url}")
    assert (answer.status_code, answer.text) == (403, "The page does not ask for this.")


@pytest.mark.parametrize("route", ["/assets/", "/static/", "/gradio_api/proxy=http://example.org/", "/svelte/"])
def test_other_routes_lead_nowhere_either(address, route):
    answer = get(address, f"{route}../../../../../../../../etc/passwd")
    assert answer.status_code >= 400
    assert "root:" not in answer.text


def inspect_event(address: str, path: str, session: str) -> httpx.Response:
    events = httpx.get(f"{address}config").json()["dependencies"]
    receive = next(event for event in events if event["api_name"] == "receive")
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = {"data": [file, "object", None, 0.5, 0.5], "fn_index": receive["id"], "session_hash": session}
    return httpx.post(f"{address}gradio_api/queue/join", json=data)


def test_an_event_inspects_what_was_uploaded_and_no_file_of_the_server_or_the_web(address, spotted):
    assert inspect_event(address, "http://example.org/a.png", "web").status_code == 403
    (uploaded,) = httpx.post(f"{address}gradio_api/upload", files={"files": ("spot.png", spotted.read_bytes())}).json()
    for index, path in enumerate((uploaded, str(spotted), "/etc/passwd")):
        assert inspect_event(address, path, f"session-{index}").status_code == 200
        queue = f"{address}gradio_api/queue/data?session_hash=session-{index}"
        with httpx.stream("GET", queue, timeout=120) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        (completed,) = (event for event in events if event["msg"] == "process_completed")
        assert completed["success"] is (path == uploaded)
        assert ("moeclip-verdict" in json.dumps(completed["output"])) is (path == uploaded)


@pytest.mark.parametrize(
    "route", ["process_recording", "run/inspect", "call/inspect", "vibe-edit", "component_server"]
)
def test_what_gradio_offers_beyond_the_page_is_refused(address, route):
    assert httpx.post(f"{address}gradio_api/{route}", files={"file": ("a.webm", b"x")}).status_code == 403
    assert httpx.get(f"{address}monitoring").status_code >= 400


def test_files_and_events_that_are_too_large_are_refused(tmp_path):
    page = build_app(device="cpu")
    address = launch_app(page, max_upload_mb=0.5, block=False)
    try:
        for size, expected in ((400_000, 200), (600_000, 413)):
            answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"x" * size)})
            assert answer.status_code == expected
        answer = httpx.post(f"{address}gradio_api/queue/join", content=b" " * 2_000_000)
        assert answer.status_code == 413
    finally:
        page.close()


def test_the_page_names_no_outside_address_to_load_from_and_no_path_of_the_server(address):
    html = httpx.get(address).text
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+)"', html)
    assert [url for url in loaded if not url.startswith(address)] == []
    assert str(EMBEDDED_CHECKPOINT) not in html
    assert "googleapis" not in httpx.get(f"{address}gradio_api/theme.css").text


def test_clients_of_its_api_find_nothing_to_call(address):
    client = Client(address, verbose=False)
    assert client.view_api(return_format="dict")["named_endpoints"] == {}


def test_a_port_that_is_taken_and_a_model_that_is_missing_are_one_line(address, tmp_path):
    port = address.rstrip("/").rpartition(":")[2]
    for arguments, words in (
        (["--port", port], f"port {port}: taken already"),
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
    ):
        failure = CliRunner().invoke(cli, ["app", "--device", "cpu", *arguments]).exception
        assert isinstance(failure, MoECLIPError)  # which the command prints as its one line
        assert words in str(failure)
        assert "\n" not in str(failure)


def test_the_space_says_what_the_hub_asks_for_and_its_page_builds(monkeypatch):
    _, front_matter, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(front_matter)
    constraints = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert settings["sdk"] == "gradio"
    assert settings["sdk_version"] == constraints["gradio"]
    assert (SPACE / settings["app_file"]).is_file()
    assert settings["license"] == "apache-2.0"
    assert settings["title"] and settings["emoji"]
    assert isinstance(settings["python_version"], str)  # 3.10 as a number would be 3.1
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.cfg").read_text())
    assert settings["python_version"] in supported
    assert "moeclip-hf" in (SPACE / "requirements.txt").read_text()
    monkeypatch.setenv("MOECLIP_MODEL", str(EMBEDDED_CHECKPOINT))
    page = runpy.run_path(str(SPACE / "app.py"))["page"]
    assert EMBEDDED_CHECKPOINT.name in " ".join(labels(page))
