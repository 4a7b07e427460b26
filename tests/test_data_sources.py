"""Index files, data sets of the `datasets` library and folders of one's own give the same kind of rows."""

import json
import os
import shutil
import warnings

import datasets
import numpy as np
import pytest
from benchmark_trees import write_folder, write_jsonl, write_tree
from PIL import Image

from moeclip_hf.calibration import normal_images
from moeclip_hf.data import load_data, load_folder, load_hub, load_index, read_mask
from moeclip_hf.data.records import COLUMNS, digest_rows
from moeclip_hf.errors import DatasetError, MoECLIPWarning


def jsonl_rows(dataset, expected, label=int):
    return [
        {
            "image_path": f"{dataset}/{one.image_path}",
            "label": label(one.label),
            "class_name": one.group,
            **({"mask_path": mask_of(dataset, one.image_path)} if one.label else {}),
        }
        for one in expected
    ]


def mask_of(dataset, image_path):
    folder, _, defect, file = image_path.split("/")
    return f"{dataset}/{folder}/ground_truth/{defect}/{file.replace('.', '_mask.')}"


def test_the_released_index_spans_several_benchmarks(tmp_path):
    mvtec, dtd = write_tree("mvtec", tmp_path / "MVTec"), write_tree("dtd-synthetic", tmp_path / "DTD-Synthetic")
    index = tmp_path / "full-shot.jsonl"
    write_jsonl(index, [*jsonl_rows("MVTec", mvtec, float), *jsonl_rows("DTD-Synthetic", dtd)])

    rows = load_data(index)

    expected = {f"DTD-Synthetic/{one.image_path}": ("dtd-synthetic", one) for one in dtd}
    expected |= {f"MVTec/{one.image_path}": ("mvtec", one) for one in mvtec}
    assert rows["image_path"][:] == sorted(expected)
    for row in rows:
        name, one = expected[row["image_path"]]
        assert (row["dataset"], row["domain"], row["label"]) == (name, "industrial", one.label)
        assert (row["class_name"], row["group"]) == (one.class_name, one.group)
        np.testing.assert_array_equal(read_mask(row), one.mask)
    prompts = dict(zip(rows["class_name"], rows["prompt_name"], strict=True))
    assert prompts["hazelnut"] == "single brown hazelnut"
    assert prompts["Woven"] == "Woven"


def test_an_index_inside_a_benchmarks_folder_belongs_to_that_benchmark(tmp_path):
    expected = write_tree("brain", tmp_path / "Brain")
    index = tmp_path / "Brain/all.jsonl"
    write_jsonl(index, [{"image_path": o.image_path, "label": o.label, "class_name": "Brain"} for o in expected])

    rows = load_index(index)

    assert set(rows["dataset"]) == {"brain"}
    assert set(rows["domain"]) == {"medical"}
    assert set(rows["class_name"]) == {"brain"}
    assert set(rows["prompt_name"]) == {"scan"}


def test_an_index_of_unknown_data_keeps_its_own_names(tmp_path):
    write_folder(tmp_path / "line_3")
    index = tmp_path / "index.jsonl"
    write_jsonl(index, [{"image_path": "line_3/normal/0.png", "label": 0, "class_name": "steel_plate"}])

    (row,) = load_data(index, domain="medical")

    assert (row["dataset"], row["class_name"], row["group"]) == ("line_3", "steel_plate", "steel_plate")
    assert (row["prompt_name"], row["domain"]) == ("steel plate", "medical")


def write_meta(root, expected):
    entries = {}
    for one in expected:
        folder, _, defect, file = one.image_path.split("/")
        entry = {
            "img_path": one.image_path,
            "mask_path": f"{folder}/ground_truth/{defect}/{file[:-4]}_mask.png" if one.label else "",
            "cls_name": folder,
            "specie_name": defect,
            "anomaly": one.label,
        }
        entries.setdefault(folder, []).append(entry)
    train = {"bottle": [{**entries["bottle"][0], "img_path": "bottle/train/good/000.png", "anomaly": 0}]}
    (root / "meta.json").write_text(json.dumps({"train": train, "test": entries}))


