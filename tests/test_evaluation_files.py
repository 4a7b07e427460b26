"""What an evaluation leaves: earlier results, and settings that earlier versions recorded."""

import json
import os

from moeclip_hf.evaluation.checkpointing import list_differences
from moeclip_hf.evaluation.results import drop_repetitions, set_aside


def test_results_of_one_second_are_kept_apart(tmp_path):
    for number in (1, 2):
        (tmp_path / "results.json").write_text(str(number))
        os.utime(tmp_path / "results.json", (1_000_000_000, 1_000_000_000))
        set_aside(tmp_path)
    assert sorted(path.read_text() for path in tmp_path.glob("*/results.json")) == ["1", "2"]


def test_what_an_earlier_version_did_not_record_is_said():
    found, settings = {"weights": "a"}, {"weights": "a", "num_experts": 4, "lora_rank": 8}
    told = "2 settings that an earlier version did not record, such as num_experts"
    assert list_differences(found, settings) == told
    assert list_differences({"weights": "b"}, settings) == f"weights b, not a, {told}"
    assert list_differences(settings, settings) == ""


def test_repetitions_are_dropped_and_nothing_else_is(tmp_path):
    figures = {"datasets": [{"dataset": "parts", "pixel_auroc": 0.9}]}
    for name, document, others in (
        (".", figures | {"date": "today"}, ["results.csv"]),
        ("2026-11-28-120000", figures, ["results.csv"]),
        ("2026-11-28-120000-2", figures, ["results.csv", "parts_curves.png"]),  # a picture that is no more
        ("2026-11-28-130000", {"datasets": []}, ["results.csv"]),
        ("2026-11-28-notes", None, ["results.csv"]),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        for file in others:
            (tmp_path / name / file).touch()
        if document is not None:
            (tmp_path / name / "results.json").write_text(json.dumps(document))
    (tmp_path / "2026-11-28-140000").mkdir()  # of a call that was cut off
    (tmp_path / "2026-11-28-notes.txt").touch()
    drop_repetitions(tmp_path)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"2026-11-28-120000-2", "2026-11-28-130000", "2026-11-28-notes"}
    assert (tmp_path / "2026-11-28-notes.txt").exists()
