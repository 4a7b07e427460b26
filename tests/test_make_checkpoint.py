"""The command that makes the embedded checkpoint, at a size of seconds, and the card that it writes."""

import json
import sys

import pytest
from training_runs import write_plain_clip

from examples import checkpoint_card, make_checkpoint
from moeclip_hf.data import load_folder
from moeclip_hf.pretrained import load_pretrained


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """The output folder of a call that has run, on a CLIP that is there already."""
    root = tmp_path_factory.mktemp("checkpoint")
    write_plain_clip(root / "clip", tokenizer)
    textures = {
        "auxiliary": (("leather",), ("stain",), 2, 4, 1),
        "normal": (("leather",), ("stain",), 4, 0, 2),
        "test": (("straw", "felt"), ("hole",), 2, 2, 4),
        "test_unseen_defects": (("straw",), ("debris",), 2, 2, 5),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_checkpoint, "TEXTURES", textures)
        patch.setattr(make_checkpoint, "PICTURE_SIZE", 64)
        patch.setattr(make_checkpoint, "CROPS_A_PHOTOGRAPH", 4)
        patch.setattr(make_checkpoint, "IMAGE_SIZE", 32)
        settings = {"image-size": 32, "batch-size": 2, "max-steps": 2}
        patch.setattr(make_checkpoint, "TRAINING", settings)
        patch.setattr(make_checkpoint, "FALSE_ALARMS", 0.5)
        patch.setattr(make_checkpoint, "PIXEL_FALSE_ALARMS", 0.5)
        patch.setattr(sys, "argv", ["make_checkpoint", "--output-dir", str(root)])
        make_checkpoint.main()
        yield root


def test_checkpoint_is_half_precision_calibrated_and_loads(made):
    folder = made / make_checkpoint.EMBEDDED_CHECKPOINT.name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    pretrained = load_pretrained(folder)
    assert pretrained.processor.image_threshold != 0.5
    assert not list(made.glob("*.unfinished"))


def test_card_reports_what_the_evaluations_wrote(made):
    card = (made / make_checkpoint.EMBEDDED_CHECKPOINT.name / "README.md").read_text()
    for name, told in checkpoint_card.DATA.items():
        document = json.loads((made / "evaluation" / name / "results.json").read_text())
        metrics = document["datasets"][0]["metrics"]
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {told} |")]
        assert f"| {100 * metrics['pixel_auroc']:.1f} |" in line
        assert f"| {100 * metrics['image_auroc']:.1f} |" in line
    assert "straw (test)" in card and "gravel (photographs)" in card
    assert "{" not in card


def test_what_is_made_is_not_made_again(made, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(make_checkpoint, "run", refuse)
    make_checkpoint.main()


def test_photographs_are_crops_with_exact_masks_every_other_time(made):
    rows = load_folder(made / "photographs")
    assert sorted(set(rows["prompt_name"])) == ["brick wall", "grass", "gravel"]
    assert sum(rows["label"]) == len(rows) // 2


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (0.1, "The class name matters"),
        (0.9, "The class name does not matter here"),
    ],
)
def test_card_says_whether_the_class_name_matters(wrong, sentence):
    right = dict.fromkeys(checkpoint_card.SHOWN, 0.5)
    assert checkpoint_card.judge_names(right, {"another": dict.fromkeys(right, wrong)}).startswith(sentence)
    mixed = right | {"pixel_ap": 0.4}
    assert "pixel AP are lower, the others are not" in checkpoint_card.judge_names(right, {"another": mixed})
