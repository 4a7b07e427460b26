"""The pipeline "zero-shot-anomaly-detection", with the package's own code."""

import base64
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.dynamic_module_utils import check_imports, get_imports, get_relative_import_files
from transformers.pipelines.pt_utils import KeyDataset

from moeclip_hf import ZeroShotAnomalyDetectionPipeline
from moeclip_hf.hub import handler_requirements
from moeclip_hf.modeling import pipeline_moeclip
from moeclip_hf.modeling.image_processing_moeclip import open_image
from moeclip_hf.modeling.pipeline_moeclip import read_image
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT

TASK = "zero-shot-anomaly-detection"
MODELING = Path(__file__).parent.parent / "modeling"


@pytest.fixture(scope="module")
def detect():
    return pipeline(TASK, model=str(EMBEDDED_CHECKPOINT), dtype=torch.float32)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Of unlike sizes."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for height, width in ((60, 80), (40, 40), (90, 50))
    ]


@pytest.fixture
def png(images) -> bytes:
    buffer = BytesIO()
    images[0].save(buffer, format="PNG")
    return buffer.getvalue()


def plain_result(detect, image: Image.Image, class_name: str) -> dict:
    """The result by the model and the processor alone."""
    inputs = detect.processor(images=image, text=[class_name], return_tensors="pt")
    with torch.no_grad():
        outputs = detect.model(**inputs)
    return detect.processor.post_process_anomaly_detection(outputs, [(image.height, image.width)])[0]


def assert_same(actual: dict, expected: dict) -> None:
    assert actual["score"] == pytest.approx(expected["score"], abs=1e-6)
    assert torch.allclose(actual["map"], expected["map"], atol=1e-5)
    assert actual["is_anomalous"] == expected["is_anomalous"]
    assert [region["box"] for region in actual["regions"]] == [region["box"] for region in expected["regions"]]


def test_the_result_is_that_of_model_and_processor(detect, images):
    assert isinstance(detect, ZeroShotAnomalyDetectionPipeline)
    for image in images:
        result = detect(image, class_name="wood")
        assert_same(result, plain_result(detect, image, "wood"))
        assert result["heatmap"].size == image.size
        assert np.abs(np.asarray(result["heatmap"]) / 255 - result["map"].numpy()).max() <= 0.5 / 255 + 1e-6
    assert_same(detect(images[0]), plain_result(detect, images[0], "object"))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_generators_and_data_sets_give_a_result_an_image_whatever_the_batch(detect, images, batch_size):
    expected = [plain_result(detect, image, "wood") for image in images]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return {"image": images[index], "label": 0}

    settings = {"class_name": "wood", "batch_size": batch_size}
    for given in (images, (image for image in images), KeyDataset(Rows(), "image"), Rows()):
        results = list(detect(given, **settings))
        assert len(results) == len(images)
        for result, right in zip(results, expected, strict=True):
            assert_same(result, right)


def test_images_that_keep_their_aspect_ratios_make_a_batch(images):
    processor = AutoProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    processor.image_processor.size = {"shortest_edge": 112}
    model = AutoModel.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    detect = ZeroShotAnomalyDetectionPipeline(model, processor=processor, device=-1)
    for result, image in zip(detect([*images, images[0]], batch_size=4), [*images, images[0]], strict=True):
        assert_same(result, plain_result(detect, image, "object"))


def test_every_image_may_have_a_class_of_its_own(detect, images):
    given = [{"image": images[0], "class_name": name} for name in ("wood", "metal nut")] + [{"image": images[0]}]
    results = detect(given, class_name="granite", batch_size=3)
    for result, name in zip(results, ("wood", "metal nut", "granite"), strict=True):
        assert_same(result, plain_result(detect, images[0], name))


def test_anchors_are_computed_once_a_class(detect, images, monkeypatch):
    computed = []
    get_text_embeds = detect.model.get_text_embeds
    monkeypatch.setattr(
        detect.model, "get_text_embeds", lambda **prompts: computed.append(1) or get_text_embeds(**prompts)
    )
    monkeypatch.setattr(detect, "_anchors", {})
    for name in ("cork", "cork", "grass", "cork"):
        detect(images, class_name=name)
    assert len(computed) == 2
    for number in range(1100):
        detect._anchors.setdefault(f"name {number}", detect._anchors["cork"])
    detect(images[0], class_name="leather")
    assert list(detect._anchors) == ["leather"]


def test_anchors_that_another_thread_clears_are_not_missed(detect, images, monkeypatch):
    class Cleared(dict):
        def __setitem__(self, name, anchors):
            pass

    monkeypatch.setattr(detect, "_anchors", Cleared())
    assert_same(detect(images[0], class_name="cork"), plain_result(detect, images[0], "cork"))


def test_thresholds_of_a_call_go_before_those_of_the_checkpoint(detect, images):
    score = detect(images[0])["score"]
    assert detect(images[0], threshold=score - 0.01)["is_anomalous"] is True
    assert detect(images[0], threshold=score + 0.01)["is_anomalous"] is False
    assert detect(images[0], pixel_threshold=1.0)["regions"] == []
    (everywhere,) = detect(images[0], pixel_threshold=0.0)["regions"]
    assert everywhere["box"] == [0, 0, *images[0].size]


