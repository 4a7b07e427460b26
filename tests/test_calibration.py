"""Thresholds hold the false-alarm rate they promise, or the best F1 there is, and travel with the checkpoint."""

import errno
import gc
import json
import re
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from benchmark_trees import write_folder, write_tree
from PIL import Image
from sklearn.metrics import f1_score
from typer.testing import CliRunner

from moeclip_hf.calibration import (
    CalibrationScores,
    Thresholds,
    best_f1_threshold,
    calibrate_from_labels,
    calibrate_from_normal,
    conformal_threshold,
    copy_checkpoint,
    normal_images,
    score_for_calibration,
    store_thresholds,
)
from moeclip_hf.cli import app
from moeclip_hf.data import load_folder
from moeclip_hf.errors import CheckpointError, MoECLIPError, MoECLIPWarning, UnreadableImageError
from moeclip_hf.histogram import ScoreHistogram
from moeclip_hf.prediction import find_images, predict
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, load_pretrained
from moeclip_hf.reading import read_row
from moeclip_hf.threads import read_ahead


@pytest.fixture(scope="module")
def pretrained():
    return load_pretrained(device="cpu")


@pytest.fixture(scope="module")
def normal_folder(tmp_path_factory) -> Path:
    """Thirty grey pictures of unlike grain."""
    folder = tmp_path_factory.mktemp("normal")
    rng = np.random.default_rng(0)
    for number in range(30):
        grain = rng.normal(140, rng.uniform(2, 40), (40, 56, 1)).repeat(3, axis=2)
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The embedded checkpoint, which here sees images of 64 px, a sixteenth of the work."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    shutil.copytree(EMBEDDED_CHECKPOINT, folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"height": 64, "width": 64}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize(("number", "rate"), [(19, 0.05), (30, 0.1), (99, 0.29), (80, 0.013), (9, 0.1)])
def test_new_normal_images_raise_false_alarms_at_the_promised_rate(number, rate):
    rng = np.random.default_rng(number)
    runs = 20_000
    scores = rng.beta(2, 5, (runs, number + 1)).astype(np.float32)
    alarms = np.mean([new >= conformal_threshold(normal, rate) for *normal, new in scores])
    scatter = 4 * np.sqrt(rate / runs)
    assert rate - 1 / (number + 1) - scatter < alarms < rate + scatter


def test_ties_do_not_break_the_promise():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (20_000, 20)) / np.float32(4)
    alarms = np.mean([new >= conformal_threshold(normal, 0.1) for *normal, new in scores])
    assert alarms < 0.1 + 4 * np.sqrt(0.1 / 20_000)
    assert conformal_threshold([0.5] * 20, 0.1) > 0.5


def test_the_threshold_lies_just_above_the_right_score():
    scores = np.random.default_rng(0).permutation(np.arange(1, 100) / 100)
    for rate, allowed in ((0.05, 5), (0.29, 29), (0.3, 30), (0.01, 1), (0.995, 99)):
        # Of 100 images, the new one among them, `allowed` may reach the threshold: one more than the calibrating ones.
        assert np.count_nonzero(scores >= conformal_threshold(scores, rate)) == allowed - 1


@pytest.mark.parametrize("value", [0.1, 1 / 3, np.float32(0.7), 0.123456789012345])
def test_a_score_at_the_threshold_counts_in_single_and_in_double_precision(value):
    threshold = conformal_threshold([value] * 30, 0.1)
    assert threshold > value
    assert not (np.full(3, value, np.float32) >= threshold).any()
    assert (np.full(3, threshold, np.float32) >= threshold).all()


def test_too_few_images_are_refused_with_the_number_that_is_needed():
    for number, rate, needed in ((18, 0.05, 19), (98, 0.01, 99), (8, 0.1, 9), (0, 0.5, 1)):
        with pytest.raises(MoECLIPError, match=rf"takes at least {needed} normal images, and there are {number}"):
            conformal_threshold(np.zeros(number), rate)
        conformal_threshold(np.zeros(needed), rate)
    for rate in (0, 1, -0.1, 5):
        with pytest.raises(MoECLIPError, match="between 0 and 1"):
            conformal_threshold(np.zeros(50), rate)


def test_images_and_regions_have_rates_of_their_own():
    scores, maxima = np.linspace(0, 1, 99), np.linspace(0, 0.1, 99)
    both = calibrate_from_normal(scores, maxima, 0.1)
    assert both.image == conformal_threshold(scores, 0.1)
    assert both.pixel == conformal_threshold(maxima, 0.1)
    assert calibrate_from_normal(scores, maxima, 0.1, 0.02).pixel == conformal_threshold(maxima, 0.02)