def test_anomaly_clips_meta_file_is_read_by_split(tmp_path):
    root = tmp_path / "mvtec"
    expected = write_tree("mvtec", root)
    write_meta(root, expected)

    rows = load_data(root / "meta.json")
    train = load_data(root / "meta.json", split="train")

    assert rows["image_path"][:] == [one.image_path for one in expected]
    assert rows["label"][:] == [one.label for one in expected]
    assert set(rows["dataset"]) == {"mvtec"}
    for row, one in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(read_mask(row), one.mask)
    assert train["image_path"][:] == ["bottle/train/good/000.png"]


def test_wanted_classes_are_picked_from_any_source(tmp_path):
    root = tmp_path / "mvtec"
    write_meta(root, write_tree("mvtec", root))

    assert set(load_data(root / "meta.json", classes=["tile", "wood"])["class_name"]) == {"tile", "wood"}
    assert set(load_data(root, classes=["tile"])["class_name"]) == {"tile"}
    with pytest.raises(DatasetError, match="no class window; there is bottle"):
        load_data(root, classes=["window"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected a JSON object, found list"),
        ('{"image_path": "a.png"}', "line 2: an entry has 'image_path', 'label' and 'class_name', not {'image_path'"),
        ('{"image_path": "a.png", "label": 2, "class_name": "x"}', "line 2: label 2 is neither 0"),
        (
            '{"image_path": "b.png", "label": 1, "class_name": "x"}',
            "names 1 files that are not in .*, the first is b.png",
        ),
    ],
)
def test_a_bad_line_of_an_index_is_named(line, message, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "i.jsonl").write_text('{"image_path": "a.png", "label": 0, "class_name": "x"}\n' + line + "\n")

    with pytest.raises(DatasetError, match=message):
        load_index(tmp_path / "i.jsonl")


def test_images_listed_twice_are_reported(tmp_path):
    write_folder(tmp_path)
    index = tmp_path / "i.jsonl"
    write_jsonl(index, [{"image_path": "normal/1.png", "label": 0, "class_name": "x"}] * 2)

    with pytest.warns(UserWarning, match=r"lists 1 images more than once, the first is normal/1\.png"):
        load_index(index)


def hub_columns(**changed):
    images = [Image.fromarray(np.full((6, 8, 3), 40 * i, np.uint8)) for i in range(4)]
    mask = np.zeros((6, 8), np.uint8)
    mask[1:3, 2:5] = 255
    columns = {
        "image": images,
        "mask": [None, Image.fromarray(mask), None, Image.fromarray(mask)],
        "label": [0, 1, 0, 1],
        "class_name": ["metal_nut", "metal_nut", "screw", "screw"],
    }
    columns |= changed
    return {name: values for name, values in columns.items() if values is not None}, mask > 0


def write_parquet(folder, split="test", **changed):
    columns, mask = hub_columns(**changed)
    kinds = {name: datasets.Image() for name in ("image", "mask") if name in columns}
    rows = datasets.Dataset.from_dict(columns)
    for name, kind in kinds.items():
        rows = rows.cast_column(name, kind)
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return mask


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_parquet_files_gives_the_same_rows_loaded_or_streamed(streaming, tmp_path):
    mask = write_parquet(tmp_path / "mvtec")

    rows = load_data(tmp_path / "mvtec", streaming=streaming)

    assert isinstance(rows, datasets.IterableDataset) == streaming
    assert tuple(rows.features) == COLUMNS
    rows = list(rows)
    assert [row["label"] for row in rows] == [0, 1, 0, 1]
    assert [row["prompt_name"] for row in rows] == ["metal nut which has four notched edges"] * 2 + ["screw"] * 2
    assert [row["image_path"] for row in rows] == [f"test/{i:06d}" for i in range(4)]
    assert [row["image"].getpixel((0, 0))[0] for row in rows] == [0, 40, 80, 120]
    np.testing.assert_array_equal(read_mask(rows[0]), np.zeros_like(mask))
    np.testing.assert_array_equal(read_mask(rows[3]), mask)


