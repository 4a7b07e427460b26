"""Synthetic textures repeat by seed, defects have exact masks, and a benchmark of them is read back."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from moeclip_hf.cli import app
from moeclip_hf.data import load_data, read_mask
from moeclip_hf.data.textures import DEFECTS, FAMILIES, TOLERANCE, add_defect, render, write_texture_benchmark
from moeclip_hf.data.textures.canvas import brightness
from moeclip_hf.errors import DatasetError


def checkerboard(height=96, width=128):
    """A picture with structure everywhere, as a stand-in for a photograph."""
    rows, columns = np.mgrid[:height, :width] // 6
    cells = np.random.default_rng(0).integers(40, 215, (height, width, 3), dtype=np.uint8)
    return np.where(((rows + columns) % 2 == 0)[..., None], cells // 2 + 100, cells // 2).astype(np.uint8)


def difference(first, second):
    return np.abs(first.astype(int) - second.astype(int)).max(axis=2)


def test_there_are_many_families_and_kinds_of_defect():
    assert len(FAMILIES) >= 40
    assert len(DEFECTS) >= 10
    assert list(FAMILIES) == sorted(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_varies_by_seed_and_repeats_by_it(family):
    first, mask = render(family, size=64, seed=5)
    np.random.seed(0)
    again, _ = render(family, size=64, seed=5)
    other, _ = render(family, size=64, seed=(5, 1))

    assert first.dtype == np.uint8
    assert first.shape == (64, 64, 3)
    assert mask.shape == (64, 64)
    assert not mask.any()
    np.testing.assert_array_equal(first, again)
    assert first.std() > 4
    assert difference(first, other).mean() > 10


def test_pictures_do_not_depend_on_the_process():
    code = "import hashlib; from moeclip_hf.data.textures import render; "
    code += "print(hashlib.sha256(render('denim', 'crack', 64, 3)[0].tobytes()).hexdigest())"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}

    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    render("cork", size=64)
    assert printed.stdout.strip() == hashlib.sha256(render("denim", "crack", 64, 3)[0].tobytes()).hexdigest()


def test_a_texture_looks_alike_at_every_size():
    large, _ = render("brick_wall", size=192, seed=8)
    small, _ = render("brick_wall", size=96, seed=8)

    assert abs(large.mean() - small.mean()) < 25


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("family", ["brick_wall", "brushed_metal", "woven_fabric"])
def test_a_mask_holds_all_that_changed_and_little_else(family, defect):
    for seed in range(3):
        faultless, _ = render(family, size=96, seed=seed)
        changed, mask = render(family, defect, size=96, seed=seed)

        assert mask.dtype == bool
        assert difference(faultless, changed)[~mask].max() <= TOLERANCE
        assert 3e-4 <= mask.mean() < 0.5
        assert difference(faultless, changed)[mask].mean() > 8


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_cut_into_any_picture_and_repeat_by_their_generator(defect):
    photograph = checkerboard()
    before = photograph.copy()

    changed, mask = add_defect(photograph, defect, np.random.default_rng(4))
    again, mask_again = add_defect(photograph, defect, np.random.default_rng(4))
    other, _ = add_defect(photograph, defect, np.random.default_rng(5))

    np.testing.assert_array_equal(photograph, before)
    np.testing.assert_array_equal(changed, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert (changed != other).any()
    assert difference(photograph, changed)[~mask].max() <= TOLERANCE
    assert mask.any()


def test_defects_are_small_and_large_thin_and_compact():
    photograph = checkerboard(128, 128)

    def masks(kind):
        return [add_defect(photograph, kind, np.random.default_rng(seed))[1] for seed in range(20)]

    stains = [mask.mean() for mask in masks("stain")]
    assert max(stains) > 5 * min(stains)
    for kind, inner in (("scratch", 0.1), ("crack", 0.1), ("fiber", 0.1)):
        thin = [ndimage.binary_erosion(mask, iterations=2).sum() / mask.sum() for mask in masks(kind)]
        assert np.median(thin) < inner
    compact = [ndimage.binary_erosion(mask, iterations=2).sum() / mask.sum() for mask in masks("misplaced_patch")]
    assert np.median(compact) > 0.5


def test_a_hole_is_one_dark_region():
    photograph = np.full((96, 96, 3), 180, dtype=np.uint8)

    changed, mask = add_defect(photograph, "hole", np.random.default_rng(0))

    assert changed[mask].mean() < 110
    assert ndimage.label(ndimage.binary_opening(mask))[1] == 1


def test_a_misplaced_patch_is_made_of_the_picture_itself():
    photograph = np.zeros((96, 96, 3), dtype=np.uint8)
    photograph[..., 0] = checkerboard(96, 96)[..., 0]

    changed, mask = add_defect(photograph, "misplaced_patch", np.random.default_rng(1))

    assert mask.any()
    assert (changed[..., 1:] == 0).all()


def test_what_cannot_be_done_is_refused():
    plain = np.full((64, 64, 3), 90, dtype=np.uint8)

    with pytest.raises(DatasetError, match="'distortion' cannot be seen on this picture"):
        add_defect(plain, "distortion", np.random.default_rng(0))
    with pytest.raises(DatasetError, match="no defect 'dent'; there is abrasion, "):
        add_defect(plain, "dent", np.random.default_rng(0))
    with pytest.raises(DatasetError, match=r"not float64 of shape \(64, 64\)"):
        add_defect(np.zeros((64, 64)), "hole", np.random.default_rng(0))
    with pytest.raises(DatasetError, match="no texture 'velvet'; there is asphalt, "):
        render("velvet")


def test_a_written_benchmark_is_read_back(tmp_path):
    told = []
    write_texture_benchmark(
        tmp_path,
        ["cork", "hexagonal_tiles"],
        ["scratch", "stain"],
        normal=2,
        anomalous=3,
        train=1,
        size=48,
        seed=9,
        progress=lambda done, total: told.append((done, total)),
    )

    test, train = load_data(tmp_path), load_data(tmp_path, split="train")

    assert told == [(i, 12) for i in range(1, 13)]
    assert sorted(set(test["class_name"])) == ["cork", "hexagonal_tiles"]
    assert set(test["prompt_name"]) == {"cork", "hexagonal tiles"}
    assert test["label"][:] == [0, 0, 1, 1, 1] * 2
    assert train["label"][:] == [0, 0]
    assert [path for path in test["image_path"] if path.startswith("cork")] == [
        "cork/test/good/000.png",
        "cork/test/good/001.png",
        "cork/test/scratch/000.png",
        "cork/test/scratch/002.png",
        "cork/test/stain/001.png",
    ]
    for row in test:
        assert row["image"].size == (48, 48)
        assert read_mask(row).any() == (row["label"] == 1)
    pictures = {np.asarray(row["image"]).tobytes() for rows in (test, train) for row in rows}
    assert len(pictures) == 12


def test_a_class_does_not_depend_on_the_others_written(tmp_path):
    options = {"normal": 1, "anomalous": 1, "size": 48}
    write_texture_benchmark(tmp_path / "one", ["denim"], **options)
    write_texture_benchmark(tmp_path / "two", ["cork", "denim"], **options)

    for path in ("test/good/000.png", "test/abrasion/000.png", "ground_truth/abrasion/000_mask.png"):
        one, two = (Image.open(tmp_path / folder / "denim" / path) for folder in ("one", "two"))
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def test_the_command_writes_a_benchmark_once(tmp_path):
    arguments = ["benchmarks", "textures", str(tmp_path / "new"), "--families", "cork,felt", "--defects", "hole"]
    arguments += ["--normal", "1", "--anomalous", "1", "--size", "40", "--seed", "2"]
    runner = CliRunner()

    first, second = runner.invoke(app, arguments), runner.invoke(app, arguments)

    assert first.exit_code == 0
    written = load_data(tmp_path / "new")
    assert sorted(zip(written["class_name"], written["label"], strict=True)) == [
        ("cork", 0),
        ("cork", 1),
        ("felt", 0),
        ("felt", 1),
    ]
    assert written[3]["image"].size == (40, 40)
    assert isinstance(second.exception, DatasetError)
    assert "is not empty" in str(second.exception)


def test_nothing_is_written_for_an_unknown_name(tmp_path):
    with pytest.raises(DatasetError, match="no defect 'dent'"):
        write_texture_benchmark(tmp_path / "new", ["cork"], ["scratch", "dent"])

    assert not (tmp_path / "new").exists()


def test_brightness_is_the_mean_of_the_channels_to_the_last_bit():
    pixels = np.random.default_rng(0).random((37, 53, 3), dtype=np.float32)
    np.testing.assert_array_equal(brightness(pixels), pixels.mean(axis=2))
