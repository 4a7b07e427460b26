"""All benchmarks are read from their own trees into one kind of data set."""

import datasets
import numpy as np
import pytest
from benchmark_trees import ALL, DTD_FOLDERS, MVTEC_CLASSES, write_tree
from PIL import Image

from moeclip_hf.data import load_benchmark, load_data, read_mask
from moeclip_hf.errors import DatasetError

PROMPTS = {
    "mvtec": ("capsule", "black asd orange capsule"),
    "visa": ("pipe_fryum", "pipe-shaped fryum"),
    "btad": ("02", "vertical fabric lines in warm, dusty pink and beige tones"),
    "rsdd": ("Metal15", "metal"),
    "dtd-synthetic": ("Woven", "Woven"),
    "brain": ("brain", "scan"),
    "liver": ("liver", "scan"),
    "retina": ("retina", "scan"),
    "headct": ("headct", "scan"),
    "clinicdb": ("clinicdb", "colon endoscopy image"),
    "colondb": ("colondb", "colon endoscopy image"),
    "cvc300": ("cvc300", "colon endoscopy image"),
    "kvasir": ("kvasir", "colon endoscopy image"),
    "endo": ("endo", "polyp"),
}


@pytest.mark.parametrize(("name", "form"), [*((name, "own") for name in ALL), ("visa", "converted")])
def test_every_tree_is_read_as_it_was_written(name, form, tmp_path):
    expected = write_tree(name, tmp_path, form=form)

    rows = load_benchmark(name, tmp_path)

    assert rows["image_path"][:] == [one.image_path for one in expected]
    assert rows["label"][:] == [one.label for one in expected]
    assert rows["class_name"][:] == [one.class_name for one in expected]
    assert rows["group"][:] == [one.group for one in expected]
    assert set(rows["dataset"]) == {name}
    assert set(rows["domain"]) == {"medical" if ALL.index(name) >= ALL.index("brain") else "industrial"}
    assert PROMPTS[name] in set(zip(rows["class_name"], rows["prompt_name"], strict=True))
    for row, one in zip(rows, expected, strict=True):
        mask = read_mask(row)
        assert (mask is None) == (one.mask is None)
        if mask is not None:
            np.testing.assert_array_equal(mask, one.mask)


def test_rows_have_typed_columns_and_images_decode_only_when_read(tmp_path):
    write_tree("brain", tmp_path)

    rows = load_benchmark("brain", tmp_path)
    (tmp_path / rows[0]["image_path"]).write_bytes(b"no image")

    assert rows.features["image"] == rows.features["mask"] == datasets.Image()
    assert rows.features["label"].names == ["normal", "anomalous"]
    assert list(rows.features) == [
        "image",
        "mask",
        "label",
        "class_name",
        "prompt_name",
        "group",
        "dataset",
        "domain",
        "image_path",
    ]
    assert rows[1]["image"].size == (24, 18)
    with pytest.raises(OSError, match="cannot identify image file"):
        rows[0]


def test_a_benchmark_is_found_beneath_its_parent_by_name_or_alias(tmp_path):
    for folder, name in {"MVTec-AD": "mvtec", "Colon_clinicDB": "clinicdb", "HeadCT/headct": "headct"}.items():
        write_tree(name, tmp_path / folder)

    assert len(load_benchmark("mvtec", tmp_path)) == 45
    assert len(load_data("cvc-clinicdb", tmp_path)) == 2
    assert set(load_benchmark("HeadCT", tmp_path)["dataset"]) == {"headct"}


def test_only_the_wanted_classes_are_read_and_may_be_all_there_is(tmp_path):
    write_tree("mvtec", tmp_path)
    for name in set(MVTEC_CLASSES) - {"zipper", "carpet"}:
        (tmp_path / name).rename(tmp_path / f".{name}")

    rows = load_benchmark("mvtec", tmp_path, classes=["zipper"])

    assert set(rows["class_name"]) == {"zipper"}
    with pytest.raises(DatasetError, match=r"lacks mvtec's bottle, cable, .*; name the classes"):
        load_benchmark("mvtec", tmp_path)
    with pytest.raises(DatasetError, match="no class zip; it has bottle, cable"):
        load_benchmark("mvtec", tmp_path, classes=["zip"])


def test_a_texture_class_spans_its_folders(tmp_path):
    write_tree("dtd-synthetic", tmp_path)

    rows = load_benchmark("dtd-synthetic", tmp_path, classes=["Woven"])

    assert sorted(set(rows["group"])) == [folder for folder in DTD_FOLDERS if folder.startswith("Woven")]


@pytest.mark.parametrize(("name", "form"), [("mvtec", "own"), ("visa", "own"), ("visa", "converted"), ("btad", "own")])
def test_the_training_split_is_the_normal_training_images(name, form, tmp_path):
    write_tree(name, tmp_path, form=form)

    rows = load_benchmark(name, tmp_path, split="train")

    assert len(rows) == len(set(rows["class_name"])) == {"mvtec": 15, "visa": 12, "btad": 3}[name]
    assert set(rows["label"]) == {0}


def test_a_split_that_is_not_there_is_an_error(tmp_path):
    write_tree("kvasir", tmp_path)

    with pytest.raises(DatasetError, match="no images for split 'train'"):
        load_benchmark("kvasir", tmp_path, split="train")
    with pytest.raises(DatasetError, match="no split 'validation'"):
        load_benchmark("kvasir", tmp_path, split="validation")


def test_a_wrong_root_is_answered_with_what_was_looked_for(tmp_path):
    looked_for = "split_csv/1cls.csv or <class>/test/good"
    with pytest.raises(DatasetError, match=rf"no visa in .*: looked for {looked_for} .* VisA,"):
        load_benchmark("visa", tmp_path)
    with pytest.raises(DatasetError, match=r"no such folder: .*nowhere"):
        load_benchmark("visa", tmp_path / "nowhere")


def test_another_benchmarks_tree_is_not_taken_for_the_wanted_one(tmp_path):
    write_tree("headct", tmp_path / "headct")
    write_tree("rsdd", tmp_path / "RSDD")

    with pytest.raises(DatasetError, match="no mvtec"):
        load_benchmark("mvtec", tmp_path)
    with pytest.raises(DatasetError, match="no mvtec"):
        load_benchmark("mvtec", tmp_path / "RSDD")


def test_two_masks_for_one_image_are_refused(tmp_path):
    write_tree("clinicdb", tmp_path)
    Image.new("L", (24, 18)).save(tmp_path / "masks/0.bmp")

    with pytest.raises(DatasetError, match=r"two masks for one image, remove one: .*0.bmp and .*0.png"):
        load_benchmark("clinicdb", tmp_path)

    (tmp_path / "masks/0.bmp").rename(tmp_path / "masks/0_mask.bmp")
    with pytest.raises(DatasetError, match=r"two masks for one image, remove one: .*0.png and .*0_mask.bmp"):
        load_benchmark("clinicdb", tmp_path)


def test_a_missing_mask_leaves_the_anomalous_pixels_unknown(tmp_path):
    write_tree("colondb", tmp_path)
    (tmp_path / "masks/1.png").unlink()

    first, second = load_benchmark("colondb", tmp_path)

    assert read_mask(first) is not None
    assert read_mask(second) is None


def test_a_table_without_its_columns_is_refused(tmp_path):
    write_tree("visa", tmp_path)
    (tmp_path / "split_csv/1cls.csv").write_text("object,split,image\ncandle,test,0.png\n")

    with pytest.raises(DatasetError, match=r"1cls\.csv has no column 'label'"):
        load_benchmark("visa", tmp_path)
