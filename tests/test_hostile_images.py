"""Image files of every kind, damaged ones among them, through every way in: scored as what they show, or named."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
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
from PIL import EpsImagePlugin, Image
from transformers import pipeline
from typer.testing import CliRunner

from moeclip_hf import prediction
from moeclip_hf.app.inspector import Inspector
from moeclip_hf.cli import app, main
from moeclip_hf.data import check_rows, load_folder
from moeclip_hf.data.records import Record, to_dataset
from moeclip_hf.errors import DatasetError, MoECLIPError, UnreadableImageError
from moeclip_hf.modeling import handler
from moeclip_hf.modeling.pipeline_moeclip import ZeroShotAnomalyDetectionPipeline
from moeclip_hf.prediction import detect, find_images, predict, read_image
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, Pretrained, load_pretrained
from moeclip_hf.reading import leave_undecoded, read_row
from moeclip_hf.tiling import Tiling

DAMAGED_FILES_A_KIND = 6
ALL_DAMAGED_FILES_A_KIND = 150
CLASS_NAME = "wood"

Outcomes = dict[str, float | str]
"""By name of a file: its score, or why it was refused."""


# Ways in


@cache
def pretrained() -> Pretrained:
    return load_pretrained(device="cpu")


@cache
def detecting() -> ZeroShotAnomalyDetectionPipeline:
    return pipeline("zero-shot-anomaly-detection", model=str(EMBEDDED_CHECKPOINT), device="cpu", dtype=torch.float32)


@cache
def endpoint() -> handler.EndpointHandler:
    return handler.EndpointHandler(str(EMBEDDED_CHECKPOINT))


@cache
def inspector() -> Inspector:
    return Inspector(device="cpu")


def score_or_reason(score: Callable[[], float]) -> float | str:
    try:
        return score()
    except ValueError as error:
        return str(error)


@cache
def anchors() -> torch.Tensor:
    return pretrained().encode_class(CLASS_NAME)


@cache
def score_of_bytes(content: bytes, width: int) -> float:
    picture = np.frombuffer(content, dtype=np.uint8).reshape(-1, width, 3)
    return detect(pretrained(), Image.fromarray(picture), anchors()).score


def score_of_picture(picture: np.ndarray) -> float:
    return score_of_bytes(picture.astype(np.uint8).tobytes(), picture.shape[1])


def by_command(files: list[Path]) -> Outcomes:
    options = ["--class-name", CLASS_NAME, "--json", "--no-overlays", "--device", "cpu"]
    done = CliRunner().invoke(app, ["predict", *map(str, files), *options])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    outcomes = {Path(row["image"]).name: row.get("error", row["score"]) for row in rows}
    refused = [reason for reason in outcomes.values() if isinstance(reason, str)]
    assert done.exit_code == bool(refused), done.exception
    said = [line for line in done.stderr.splitlines() if line.startswith("moeclip: ")]
    assert len(said) == len(refused)
    return outcomes


def by_pipeline(files: list[Path]) -> Outcomes:
    return {
        file.name: score_or_reason(lambda file=file: detecting()(str(file), class_name=CLASS_NAME)["score"])
        for file in files
    }


def by_handler(files: list[Path]) -> Outcomes:
    parameters = {"class_name": CLASS_NAME}

    def answer(file: Path) -> float:
        encoded = base64.b64encode(file.read_bytes()).decode()
        return endpoint()({"inputs": encoded, "parameters": parameters})["score"]

    return {file.name: score_or_reason(lambda file=file: answer(file)) for file in files}


def by_page(files: list[Path]) -> Outcomes:
    rows = inspector().score(files, CLASS_NAME, inspector().model)
    return {row.file: row.error if row.score is None else row.score for row in rows}


def by_data_set(files: list[Path]) -> Outcomes:
    """As evaluation, calibration and training read their rows; of every second one the data set holds the bytes."""
    names = {"class_name": CLASS_NAME, "prompt_name": CLASS_NAME, "group": CLASS_NAME, "dataset": "d"}
    records = [Record(str(file), None, 0, domain="industrial", image_path=file.name, **names) for file in files]
    by_path = to_dataset(records)
    stored = [
        {**row, "image": {"path": None, "bytes": file.read_bytes()} if number % 2 else row["image"]}
        for number, (file, row) in enumerate(zip(files, leave_undecoded(by_path), strict=True))
    ]
    rows = leave_undecoded(by_path.from_list(stored, features=by_path.features))
    outcomes = {
        file.name: score_or_reason(
            lambda index=index: detect(pretrained(), read_row(rows, index)["image"], anchors()).score
        )
        for index, file in enumerate(files)
    }
    refused = {name for name, outcome in outcomes.items() if isinstance(outcome, str)}
    assert {problem.path for _, problem in check_rows(rows, range(len(rows)))} == refused
    return outcomes


WAYS = {
    "command": by_command,
    "pipeline": by_pipeline,
    "handler": by_handler,
    "page": by_page,
    "data set": by_data_set,
}


def write(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


# What is good, and what is not


@pytest.mark.parametrize("file", good_files(), ids=lambda file: file.name)
def test_what_a_file_shows_is_read_whatever_kind_it_is(file, tmp_path):
    (tmp_path / file.name).write_bytes(file.content)
    shown = np.asarray(read_image(tmp_path / file.name)).astype(int)
    assert shown.shape == file.picture.shape
    assert np.abs(shown - file.picture).max() <= file.tolerance


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


# Names, links and rights

NAMES = [
    b"with spaces.png",
    b"two\nlines.png",
    b"\xff\xfe.png",
    b"\x1b[31mred\x1b[0m.png",
    b"[bold]markup.png",
    b"--json.png",
    b"..png",
    "übergröße ".encode() + b".png",
    "\u202egnp.png".encode() + b".png",
    b"x" * 251 + b".png",
    b"y" * 251 + b".png",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_a_name_may_be_anything_and_its_results_bear_it(name, tmp_path):
    folder, output = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    (folder / os.fsdecode(name)).write_bytes(encode(Image.fromarray(scene()), "PNG"))
    options = ["--output-dir", str(output), "--json", "--maps", "npy", "--device", "cpu"]
    done = CliRunner().invoke(app, ["predict", str(folder), *options])
    assert done.exit_code == 0, done.exception
    row = json.loads(done.stdout)
    assert os.fsencode(Path(row["image"]).name) == name
    assert Image.open(row["overlay"]).size == (WIDTH, HEIGHT)
    assert np.load(row["map"]).shape == (HEIGHT, WIDTH)
    assert os.fsencode(Path(row["overlay"]).name).startswith(name.removesuffix(b".png")[:200])


@pytest.fixture
def command(monkeypatch, capfdbinary) -> Callable[..., tuple[int, bytes, bytes]]:
    """Runs `moeclip` and gives its status, what it printed, and what it said on standard error."""

    def run(*arguments: str | Path) -> tuple[int, bytes, bytes]:
        monkeypatch.setattr(sys, "argv", ["moeclip", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capfdbinary.readouterr()

    return run


def test_refused_files_are_a_printable_line_each_whatever_their_names(tmp_path, command):
    for name in NAMES:
        (tmp_path / os.fsdecode(name)).write_bytes(b"no image")
    status, printed, said = command("predict", tmp_path, "--no-overlays", "--device", "cpu")
    assert status == 1
    lines = said.decode().splitlines()
    assert len(lines) == len(NAMES)
    assert all(line.startswith("moeclip: ") and line.isprintable() for line in lines)
    assert b"\x1b" not in printed


def test_an_error_about_a_name_is_a_printable_line_too(tmp_path, command):
    folder = tmp_path / os.fsdecode(b"\xff\n\x1b[2J")
    folder.mkdir()
    status, _, said = command("predict", folder)
    (line,) = said.decode().splitlines()
    assert status == 1
    assert line.startswith("moeclip: ")
    assert line.isprintable()
    assert "holds no images" in line


def test_a_data_set_with_a_name_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "normal").mkdir()
    (tmp_path / "normal" / os.fsdecode(b"\xff.png")).write_bytes(encode(Image.fromarray(scene()), "PNG"))
    with pytest.raises(DatasetError, match="not UTF-8"):
        load_folder(tmp_path)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise AssertionError(f"it hangs: {seconds} seconds went by")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_what_only_looks_like_a_file_is_named_and_nothing_is_waited_for(tmp_path):
    good = tmp_path / "good.png"
    good.write_bytes(encode(Image.fromarray(scene()), "PNG"))
    (tmp_path / "linked.png").symlink_to(good)
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    for here, there in (("loop-1.png", "loop-2.png"), ("loop-2.png", "loop-1.png")):
        (tmp_path / here).symlink_to(tmp_path / there)
    (tmp_path / "around").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    with time_limit(60):
        found = find_images([tmp_path], exclude=tmp_path / "out")
        outcomes = by_command([*found, tmp_path / "deeper" / "good.png"])
    assert outcomes.pop("linked.png") == pytest.approx(score_of_picture(scene()), abs=1e-5)
    named = {
        "broken.png": "no such file",
        "loop-1.png": "symbolic links",
        "loop-2.png": "symbolic links",
        "pipe.png": "no file",
        "device.png": "no file",
        "good.png": "no such file",  # the one in a folder that is not there
    }
    assert set(outcomes) == set(named)
    for name, words in named.items():
        assert words in outcomes[name]
    with pytest.raises(UnreadableImageError, match=r"folder\.png.*no file"):
        read_image(tmp_path / "folder.png")
    assert find_images([str(tmp_path / "*.png")]) == found


@pytest.fixture
def without_privileges() -> Iterator[Path]:
    """A folder of one who is not root, for as long as the process acts as that user."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        user = 65534 if os.geteuid() == 0 else os.geteuid()
        os.chown(folder, user, -1)
        was = os.geteuid()
        os.seteuid(user)
        try:
            yield Path(folder)
        finally:
            os.seteuid(was)
            for path in Path(folder).rglob("*"):
                path.chmod(0o755)


