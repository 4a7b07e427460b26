"""The command that makes the embedded checkpoint, at a size of seconds, and the card that it writes."""

import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import ndimage
from training_runs import interrupt_second_step, write_folder, write_plain_clip
from typer.testing import CliRunner

from benchmarks import experts
from examples import checkpoint_card, make_checkpoint
from examples.make_checkpoint import TEXTURES
from moeclip_hf.cli import app
from moeclip_hf.data import load_folder
from moeclip_hf.data.textures import TOLERANCE, add_defect
from moeclip_hf.data.textures.splits import VALIDATION_FAMILIES
from moeclip_hf.evaluation import evaluate
from moeclip_hf.evaluation.protocol import describe_model
from moeclip_hf.metrics import AnomalyMetrics
from moeclip_hf.pretrained import load_pretrained
from moeclip_hf.training import get_recipe, start_model

NAME = make_checkpoint.EMBEDDED_CHECKPOINT.name


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """The output folder of a call that has run, on a CLIP that is there already, and has installed its result."""
    root = tmp_path_factory.mktemp("checkpoint")
    write_plain_clip(root / "clip", tokenizer)
    embedded = tmp_path_factory.mktemp("package") / NAME
    embedded.mkdir()
    (embedded / "of the old one").touch()
    textures = {
        "auxiliary": (("leather",), ("stain",), 2, 4, 1),
        "normal": (("leather",), ("stain",), 4, 0, 2),
        "test": (("straw", "felt", "denim", "burlap"), ("hole",), 2, 2, 4),
        "test_unseen_defects": (("straw",), ("debris",), 2, 2, 5),
    }
    in_a_process = make_checkpoint.run

    def run(module, name, *words):
        if name != "evaluate":
            in_a_process(module, name, *words)
        elif (ended := CliRunner().invoke(app, [name, *map(str, words)])).exit_code:  # three times, hence here
            raise AssertionError(ended.output) from ended.exception

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_checkpoint, "run", run)
        patch.setattr(make_checkpoint, "TEXTURES", textures)
        patch.setattr(make_checkpoint, "PICTURE_SIZE", 64)
        patch.setattr(make_checkpoint, "CROPS_A_PHOTOGRAPH", 4)
        patch.setattr(make_checkpoint, "SCORED_SIZE", 48)
        settings = {"image-size": 32, "batch-size": 2, "max-steps": 2}
        patch.setattr(make_checkpoint, "TRAINING", settings)
        patch.setattr(make_checkpoint, "SAVE_STEPS", 1)
        patch.setattr(make_checkpoint, "EMBEDDED_CHECKPOINT", embedded)
        patch.setattr(make_checkpoint, "FALSE_ALARMS", 0.5)
        patch.setattr(make_checkpoint, "PIXEL_FALSE_ALARMS", 0.5)
        patch.setattr(sys, "argv", ["make_checkpoint", "--output-dir", str(root), "--install"])
        make_checkpoint.main()
        yield root


def test_checkpoint_is_half_precision_calibrated_and_loads(made):
    folder = made / NAME
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    pretrained = load_pretrained(folder)
    assert pretrained.processor.image_threshold != 0.5
    assert pretrained.processor.image_processor.size == {"height": 48, "width": 48}
    assert "at 48 x 48 pixels" in (card := (folder / "README.md").read_text()) and "families at 32 pixels" in card
    assert not list(made.glob("*.unfinished"))


def test_card_reports_what_the_evaluations_wrote(made):
    card = (made / NAME / "README.md").read_text()
    for name, told in checkpoint_card.DATA.items():
        document = json.loads((made / "evaluation" / name / "results.json").read_text())
        metrics = document["datasets"][0]["metrics"]
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {told} |")]
        assert f"| {100 * metrics['pixel_auroc']:.1f} |" in line
        assert f"| {100 * metrics['image_auroc']:.1f} |" in line
    assert "straw (test)" in card and "gravel (photographs)" in card
    assert "| that of another class, mean of 3 ways to give them |" in card
    assert "Of the photographs' classes, adaptation saw brick wall and gravel by name and texture" in card
    told, _, citation = card.partition("## Citation")
    assert "{" not in told and "@inproceedings{park2026moeclip" in citation
    threshold = json.loads((made / NAME / "processor_config.json").read_text())["image_threshold"]
    assert "## Use" in told and f"The thresholds ({threshold:.4g} for images" in told.partition("## Limits")[2]