def test_best_f1_is_that_of_every_threshold_tried():
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.3
    scores = np.round(rng.normal(labels, 1.0), 1)
    normal, anomalous = ScoreHistogram(), ScoreHistogram()
    normal.add(scores[~labels])
    anomalous.add(scores[labels])
    chosen = best_f1_threshold(normal, anomalous)
    best = max(f1_score(labels, scores >= threshold) for threshold in scores)
    assert f1_score(labels, scores >= chosen) == best
    assert 0 < best < 1


def test_labels_without_masks_still_give_a_pixel_threshold():
    scored = CalibrationScores([0.1, 0.2, 0.6, 0.9], [0.5, 0.1, 0.7, 0.6], [0, 0, 1, 1])
    thresholds = calibrate_from_labels(scored)
    assert (thresholds.image, thresholds.pixel) == (0.6, 0.6)
    for label, kind in ((0, "normal"), (1, "anomalous")):
        with pytest.raises(MoECLIPError, match=f"only {kind} ones"):
            calibrate_from_labels(CalibrationScores([0.5], [0.5], [label]))


def test_what_is_scored_is_what_predict_gives(pretrained, tmp_path):
    write_folder(tmp_path)
    rows = load_folder(tmp_path)
    scored = score_for_calibration(pretrained, rows, batch_size=3, with_pixels=True)
    predictions = list(predict(pretrained, [tmp_path / path for path in rows["image_path"]]))
    assert scored.scores == pytest.approx([prediction.score for prediction in predictions], abs=1e-6)
    assert scored.labels == [1, 1, 0, 0]
    assert scored.normal_pixels.pixels + scored.anomalous_pixels.pixels == 4 * 24 * 18
    for maximum, prediction in zip(scored.map_maxima, predictions, strict=True):
        assert prediction.anomaly_map.max() <= maximum * (1 + 1e-6)
    values = np.concatenate([prediction.anomaly_map.ravel() for prediction in predictions])
    tables = (scored.normal_pixels.table(), scored.anomalous_pixels.table())
    assert np.allclose(
        np.sort(np.concatenate([np.repeat(t.scores, t.pixels) for t in tables])), np.sort(values), atol=1e-5
    )


def test_no_image_is_held_while_it_waits_to_be_scored(pretrained, tmp_path, monkeypatch):
    write_folder(tmp_path)
    images = []

    def read(rows, index):
        row = read_row(rows, index)
        images.append(weakref.ref(row["image"]))
        return row

    def read_all(read, items, depth):
        waiting = list(read_ahead(read, items, depth))
        gc.collect()
        assert [image() for image in images] == [None] * 4
        return waiting

    monkeypatch.setattr("moeclip_hf.calibration.read_row", read)
    monkeypatch.setattr("moeclip_hf.calibration.read_ahead", read_all)
    scored = score_for_calibration(pretrained, load_folder(tmp_path), with_pixels=True)
    assert len(scored.scores) == 4


def test_a_model_in_training_mode_is_calibrated_as_in_use(pretrained, normal_folder):
    rows = normal_images(find_images([normal_folder])[:3], "object")
    scored = score_for_calibration(pretrained, rows)
    pretrained.model.train()
    again = score_for_calibration(pretrained, rows)
    assert (again.scores, again.map_maxima) == (scored.scores, scored.map_maxima)
    assert not pretrained.model.training


