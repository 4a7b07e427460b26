"""The ablation example: two variants trained for two steps on small textures, and what is written of them."""

import csv
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import random_anchors, tiny_model
from training_runs import interrupt_second_step, write_folder, write_plain_clip

from examples import ablation, ablation_report
from moeclip_hf.explanation import explain
from moeclip_hf.pretrained import Pretrained
from moeclip_hf.training import RECIPES, get_recipe, start_model


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ablation", *map(str, arguments)])
    ablation.main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """A CLIP, the options of a call that has run, its output folder, and the configurations that it trained."""
    folder = tmp_path_factory.mktemp("ablation")
    clip = write_plain_clip(folder / "clip", tokenizer)
    options = ["--clip", clip, "--seeds", "0", "--steps", "2", "--batch-size", "4", "--output-dir", folder / "out"]
    trained = []

    def start(*args, **settings):
        model, processor = start_model(*args, **settings)
        trained.append(model.config)
        return model, processor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "AUXILIARY_FAMILIES", ("leather",))
        patch.setattr(ablation, "TEST_FAMILIES", ("straw",))
        patch.setattr(ablation, "TEXTURE_SIZE", 40)
        patch.setattr(ablation, "start_model", start)
        call(patch, *options, "--variants", "full", "no-fofs-no-etf")
    return options, folder / "out", trained


def test_without_depthwise_convolution_each_patch_is_projected_alone(tokenizer, tmp_path):
    clip = write_plain_clip(tmp_path / "clip", tokenizer)
    model, _ = start_model(clip, get_recipe("paper"))
    ablation.leave_out_depthwise_convolution(model)
    adapter = model.freeze_backbone().depthwise_adapter
    patches = torch.randn(2, 9, model.config.vision_config.hidden_size)
    alone = torch.cat([adapter(patch) for patch in patches.split(1, dim=1)]).view(9, 2, -1).mean(dim=0)
    torch.testing.assert_close(adapter(patches), alone)
    adapter(patches).sum().backward()
    assert not adapter.depthwise.weight.grad.any()
    assert adapter.pointwise.weight.grad.any()


def read_lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_every_variant_is_trained_as_its_name_says(finished):
    _, _, (full, plain) = finished
    assert (full.use_fofs, full.etf_loss_coef, full.num_experts, full.lora_rank) == (True, 0.01, 4, 8)
    assert (plain.use_fofs, plain.etf_loss_coef, plain.num_experts, plain.lora_rank) == (False, 0.0, 4, 8)


