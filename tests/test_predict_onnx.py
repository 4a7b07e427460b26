"""`moeclip export`, and `moeclip predict` with what it wrote."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel
from typer.testing import CliRunner

from moeclip_hf import MoECLIPConfig, MoECLIPModel, MoECLIPProcessor
from moeclip_hf.cli import app
from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.onnx_detector import OnnxDetector, load_onnx
from moeclip_hf.prediction import predict
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, load_pretrained

DOCUMENTATION = Path(__file__).resolve().parent.parent / "docs" / "export.md"
CLASS_NAMES = ("granite", "wire mesh")


def run(*arguments: str | Path):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The embedded checkpoint's first blocks, which export sooner than all of them."""
    folder = tmp_path_factory.mktemp("checkpoint") / "short"
    config = MoECLIPConfig.from_pretrained(EMBEDDED_CHECKPOINT)
    first = config.feature_layers[0]
    shorter = {"feature_layers": [first], "moe_layers": config.moe_layers[:1], "image_feature_layer": first}
    MoECLIPModel.from_pretrained(EMBEDDED_CHECKPOINT, **shorter).save_pretrained(folder)
    MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint) -> tuple[Path, str]:
    """The folder that the command wrote, and what it printed."""
    folder = checkpoint.with_name("exported")
    names = [word for name in CLASS_NAMES for word in ("--class-name", name)]
    result = run("export", "--model", checkpoint, "--output", folder, "--int8", *names)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two pictures with a dark spot, in unlike sizes and formats."""
    folder = tmp_path_factory.mktemp("images")
    grain = np.random.default_rng(0).normal(150, 8, (96, 130, 1)).repeat(3, axis=2)
    grain[40:62, 70:95] = 15
    picture = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
    picture.save(folder / "wide.png")
    picture.resize((300, 420)).save(folder / "tall.jpg", quality=95)
    return folder


def test_people_read_how_large_and_how_exact_the_graphs_are(exported):
    folder, printed = exported
    for name in ("model.onnx", "model_int8.onnx"):
        megabytes = (folder / name).stat().st_size / 1e6
        assert f"{name}: {megabytes:.1f} MB; maps and scores differ from the model's by at most " in printed
    assert "Classes: granite, wire mesh" in printed
    assert f"moeclip predict IMAGES --model {folder}" in printed
    assert (folder / "model_int8.onnx").stat().st_size < 0.5 * (folder / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--backend", "onnx", "--batch-size", "1", "--threshold", "0.2", "--pixel-threshold", "0.3"],
        ["--image-size", "72", "--keep-aspect"],
        ["--tile", "auto"],
    ],
    ids=["whole", "alone", "other sizes", "tiles"],
)
@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_predictions_are_those_of_the_torch_backend(exported, checkpoint, images, tmp_path, options, class_name):
    rows = {}
    for side, model in (("torch", checkpoint), ("onnx", exported[0])):
        arguments = ["predict", images, "--class-name", class_name, "--model", model, "--output-dir", tmp_path / side]
        shared = [option for option in options if side == "onnx" or option not in ("--backend", "onnx")]
        result = run(*arguments, "--json", "--maps", "npy", *shared)
        assert result.exit_code == 0, result.output
        rows[side] = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows["onnx"]) == 2
    for ours, theirs in zip(rows["onnx"], rows["torch"], strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        for key in ("image", "class_name", "threshold", "is_anomalous", "width", "height"):
            assert ours[key] == theirs[key]
        assert [region["box"] for region in ours["regions"]] == [region["box"] for region in theirs["regions"]]
        assert np.allclose(np.load(ours["map"]), np.load(theirs["map"]), atol=1e-4)
        overlays = [np.asarray(Image.open(row["overlay"])).astype(int) for row in (ours, theirs)]
        assert np.abs(overlays[0] - overlays[1]).max() <= 4  # a step of the colours, of 255


def test_eight_bits_are_used_by_naming_their_file(exported, images, tmp_path):
    scores = {}
    for model in (exported[0], exported[0] / "model_int8.onnx"):
        result = run(
            "predict", images, "--class-name", "granite", "--model", model, "--json", "--output-dir", tmp_path
        )
        scores[model.name] = [json.loads(line)["score"] for line in result.stdout.splitlines()]
    assert scores["model_int8.onnx"] != scores["exported"]
    assert scores["model_int8.onnx"] == pytest.approx(scores["exported"], abs=0.05)


def test_an_exported_folder_does_without_the_model(exported, images, tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a model was made")

    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)
    monkeypatch.setenv("COLUMNS", "200")  # for paths as long as these
    result = run(
        "predict", images, "--class-name", "granite", "--model", exported[0], "--output-dir", tmp_path / "results"
    )
    assert result.exit_code == 0, result.output
    assert "wide.png" in result.stdout
    assert Image.open(tmp_path / "results" / "tall_overlay.png").size == (300, 420)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--class-name", "zebra"], r"'zebra': the graph was exported for 'granite', 'wire mesh'"),
        (["--class-name", "granite", "--device", "cuda"], "device 'cuda' cannot be used here"),
        (["--model", "nowhere", "--backend", "onnx"], "nowhere: no such file"),
        (["--model", "nowhere.onnx"], "nowhere.onnx: no such file"),
    ],
)
def test_a_users_mistake_is_one_line(exported, images, arguments, words, tmp_path):
    result = run("predict", images, "--model", exported[0], "--output-dir", tmp_path, *arguments)
    assert isinstance(result.exception, MoECLIPError)
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.fixture
def spoiled(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported[0], tmp_path / "spoiled"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_threshold": 7}, r"image_threshold \(7\) is not 0 to 1"),
        ({"image_processor": {"image_std": [0, 0, 0]}}, r"image_std \(\[0, 0, 0\]\)"),
        ({"image_processor": {"size": {"height": 10**9, "width": 8}}}, "over 8192 pixels"),
        ({"image_processor": {"image_processor_type": "ViTImageProcessor"}}, "ViTImageProcessor.*, another model's"),
        ({"image_processor": {"size": "large"}}, "cannot be loaded as an exported graph"),
    ],
)
def test_a_processor_that_no_image_could_be_scored_with_is_refused_by_name(spoiled, changes, words):
    path = spoiled / "processor_config.json"
    settings = json.loads(path.read_text())
    for name, value in changes.items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=words) as refusal:
        load_onnx(spoiled)
    assert str(spoiled) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def write_metadata(folder: Path, change) -> None:
    """Change what a folder's graph says of itself."""
    model = onnx.load(folder / "model.onnx")
    (entry,) = [entry for entry in model.metadata_props if entry.key == "moeclip"]
    entry.value = json.dumps(change(json.loads(entry.value)))
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: {}, "its metadata name no classes"),
        (lambda facts: [], "its metadata name no classes"),
        (lambda facts: facts | {"class_names": 5}, "its metadata name no classes"),
        (lambda facts: facts | {"class_names": "brick"}, "its metadata name no classes"),
        (lambda facts: facts | {"class_names": []}, "its metadata name no classes"),
        (lambda facts: facts | {"class_names": ["granite"]}, r"is none for the classes .* \('granite'\)"),
        (lambda facts: facts | {"patch_size": 14}, "processor is another model's: patch_size is 8, and 14 in"),
        (lambda facts: facts | {"image_mean": [0, 0, 0]}, "image_mean is .*, and .0, 0, 0. in"),
    ],
)
def test_a_graph_whose_metadata_are_not_its_own_is_refused_by_name(spoiled, change, words):
    write_metadata(spoiled, change)
    with pytest.raises(CheckpointError, match=words) as refusal:
        load_onnx(spoiled)
    assert str(spoiled) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_graph_of_something_else_is_refused_by_name(spoiled):
    model = onnx.load(spoiled / "model.onnx")
    pixels, pixels_again = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 3, "h", "w"])
        for name in ("pixel_values", "pixels_again")
    )
    node = onnx.helper.make_node("Identity", ["pixel_values"], ["pixels_again"])
    model.graph.CopyFrom(onnx.helper.make_graph([node], "other", [pixels], [pixels_again]))
    onnx.save(model, spoiled / "model.onnx")
    write_metadata(spoiled, lambda facts: facts | {"class_names": ["granite"]})
    with pytest.raises(CheckpointError, match="its graph, from pixel_values to pixels_again, is none for the classes"):
        load_onnx(spoiled)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("Failed to allocate memory")]
)
def test_short_memory_of_a_graph_is_told_as_such(error):
    def run_short(*_):
        raise error

    detector = OnnxDetector(SimpleNamespace(run=run_short), ("brick",), None, Path("graph.onnx"))
    with pytest.raises(MemoryError):
        detector.patch_maps(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long))


