"""A copy of a benchmark is checked against what it should hold, in Python and from the command line."""

import dataclasses
import json

import pytest
from benchmark_trees import write_tree
from PIL import Image
from typer.testing import CliRunner

from moeclip_hf.cli import app
from moeclip_hf.data import check_benchmark, get_benchmark


@pytest.fixture
def small_brain(tmp_path):
    """A copy of two normal and three anomalous images, and the benchmark that expects just these."""
    write_tree("brain", tmp_path, normal=2, anomalous=3)
    return dataclasses.replace(get_benchmark("brain"), normal=2, anomalous=3), tmp_path


def problems_of(benchmark, root):
    return [(problem.path, problem.what) for problem in check_benchmark(benchmark, root).problems]


def test_a_complete_copy_has_no_problems_and_progress_is_told(small_brain):
    seen = []

    report = check_benchmark(*small_brain, lambda done, total: seen.append((done, total)))

    assert report.ok
    assert (report.normal, report.anomalous, report.masks) == (2, 3, 3)
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_missing_images_are_counted(small_brain):
    benchmark, root = small_brain
    (root / "test/good/img/0.png").unlink()
    (root / "test/Ungood/img/1.png").unlink()

    assert problems_of(benchmark, root) == [
        ("", "1 normal images instead of 2"),
        ("", "2 anomalous images instead of 3"),
    ]


def test_each_kind_of_bad_mask_is_named(small_brain):
    benchmark, root = small_brain
    labels = root / "test/Ungood/label"
    (labels / "0.png").unlink()
    Image.new("L", (24, 18), 0).save(labels / "1.png")
    Image.new("L", (18, 24), 255).save(labels / "2.png")

    assert problems_of(benchmark, root) == [
        ("test/Ungood/img/0.png", "is anomalous and has no mask"),
        ("test/Ungood/img/1.png", f"is anomalous, and its mask {labels / '1.png'} is empty"),
        ("test/Ungood/img/2.png", "is 24 x 18, its mask 18 x 24"),
    ]


def test_files_that_cannot_be_read_are_named(small_brain):
    benchmark, root = small_brain
    truncated = root / "test/Ungood/img/0.png"
    truncated.write_bytes(truncated.read_bytes()[:200])
    (root / "test/Ungood/label/1.png").write_bytes(b"no image")

    (image, what_image), (mask, what_mask) = problems_of(benchmark, root)

    assert (image, mask) == ("test/Ungood/img/0.png", "test/Ungood/img/1.png")
    assert what_image.startswith("cannot be read")
    assert what_mask.startswith("its mask") and "cannot be read" in what_mask


def test_one_image_in_two_formats_is_named(small_brain):
    benchmark, root = small_brain
    Image.new("RGB", (24, 18)).save(root / "test/good/img/1.jpg")

    assert ("test/good/img/1.png", "the same image as test/good/img/1.jpg, in another format") in problems_of(
        benchmark, root
    )


def test_missing_classes_are_named_and_the_rest_is_still_checked(tmp_path):
    write_tree("mvtec", tmp_path)
    (tmp_path / "cable").rename(tmp_path / ".cable")
    (tmp_path / "wood/ground_truth/scratch/001_mask.png").unlink()

    problems = problems_of(get_benchmark("mvtec"), tmp_path)

    assert ("", "no class cable") in problems
    assert ("wood/test/scratch/001.png", "is anomalous and has no mask") in problems


def test_missing_texture_folders_are_counted(tmp_path):
    write_tree("dtd-synthetic", tmp_path)
    (tmp_path / "Woven_001").rename(tmp_path / ".Woven_001")

    assert ("", "11 class folders instead of 12") in problems_of(get_benchmark("dtd-synthetic"), tmp_path)


def test_headct_needs_no_masks(tmp_path):
    write_tree("headct", tmp_path, normal=100, anomalous=100)

    assert check_benchmark(get_benchmark("headct"), tmp_path).ok


def test_the_command_lists_all_benchmarks_with_their_published_results():
    runner = CliRunner()

    table = runner.invoke(app, ["benchmarks"])
    listed = json.loads(runner.invoke(app, ["benchmarks", "--json"]).stdout)

    assert table.exit_code == 0
    for text in ("dtd-synthetic", "467/1258", "93.9", "94.3"):
        assert text in table.stdout
    assert len(listed) == 14
    assert listed[0]["name"] == "mvtec"
    assert listed[0]["published"] == {"image_auroc": 93.9, "image_ap": 96.8, "pixel_auroc": 92.5, "pixel_ap": 45.7}
    assert listed[11]["published"]["pixel_auroc"] is None


def test_the_command_succeeds_on_a_complete_copy_only(tmp_path):
    write_tree("cvc300", tmp_path / "CVC-300", anomalous=60)
    write_tree("headct", tmp_path / "headct", normal=100, anomalous=99)
    runner = CliRunner()

    good = runner.invoke(app, ["benchmarks", "check", "cvc300", "--data-dir", str(tmp_path)])
    both = runner.invoke(app, ["benchmarks", "check", "cvc300", "headct", "--data-dir", str(tmp_path), "--json"])
    every = runner.invoke(app, ["benchmarks", "check", "all", "--data-dir", str(tmp_path), "--json"])

    assert good.exit_code == 0
    assert "cvc300: complete (0 normal, 60 anomalous, 60 masks)" in good.stdout
    assert both.exit_code == 1
    assert [(one["name"], one["ok"]) for one in json.loads(both.stdout)] == [("cvc300", True), ("headct", False)]
    assert json.loads(both.stdout)[1]["problems"] == [{"path": "", "what": "99 anomalous images instead of 100"}]
    assert every.exit_code == 1
    assert [one["name"] for one in json.loads(every.stdout) if one["ok"]] == ["cvc300"]