def test_what_may_not_be_read_is_named(without_privileges):
    for name in ("good.png", "secret.png", "closed/part.png"):
        path = without_privileges / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(Image.fromarray(scene()), "PNG"))
    (without_privileges / "secret.png").chmod(0)
    good, secret = find_images([without_privileges / "good.png", without_privileges / "secret.png"])
    scored, refused = predict(pretrained(), [good, secret], CLASS_NAME)
    assert scored.score == pytest.approx(score_of_picture(scene()), abs=1e-5)
    assert refused.error == f"{secret}: cannot be read as an image (Permission denied)."
    (without_privileges / "closed").chmod(0)
    with pytest.raises(MoECLIPError, match=r"closed: cannot be searched.*Permission denied"):
        find_images([without_privileges])


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
    overlays = CliRunner().invoke(app, ["predict", *map(str, files), "--output-dir", str(tmp_path / "out")])
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
    done = CliRunner().invoke(
        app,
        [
            "evaluate",
            "--data-dir",
            str(tmp_path),
            "--output-dir",
            str(tmp_path / "out"),
            "--no-pictures",
            "--device",
            "cpu",
        ],
    )
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
    options = ["--dataset", str(tmp_path), "--clip", "embedded", "--output-dir", str(tmp_path / "out"), "--cpu"]
    done = CliRunner().invoke(app, ["train", *options, "--num-workers", "0", "--tracker", "none"])
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
    bombs = [name for name in refused_files() if "bomb" in name]
    write(tmp_path, {name: refused_files()[name][0] for name in bombs})
    program = """
import resource, sys
from pathlib import Path
from moeclip_hf.modeling.image_processing_moeclip import to_rgb
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        to_rgb(path)
    except ValueError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    *refusals, megabytes = done.stdout.splitlines()
    assert len(refusals) == len(bombs) == 4
    assert int(megabytes) < 64


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