def test_tables_hold_a_row_a_variant_with_the_papers_figures_beside(finished):
    _, folder, _ = finished
    lines = read_lines(folder)
    assert [line["variant"] for line in lines] == ["full", "no-fofs-no-etf"]
    assert all(line["versions"].keys() >= {"moeclip-hf", "torch"} for line in lines)
    with (folder / "ablation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["full", "no-fofs-no-etf"]
    for row, line in zip(rows, lines, strict=True):
        for name in ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_aupro", "expert_cosine"):
            assert float(row[f"{name}_mean"]) == line["figures"][name]
            assert row[f"{name}_std"] == ""
        by_block = [line["figures"][f"expert_cosine_block_{block}"] for block in (2, 4, 6, 8)]
        assert line["figures"]["expert_cosine"] == pytest.approx(np.mean(by_block))
        assert np.abs(by_block).max() <= 1
    assert [row["image_auroc_paper"] for row in rows] == ["0.953", "0.931"]
    assert [row["pixel_auroc_paper"] for row in rows] == ["0.922", "0.912"]
    assert [row["expert_cosine_paper"] for row in rows] == ["0.02", "0.45"]

    document = json.loads((folder / "ablation.json").read_text())
    assert [row["mean"]["pixel_ap"] for row in document["variants"]] == [line["figures"]["pixel_ap"] for line in lines]
    markdown = (folder / "ablation.md").read_text()
    for line in lines:
        cells = [f"{100 * line['figures'][name]:.1f}" for name in ("image_auroc", "pixel_auroc")]
        assert f"| {line['variant']} | 1 | {' | '.join(cells)} |" in markdown


def test_the_picture_has_a_bar_a_variant_and_a_dot_a_seed(finished):
    _, folder, _ = finished
    assert Image.open(folder / "ablation.png").width > 1000
    rows = json.loads((folder / "ablation.json").read_text())["variants"]
    panels = ablation_report.draw(rows).axes
    assert len(panels) == 5
    full, plain = (row["mean"]["pixel_auroc"] for row in rows)
    assert [bar.get_width() for bar in panels[1].patches] == pytest.approx([0, 100 * (plain - full)])
    dots, paper, _ = panels[1].lines
    assert list(dots.get_xdata()) == pytest.approx([0, 100 * (plain - full)])
    assert list(paper.get_xdata()) == pytest.approx([0, -1.0])
    assert list(panels[4].lines[1].get_xdata()) == [0.02, 0.45]


def test_what_is_done_is_not_done_again_under_another_name_either(finished, monkeypatch, capsys):
    options, folder, _ = finished
    before = (folder / "runs.jsonl").read_text()

    def refuse(*args):
        pytest.fail("a run was repeated")

    monkeypatch.setattr(ablation, "execute", refuse)
    call(monkeypatch, *options, "--variants", "full", "no-fofs-no-etf", "K=4", "r=8", "k=2")
    assert (folder / "runs.jsonl").read_text() == before
    rows = json.loads((folder / "ablation.json").read_text())["variants"]
    assert [row["variant"] for row in rows] == ["full", "no-fofs-no-etf", "K=4", "r=8", "k=2"]
    assert rows[2]["mean"] == rows[0]["mean"]
    assert "no-fofs-no-etf" in capsys.readouterr().out


@pytest.fixture
def another(finished, tmp_path):
    """Options of the same call, into a new folder that holds the textures alone."""
    options, folder, _ = finished
    shutil.copytree(folder / "textures", tmp_path / "textures")
    return [*options[:-1], tmp_path, "--variants", "full"]


@pytest.mark.parametrize("part", ["model.safetensors", "config.json"])
def test_runs_of_another_clip_of_the_same_name_are_not_reused(finished, another, monkeypatch, tmp_path, part):
    class RepeatedError(Exception):
        pass

    def repeat(*args):
        raise RepeatedError

    path = finished[0][1] / part
    stored = path.read_bytes()
    shutil.copy(finished[1] / "runs.jsonl", tmp_path)
    monkeypatch.setattr(ablation, "execute", repeat)
    call(monkeypatch, *another)
    try:
        if part == "config.json":
            path.write_text(json.dumps(json.loads(stored) | {"lora_alpha": 8}))
        else:
            weights = load_file(path)
            weights["visual_projection.weight"][0, 0] += 1
            save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(RepeatedError):
            call(monkeypatch, *another)
    finally:
        path.write_bytes(stored)


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ([], (5e-4, 1e-3)),
        (["--learning-rate", "2e-3"], (2e-3, 4e-3)),
        (["--expert-learning-rate", "0"], (5e-4, 0)),
        (["--learning-rate", "2e-3", "--expert-learning-rate", "1e-3"], (2e-3, 1e-3)),
    ],
)
def test_experts_learn_at_the_rate_given_or_at_the_recipes_ratio_to_the_other(monkeypatch, options, rates):
    runs = []
    monkeypatch.setitem(RECIPES, "paper", replace(RECIPES["paper"], expert_learning_rate=1e-3))
    monkeypatch.setattr(ablation, "ablate", lambda args: runs.append(ablation.Run.of("full", 0, args, "")))
    call(monkeypatch, "--clip", "x", *options)
    assert (runs[0].recipe.learning_rate, runs[0].recipe.expert_learning_rate) == rates


def test_a_training_that_was_cut_short_goes_on_from_its_last_checkpoint(finished, another, monkeypatch, tmp_path):
    steps = interrupt_second_step(monkeypatch)
    monkeypatch.setattr(ablation, "SAVE_STEPS", 1)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, *another)
    call(monkeypatch, *another)
    assert steps == [0, 1, 1]
    assert read_lines(tmp_path)[0]["figures"] == read_lines(finished[1])[0]["figures"]