def test_a_calibrated_copy_calls_the_promised_share_anomalous(normal_folder, checkpoint, tmp_path):
    options = ("--class-name", "granite", "--false-alarm-rate", "0.2", "--model", checkpoint)
    result = run(normal_folder, *options, "--output", tmp_path / "copy")
    assert result.exit_code == 0, result.output
    assert "at most 20.0% of normal images called anomalous" in result.stdout
    calibrated = load_pretrained(tmp_path / "copy", device="cpu")
    predictions = list(predict(calibrated, find_images([normal_folder]), "granite"))
    # Of 31 images 6 may; the new one may be one of them.
    assert sum(prediction.is_anomalous for prediction in predictions) == 5
    assert sum(bool(prediction.regions) for prediction in predictions) <= 5
    for file in checkpoint.iterdir():
        same = (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
        assert same == (file.name not in ("processor_config.json", "README.md"))
    cards = [(folder / "README.md").read_text().splitlines() for folder in (checkpoint, tmp_path / "copy")]
    (line,) = [line for line, other in zip(*reversed(cards), strict=True) if line != other]
    image, pixel = calibrated.processor.image_threshold, calibrated.processor.pixel_threshold
    assert line.startswith(f"- The thresholds ({image:.4g} for images, {pixel:.4g} for pixels) hold for images like")


def test_what_predict_wrote_below_the_photos_is_no_normal_image(normal_folder, checkpoint, tmp_path, monkeypatch):
    photos = shutil.copytree(normal_folder, tmp_path / "photos")
    monkeypatch.chdir(photos)
    predicted = CliRunner().invoke(app, ["predict", ".", "--model", str(checkpoint), "--device", "cpu"])
    assert predicted.exit_code == 0, predicted.output
    assert len(list((photos / "moeclip-output").glob("*_overlay.png"))) == 30
    options = ("--false-alarm-rate", "0.1", "--model", checkpoint, "--output", tmp_path / "copy", "--json")
    with pytest.warns(MoECLIPWarning, match="30 results of predict or explain are no images of parts"):
        facts = json.loads(run(".", *options).stdout)
    assert facts["normal_images"] == 30


def test_machines_get_the_thresholds_that_are_stored(normal_folder, checkpoint, tmp_path):
    rates = ("--false-alarm-rate", "0.1", "--pixel-false-alarm-rate", "0.2")
    facts = json.loads(run(normal_folder, *rates, "--model", checkpoint, "--output", tmp_path / "a", "--json").stdout)
    stored = json.loads((tmp_path / "a" / "processor_config.json").read_text())
    assert facts["thresholds"] == {"image": stored["image_threshold"], "pixel": stored["pixel_threshold"]}
    assert (facts["normal_images"], facts["pixel_false_alarm_rate"]) == (30, 0.2)
    # In place, on all classes of a tree as MVTec AD's: the test images are not touched by split "train".
    write_tree("mvtec", tmp_path / "tree")
    where = ("--data-dir", tmp_path / "tree", "--split", "train", "--model", tmp_path / "a", "--in-place")
    again = json.loads(run(*where, "--false-alarm-rate", "0.1", "--json").stdout)
    assert again["normal_images"] == 15
    assert again["before"] == facts["thresholds"]
    assert load_pretrained(tmp_path / "a", device="cpu").processor.image_threshold == again["thresholds"]["image"]


def test_a_copy_goes_into_any_empty_folder_and_takes_nothing_beside_it(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").touch()
    for name in ("out", "here", "there"):
        (tmp_path / name).mkdir(mode=0o750)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    names = {file.name for file in checkpoint.iterdir()}
    copy_checkpoint(checkpoint, tmp_path / "out", thresholds=Thresholds(0.25, 0.125))
    copy_checkpoint(checkpoint, tmp_path / "link")
    monkeypatch.chdir(tmp_path / "here")
    copy_checkpoint(checkpoint, Path())
    copy_checkpoint(checkpoint, tmp_path / "new" / "folder")
    for folder in ("out", "there", "here", "new/folder"):
        assert {file.name for file in (tmp_path / folder).iterdir()} == names
    assert load_pretrained(tmp_path / "out", device="cpu").processor.pixel_threshold == 0.125
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out.partial" / "mine.txt").exists()


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("step", ["moeclip_hf.calibration.shutil.copy", "moeclip_hf.writing.os.replace"])
def test_a_copy_that_cannot_be_finished_leaves_nothing_and_the_thresholds_are_told(
    normal_folder, checkpoint, tmp_path, monkeypatch, step, is_new
):
    if not is_new:
        (tmp_path / "copy").mkdir()
    module, _, name = step.rpartition(".")
    plain, calls = getattr(sys.modules[module.rpartition(".")[2]], name), []

    def run_full(*given, **options):
        calls.append(given)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*given, **options)

    monkeypatch.setattr(step, run_full)
    options = ("--false-alarm-rate", "0.1", "--model", checkpoint, "--output", tmp_path / "copy")
    told = str(run(normal_folder, *options).exception)
    image, pixel = (r"0\.\d+ for images", r"0\.\d+ for pixels")
    assert re.fullmatch(
        rf"{tmp_path}/copy/[\w.]+: cannot be written \(No space.*; the thresholds are {image} and {pixel}\.", told
    )
    assert (tmp_path / "copy").exists() != is_new
    assert is_new or not list((tmp_path / "copy").iterdir())


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_scored(
    normal_folder, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("moeclip_hf.calibration.score_for_calibration", lambda *_: pytest.fail("scored"))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "copy", Path("/proc/copy")):
        refused = run(normal_folder, "--model", checkpoint, "--output", output)
        assert (refused.exit_code, "can be written to" in " ".join(refused.stderr.split())) == (2, True)


def test_a_copy_holds_no_pickles_and_no_steps_of_the_run(normal_folder, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "run")
    (source / "modeling_moeclip.py").write_text("raise SystemExit")
    (source / "training_args.bin").touch()
    (source / "checkpoint-500").mkdir()
    (source / "checkpoint-500" / "optimizer.pt").touch()
    copy_checkpoint(source, tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {
        "modeling_moeclip.py",
        *(file.name for file in checkpoint.iterdir()),
    }


def test_thresholds_that_cannot_be_written_leave_the_old_ones(checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    before = (folder / "processor_config.json").read_bytes()

    def fill_disk(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    monkeypatch.setattr(Path, "write_text", lambda path, text: fill_disk(path, text.encode()))
    with pytest.raises(MoECLIPError, match=r"processor_config\.json: cannot be written \(No space left"):
        store_thresholds(folder, Thresholds(0.25, 0.75))
    assert (folder / "processor_config.json").read_bytes() == before


def test_labelled_images_give_best_f1(tmp_path):
    write_folder(tmp_path / "data", normal=3, anomalous=3)
    facts = json.loads(
        run("--data-dir", tmp_path / "data", "--best-f1", "--output", tmp_path / "copy", "--json").stdout
    )
    assert (facts["by"], facts["normal_images"], facts["anomalous_images"]) == ("best F1", 3, 3)
    assert "false_alarm_rate" not in facts


def test_images_of_a_folder_are_scored_under_the_same_name_either_way(checkpoint, tmp_path):
    write_folder(tmp_path / "data", normal=9, anomalous=0)
    given = ("--false-alarm-rate", "0.1", "--model", checkpoint, "--json")
    thresholds = [
        json.loads(run(*images, *name, *given, "--output", tmp_path / f"copy{number}").stdout)["thresholds"]
        for number, (images, name) in enumerate(
            [
                ((tmp_path / "data" / "normal",), ("--class-name", "brick wall")),
                (("--data-dir", tmp_path / "data"), ("--class-name", "brick wall")),
                (("--data-dir", tmp_path / "data"), ()),
            ]
        )
    ]
    assert thresholds[0] == thresholds[1] != thresholds[2]


def test_what_cannot_be_done_is_said_before_anything_is_written(normal_folder, tmp_path, pretrained, monkeypatch):
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "file").touch()
    assert isinstance(run(normal_folder, "--output", tmp_path / "filled").exception, CheckpointError)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    (tmp_path / "torn.png").write_bytes((normal_folder / "00.png").read_bytes()[:200])
    with monkeypatch.context() as patch:  # nothing will come of scores
        patch.setattr("moeclip_hf.MoECLIPModel.forward", lambda *_, **__: pytest.fail("scored"))
        everything = run(broken, normal_folder, tmp_path / "torn.png", "--output", tmp_path / "copy").exception
    assert isinstance(everything, UnreadableImageError)
    assert re.fullmatch(r"\S+broken.png: cannot be read.*\. \S+torn.png: cannot be read.*", str(everything))
    for error, arguments in (
        (UnreadableImageError, (broken, normal_folder)),
        (MoECLIPError, (normal_folder, "--false-alarm-rate", "0.01", "--model", "not/looked-for-yet")),
        (MoECLIPError, (normal_folder, "--pixel-false-alarm-rate", "0.01", "--model", "not/looked-for-yet")),
    ):
        raised = run(*arguments, "--output", tmp_path / "copy").exception
        assert isinstance(raised, error) and re.match(
            "a false-alarm rate of 0.01 takes at least 99|.*broken", str(raised)
        )
        assert not (tmp_path / "copy").exists()
    out = ("--output", tmp_path / "copy")
    data = ("--data-dir", tmp_path, *out)
    for usage in (
        *((), out, (normal_folder,), (normal_folder, "--in-place"), (normal_folder, "--best-f1", *out)),
        *((normal_folder, "--classes", "a", *out), (normal_folder, "--split", "train", *out)),
        *((*data, "--best-f1", "--false-alarm-rate", "0.05"), (*data, "--best-f1", "--pixel-false-alarm-rate", "0.1")),
    ):
        assert run(*usage).exit_code == 2
    assert run(normal_folder, "--data-dir", tmp_path, *out).exit_code == 2