def test_an_image_may_come_as_path_url_base64_bytes_array_or_tensor(detect, images, png, tmp_path):
    (tmp_path / "part.png").write_bytes(png)
    encoded = base64.b64encode(png).decode()

    class Folder(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    pixels = np.asarray(images[0])
    try:
        given = [
            str(tmp_path / "part.png"),
            tmp_path / "part.png",
            f"{url}/part.png",
            encoded,
            f"data:image/png;base64,{encoded}",
            base64.encodebytes(png).decode(),
            png,
            pixels,
            torch.from_numpy(pixels.copy()),
        ]
        expected = plain_result(detect, images[0], "wood")
        for result in detect(given, class_name="wood", timeout=10):
            assert_same(result, expected)
        with pytest.raises(ValueError, match=r"gone.png: cannot be fetched \(HTTP Error 404"):
            detect(f"{url}/gone.png")
        with pytest.raises(ValueError, match="cannot be read as an image"):
            detect(f"{url}/")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gone.png", "gone.png: no such file, and neither a URL nor base64 of an image"),
        ("abcd", "abcd: no such file, and neither"),
        (b"no image", "bytes: cannot be read as an image"),
        (17, "A int is no image"),
    ],
)
def test_what_is_no_image_is_refused(detect, given, words):
    with pytest.raises(ValueError, match=words):
        detect(given)


def test_what_is_no_class_name_or_no_setting_is_refused(detect, images):
    with pytest.raises(ValueError, match="printable"):
        detect(images[0], class_name="two\nlines")
    with pytest.raises(TypeError, match="treshold"):
        detect(images[0], treshold=0.5)
    for batch_size in (1, 2):
        with pytest.raises(ValueError, match="class_name is a text, not a list: for a class an image, pass dicts"):
            detect(images[:2], class_name=["wood", "cork"], batch_size=batch_size)
    with pytest.raises(ValueError, match="class_name is a text, not a NoneType"):
        detect({"image": images[0], "class_name": None})


@pytest.mark.parametrize("value", [float("nan"), 2, -0.1, "0.5", True, [0.5]])
@pytest.mark.parametrize("name", ["threshold", "pixel_threshold"])
def test_what_is_no_threshold_is_refused(detect, images, name, value):
    with pytest.raises(ValueError, match=f"{name} is a number from 0 to 1, not ") as refusal:
        detect(images[0], **{name: value})
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize("keys", [("img",), ("img", "class_name"), ()], ids=lambda keys: "-".join(keys))
def test_a_dict_without_an_image_is_refused(detect, images, keys):
    with pytest.raises(ValueError, match="A dict holds an image and perhaps its class_name, not ") as refusal:
        detect({key: images[0] if key.startswith("im") else "wood" for key in keys})
    assert str(list(keys)) in str(refusal.value)


def test_it_is_told_once_which_keys_of_a_dict_are_not_read(detect, images, monkeypatch):
    told = []
    monkeypatch.setattr(pipeline_moeclip.logger, "warning_once", told.append)
    scored = detect({"image": images[0], "class": "wood", "label": 0})
    assert told == ["Of a dict image and class_name are read, and not ['class', 'label']."]
    assert_same(scored, detect(images[0]))


def test_of_no_images_there_are_no_results(detect):
    assert detect([], class_name="wood") == []


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF"])
def test_a_pil_image_is_turned_upright_like_its_file_and_once(detect, images, tmp_path, file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "part"
    images[0].save(file, file_format, exif=exif)
    by_path, by_image = detect(file), detect(Image.open(file))
    assert_same(by_image, by_path)
    assert by_path["heatmap"].size == (images[0].size if orientation < 5 else images[0].size[::-1])
    for turned in (open_image(file), ImageOps.exif_transpose(Image.open(file)), read_image(Image.open(file))):
        assert_same(detect(turned), by_path)


def test_another_models_processor_is_refused(detect):
    with pytest.raises(ValueError, match="takes a MoECLIP and its processor, not a NoneType"):
        ZeroShotAnomalyDetectionPipeline(detect.model, device=-1)


def test_a_saved_pipeline_loads_again(detect, images, tmp_path):
    detect.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), dtype=torch.float32)
    assert_same(again(images[0]), plain_result(detect, images[0], "object"))


def test_a_checkpoint_in_half_precision_is_scored_nearly_the_same(detect, images):
    half = pipeline(TASK, model=str(EMBEDDED_CHECKPOINT), dtype=torch.bfloat16)
    result = half(images, batch_size=2)[0]
    assert result["map"].dtype == torch.float32
    assert result["score"] == pytest.approx(plain_result(detect, images[0], "object")["score"], abs=0.05)


def test_the_code_that_travels_imports_what_its_requirements_name_and_finds_its_parts_by_single_dots():
    files = sorted(path for path in MODELING.glob("*.py") if path.name != "__init__.py")
    packages = set()
    for file in files:
        packages |= set(get_imports(file))
        check_imports(file)
        assert "from . import" not in file.read_text()
        assert "from .." not in file.read_text()
    import sys

    distributions = {"PIL": "pillow"}
    foreign = {distributions.get(name, name) for name in packages - sys.stdlib_module_names}
    named = {line.partition(">=")[0] for line in handler_requirements().splitlines()}
    assert foreign <= named
    assert named - foreign == {"safetensors"}  # which transformers reads the weights with
    assert all(">=" in line for line in handler_requirements().splitlines())
    reached = {Path(file).name for file in get_relative_import_files(MODELING / "pipeline_moeclip.py")}
    reached |= {Path(file).name for file in get_relative_import_files(MODELING / "processing_moeclip.py")}
    assert {file.name for file in files} - reached == {"handler.py", "processing_moeclip.py"}
