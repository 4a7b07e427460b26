"""`moeclip predict`, as people and machines call it."""

import copy
import json
import ntpath
import os
import struct
import sys
import unicodedata
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from moeclip_hf.cli import app
from moeclip_hf.cli.predict import _output_names
from moeclip_hf.cli.usage import LARGEST_EDGE
from moeclip_hf.errors import CheckpointError, MoECLIPError, MoECLIPWarning
from moeclip_hf.prediction import find_images, predict
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, check_processor, load_pretrained
from moeclip_hf.visualization import draw_overlay


@pytest.fixture(scope="module")
def pretrained():
    return load_pretrained(device="cpu")


@pytest.fixture
def images(tmp_path) -> Path:
    """Two pictures, one of them with a dark spot, in unlike sizes and formats."""
    folder = tmp_path / "images"
    (folder / "line 2").mkdir(parents=True)
    rng = np.random.default_rng(0)
    grain = rng.normal(150, 8, (96, 130, 1)).repeat(3, axis=2)
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / "good.png")
    grain[40:62, 70:95] = 15
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).resize((65, 48)).save(
        folder / "line 2" / "spot.jpg", quality=95
    )
    return folder


def run(*arguments: str | Path, cwd: Path):
    previous = Path.cwd()
    os.chdir(cwd)
    try:
        return CliRunner().invoke(app, ["predict", *map(str, arguments), "--device", "cpu"])
    finally:
        os.chdir(previous)


def test_people_get_a_table_and_overlays_of_the_images_own_size(images, tmp_path):
    result = run("images", "--class-name", "granite", cwd=tmp_path)
    assert result.exit_code == 0
    assert "good.png" in result.stdout
    assert "spot.jpg" in result.stdout
    assert Image.open(tmp_path / "moeclip-output" / "good_overlay.png").size == (130, 96)
    assert Image.open(tmp_path / "moeclip-output" / "spot_overlay.png").size == (65, 48)


def test_machines_get_a_line_of_json_an_image(images, tmp_path):
    result = run(
        images, "--json", "--maps", "npy", "--output-dir", tmp_path / "out", "--threshold", "0.1", cwd=tmp_path
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["good.png", "spot.jpg"]
    for row in rows:
        assert row["model"] == str(EMBEDDED_CHECKPOINT)
        assert 0 <= row["score"] <= 1
        assert row["is_anomalous"] is (row["score"] >= 0.1)
        anomaly_map = np.load(row["map"])
        assert anomaly_map.shape == (row["height"], row["width"])
        assert 0 <= anomaly_map.min() <= anomaly_map.max() <= 1
        assert Path(row["overlay"]).exists()


def test_maps_of_sixteen_bits_hold_the_same_values(images, tmp_path):
    for format in ("npy", "png"):
        run(images / "good.png", "--maps", format, "--no-overlays", "--output-dir", tmp_path / "out", cwd=tmp_path)
    values = np.load(tmp_path / "out" / "good_map.npy")
    picture = Image.open(tmp_path / "out" / "good_map.png")
    assert picture.mode.startswith("I;16")
    assert np.abs(np.asarray(picture) / 65535 - values).max() < 1e-5
    assert not (tmp_path / "out" / "good_overlay.png").exists()


def test_an_unreadable_file_is_named_and_the_rest_is_done(images, tmp_path):
    (images / "broken.png").write_bytes(b"no image")
    result = run(images, images / "gone.png", "--json", cwd=tmp_path)
    assert result.exit_code == 1
    rows = {Path(json.loads(line)["image"]).name: json.loads(line) for line in result.stdout.splitlines()}
    assert rows["broken.png"]["score"] is None
    assert "broken.png: cannot be read" in rows["broken.png"]["error"]
    assert "no such file" in rows["gone.png"]["error"]
    assert rows["good.png"]["score"] is not None
    assert "broken.png" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_decoder_that_breaks_on_one_file_does_not_end_the_run(images, tmp_path, monkeypatch):
    opened = Image.open

    def open_or_break(path, *arguments, **keywords):
        if Path(path).name == "spot.jpg":
            raise struct.error("required argument is not an integer")
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Image, "open", open_or_break)
    result = run(images, "--json", cwd=tmp_path)
    rows = {Path(json.loads(line)["image"]).name: json.loads(line) for line in result.stdout.splitlines()}
    assert result.exit_code == 1
    assert "spot.jpg: cannot be read" in rows["spot.jpg"]["error"]
    assert rows["good.png"]["score"] is not None


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_a_result_that_cannot_be_written_is_named_and_the_rest_is_done(images, tmp_path, options):
    Image.new("RGB", (30, 20)).save(images / "last.png")
    (tmp_path / "moeclip-output" / "last_overlay.png").mkdir(parents=True)
    result = run("images", "--maps", "npy", *options, cwd=tmp_path)
    assert result.exit_code == 1
    assert all(name in result.stdout for name in ("good.png", "last.png", "spot.jpg"))
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("moeclip: ")]
    assert line == "moeclip: moeclip-output/last_overlay.png: cannot be written (Is a directory)"
    written = {path.name for path in (tmp_path / "moeclip-output").iterdir()} - {"last_overlay.png"}
    assert written == {"good_overlay.png", "good_map.npy", "last_map.npy", "spot_overlay.png", "spot_map.npy"}