def test_what_is_made_is_not_made_again(made, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(make_checkpoint, "run", refuse)
    make_checkpoint.main()


def folder_contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_checkpoint_takes_its_name_once_it_is_calibrated(made, tmp_path, monkeypatch):
    root = shutil.copytree(made, tmp_path / "cut", ignore=shutil.ignore_patterns(NAME))
    calls = []

    def run(*words):
        calls.append(words[1])
        assert not (root / NAME).exists()
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(make_checkpoint, "run", run)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint.make(root)
    assert (make_checkpoint.make(root) / "config.json").exists()
    assert calls == ["calibrate", "calibrate"]


def test_training_that_was_cut_off_goes_on_from_its_last_checkpoint(made, tmp_path, monkeypatch, command):
    root = shutil.copytree(made, tmp_path / "cut", ignore=shutil.ignore_patterns("trained"))
    steps = interrupt_second_step(monkeypatch)
    monkeypatch.setattr(make_checkpoint, "run", lambda module, *words: command(*map(str, words)))
    make_checkpoint.make(root)
    assert not (root / "trained" / "config.json").exists()
    make_checkpoint.make(root)
    assert steps == [0, 1, 1]
    unbroken, resumed = (load_file(path / "trained" / "model.safetensors") for path in (made, root))
    for name, weight in unbroken.items():
        np.testing.assert_allclose(resumed[name], weight, rtol=1e-4, atol=1e-6, err_msg=name)


def test_evaluation_of_other_weights_is_done_again(made, tmp_path, monkeypatch):
    root = shutil.copytree(made, tmp_path / "changed")
    weights = load_file(root / NAME / "model.safetensors")
    weights["text_adapter.projection.weight"] *= 2
    save_file(weights, root / NAME / "model.safetensors", metadata={"format": "pt"})
    results = root / "evaluation" / "photographs" / "results.json"
    evaluated = []

    def run(module, *words):
        evaluated.append(dict(zip(words[1::2], words[2::2], strict=True))["--data-dir"].name)

    monkeypatch.setattr(make_checkpoint, "run", run)
    make_checkpoint.make(root)
    assert evaluated == list(make_checkpoint.REPORTED)

    document = json.loads(results.read_text())
    document["datasets"][0]["settings"] |= describe_model(load_pretrained(root / NAME, dtype="float32"))
    results.write_text(json.dumps(document))
    evaluated.clear()
    make_checkpoint.make(root)
    assert evaluated == ["test", "test_unseen_defects"]

    document["datasets"][0]["settings"]["image_size"] = [32, 32]  # that it was trained at
    results.write_text(json.dumps(document))
    evaluated.clear()
    make_checkpoint.make(root)
    assert evaluated == list(make_checkpoint.REPORTED)


@pytest.mark.parametrize(
    ("name", "made_again"),
    [
        ("auxiliary", ["train", "calibrate"]),
        ("normal", ["calibrate"]),
        ("test", ["evaluate"]),
        ("photographs", ["evaluate"]),
    ],
)
def test_data_of_other_settings_is_rendered_anew_with_what_was_made_from_it(
    made, tmp_path, monkeypatch, name, made_again
):
    root = shutil.copytree(made, tmp_path / "changed")
    if name == "photographs":
        monkeypatch.setattr(make_checkpoint, "PHOTOGRAPH_SEED", 99)
    else:
        monkeypatch.setitem(make_checkpoint.TEXTURES, name, (*make_checkpoint.TEXTURES[name][:-1], 99))
    before = {path: path.read_bytes() for path in root.glob("*/*/test/*/*.png")}
    calls = []

    def run(module, *words):
        calls.append(words[0])
        if words[0] == "train":
            shutil.copytree(made / "trained", root / "trained")

    monkeypatch.setattr(make_checkpoint, "run", run)
    make_checkpoint.make(root)
    assert calls == made_again
    changed = {path.relative_to(root).parts[0] for path, content in before.items() if path.read_bytes() != content}
    assert changed == {name}
    assert not list(root.glob("*.unfinished"))


def test_data_is_rendered_anew_after_a_cut(made, tmp_path, monkeypatch):
    root = shutil.copytree(made, tmp_path / "cut", ignore=shutil.ignore_patterns(make_checkpoint.SETTINGS_FILE))
    write = make_checkpoint.write_photographs

    def cut(*args, **settings):
        write(*args, **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_checkpoint, "write_photographs", cut)
        make_checkpoint.write_data(root)
    assert not (root / "photographs").exists()
    make_checkpoint.write_data(root)
    for name in (*make_checkpoint.TEXTURES, "photographs"):
        rendered, expected = (
            {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for folder in (root / name, made / name)
        )
        assert rendered == expected


def test_installed_checkpoint_is_the_one_that_was_made(made):
    assert folder_contents(make_checkpoint.EMBEDDED_CHECKPOINT) == folder_contents(made / NAME)
    assert [path.name for path in make_checkpoint.EMBEDDED_CHECKPOINT.parent.iterdir()] == [NAME]


def test_embedded_checkpoint_stays_where_another_cannot_be_copied(tmp_path, monkeypatch):
    new, embedded = tmp_path / "new", tmp_path / "package" / NAME
    for folder in (new, embedded):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(str(folder))
    monkeypatch.setattr(make_checkpoint, "EMBEDDED_CHECKPOINT", embedded)

    def fill(source, target):
        target.mkdir()
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(shutil, "copytree", fill)
        make_checkpoint.install(new)
    assert (embedded / "config.json").read_text() == str(embedded)

    embedded.rename(f"{embedded}.old")  # as a call leaves it that was cut off between its two moves
    make_checkpoint.install(new)
    assert (embedded / "config.json").read_text() == str(new)
    assert [path.name for path in embedded.parent.iterdir()] == [NAME]


def test_what_is_reported_is_not_what_was_scored_before_the_settings_were_chosen():
    assert {TEXTURES[name][-1] for name in ("test", "test_unseen_defects")}.isdisjoint({4, 5})
    assert make_checkpoint.PHOTOGRAPH_SEED != 6


def test_other_names_are_evaluated_from_one_pass_as_one_evaluation_each_would(made):
    pretrained, rows = load_pretrained(made / NAME, device="cpu", dtype="float32"), load_folder(made / "test")
    classes = sorted(set(rows["prompt_name"]))
    namings = [dict(zip(classes, reversed(classes), strict=True)), dict.fromkeys(classes, "object")]
    found = make_checkpoint.evaluate_named(pretrained, rows, namings)
    assert found[0] != found[1]
    for naming, metrics in zip(namings, found, strict=True):
        names = [naming[name] for name in rows["prompt_name"]]
        renamed = rows.remove_columns("prompt_name").add_column("prompt_name", names).cast(rows.features)
        assert metrics == pytest.approx(evaluate(pretrained, renamed).metrics, abs=1e-6)


def test_photographs_are_crops_with_exact_masks_every_other_time(tmp_path, monkeypatch):
    crops = []

    def recorded(crop, *args):
        crops.append(crop.copy())
        return add_defect(crop, *args)

    monkeypatch.setattr(make_checkpoint, "add_defect", recorded)
    settings = make_checkpoint.data_settings("photographs") | {"size": 64, "crops": 4}
    make_checkpoint.write_photographs(tmp_path, **settings)
    rows = load_folder(tmp_path)
    assert sorted(set(rows["prompt_name"])) == ["brick wall", "grass", "gravel"]
    assert sum(rows["label"]) == len(rows) // 2 == len(crops)
    damaged = [row for row in rows if row["label"]]
    for row in damaged:
        image, mask = np.asarray(row["image"]).astype(int), np.asarray(row["mask"]) > 0
        differences = [np.abs(image - crop).max(axis=2) for crop in crops]
        difference = min(differences, key=np.count_nonzero)
        assert difference[~mask].max() <= TOLERANCE
        assert (difference[mask] > TOLERANCE).mean() > 0.5


def test_maps_of_the_plain_clip_are_smoothed_on_the_patch_grid(tokenizer, tmp_path, monkeypatch):
    """On a grid of 4 x 4 patches and 16 x 16 pixels every fifth pixel is a patch's own."""
    clip = start_model(write_plain_clip(tmp_path / "clip", tokenizer), get_recipe("paper"), image_size=16)
    rows = load_folder(write_folder(tmp_path / "data", images_a_state=1))
    grids = []

    class Metrics(AnomalyMetrics):
        def update(self, maps, *args):
            grids.append(maps[0, ::5, ::5].numpy())
            super().update(maps, *args)

    monkeypatch.setattr(experts, "AnomalyMetrics", Metrics)
    experts.score_plain_clip(*clip, rows)
    monkeypatch.setattr(experts, "smooth", lambda grid, domain: grid)
    experts.score_plain_clip(*clip, rows)
    assert len(grids) == 2 * len(rows)
    for smoothed, grid in zip(grids[: len(rows)], grids[len(rows) :], strict=True):
        assert np.ptp(grid) > 0.01
        expected = ndimage.gaussian_filter(grid, 1.0, mode="mirror", radius=3)
        np.testing.assert_allclose(smoothed, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (0.46, "The class name matters: with the name of another class the figures are 4.0 points lower, in the mean"),
        (0.54, "The right class name is no help: with the name of another class the figures are 4.0 points higher"),
        (0.496, "The class name does not matter: with the name of another class the figures are 0.4 points lower"),
        (0.504, "The class name does not matter: with the name of another class the figures are 0.4 points higher"),
    ],
)
def test_card_says_whether_the_class_name_matters_in_the_mean_of_all_figures(wrong, sentence):
    right = dict.fromkeys(checkpoint_card.SHOWN, 0.5)
    uneven = {
        name: wrong + shift for name, shift in zip(checkpoint_card.SHOWN, (0.03, 0.01, -0.02, -0.02), strict=True)
    }
    assert checkpoint_card.judge_names(right, uneven).startswith(sentence)


def test_card_says_on_which_data_adaptation_lowers_image_auroc():
    def figures(*adapted):
        documents = {
            name: {"datasets": [{"metrics": dict.fromkeys(checkpoint_card.SHOWN, value)}]}
            for name, value in zip(checkpoint_card.DATA, adapted, strict=True)
        }
        plain = {name: dict.fromkeys(checkpoint_card.SHOWN, 0.8) for name in checkpoint_card.DATA}
        return checkpoint_card.Figures(documents, plain, [], {})

    lowered = checkpoint_card.judge_image_scores(figures(0.9, 0.78, 0.7996))
    unseen = checkpoint_card.DATA["test_unseen_defects"]
    assert lowered.startswith(
        f"Adaptation lowers image AUROC against the plain CLIP on 1 of 3: {unseen} (80.0 to 78.0)."
    )
    assert "lowers image AUROC against the plain CLIP on none" in checkpoint_card.judge_image_scores(
        figures(0.9, 0.8, 0.8)
    )


def test_card_says_which_photographs_are_of_families_that_adaptation_saw():
    told = checkpoint_card.tell_photographs(["gravel", VALIDATION_FAMILIES[0]])
    assert "saw gravel by name and texture, as rendered families, and circuit board not at all" in told
    assert "saw none by name" in checkpoint_card.tell_photographs(["grass"])
