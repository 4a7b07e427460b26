"""Data sets that are not as they should be: training refuses or leaves out, evaluation tells, all is said."""

import csv
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from benchmark_trees import write_folder as write_parts
from benchmark_trees import write_jsonl, write_tree
from PIL import Image
from training_runs import tiny_trainer, write_folder
from typer.testing import CliRunner

from moeclip_hf.cli import app
from moeclip_hf.data import check_rows, load_data, load_folder
from moeclip_hf.data.layouts import IMAGE_SUFFIXES, tell_passed_over
from moeclip_hf.errors import CheckpointError, DatasetError, MoECLIPError, MoECLIPWarning, UnreadableImageError
from moeclip_hf.evaluation import evaluate
from moeclip_hf.evaluation.results import caveats
from moeclip_hf.modeling.image_processing_moeclip import FORMATS
from moeclip_hf.pretrained import load_pretrained
from moeclip_hf.training import TrainingSamples, get_recipe, start_model, train, training_arguments

EDGE = 32


@pytest.fixture(scope="module")
def pretrained():
    return load_pretrained(device="cpu")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def parts(sound, tmp_path) -> Path:
    """24 images in two classes, to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "parts"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


FAULTS = {
    "truncated-image": ("nut/normal/1.png", truncate, "nut/normal/1.png: cannot be read as an image"),
    "empty-image": ("nut/normal/1.png", lambda path: path.write_bytes(b""), "nut/normal/1.png: cannot be read"),
    "truncated-mask": ("nut/masks/1.png", truncate, "nut/abnormal/1.png: its mask: cannot be read as an image"),
    "no-mask": ("nut/masks/1.png", Path.unlink, "nut/abnormal/1.png: is anomalous and has no mask"),
    "mask-of-another-size": (
        "nut/masks/1.png",
        lambda path: Image.new("L", (20, 30), 255).save(path),
        "nut/abnormal/1.png: is 20 x 20, its mask 20 x 30",
    ),
    "empty-mask": (
        "nut/masks/1.png",
        lambda path: Image.new("L", (20, 20)).save(path),
        "nut/abnormal/1.png: is anomalous, and its mask",
    ),
}


def spoil(root: Path, fault: str) -> str:
    """Spoil a file of a folder; what is said of it."""
    name, damage, said = FAULTS[fault]
    damage(root / name)
    return said


def start(clip: Path, rows: datasets.Dataset, output: Path, skip: bool = False, **settings) -> Path:
    recipe = get_recipe("paper", batch_size=4)
    model, processor = start_model(clip, recipe)
    defaults = {"use_cpu": True, "max_steps": 1, "dataloader_num_workers": 0, "disable_tqdm": True}
    args = training_arguments(output, recipe, **(defaults | settings))
    return train(model, processor, rows, recipe, args, skip_unreadable=skip)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_named_and_nothing_else(parts, fault):
    assert check_rows(load_folder(parts), range(24)) == []
    said = spoil(parts, fault)
    rows = load_folder(parts)
    ((row, problem),) = check_rows(rows, range(24))
    assert rows["image_path"][row] == problem.path
    assert f"{problem.path}: {problem.what}".startswith(said)


def test_training_stops_before_the_first_step_with_the_list(clip, parts, tmp_path):
    said = [spoil(parts, "truncated-image"), spoil(parts, "no-mask")]
    with pytest.raises(DatasetError, match="2 of 24 images cannot be trained on") as refusal:
        start(clip, load_folder(parts), tmp_path / "out")
    assert all(words in str(refusal.value) for words in said)
    assert "--skip-unreadable" in str(refusal.value)
    listed = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert len(listed) == 2 and all(line.startswith(words) for line, words in zip(listed, sorted(said), strict=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unreadable.txt"]


def test_a_long_list_is_cut_in_the_message_and_whole_in_the_file(clip, parts, tmp_path):
    shutil.rmtree(parts / "nut" / "masks")
    shutil.rmtree(parts / "wood" / "masks")
    with pytest.raises(DatasetError, match=r"12 of 24 images .*and so on, see .*unreadable\.txt") as refusal:
        start(clip, load_folder(parts), tmp_path / "out")
    assert str(refusal.value).count("has no mask") == 10
    assert len((tmp_path / "out" / "unreadable.txt").read_text().splitlines()) == 12


def test_what_is_unreadable_is_left_out_on_demand_and_counted(clip, parts, tmp_path):
    for fault in ("truncated-image", "no-mask"):
        spoil(parts, fault)
    with pytest.warns(MoECLIPWarning, match="2 of 24 images are left out: nut/abnormal/1.png: is anomalous"):
        folder = start(clip, load_folder(parts), tmp_path / "out", skip=True)
    assert json.loads((folder / "recipe.json").read_text())["images"].startswith("22, ")


def test_the_option_says_it_and_goes_on(clip, parts, tmp_path):
    spoil(parts, "truncated-image")
    options = ["train", "--dataset", parts, "--clip", clip, "--output-dir", tmp_path / "out", "--max-steps", "1",
               "--num-workers", "0", "--tracker", "none", "--cpu"]  # fmt: skip
    refused = CliRunner().invoke(app, list(map(str, options)))
    assert isinstance(refused.exception, DatasetError)
    with pytest.warns(MoECLIPWarning, match="1 of 24 images are left out"):
        done = CliRunner().invoke(app, [*map(str, options), "--skip-unreadable"])
    assert done.exit_code == 0, done.output


def test_an_image_that_breaks_after_the_check_ends_training_in_one_line(clip, parts, tmp_path):
    trainer = tiny_trainer(clip, load_folder(parts), tmp_path)
    samples = trainer.train_dataset
    spoil(parts, "truncated-image")
    with pytest.raises(UnreadableImageError, match=r"^nut/normal/1.png: cannot be read as an image \(.*\)\.$"):
        for draw in trainer.sampler:
            samples[draw]


@pytest.mark.parametrize("damage", ["unreadable", "killed"])
def test_a_reading_process_that_fails_is_told_in_one_line(clip, parts, tmp_path, monkeypatch, damage):
    rows = load_folder(parts)
    monkeypatch.setattr("moeclip_hf.training.run.check_rows", lambda *given, **progress: [])
    if damage == "unreadable":
        spoil(parts, "truncated-image")
    else:
        monkeypatch.setattr(TrainingSamples, "__getitem__", lambda self, draw: os.kill(os.getpid(), 9))
    kind = UnreadableImageError if damage == "unreadable" else MoECLIPError
    words = "nut/normal/1.png: cannot be read" if damage == "unreadable" else "a process that reads images ended"
    with pytest.raises(kind, match=f"^{words}") as failure:
        start(clip, rows, tmp_path / "out", max_steps=6, dataloader_num_workers=1)
    assert "\n" not in str(failure.value)


def test_a_run_is_not_resumed_on_other_images(clip, sound, tmp_path):
    rows = load_folder(sound)
    tiny_trainer(clip, rows, tmp_path, save_steps=2, max_steps=2).train()
    fewer = tiny_trainer(clip, rows.select(range(1, 24)), tmp_path)
    with pytest.raises(CheckpointError, match=r"was trained with images 24, digest .*, not 23, digest"):
        fewer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_run_is_resumed_on_images_that_were_moved_and_not_on_other_masks(clip, parts, tmp_path):
    output, moved = tmp_path / "out", tmp_path / "elsewhere" / "parts"
    tiny_trainer(clip, load_folder(parts), output, save_steps=2, max_steps=2).train()
    shutil.copytree(parts, moved, copy_function=shutil.copyfile)  # the times are those of the copy
    shutil.rmtree(parts)
    resumed = tiny_trainer(clip, load_folder(moved), output, max_steps=3)
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert resumed.state.global_step == 3
    Image.effect_noise((20, 20), 60).save(moved / "nut" / "masks" / "0.png")
    with pytest.raises(CheckpointError, match=r"was trained with images 24, digest .*, not 24, digest"):
        tiny_trainer(clip, load_folder(moved), output).train(resume_from_checkpoint=str(output / "checkpoint-2"))


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_one_corrupt_image_among_thousands_is_named(tmp_path, count):
    write_parts(tmp_path / "one")
    (tmp_path / "many" / "normal").mkdir(parents=True)
    for index in range(count):
        os.link(tmp_path / "one" / "normal" / f"{index % 2}.png", tmp_path / "many" / "normal" / f"{index:05d}.png")
    odd = tmp_path / "many" / "normal" / f"{count // 3:05d}.png"
    content = bytearray(odd.read_bytes())
    content[len(content) // 2] ^= 0xFF
    odd.unlink()
    odd.write_bytes(content)
    ((row, problem),) = check_rows(load_folder(tmp_path / "many"), range(count))
    assert (row, problem.path) == (count // 3, f"normal/{odd.name}")


def test_evaluation_tells_what_is_wrong_with_masks(pretrained, tmp_path):
    write_parts(tmp_path, normal=3, anomalous=6)
    masks = tmp_path / "masks"
    (masks / "0.png").unlink()
    (masks / "1.png").unlink()
    Image.new("L", (24, 18)).save(masks / "2.png")
    Image.open(masks / "3.png").resize((48, 36)).save(masks / "3.png")
    result = evaluate(pretrained, load_data(tmp_path), image_size=EDGE)
    assert result.to_dict()["mask_faults"] == {"missing": 2, "empty": 1, "other_size": 1}
    assert caveats(result) == [
        "2 of 6 anomalous images have no mask: they count for the image figures only.",
        "1 of 6 anomalous images have a mask without an anomalous pixel at the size of the maps.",
        "1 of 6 anomalous images have a mask of another size, which was stretched to theirs.",
    ]
    assert result.anomalous == 6
    assert caveats(evaluate(pretrained, load_data(tmp_path / "normal"), image_size=EDGE)) == []


@pytest.mark.parametrize("fault", ["truncated-image", "truncated-mask"])
def test_evaluation_names_what_it_cannot_read_and_gives_no_figures(parts, tmp_path, fault):
    said = spoil(parts, fault).replace(": its", ", its")
    options = ["evaluate", "--data-dir", parts, "--output-dir", tmp_path / "out", "--device", "cpu", "--no-pictures"]
    failure = CliRunner().invoke(app, [*map(str, options), "--image-size", str(EDGE)]).exception
    assert isinstance(failure, UnreadableImageError)
    assert str(failure).startswith(said)
    assert not list((tmp_path / "out").glob("results*"))


def test_a_class_without_images_is_named_and_may_be_left_out(tmp_path):
    for name in ("bolt", "nut"):
        write_parts(tmp_path / name)
    (tmp_path / "hub" / "abnormal").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    for image in (tmp_path / "bolt").glob("*/*"):
        image.unlink()
    with pytest.raises(DatasetError, match="no images of bolt, hub for split 'test'"):
        load_data(tmp_path)
    assert set(load_data(tmp_path, classes=["nut"])["class_name"]) == {"nut"}
    with pytest.raises(DatasetError, match="no images of bolt for split"):
        load_data(tmp_path, classes=["bolt"])


def test_a_class_that_the_benchmark_does_not_know_is_told_once(tmp_path):
    write_tree("mvtec", tmp_path / "mvtec")
    images = {"zipper/test/good/000.png": "zipper", "wood/test/good/000.png": "new_part"}
    images["wood/test/scratch/001.png"] = "new_part"
    rows = [{"image_path": f"mvtec/{path}", "label": 0, "class_name": name} for path, name in images.items()]
    write_jsonl(tmp_path / "i.jsonl", rows)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        assert load_data(tmp_path / "i.jsonl")["prompt_name"][:] == ["new part", "new part", "a black zipper"]
    assert [str(one.message) for one in told] == ["mvtec has no class 'new_part': its prompts say 'new part'"]


def test_images_of_a_kind_that_is_not_read_are_told_and_notes_are_not(tmp_path):
    write_parts(tmp_path)
    (tmp_path / "normal" / "notes.txt").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_data(tmp_path)) == 4
    Image.new("RGB", (4, 4)).save(tmp_path / "normal" / "9.tga")
    with pytest.warns(MoECLIPWarning, match=r"normal: passes over 1 files, of which the first is 9\.tga"):
        assert len(load_data(tmp_path)) == 4


def test_every_suffix_of_a_format_that_is_read_is_looked_for():
    read = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert read - IMAGE_SUFFIXES == set()


def test_a_folder_takes_images_of_every_suffix(tmp_path):
    write_parts(tmp_path, normal=1)
    for suffix in ("jp2", "j2k", "ppm", "pgm", "jfif", "jpe", "MPO"):
        shutil.copy(tmp_path / "normal" / "0.png", tmp_path / "normal" / f"of-{suffix}.{suffix}")
    assert load_data(tmp_path)["label"][:].count(0) == 8


@pytest.mark.parametrize("suffix", ["heic", "HEIF", "avif", "tga", "dng", "cr2", "nef", "arw", "svg", "psd"])
def test_pictures_that_are_passed_over_are_counted_and_named(tmp_path, suffix):
    with pytest.warns(MoECLIPWarning) as told:
        tell_passed_over(tmp_path, ["notes.txt", f"lot/1.{suffix}", f"2.{suffix}", "report.pdf"])
    (warning,) = told
    assert str(warning.message) == (
        f"{tmp_path}: passes over 2 files, of which the first is lot/1.{suffix}: convert them to PNG"
    )


def test_images_in_folders_within_a_labels_folder_are_told_and_refused_where_there_are_no_others(tmp_path):
    write_parts(tmp_path / "parts", normal=2)
    lot = tmp_path / "parts" / "normal" / "lot1" / "day2"
    lot.mkdir(parents=True)
    (tmp_path / "parts" / "normal" / "notes").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_data(tmp_path / "parts")) == 4
    (tmp_path / "parts" / "normal" / "0.png").rename(lot / "0.png")
    with pytest.warns(MoECLIPWarning, match="normal: images in folders within it are not read, as in lot1") as told:
        assert load_data(tmp_path / "parts")["label"][:] == [1, 1, 0]
    assert len(told) == 1
    (tmp_path / "parts" / "normal" / "1.png").rename(lot / "1.png")
    with pytest.raises(DatasetError, match=r"parts/normal: images in folders within it .*: move them up into it"):
        load_data(tmp_path / "parts")


def test_the_parts_of_a_folder_whose_normal_images_lie_in_itself_are_not_told(tmp_path):
    write_parts(tmp_path)
    for image in (tmp_path / "normal").iterdir():
        image.rename(tmp_path / image.name)
    (tmp_path / "normal").rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_data(tmp_path)["label"][:] == [0, 0, 1, 1]
    (tmp_path / "abnormal" / "scratch").mkdir()
    for image in (tmp_path / "abnormal").glob("*.jpg"):
        image.rename(tmp_path / "abnormal" / "scratch" / image.name)
    with pytest.raises(DatasetError, match=r"abnormal: images in folders within it are not read, as in scratch"):
        load_data(tmp_path)


def test_names_that_are_not_utf_8_and_files_that_are_none_are_named(tmp_path):
    write_parts(tmp_path)
    odd = os.path.join(os.fsencode(tmp_path / "normal"), b"\xff.png")
    shutil.copy(tmp_path / "normal" / "0.png", odd)
    with pytest.raises(DatasetError, match=r"normal/\\udcff\.png': a name that is not UTF-8: rename it"):
        load_data(tmp_path)
    os.unlink(odd)
    for name, make in (("link", lambda path: path.symlink_to(path)), ("pipe", os.mkfifo), ("folder", os.mkdir)):
        path = tmp_path / "normal" / f"{name}.png"
        make(path)
        with pytest.raises(DatasetError, match=rf"1 files are missing, or are none, the first is .*{name}\.png"):
            load_data(tmp_path)
        path.rmdir() if name == "folder" else path.unlink()


ENTRY = {"image_path": "normal/0.png", "label": 0, "class_name": "x"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image_path": 5}, "line 1: paths and classes are text, not 5"),
        ({"image_path": ""}, "line 1: names no image"),
        ({"mask_path": ["m.png"]}, r"line 1: paths and classes are text, not \['m.png'\]"),
        ({"class_name": None}, "line 1: paths and classes are text, not None"),
        ({"class_name": "\ud800"}, "a name that is not UTF-8"),
        ({"image_path": "/etc/passwd"}, "line 1: path '/etc/passwd' must be relative"),
        ({"image_path": "normal/../../parts/normal/0.png"}, "must be relative to .* and not lead out of it"),
        ({"image_path": "a" * 5000}, "names 1 files that are not in"),
        ({"image_path": "normal/0.png\0"}, "names 1 files that are not in"),
        ({"label": float("nan")}, "label nan is neither"),
        ({"label": [0]}, r"label \[0\] is neither"),
    ],
    ids=str,
)
def test_an_index_that_lies_is_refused_by_line(tmp_path, changed, words):
    write_parts(tmp_path / "parts")
    write_jsonl(tmp_path / "parts" / "i.jsonl", [ENTRY | changed])
    with pytest.raises(DatasetError, match=words):
        load_data(tmp_path / "parts" / "i.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("i.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("i.jsonl", b"[" * 100_000, "line 1: not JSON that can be read"),
        ("i.jsonl", b'{"label": ' + b"1" * 5000 + b"}", "line 1: not JSON that can be read"),
        ("meta.json", b'{"test": [1]}', "must be an object of classes, each a list of images"),
        ("meta.json", b'{"test": {"a": 5}}', "must be an object of classes, each a list of images"),
        ("meta.json", b"[]", "expected a JSON object"),
    ],
    ids=["no-text", "deep", "long-number", "no-classes", "no-list", "no-object"],
)
def test_an_index_that_is_none_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=words):
        load_data(tmp_path / name)


def test_an_image_with_two_labels_is_refused_and_one_listed_twice_told(tmp_path):
    write_parts(tmp_path)
    index = tmp_path / "i.jsonl"
    write_jsonl(index, [ENTRY, ENTRY])
    with pytest.warns(MoECLIPWarning, match="1 images more than once"):
        load_data(index)
    write_jsonl(index, [ENTRY, ENTRY | {"label": 1}])
    with pytest.raises(DatasetError, match=r"1 images as normal and as anomalous, the first is normal/0\.png"):
        load_data(index)


def test_an_index_beside_its_images_needs_no_folder_in_its_paths(tmp_path):
    write_parts(tmp_path / "parts")
    write_jsonl(tmp_path / "parts" / "normal" / "i.jsonl", [ENTRY | {"image_path": "0.png"}])
    (row,) = load_data(tmp_path / "parts" / "normal" / "i.jsonl")
    assert (row["dataset"], row["class_name"], row["image_path"]) == ("normal", "x", "0.png")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"label": "Normal"}, "line 2: label 'Normal' is neither 'normal' nor 'anomaly'"),
        ({"image": ""}, "line 2: names no image"),
        ({"image": "/etc/passwd"}, "line 2: path '/etc/passwd' must be relative"),
        ({"mask": "../0.png"}, "line 2: path '../0.png' must be relative"),
        ({"image": "nowhere.png"}, r"1 files are missing, or are none, the first is .*nowhere\.png"),
        ({"image": "a" * 200_000}, "cannot be read as a table: field larger"),
    ],
    ids=str,
)
def test_a_table_that_lies_is_refused_by_line(tmp_path, changed, words):
    write_tree("visa", tmp_path)
    table = tmp_path / "split_csv" / "1cls.csv"
    with table.open() as file:
        row = next(one for one in csv.DictReader(file) if one["split"] == "test" and one["object"] == "candle")
    text = io.StringIO()
    writer = csv.DictWriter(text, row)
    writer.writeheader()
    writer.writerow(row | changed)
    table.write_text(text.getvalue())
    with pytest.raises(DatasetError, match=words):
        load_data("visa", tmp_path, classes=["candle"])


def saved(folder: Path, **columns) -> Path:
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    rows = datasets.Dataset.from_dict({"image": [image, image]} | columns).cast_column("image", datasets.Image())
    labels = datasets.ClassLabel(names=["good", "bad"])
    rows.cast_column("label", labels).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(
    "columns",
    [{"label": [0, -1]}, {"label": [0, None]}, {"label": [0, 1], "class_name": ["nut", None]}],
    ids=["label-minus-one", "no-label", "no-class"],
)
def test_rows_whose_label_or_class_is_not_known_are_refused(tmp_path, columns):
    with pytest.raises(DatasetError, match="row 1: its label or class is not known: leave such rows out"):
        load_data(saved(tmp_path / "set", **columns))


def test_a_data_set_with_a_hole_or_of_damaged_files_is_refused(tmp_path, pretrained):
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    folder = saved(tmp_path / "set", image=[image, None], label=[0, 1])
    with pytest.raises(UnreadableImageError, match="test/000001: the data set holds no image here"):
        evaluate(pretrained, load_data(folder), image_size=EDGE)
    assert [row for row, _ in check_rows(load_data(folder), range(2))] == [1]
    for file in ("state.json", "data-00000-of-00001.arrow"):
        spoilt = Path(shutil.copytree(folder, tmp_path / f"without-{file}"))
        (spoilt / file).write_bytes(b"{}")
        with pytest.raises(DatasetError, match="cannot load data set"):
            load_data(spoilt)


def test_the_name_of_a_data_set_is_a_name_whatever_the_way_to_it(tmp_path, monkeypatch):
    inner = saved(tmp_path / "set", label=[0, 1]) / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    assert set(load_data("..")["dataset"]) == {"set"}