def test_digests_tell_other_files_of_the_same_names_apart_and_copies_by_their_times_alone(tmp_path):
    write_folder(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    one, other = load_data(tmp_path / "one"), load_data(tmp_path / "other")
    assert digest_rows(one) == digest_rows(other)
    assert digest_rows(one, with_times=True) == digest_rows(other, with_times=True)
    assert digest_rows(one) != digest_rows(one.select([1, 0, 2, 3]))
    assert digest_rows(one) == digest_rows(one.select([1, 0, 2, 3]).select([1, 0, 2, 3]))

    os.utime(tmp_path / "other" / "normal" / "0.png", (0, 0))
    assert digest_rows(one) == digest_rows(other)
    assert digest_rows(one, with_times=True) != digest_rows(other, with_times=True)
    Image.effect_noise((24, 18), 60).save(tmp_path / "other" / "masks" / "0.png")
    assert digest_rows(one) != digest_rows(other)
    before = digest_rows(one)
    (tmp_path / "one" / "masks" / "0.png").unlink()
    assert digest_rows(load_data(tmp_path / "one")) != before


def test_digests_tell_images_apart_that_a_data_set_holds_itself(tmp_path):
    noise = [Image.effect_noise((8, 6), 60).convert("RGB") for _ in range(4)]
    write_parquet(tmp_path / "flat")
    write_parquet(tmp_path / "noise", image=noise)
    assert digest_rows(load_data(tmp_path / "flat")) == digest_rows(load_data(tmp_path / "flat"), with_times=True)
    assert digest_rows(load_data(tmp_path / "flat")) != digest_rows(load_data(tmp_path / "noise"))


@pytest.mark.parametrize("streaming", [False, True])
def test_masks_and_classes_of_a_hub_data_set_are_optional(streaming, tmp_path):
    write_parquet(tmp_path / "mine", mask=None, class_name=None)

    rows = list(load_data(tmp_path / "mine", streaming=streaming))

    assert {(row["class_name"], row["prompt_name"], row["dataset"]) for row in rows} == {("object", "object", "mine")}
    assert read_mask(rows[1]) is None


@pytest.mark.parametrize("labels", [["good", "crack", "good", "dent"], [False, True, False, True]])
def test_labels_may_be_names_or_booleans(labels, tmp_path):
    write_parquet(tmp_path, label=labels)

    assert load_hub(str(tmp_path))["label"][:] == [0, 1, 0, 1]


@pytest.mark.parametrize("labels", [["no_defect", "defect"] * 2, ["scratch", "dent"] * 2, ["no_defect"] * 4])
def test_plain_names_of_labels_none_of_which_means_normal_are_refused(labels, tmp_path):
    write_parquet(tmp_path, label=labels)
    named = ", ".join(dict.fromkeys(labels))
    with pytest.raises(DatasetError, match=f"none of the labels {named} is one of 0, good, normal, ok, which mean"):
        load_data(tmp_path)


def test_a_split_without_normal_images_loads_by_numbers_and_by_class_labels(tmp_path):
    write_parquet(tmp_path / "numbers", label=[1] * 4)
    columns, _ = hub_columns(label=[1, 2, 1, 2])
    kinds = datasets.ClassLabel(names=["good", "scratch", "dent"])
    datasets.Dataset.from_dict(columns).cast_column("label", kinds).save_to_disk(tmp_path / "classes")
    for name in ("numbers", "classes"):
        assert load_data(tmp_path / name)["label"][:] == [1] * 4


def test_many_labels_are_not_all_listed(tmp_path):
    labels = [f"defect {index}" for index in range(12)]
    rows = datasets.Dataset.from_dict({"image": hub_columns()[0]["image"] * 3, "label": labels})
    rows.save_to_disk(tmp_path / "set")
    with pytest.raises(DatasetError, match=r"labels defect 0, .*, defect 7, \.\.\. is one of"):
        load_data(tmp_path / "set")


def test_a_stream_warns_where_its_first_label_is_not_a_normal_one(tmp_path):
    """Its labels are not known beforehand; in many data sets defects come first."""
    write_parquet(tmp_path / "sorted", label=["crack", "dent", "good", "good"])
    rows = load_data(tmp_path / "sorted", streaming=True)
    with pytest.warns(MoECLIPWarning, match="row 0: label 'crack' is taken for anomalous, .* none of 0, good") as told:
        assert [row["label"] for row in rows] == [1, 1, 0, 0]
    assert len(told) == 1


@pytest.mark.parametrize("labels", [["good", "crack"] * 2, [1, 0] * 2])
def test_a_stream_whose_labels_are_plain_is_read_without_a_word(labels, tmp_path):
    write_parquet(tmp_path / "mine", label=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoECLIPWarning)
        assert sum(row["label"] for row in load_data(tmp_path / "mine", streaming=True)) == 2


def test_a_stream_refuses_classes_that_its_type_does_not_know(tmp_path):
    columns, _ = hub_columns(class_name=[0, 0, 1, 1])
    saved = datasets.Dataset.from_dict(columns).cast_column("class_name", datasets.ClassLabel(names=["bolt", "nut"]))
    saved.save_to_disk(tmp_path / "typed")
    write_parquet(tmp_path / "classless", class_name=None)
    write_parquet(tmp_path / "plain")

    assert [row["class_name"] for row in load_data(tmp_path / "typed", classes=["nut"], streaming=True)] == ["nut"] * 2
    assert len(list(load_data(tmp_path / "classless", classes=["object"], streaming=True))) == 4
    assert len(list(load_data(tmp_path / "plain", classes=["screw"], streaming=True))) == 2
    with pytest.raises(DatasetError, match="no class screw; there is bolt, nut"):
        load_data(tmp_path / "typed", classes=["nut", "screw"], streaming=True)
    with pytest.raises(DatasetError, match="no class nut; there is object"):
        load_data(tmp_path / "classless", classes=["nut"], streaming=True)
    with pytest.raises(DatasetError, match="no class nut; there is metal_nut, screw"):
        load_data(tmp_path / "plain", classes=["nut"])


def test_class_labels_are_read_by_their_names(tmp_path):
    columns, _ = hub_columns(label=[1, 0, 1, 0], class_name=[0, 0, 1, 1])
    saved = datasets.Dataset.from_dict(columns).cast_column("label", datasets.ClassLabel(names=["defective", "good"]))
    saved = saved.cast_column("class_name", datasets.ClassLabel(names=["bolt", "nut"]))
    datasets.DatasetDict({"validation": saved}).save_to_disk(tmp_path / "dict")
    saved.save_to_disk(tmp_path / "one")

    assert load_data(tmp_path / "dict", split="validation")["label"][:] == [0, 1, 0, 1]
    assert load_data(tmp_path / "one")["label"][:] == [0, 1, 0, 1]
    assert load_data(tmp_path / "one")["class_name"][:] == ["bolt", "bolt", "nut", "nut"]
    with pytest.raises(DatasetError, match="has no split 'test'; it has validation"):
        load_data(tmp_path / "dict")


def test_unusable_hub_data_sets_are_named(tmp_path):
    write_parquet(tmp_path / "no_label", label=None)
    write_parquet(tmp_path / "strange_label", label=[0, 1, 0, 7])
    write_parquet(tmp_path / "train_only", split="train")
    columns, _ = hub_columns()
    unclear = datasets.Dataset.from_dict(columns).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    unclear.save_to_disk(tmp_path / "unclear_label")

    with pytest.raises(DatasetError, match="no_label has no column label; it has image, mask, class_name"):
        load_data(tmp_path / "no_label")
    with pytest.raises(DatasetError, match="none of the labels a, b is one of 0, good, normal, ok"):
        load_data(tmp_path / "unclear_label")
    with pytest.raises(DatasetError, match="row 3: label 7 is neither 0"):
        load_data(tmp_path / "strange_label")
    with pytest.raises(DatasetError, match="split 'test': Unknown split"):
        load_data(tmp_path / "train_only")


@pytest.mark.parametrize(("anomalous", "masks"), [(2, True), (2, False), (0, False)])
def test_a_plain_folder_needs_only_normal_images(anomalous, masks, tmp_path):
    expected = write_folder(tmp_path, anomalous=anomalous, masks=masks)

    rows = load_folder(tmp_path, class_name="steel_plate")

    assert rows["image_path"][:] == [one.image_path for one in expected]
    assert rows["label"][:] == [one.label for one in expected]
    assert set(rows["prompt_name"]) == {"steel plate"}
    for row, one in zip(rows, expected, strict=True):
        mask = read_mask(row)
        assert (mask is None) == (one.mask is None)
        if mask is not None:
            np.testing.assert_array_equal(mask, one.mask)


def test_a_folder_of_images_is_one_class_of_normal_images(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "normal/notes.txt").write_text("not an image")
    (tmp_path / "normal/.hidden.png").write_bytes(b"")

    rows = load_data(tmp_path / "normal")

    assert rows["image_path"][:] == ["0.png", "1.png"]
    assert rows["label"][:] == [0, 0]
    assert set(rows["class_name"]) == {"object"}


def test_the_class_of_a_folder_of_one_may_be_named_and_no_others(tmp_path):
    write_folder(tmp_path / "one")
    rows = load_data(tmp_path / "one", class_name="steel_plate")
    assert set(zip(rows["class_name"], rows["prompt_name"], strict=True)) == {("steel_plate", "steel_plate")}
    listed = normal_images([tmp_path / "one" / "normal" / "0.png"], "steel_plate")
    assert set(listed["prompt_name"]) == set(rows["prompt_name"])  # and `predict` takes the name itself
    for name in ("bolt", "nut"):
        write_folder(tmp_path / "several" / name)
    with pytest.raises(DatasetError, match=r"several: its classes go by the names of their folders \(bolt, nut\)"):
        load_data(tmp_path / "several", class_name="steel plate")
    for other in ("btad", "someone/parts", "index.jsonl"):
        with pytest.raises(DatasetError, match=f"^{other}: is no folder of one class"):
            load_data(other, tmp_path, class_name="steel plate")


def test_a_folder_may_hold_a_folder_a_class_in_either_form(tmp_path):
    for name in ("plain/bolt", "plain/nut"):
        write_folder(tmp_path / name)
    write_tree("mvtec", tmp_path / "trees")

    assert set(load_data(tmp_path / "plain")["class_name"]) == {"bolt", "nut"}
    tree = load_data(tmp_path / "trees", split="train")
    assert len(tree) == 15
    assert set(load_data(tmp_path / "trees/bottle")["label"]) == {0, 1}


def test_sources_that_are_nothing_are_answered_with_a_remedy(tmp_path):
    with pytest.raises(DatasetError, match=r"no images in .*: looked for normal, test/good, <class>/normal"):
        load_data(tmp_path)
    with pytest.raises(DatasetError, match=r"benchmark 'mvtec' needs the folder that holds it .*\./mvtec"):
        load_data("mvtec")
    with pytest.raises(DatasetError, match="unknown benchmark 'mvtek': did you mean 'mvtec'"):
        load_data("mvtek", tmp_path)
    with pytest.raises(DatasetError, match=r"no such folder: \./nowhere"):
        load_data("./nowhere")
    with pytest.raises(DatasetError, match=r"no such index file: nowhere\.jsonl"):
        load_data("nowhere.jsonl")
