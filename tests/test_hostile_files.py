"""Files by names, links and rights of every kind: results bear their names, errors are one printable line each."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from image_corpus import HEIGHT, WIDTH, encode, scene
from image_ways import CLASS_NAME, by_command, pretrained, score_of_picture, small_checkpoint
from limits import time_limit
from PIL import Image
from typer.testing import CliRunner

from moeclip_hf.cli import app
from moeclip_hf.data import load_folder
from moeclip_hf.errors import DatasetError, MoECLIPError, UnreadableImageError
from moeclip_hf.prediction import find_images, predict, read_image

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


def test_a_name_may_be_anything_and_its_results_bear_it(tmp_path):
    folder, output = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for name in NAMES:
        (folder / os.fsdecode(name)).write_bytes(encode(Image.fromarray(scene()), "PNG"))
    options = ["--model", str(small_checkpoint()), "--output-dir", str(output), "--json", "--maps", "npy"]
    done = CliRunner().invoke(app, ["predict", str(folder), *options, "--device", "cpu"])
    assert done.exit_code == 0, done.exception
    rows = {os.fsencode(Path(row["image"]).name): row for row in map(json.loads, done.stdout.splitlines())}
    assert rows.keys() == set(NAMES)
    for name, row in rows.items():
        assert Image.open(row["overlay"]).size == (WIDTH, HEIGHT)
        assert np.load(row["map"]).shape == (HEIGHT, WIDTH)
        assert os.fsencode(Path(row["overlay"]).name).startswith(name.removesuffix(b".png")[:200])


def test_an_image_of_any_name_is_explained_in_printable_lines(tmp_path, command):
    for number, name in enumerate([*NAMES[1:5], NAMES[-1]]):
        image = tmp_path / os.fsdecode(name)
        image.write_bytes(encode(Image.fromarray(scene()), "PNG"))
        output = tmp_path / str(number)
        options = ("--class-name", "bolt [/m8]", "--model", small_checkpoint(), "--device", "cpu")
        status, printed, said = command("explain", image, *options, "--output-dir", output)
        assert status == 0, said
        lines = printed.decode().splitlines()
        assert all(line.isprintable() for line in lines)
        assert "bolt [/m8]: " in lines[0]
        assert sum(line.startswith("Written: ") for line in lines) == 1
        assert len(list(output.iterdir())) == 3


def test_refused_files_are_a_printable_line_each_whatever_their_names(tmp_path, command):
    for name in NAMES:
        (tmp_path / os.fsdecode(name)).write_bytes(b"no image")
    status, printed, said = command("predict", tmp_path, "--model", small_checkpoint(), "--no-overlays")
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
        found = find_images([tmp_path])
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
