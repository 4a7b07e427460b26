"""Image files of every kind, damaged ones among them, through every way in: scored as what they show, or named."""

import subprocess
import sys
import threading
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from image_corpus import (
    DAMAGE,
    HEIGHT,
    WIDTH,
    damaged_files,
    encode,
    good_files,
    plainly_decoded,
    png_of_zeros,
    refused_files,
    scene,
)
from image_ways import CLASS_NAME, WAYS, endpoint, pretrained, score_of_picture, small_checkpoint, write
from limits import memory_limit, time_limit
from PIL import EpsImagePlugin, Image
from typer.testing import CliRunner

from moeclip_hf import prediction
from moeclip_hf.cli import app
from moeclip_hf.errors import MoECLIPError, UnreadableImageError
from moeclip_hf.modeling import handler
from moeclip_hf.modeling.image_processing_moeclip import to_rgb
from moeclip_hf.prediction import predict, read_image
from moeclip_hf.tiling import Tiling

DAMAGED_FILES_A_KIND = 6
ALL_DAMAGED_FILES_A_KIND = 150


# What is good, and what is not


@pytest.mark.parametrize("file", good_files(), ids=lambda file: file.name)
def test_what_a_file_shows_is_read_whatever_kind_it_is(file, tmp_path):
    (tmp_path / file.name).write_bytes(file.content)
    shown = np.asarray(read_image(tmp_path / file.name)).astype(int)
    assert shown.shape == file.picture.shape
    assert np.abs(shown - file.picture).max() <= file.tolerance


def test_a_score_tells_a_picture_from_itself_turned_and_from_its_grey():
    shown = scene()
    turned = [np.rot90(side, turns) for side in (shown, shown[:, ::-1]) for turns in range(4)]
    grey = shown[..., :1].repeat(3, axis=2)
    scores = np.sort([score_of_picture(picture) for picture in (*turned, grey)])
    assert np.diff(scores).min() > 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_scores_what_good_files_show(way, tmp_path):
    files = good_files()
    outcomes = WAYS[way](write(tmp_path, {file.name: file.content for file in files}))
    for file in files:
        lossy = 0.03 if file.tolerance > 1 else 0.003 if file.tolerance else 1e-5
        assert outcomes[file.name] == pytest.approx(score_of_picture(file.picture), abs=lossy), file.name


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_refuses_what_is_no_single_whole_image_and_says_why(way, tmp_path):
    files = refused_files()
    outcomes = WAYS[way](write(tmp_path, {name: content for name, (content, _) in files.items()}))
    for name, (_, reason) in files.items():
        assert isinstance(outcomes[name], str), name
        assert "\n" not in outcomes[name]
        if way == "handler":  # which says of a stranger's bytes that they are no image, and no more
            continue
        assert name in outcomes[name] or way == "pipeline"
        assert reason in outcomes[name] or way == "page", name


DECLARED = ("several images", "16 bits", "it must lie in 0 to 255", "NaN")
"""Reasons for which files are refused that PIL itself decodes."""


def reason_of(file: Path) -> str:
    with pytest.raises(UnreadableImageError) as refusal:
        read_image(file)
    return str(refusal.value)


def check_damaged_files(way: str, kind: str, count: int, folder: Path) -> None:
    """Each is scored as PIL's plain decoding of it, or refused where that raises too, or for one of the reasons."""
    contents = dict(damaged_files(kind, count))
    outcomes = WAYS[way](write(folder, contents))
    assert len(outcomes) == count
    for name, content in contents.items():
        outcome, picture = outcomes[name], plainly_decoded(content)
        if isinstance(outcome, str):
            assert "\n" not in outcome
            if picture is not None and not (way == "page" and "times the other" in outcome):  # its limit for strips
                assert any(words in reason_of(folder / name) for words in DECLARED), (name, outcome)
        else:
            assert picture is not None, name
            assert outcome == pytest.approx(score_of_picture(picture), abs=2e-3), name


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_file_is_refused_or_scored_as_what_is_left(way, kind, tmp_path):
    check_damaged_files(way, kind, DAMAGED_FILES_A_KIND, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("way", WAYS)
def test_all_damaged_files_are_refused_or_scored_as_what_is_left(way, kind, tmp_path):
    check_damaged_files(way, kind, ALL_DAMAGED_FILES_A_KIND, tmp_path)


def test_a_png_whose_checksum_tells_of_damage_is_refused_though_its_pixels_decode(tmp_path):
    whole, other = (encode(Image.fromarray(scene(seed)), "PNG", compress_level=0) for seed in (0, 1))
    checksum = slice(-16, -12)  # of the pixels, before the closing chunk
    (tmp_path / "part.png").write_bytes(other[:-16] + whole[checksum] + other[-12:])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "part.png")), scene(1))
    with pytest.raises(UnreadableImageError, match=r"part\.png: cannot be read.*checksum"):
        read_image(tmp_path / "part.png")


