"""Numbers at their limits: images of one colour, NaN and infinities, names too long, sizes mixed in a batch."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from moeclip_hf.app.inspector import LONGEST_CLASS_NAME, Inspector
from moeclip_hf.calibration import normal_images, score_for_calibration
from moeclip_hf.errors import MoECLIPError
from moeclip_hf.evaluation import evaluate
from moeclip_hf.modeling.handler import EndpointHandler
from moeclip_hf.prediction import detect, predict
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, Pretrained, load_pretrained
from moeclip_hf.tiling import Tiling, detect_in_tiles

LONG_NAME = "metal nut " * 1000
"""10,000 characters."""


@cache
def pretrained() -> Pretrained:
    return load_pretrained(device="cpu")


@pytest.fixture(scope="module")
def detecting():
    return pipeline("zero-shot-anomaly-detection", model=str(EMBEDDED_CHECKPOINT), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "part.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# Images without any contrast, or with nothing but


@pytest.mark.parametrize(
    "levels",
    [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0)],
    ids=["black", "saturated", "grey", "red"],
)
def test_an_image_of_one_colour_has_a_score_and_a_map(levels, detecting):
    bytes_ = torch.tensor(levels, dtype=torch.uint8).view(3, 1, 1).expand(3, 20, 30)
    given = {
        "PIL": Image.new("RGB", (30, 20), levels),
        "bytes": bytes_,
        "floats": bytes_.float() / 255,
        "halves": bytes_.half() / 255,
        "array": bytes_.permute(1, 2, 0).numpy(),
    }
    results = {kind: detecting(image) for kind, image in given.items()}
    for kind, result in results.items():
        assert 0 <= result["score"] <= 1, kind
        assert result["map"].shape == (20, 30)
        assert 0 <= result["map"].min() <= result["map"].max() <= 1
        assert result["score"] == pytest.approx(results["PIL"]["score"], abs=1e-6), kind


def test_an_image_of_extremes_alone_has_a_score_and_a_map(detecting):
    stripes = np.zeros((20, 30), dtype=np.uint8)
    stripes[:, ::2] = 255
    result = detecting(stripes)
    assert 0 <= result["score"] <= 1
    assert torch.isfinite(result["map"]).all()
    assert detecting(stripes.astype(np.uint16) * 257)["score"] == pytest.approx(result["score"], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_one_pixel_that_is_no_number_is_enough_to_refuse_a_tensor(value, dtype, detecting):
    pixels = torch.full((3, 20, 30), 0.5, dtype=dtype)
    pixels[1, 7, 11] = value
    for given in (pixels, [torch.zeros(3, 20, 30), pixels]):
        with pytest.raises(ValueError, match="NaN or infinite"):
            detecting(given)
        with pytest.raises(ValueError, match="NaN or infinite"):
            pretrained().processor(images=given)
    if dtype is not torch.bfloat16:  # which NumPy has not
        with pytest.raises(ValueError, match="NaN or infinite"):
            detecting(pixels.numpy())


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4), dtype=np.complex64), "complex64"),
        (np.array([["1", "2"]]), "<U1"),
        (np.array([[None, 1]]), "object"),
        (np.full((4, 4), 1 << 40), "it must lie in 0 to 255"),
        (np.full((4, 4), 1e30), "it must lie in 0 to 255"),
        (np.full((4, 4), -1), "it must lie in 0 to 255"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.dtype),
)
def test_arrays_that_hold_no_pixels_are_refused(array, words):
    with pytest.raises(ValueError, match=words):
        pretrained().processor(images=array)


def test_the_order_of_bytes_in_an_array_is_heeded(detecting):
    values = np.random.default_rng(0).integers(0, 65_536, (20, 30)).astype(np.uint16)
    assert detecting(values.astype(">u2"))["score"] == detecting(values)["score"]


# A model whose numbers fail


@pytest.fixture
def broken(monkeypatch) -> Pretrained:
    """A model that overflows, as one may in a type too narrow for it."""
    loaded = load_pretrained(device="cpu")
    with torch.no_grad():
        loaded.model.vision_model.post_layernorm.weight.fill_(float("nan"))
    return loaded


def test_a_score_that_is_no_number_is_no_verdict(broken, part):
    """NaN reaches no threshold: it would pass for normal."""
    anchors = pretrained().encode_class("wood")
    for tiling in (None, Tiling(16)):
        (found,) = predict(broken, [part], "wood", tiling=tiling)
        assert found.is_anomalous is None
        assert f"{part}: The model gives NaN" in found.error
    with pytest.raises(MoECLIPError, match="gives NaN"):
        detect(broken, Image.open(part), anchors)
    with pytest.raises(ValueError, match="gives NaN"):
        detect_in_tiles(broken, Image.open(part), anchors, Tiling(16))
    outputs = broken.model(**broken.processor(images=Image.open(part), text="wood", return_tensors="pt"))
    with pytest.raises(ValueError, match="gives NaN"):
        broken.processor.post_process_anomaly_detection(outputs)
    rows = normal_images([part], "wood")
    with pytest.raises(MoECLIPError, match="gives NaN"):
        score_for_calibration(broken, rows)
    with pytest.raises(MoECLIPError, match="NaN"):
        evaluate(broken, rows)


# Sizes


def test_images_of_unlike_sizes_in_a_batch_are_scored_as_alone(tmp_path, detecting):
    sizes = [(1, 1), (500, 1), (1, 300), (37, 91), (112, 112), (640, 480)]
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{width}x{height}.png" for width, height in sizes]
    for file, (width, height) in zip(files, sizes, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    alone = [detecting(str(file)) for file in files]
    together = detecting([str(file) for file in files], batch_size=len(files))
    by_files = predict(pretrained(), files, batch_size=len(files))
    for (width, height), one, batched, found in zip(sizes, alone, together, by_files, strict=True):
        assert one["map"].shape == batched["map"].shape == found.anomaly_map.shape == (height, width)
        assert batched["score"] == pytest.approx(one["score"], abs=1e-5)
        assert found.score == pytest.approx(one["score"], abs=1e-5)
        assert np.allclose(batched["map"], found.anomaly_map, atol=1e-5)


# Class names


def test_a_name_of_ten_thousand_characters_is_cut_and_that_is_said(part, detecting, caplog, command):
    assert len(LONG_NAME) == 10_000
    read = pretrained().processor.fit_class_name(LONG_NAME)
    assert LONG_NAME.startswith(read)
    assert len(read) > len("metal nut")
    whole, cut = detecting(str(part), class_name=LONG_NAME), detecting(str(part), class_name=read)
    assert whole["score"] == cut["score"]
    assert f"read as {read!r}" in caplog.text
    caplog.clear()
    status, *_ = command("predict", part, "--no-overlays", "--class-name", LONG_NAME)
    assert status == 0
    assert f"read as {read!r}" in caplog.text


def test_where_nobody_sees_a_warning_the_answer_holds_the_name_that_was_read(part):
    """A visitor of the page, and a client of an endpoint."""
    name = "photovoltaic module of a satellite in orbit"
    read = pretrained().processor.fit_class_name(name)
    assert read != name
    serve = EndpointHandler(str(EMBEDDED_CHECKPOINT))
    request = {"inputs": part.read_bytes(), "parameters": {"class_name": name}}
    assert serve(request)["class_name"] == read
    inspector = Inspector(device="cpu")
    assert inspector.inspect(part, name, inspector.model).class_name == read
    assert next(inspector.score([part], name, inspector.model)).class_name == read
    with pytest.raises(ValueError, match="1 to 500 characters"):
        serve({**request, "parameters": {"class_name": LONG_NAME}})
    with pytest.raises(MoECLIPError, match=f"{LONGEST_CLASS_NAME} characters at most, not 10000"):
        inspector.inspect(part, LONG_NAME, inspector.model)


@pytest.mark.parametrize("name", ["漢" * 10_000, "\u0301" * 10_000, "🙂" * 10_000, "{}" * 5_000, "x" * 10_000])
def test_a_long_name_of_any_letters_is_cut_to_what_fits(name):
    processor = pretrained().processor
    tokens = processor(text=[name])["input_ids"]
    assert max(map(len, tokens)) <= processor.tokenizer.model_max_length
    assert torch.isfinite(pretrained().encode_class(name)).all()


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_an_empty_name_is_refused_wherever_it_is_given(name, part, detecting):
    with pytest.raises(ValueError, match=r"empty|printable"):
        detecting(str(part), class_name=name)
    with pytest.raises(MoECLIPError, match=r"empty|printable"):
        next(predict(pretrained(), [part], name))
    with pytest.raises(MoECLIPError, match=r"empty|printable"):
        evaluate(pretrained(), normal_images([part], name))


def test_a_name_that_ends_the_sentence_for_the_text_tower_is_refused():
    with pytest.raises(MoECLIPError, match="begin or end"):
        pretrained().encode_class("nut<|endoftext|>")