def test_an_evaluation_that_was_cut_short_finds_the_trained_model(finished, another, monkeypatch, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ablation, "evaluate", interrupt)
        call(patch, *another)
    (unfinished,) = tmp_path.glob("unfinished-*")
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "train", None)
        call(patch, *another)
    assert read_lines(tmp_path)[0]["figures"] == read_lines(finished[1])[0]["figures"]
    assert not unfinished.exists()


def test_a_damaged_line_is_named(finished, another, monkeypatch, tmp_path):
    (tmp_path / "runs.jsonl").write_text((finished[1] / "runs.jsonl").read_text() + '{"run": ')
    with pytest.raises(SystemExit, match=r"runs.jsonl: line 3 is damaged"):
        call(monkeypatch, *another)


def test_cosines_are_those_that_explaining_each_image_gives(finished):
    model, processor = start_model(finished[0][1], get_recipe("paper"))
    images = np.random.default_rng(0).integers(0, 255, (3, 20, 20, 3), dtype=np.uint8)
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    with ablation.watched_cosines(model.eval()) as cosines, torch.inference_mode():
        model(pixels[:2], text_embeds=random_anchors(2))
        model(pixels[2:], text_embeds=random_anchors(1))
    for image, of_image in zip(images, zip(*cosines.values(), strict=True), strict=True):
        layers = explain(Pretrained(model, processor), image).layers
        assert list(of_image) == pytest.approx([layer.mean_output_cosine for layer in layers], abs=1e-6)
        assert list(cosines) == [layer.block for layer in layers]


def test_a_single_expert_has_no_cosine():
    with ablation.watched_cosines(model := tiny_model(num_experts=1, num_experts_per_tok=1)) as cosines:
        model(torch.zeros(1, 3, 20, 20), text_embeds=random_anchors())
    assert cosines == {2: [], 4: [], 6: [], 8: []}


def test_means_and_deviations_are_over_the_seeds_in_which_a_figure_is_defined():
    results = [{"run": {"seed": seed}, "figures": dict.fromkeys(ablation_report.FIGURES)} for seed in (0, 1, 2)]
    for result, value in zip(results, (0.5, 0.7, 0.9), strict=True):
        result["figures"]["pixel_ap"] = value
    summary = ablation_report.summarise("K=2", results)
    assert summary["seeds"] == [0, 1, 2]
    assert summary["mean"]["pixel_ap"] == pytest.approx(0.7)
    assert summary["std"]["pixel_ap"] == pytest.approx(0.2)
    assert summary["mean"]["image_auroc"] is None and summary["std"]["image_auroc"] is None
    assert summary["paper"] == {}
    table = ablation_report.figure_table([summary])
    assert table[1] == ["K=2", "3", "—", "—", "70.0 ± 20.0", "—", "—", "—", "—", "—"]


def test_sweeps_name_one_setting_each():
    assert ablation.variant_names("K=1,2,8") == ["K=1", "K=2", "K=8"]
    assert ablation.changes_of("K=1") == {"num_experts": 1, "num_experts_per_tok": 1}
    assert ablation.changes_of("K=8") == {"num_experts": 8, "num_experts_per_tok": 2}
    assert ablation.changes_of("k=1") == {"num_experts_per_tok": 1}
    assert ablation.changes_of("r=4") == {"lora_rank": 4}


def test_an_unknown_variant_is_named_with_all_there_are(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "--clip", "x", "--variants", "full", "no-lora")
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "no variant 'no-lora'; there are full, no-fofs, no-etf, no-fofs-no-etf, no-paa, no-depthwise, and K=N" in (
        message
    )


@pytest.mark.parametrize(
    ("variant", "message"),
    [("k=5", "variant k=5: num_experts_per_tok (5)"), ("K=8", "variant K=8: lora_rank (8) exceeds the 4 features")],
)
def test_a_variant_that_does_not_fit_is_refused_before_any_training(finished, monkeypatch, tmp_path, variant, message):
    options, _, trained = finished
    data = write_folder(tmp_path / "data", images_a_state=2)
    with pytest.raises(SystemExit, match=r"^ablation\.py: ") as stop:
        call(monkeypatch, *options, "--train-dir", data, "--test-dir", data, "--variants", "full", variant)
    assert message in str(stop.value)
    assert len(trained) == 2