def test_what_was_scored_is_printed_when_the_run_is_interrupted(images, tmp_path, monkeypatch):
    def interrupt_after_one(*given, **options):
        yield next(predict(*given, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr("moeclip_hf.prediction.predict", interrupt_after_one)
    result = run("images", cwd=tmp_path)
    assert result.exit_code != 0
    assert "good.png" in result.stdout and "spot.jpg" not in result.stdout
    assert (tmp_path / "moeclip-output" / "good_overlay.png").exists()


def test_lines_for_machines_go_to_standard_output_though_standard_error_is_a_terminal(images, tmp_path, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    result = run(images, "--json", "--no-overlays", cwd=tmp_path)
    assert [Path(json.loads(line)["image"]).name for line in result.stdout.splitlines()] == ["good.png", "spot.jpg"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output-dir", "images/good.png"], "good.png"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here"),
        (["--model", "images/good.png"], "is a file"),
        (["--class-name", "two\nlines"], "printable text"),
        (["--class-name", " "], 'use "object"'),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_status_1(images, tmp_path, monkeypatch, command, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _, said = command("predict", "images/good.png", *arguments)
    assert status == 1
    assert said.startswith(b"moeclip: ")
    assert words.encode() in said
    assert said.count(b"\n") == 1


def test_a_class_name_is_no_markup(images, tmp_path):
    assert "[/bold] nut" in run("images/good.png", "--class-name", "[/bold] nut", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        [],
        ["x.png", "--batch-size", "0"],
        ["x.png", "--maps", "gif"],
        ["x.png", "--threshold", "nan"],
        ["x.png", "--threshold", "5"],
        ["x.png", "--image-size", "9000"],
    ],
)
def test_wrong_usage_ends_with_status_2(arguments, tmp_path):
    assert run(*arguments, cwd=tmp_path).exit_code == 2


def test_files_folders_and_patterns_are_found_once_and_in_order(images):
    good, spot = images / "good.png", images / "line 2" / "spot.jpg"
    assert find_images([images]) == [good, spot]
    assert find_images([good, images, str(images / "**" / "*.jpg")]) == [good, spot]
    assert find_images([images / "gone.png"]) == [images / "gone.png"]
    (images / "empty").mkdir()
    for nothing in (images / "empty", images / "*.tiff"):
        with pytest.raises(MoECLIPError, match="holds no images"):
            find_images([nothing])


@pytest.mark.filterwarnings("ignore:.* results of predict or explain")
def test_results_are_not_taken_for_images_and_images_not_for_results(images, tmp_path):
    """Whatever their names are, and however they are named to the command."""
    (images / "floor_map.png").write_bytes((images / "good.png").read_bytes())
    expected = ["floor_map.png", "good.png", "spot.jpg"]
    for output in (images / "results", images):
        options = ("--maps", "png", "--json", "--output-dir", output)
        first = run(images, *options, cwd=tmp_path)
        assert sorted(Path(json.loads(line)["image"]).name for line in first.stdout.splitlines()) == expected
        for sources in ([images], [images / "**" / "*.*g"], sorted(images.rglob("*.*g"))):
            with pytest.warns(MoECLIPWarning, match=r"\d+ results of predict or explain are no images of parts"):
                again = run(*sources, *options, cwd=tmp_path)
            assert sorted(Path(json.loads(line)["image"]).name for line in again.stdout.splitlines()) == expected
    with pytest.raises(MoECLIPError, match="and there are no others"):
        find_images([images / "results"])


def test_an_image_is_not_overwritten_by_the_overlay_of_another(images, tmp_path):
    original = images / "good_overlay.png"
    Image.open(images / "good.png").rotate(90).save(original)
    before = original.read_bytes()
    result = run(images / "good.png", original, "--output-dir", images, cwd=tmp_path)
    assert isinstance(result.exception, MoECLIPError)
    told = f"{original}: the results of {images / 'good.png'} would overwrite it: name another --output-dir."
    assert str(result.exception) == told
    assert original.read_bytes() == before and not list(images.glob("*_overlay_overlay.png"))
    assert run(images / "good.png", original, "--output-dir", tmp_path / "out", cwd=tmp_path).exit_code == 0
    assert original.read_bytes() == before


def test_a_picture_that_is_no_result_is_not_overwritten(images, tmp_path):
    (images / "good_overlay.png").write_bytes((images / "good.png").read_bytes())
    (images / "good_overlay.png.partial").write_bytes(b"mine")
    result = run(images / "good.png", "--output-dir", images, cwd=tmp_path)
    told = f"{images / 'good_overlay.png'}: is no result of moeclip's, and those of {images / 'good.png'} would"
    assert str(result.exception).startswith(told)
    assert (images / "good_overlay.png").read_bytes() == (images / "good.png").read_bytes()
    (images / "good_overlay.png").unlink()
    for _ in range(2):
        assert run(images / "good.png", "--output-dir", images, cwd=tmp_path).exit_code == 0
    assert (images / "good_overlay.png.partial").read_bytes() == b"mine"
    assert not list(images.glob(".*"))


def test_the_largest_size_that_commands_take_is_the_largest_that_a_processor_may_ask_for(pretrained):
    def told(edge: int) -> str:
        processor = copy.deepcopy(pretrained.processor)
        processor.image_processor.size = {"height": edge, "width": edge}
        try:
            check_processor("it", processor)
        except CheckpointError as error:
            return str(error)
        return ""

    assert not told(LARGEST_EDGE)
    assert f"is over {LARGEST_EDGE} pixels" in told(LARGEST_EDGE + 8)


def test_explain_overwrites_no_picture_that_is_no_result(images, tmp_path):
    own = tmp_path / "out" / "good_routing.png"
    own.parent.mkdir()
    own.write_bytes((images / "good.png").read_bytes())
    explain = ["explain", str(images / "good.png"), "--device", "cpu", "--output-dir", str(own.parent)]
    failure = CliRunner().invoke(app, explain).exception
    assert isinstance(failure, MoECLIPError) and str(failure).startswith(f"{own}: is no result of moeclip's")
    assert own.read_bytes() == (images / "good.png").read_bytes()
    own.unlink()
    for _ in range(2):
        assert CliRunner().invoke(app, explain).exit_code == 0


def test_a_name_that_no_disk_takes_ends_nothing(images, tmp_path):
    result = run(images / "good.png", f"{'a' * 300}_overlay.png", "--no-overlays", "--json", cwd=tmp_path)
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["score"] is not None and "too long" in second["error"]


def test_images_of_kinds_that_are_not_read_are_told_with_their_folders(images):
    for name in ("b.heic", "line 2/a.heic"):
        (images / name).touch()
    with pytest.warns(MoECLIPWarning, match=r"passes over 2 files, of which the first is b\.heic"):
        find_images([images])
    (images / "b.heic").unlink()
    with pytest.warns(MoECLIPWarning, match=r"passes over 1 files, of which the first is line 2/a\.heic"):
        find_images([images])


def test_names_are_whole_where_the_table_goes_to_a_file(images, tmp_path):
    far = tmp_path / ("station with a name " * 8) / ("camera " * 10)
    far.mkdir(parents=True)
    for number in (1, 2):
        (far / f"{number}.png").write_bytes((images / "good.png").read_bytes())
    result = run(far, "--no-overlays", cwd=tmp_path)
    for number in (1, 2):
        (row,) = [line for line in result.stdout.splitlines() if str(far / f"{number}.png") in line]
        assert row.split()[-2] in ("normal", "anomalous")


def test_an_image_that_memory_is_too_short_for_is_named_and_the_rest_is_done(images, tmp_path, monkeypatch):
    """In reading, in finding regions and in drawing; each error as the machine would raise it."""
    Image.new("RGB", (301, 200)).save(images / "large.png")
    allocator = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")
    for name, concerns, error in (
        ("moeclip_hf.prediction.read_image", lambda path: path.name == "large.png", MemoryError()),
        ("moeclip_hf.prediction._complete", lambda prediction, _: prediction.path.name == "large.png", allocator),
        ("moeclip_hf.visualization.draw_overlay", lambda image, *_: image.size == (301, 200), MemoryError()),
    ):
        with monkeypatch.context() as patch:
            plain = getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2])

            def run_short(*given, _plain=plain, _concerns=concerns, _error=error):
                if _concerns(*given):
                    raise _error
                return _plain(*given)

            patch.setattr(name, run_short)
            result = run(images, cwd=tmp_path)
        assert result.exit_code == 1, name
        (line,) = result.stderr.splitlines()
        assert "large" in line and "memory is" in line, name
        assert all(shown in result.stdout for shown in ("good.png", "large.png", "spot.jpg")), name


def test_a_batch_that_memory_is_too_short_for_is_done_image_by_image(images, tmp_path, monkeypatch):
    patch_maps = type(load_pretrained(device="cpu")).patch_maps
    sizes = []

    def run_short(self, pixel_values, encoded_class):
        sizes.append(len(pixel_values))
        if len(sizes) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return patch_maps(self, pixel_values, encoded_class)

    monkeypatch.setattr("moeclip_hf.pretrained.Pretrained.patch_maps", run_short)
    for name in ("a.png", "b.png"):
        (images / name).write_bytes((images / "good.png").read_bytes())
    result = run(images, "--batch-size", "2", "--json", cwd=tmp_path)
    assert (result.exit_code, sizes) == (1, [2, 1, 1, 2])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["lower --batch-size" in row.get("error", "") for row in rows].count(True) == 1
    assert [row["score"] is None for row in rows] == ["error" in row for row in rows]


def test_results_of_files_with_one_name_do_not_overwrite_each_other(images, tmp_path):
    (images / "line 2" / "good.png").write_bytes((images / "good.png").read_bytes())
    result = run(images, "--json", cwd=tmp_path)
    overlays = [json.loads(line)["overlay"] for line in result.stdout.splitlines()]
    assert len(set(overlays)) == 3
    assert all((tmp_path / overlay).exists() for overlay in overlays)


@pytest.mark.parametrize(
    "names",
    [
        ("cam1/IMG_1.png", "cam2/img_1.png"),
        ("x/a.png", "x/A.png"),
        ("x/a.png", "x/a.jpg", "x/A.png", "b.png"),
        ("caf\u00e9.png", "cafe\u0301.png"),
    ],
    ids=["folders", "case", "suffixes", "accents"],
)
def test_names_of_results_are_told_apart_on_disks_that_take_two_names_for_one(names):
    given = _output_names([Path(name) for name in names])
    assert len({unicodedata.normalize("NFC", name).casefold() for name in given.values()}) == len(names)
    assert _output_names([Path(name) for name in reversed(names)]) == given


def test_names_of_results_are_no_longer_than_they_need_be():
    assert list(_output_names([Path("x/a.png"), Path("y/b.png")]).values()) == ["a", "b"]
    assert list(_output_names([Path("x/a.png"), Path("y/A.png")]).values()) == ["x/a.png", "y/A.png"]


def test_results_of_files_on_several_drives_are_named_by_the_drive(monkeypatch):
    windows = SimpleNamespace(path=ntpath, fsencode=os.fsencode, fsdecode=os.fsdecode)
    monkeypatch.setattr(sys.modules["moeclip_hf.cli.predict"], "os", windows)
    paths = [PureWindowsPath(path) for path in (r"C:\cam\a.png", r"D:\cam\a.png", r"\\host\share\a.png")]
    assert list(_output_names(paths).values()) == [r"C\cam\a.png", r"D\cam\a.png", r"host_share\a.png"]


def test_results_stay_in_their_folder_however_files_are_named(images, tmp_path):
    (tmp_path / "line").mkdir()
    (tmp_path / "line" / "good.png").write_bytes((images / "good.png").read_bytes())
    result = run("good.png", "../line/good.png", "--json", cwd=images)
    overlays = [Path(json.loads(line)["overlay"]) for line in result.stdout.splitlines()]
    assert len(set(overlays)) == 2
    for overlay in overlays:
        assert (images / overlay).exists() and ".." not in overlay.parts


def test_a_score_does_not_depend_on_the_batch(images, pretrained):
    paths = find_images([images]) * 3
    scores = {size: [p.score for p in predict(pretrained, paths, "wood", batch_size=size)] for size in (1, 2, 6)}
    assert scores[2] == pytest.approx(scores[1], abs=1e-6)
    assert scores[6] == pytest.approx(scores[1], abs=1e-6)


def test_the_map_points_at_the_spot(images, pretrained):
    prediction = next(predict(pretrained, [images / "line 2" / "spot.jpg"], "granite"))
    row, column = np.unravel_index(prediction.anomaly_map.argmax(), prediction.anomaly_map.shape)
    assert 18 <= row <= 33
    assert 33 <= column <= 50


def test_predictions_equal_those_of_the_auto_classes(images, pretrained):
    from transformers import AutoModel, AutoProcessor

    import moeclip_hf  # noqa: F401

    model = AutoModel.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    image = Image.open(images / "good.png")
    with torch.no_grad():
        outputs = model(**processor(images=image, text=["wood"], return_tensors="pt"))
    expected = processor.post_process_anomaly_detection(outputs, [(image.height, image.width)])[0]
    prediction = next(predict(pretrained, [images / "good.png"], "wood"))
    assert prediction.score == pytest.approx(expected["score"], abs=1e-6)
    assert np.allclose(prediction.anomaly_map, expected["map"].numpy(), atol=1e-5)


def test_checkpoints_that_cannot_score_are_refused_with_the_reason(tmp_path):
    from tiny_models import tiny_config
    from transformers import CLIPConfig, CLIPModel

    with pytest.raises(CheckpointError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").touch()
    with pytest.raises(CheckpointError, match=r"graph: is an exported graph.*name the checkpoint it was made of"):
        load_pretrained(tmp_path / "graph")
    (tmp_path / "graph" / "adapter_config.json").touch()  # an adapter that a graph was written beside
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        load_pretrained(tmp_path / "graph")
    config = tiny_config()
    towers = {"vision_config": config.vision_config.to_dict(), "text_config": config.text_config.to_dict()}
    CLIPModel(CLIPConfig(**towers)).save_pretrained(tmp_path / "clip")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "clip" / name).write_bytes((EMBEDDED_CHECKPOINT / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks \d+ of MoECLIP's weights.*plain CLIP has to be trained"):
        load_pretrained(tmp_path / "clip")
    result = CliRunner().invoke(app, ["predict", "x.png", "--model", str(tmp_path / "nowhere")])
    assert isinstance(result.exception, CheckpointError)


def test_an_overlay_is_the_image_where_nothing_is_anomalous_and_warm_where_something_is():
    image = Image.new("RGB", (40, 30), (100, 100, 100))
    anomaly_map = np.zeros((30, 40), dtype=np.float32)
    anomaly_map[10:20, 10:20] = 1
    overlay = np.asarray(draw_overlay(image, anomaly_map)).astype(int)
    assert (overlay[:8] == 100).all()
    inside = overlay[12:18, 12:18].reshape(-1, 3).mean(axis=0)
    assert inside[0] > inside[2] > 100
    framed = np.asarray(draw_overlay(image, anomaly_map, [{"box": [10, 10, 20, 20]}]))
    assert (framed[9, 9:21] == (0, 255, 255)).all()
    assert (framed[10:20, 10:20] == overlay[10:20, 10:20]).all()