@pytest.mark.parametrize("name", ["predict", "explain", "calibrate"])
def test_commands_read_large_images_and_damaged_exif_without_a_word_of_pils(name, command, tmp_path, monkeypatch):
    content = bytearray(encode(Image.fromarray(scene()), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"))
    (tmp_path / "part.jpg").write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.warns(Image.DecompressionBombWarning), pytest.warns(UserWarning, match="Corrupt EXIF"):
        to_rgb(tmp_path / "part.jpg")
    options = ["--model", small_checkpoint(), "--device", "cpu"]
    if name == "calibrate":
        options += ["--output", tmp_path / "out", "--false-alarm-rate", "0.5"]
    else:
        options += ["--output-dir", tmp_path / "out"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        status, _, said = command(name, tmp_path / "part.jpg", *options)
    assert status == 0, said
    assert [str(one.message) for one in told if "PIL" in one.filename] == []


def test_no_program_is_run_on_a_file(tmp_path, monkeypatch):
    """PIL hands PostScript to Ghostscript, here one that leaves a trace."""
    trace, program = tmp_path / "it-ran", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    files = write(tmp_path, {"part.png": refused_files()["program.png"][0]})
    for way in WAYS.values():
        assert isinstance(way(files)["part.png"], str)
    assert not trace.exists()
    with pytest.raises(Exception, match=r".*"):
        Image.open(files[0]).load()
    assert trace.exists()


# The handler takes PIL images as well: of a request that is nothing but a file


def test_the_handler_turns_an_image_upright_that_was_opened_for_it(tmp_path):
    upright, turned = (
        next(file for file in good_files() if file.name == name) for name in ("plain.png", "turned-6.png")
    )
    asked = {"parameters": {"class_name": CLASS_NAME}}
    answers = [endpoint()({"inputs": Image.open(BytesIO(file.content)), **asked}) for file in (upright, turned)]
    assert answers[0]["score"] == pytest.approx(answers[1]["score"], abs=1e-6)
    assert (answers[1]["width"], answers[1]["height"]) == (WIDTH, HEIGHT)


def test_the_handler_refuses_a_damaged_image_that_was_opened_for_it():
    damaged = Image.open(BytesIO(encode(Image.fromarray(scene()), "JPEG")[:-100]))
    with pytest.raises(ValueError, match="is damaged"):
        endpoint()({"inputs": damaged})


def test_a_server_that_sends_byte_by_byte_is_given_up(monkeypatch):
    monkeypatch.setattr(handler, "_TIMEOUT", 0.05)
    paused = threading.Event()

    class Slow:
        def read1(self, size: int) -> bytes:
            paused.wait(0.01)
            return b"x"

    with pytest.raises(OSError, match="takes longer"):
        handler._read_in_time(Slow())


# Strips

STRIPS = [(1, 400), (400, 1), (1, 1), (3, 2000)]


def test_a_strip_is_scored_at_the_models_size_and_in_tiles(tmp_path):
    pictures = {f"{width}x{height}.png": Image.new("RGB", (width, height), "grey") for width, height in STRIPS}
    files = write(tmp_path, {name: encode(picture, "PNG") for name, picture in pictures.items()})
    for tiling in (None, Tiling()):
        for found in predict(pretrained(), files, CLASS_NAME, tiling=tiling):
            picture = pictures[found.path.name]
            assert found.error is None
            assert found.anomaly_map.shape == (picture.height, picture.width)
            assert 0 <= found.score <= 1
    options = ["--model", str(small_checkpoint()), "--output-dir", str(tmp_path / "out")]
    overlays = CliRunner().invoke(app, ["predict", *map(str, files), *options])
    assert overlays.exit_code == 0, overlays.exception


def test_a_strip_too_long_to_keep_its_aspect_ratio_is_named_and_the_rest_is_done(tmp_path):
    files = write(
        tmp_path,
        {
            "strip.png": encode(Image.new("RGB", (1, 100_000)), "PNG"),
            "part.png": encode(Image.fromarray(scene()), "PNG"),
        },
    )
    for tiling in (None, Tiling(50_000)):
        with time_limit(60):
            strip, part = predict(pretrained(), files, CLASS_NAME, size={"shortest_edge": 112}, tiling=tiling)
        assert "strip.png: An image of 1 x " in strip.error
        assert strip.score is None
        assert part.score is not None
    with pytest.raises(ValueError, match="too long a strip"):
        pretrained().processor(images=Image.new("RGB", (1, 100_000)), size={"shortest_edge": 112})


# Data sets, by the commands


@pytest.mark.parametrize(
    ("name", "is_mask"),
    [("animation.gif", False), ("nan.tif", False), ("program.png", False), ("cut.jpg", True), ("bomb.png", True)],
)
def test_evaluation_ends_with_the_name_of_a_file_it_cannot_read(name, is_mask, tmp_path):
    content = refused_files()[name][0]
    suffix = Path(name).suffix.replace("gif", "png")  # told by contents, and GIFs are not looked for in data sets
    for state in ("normal", "abnormal", "masks"):
        (tmp_path / state).mkdir()
        (tmp_path / state / "1.png").write_bytes(encode(Image.fromarray(scene()), "PNG"))
    damaged = "masks" if is_mask else "abnormal"
    (tmp_path / damaged / "1.png").unlink()
    (tmp_path / damaged / f"1{suffix}").write_bytes(content)
    options = ["--data-dir", tmp_path, "--output-dir", tmp_path / "out", "--model", small_checkpoint()]
    done = CliRunner().invoke(app, ["evaluate", *map(str, options), "--no-pictures", "--device", "cpu"])
    assert done.exit_code == 1
    assert isinstance(done.exception, MoECLIPError)
    assert str(done.exception).startswith("abnormal/1.")
    assert ("its mask" in str(done.exception)) == is_mask
    assert "\n" not in str(done.exception)


def test_training_names_every_file_it_cannot_read_before_the_first_step(tmp_path):
    for state in ("normal", "abnormal", "masks"):
        (tmp_path / state).mkdir()
        for number in range(4):
            (tmp_path / state / f"{number}.png").write_bytes(encode(Image.fromarray(scene(number)), "PNG"))
    bad = {"normal/0.png": "cut.png", "abnormal/1.png": "pages.tif", "abnormal/2.png": "bomb.gif"}
    for place, name in bad.items():
        (tmp_path / place).write_bytes(refused_files()[name][0])
    options = ["--dataset", tmp_path, "--clip", small_checkpoint(), "--output-dir", tmp_path / "out"]
    done = CliRunner().invoke(app, ["train", *map(str, options), "--cpu", "--num-workers", "0", "--tracker", "none"])
    assert done.exit_code == 1
    assert isinstance(done.exception, MoECLIPError), done.exception
    assert all(place in str(done.exception) + done.stderr for place in bad)


# Memory


def test_batches_hold_few_large_images_and_no_more_than_asked_for(tmp_path, monkeypatch):
    files = write(tmp_path, {f"{n}.png": encode(Image.fromarray(scene(n)), "PNG") for n in range(12)})
    assert [len(batch) for batch in prediction._batches(files, 8)] == [8, 4]
    monkeypatch.setattr(prediction, "_PIXELS_AT_ONCE", 3 * WIDTH * HEIGHT)
    assert [len(batch) for batch in prediction._batches(files, 8)] == [3, 3, 3, 3]
    monkeypatch.setattr(prediction, "_PIXELS_AT_ONCE", 1)
    assert [len(batch) for batch in prediction._batches(files, 8)] == [1] * 12
    scores = [found.score for found in predict(pretrained(), files, CLASS_NAME)]
    assert scores == pytest.approx([score_of_picture(scene(n)) for n in range(12)], abs=1e-5)


def test_bombs_take_no_memory(tmp_path):
    bombs = write(tmp_path, {name: content for name, (content, _) in refused_files().items() if "bomb" in name})
    assert len(bombs) == 4
    for bomb in bombs:
        with memory_limit(64 << 20), pytest.raises(ValueError, match="bomb") as refusal:
            to_rgb(bomb)
        assert not isinstance(refusal.value.__cause__, MemoryError)


@pytest.mark.slow
def test_a_folder_of_large_images_takes_the_memory_of_a_few(tmp_path):
    """Twelve of 80 megapixels, in files of some 80 kB: all at once, with their maps, they would take 6.7 GB."""
    content = png_of_zeros(10_000, 8_000)
    write(tmp_path, {f"{number}.png": content for number in range(12)})
    program = (
        "import resource, sys; from moeclip_hf.cli import app; app(['predict', sys.argv[1], '--device', 'cpu', "
        "'--output-dir', sys.argv[2]], standalone_mode=False); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 4000