def test_what_a_graph_cannot_compute_is_one_line_with_its_name(spoiled, images, tmp_path):
    write_metadata(spoiled, lambda facts: facts | {"class_names": [*facts["class_names"], "brick"]})
    result = run("predict", images, "--model", spoiled, "--class-name", "brick", "--output-dir", tmp_path / "results")
    assert isinstance(result.exception, MoECLIPError)
    assert f"{spoiled / 'model.onnx'}: the graph cannot be computed: " in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_processor_that_leads_elsewhere_or_names_code_is_not_followed(spoiled, tmp_path, monkeypatch, capsys):
    path = spoiled / "processor_config.json"
    (spoiled / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass Evil: ...\n")
    code = {"auto_map": {"AutoProcessor": "evil.Evil"}, "processor_class": "Evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with contextlib.suppress(CheckpointError):
        load_onnx(spoiled)
    assert not (tmp_path / "canary").exists()
    assert "[y/N]" not in "".join(capsys.readouterr())
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"elsewhere\.json, out of its folder"):
        load_onnx(spoiled)


@pytest.mark.parametrize("arguments", [["--backend", "onnx"], ["--model", "x.onnx", "--dtype", "float16"]])
def test_wrong_usage_ends_with_status_2(images, arguments, tmp_path):
    assert run("predict", images, "--output-dir", tmp_path, *arguments).exit_code == 2


def test_a_filled_folder_is_not_written_to(exported):
    result = run("export", "--output", exported[0])
    assert result.exit_code == 1
    assert "not an empty folder" in str(result.exception)


def test_the_documented_example_needs_onnxruntime_and_numpy_alone(exported, checkpoint, images, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), flags=re.DOTALL)
    (tmp_path / "moeclip-onnx").symlink_to(exported[0])
    Image.open(images / "wide.png").save(tmp_path / "part.png")
    code = code.replace('"screw"', '"wire mesh"') + "\nimport sys\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pretrained = load_pretrained(checkpoint, "cpu")
    prediction = next(predict(pretrained, [images / "wide.png"], "wire mesh"))
    score, verdict, shape, imported = re.fullmatch(r"(\S+) (\w+) (.*)\n(\w+)\n", done.stdout).groups()
    assert float(score) == pytest.approx(prediction.score, abs=1e-4)
    assert verdict == str(prediction.is_anomalous)
    vision = pretrained.model.config.vision_config
    edge = pretrained.processor.image_processor.size["height"] // vision.patch_size
    assert shape == f"(1, {edge}, {edge})"
    assert imported == "False"
