"""Epochs, and runs that are resumed: what they draw, repeat, refuse and record."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import logged, tiny_trainer

from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.training import TrainingSamples, get_recipe, start_model, train, training_arguments
from moeclip_hf.training.samples import Draw


@pytest.mark.parametrize("at", [3, 6])
def test_resumed_run_repeats_the_losses_and_weights_of_an_unbroken_one(clip, rows, tmp_path, at):
    unbroken = tiny_trainer(clip, rows, tmp_path / "unbroken", save_steps=at, save_total_limit=None)
    unbroken.train()
    assert len(logged(unbroken, "loss")) == 12
    torch.manual_seed(99)
    resumed = tiny_trainer(clip, rows, tmp_path / "resumed", dataloader_num_workers=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / f"checkpoint-{at}"))
    assert logged(resumed, "loss") == logged(unbroken, "loss")
    for name, tensor in unbroken.moeclip.state_dict().items():
        assert torch.equal(resumed.moeclip.state_dict()[name], tensor), name


def test_a_finished_run_that_is_resumed_trains_no_further(clip, rows, tmp_path):
    recipe = get_recipe("paper", num_epochs=1)
    outputs = []
    for resume in (False, True):
        model, processor = start_model(clip, recipe)
        args = training_arguments(tmp_path / "run", recipe, max_steps=3, save_steps=3, dataloader_num_workers=0)
        train(model, processor, rows, recipe, args, resume=resume)
        outputs.append(load_file(tmp_path / "run" / "model.safetensors"))
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    assert (tmp_path / "run" / "training_curves.png").exists()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3"]


def test_frozen_projections_come_from_the_checkpoint_not_from_the_seed(clip, rows, tmp_path):
    first = tiny_trainer(clip, rows, tmp_path, save_steps=2, max_steps=2)
    first.train()
    second = tiny_trainer(clip, rows, tmp_path / "second")
    second.moeclip.moe_layers[0].lora_A.neg_()
    second._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert torch.equal(second.moeclip.moe_layers[0].lora_A, first.moeclip.moe_layers[0].lora_A)


def test_save_that_fails_leaves_no_checkpoint_and_the_last_one_stays(clip, rows, tmp_path, monkeypatch):
    trainer = tiny_trainer(clip, rows, tmp_path, save_steps=2, max_steps=4)
    save_state = trainer._save_rng_state

    def fail_at_four(folder):
        if trainer.state.global_step == 4:
            raise OSError("no space left")
        save_state(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", fail_at_four)
    with pytest.raises(MoECLIPError, match=r"step 4 cannot be saved \(no space left\)"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["checkpoint-2"]


def test_checkpoint_of_another_recipe_is_refused_with_both_values(clip, rows, tmp_path):
    tiny_trainer(clip, rows, tmp_path, save_steps=2, max_steps=2).train()
    other = tiny_trainer(clip, rows, tmp_path, get_recipe("paper", batch_size=4, learning_rate=0.1))
    with pytest.raises(CheckpointError, match=r"learning_rate 0.0005, not 0.1"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="seed 0, not 3"):
        tiny_trainer(clip, rows, tmp_path, seed=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="precision no, not bf16"):
        tiny_trainer(clip, rows, tmp_path, bf16=True).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "trained.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"moe_layers": [0, 2, 4, 6]}, r"moe_layers \[1, 3, 5, 7\], not \[0, 2, 4, 6\]"),
        ({"num_experts": 2}, "num_experts 4, not 2"),
        ({"image_size": 24}, "image_size {'height': 20, 'width': 20}, not {'height': 24, 'width': 24}"),
        ("clip", "clip digest [0-9a-f]{12}, not digest"),
        ("activation", "vision_config.hidden_act gelu, not relu"),
    ],
)
def test_checkpoint_of_another_model_is_refused_with_both_values(clip, rows, tmp_path, change, told):
    recipe = get_recipe("paper", batch_size=4)

    def run(resume: bool, max_steps: int, **settings) -> None:
        source = clip
        if resume and change == "activation":
            source = shutil.copytree(clip, tmp_path / "clip")
            config = json.loads((source / "config.json").read_text())
            config["vision_config"]["hidden_act"] = "relu"
            (source / "config.json").write_text(json.dumps(config))
        model, processor = start_model(source, recipe, **settings)
        if resume and change == "clip":
            with torch.no_grad():
                model.visual_projection.weight[0, 0] += 1
        args = training_arguments(tmp_path, recipe, max_steps=max_steps, save_steps=1, dataloader_num_workers=0)
        train(model, processor, rows, recipe, args, resume=resume)

    run(False, 1, image_size=20)
    settings = {"image_size": 20} | (change if isinstance(change, dict) else {})
    with pytest.raises(CheckpointError, match=told):
        run(True, 2, **settings)


def test_run_of_accumulated_batches_is_done_at_the_trainers_last_step(clip, rows, tmp_path):
    """24 images in batches of 4, 2 batches a step and 4 images over: 2 steps an epoch."""
    recipe = get_recipe("paper", batch_size=4, num_epochs=2)
    settings = {"save_steps": 1, "save_total_limit": None, "gradient_accumulation_steps": 2}
    trainer = tiny_trainer(clip, rows.select(range(20)), tmp_path, recipe, **settings)
    trainer.train()
    assert trainer.state.global_step == 4
    assert [trainer.is_done(str(tmp_path / f"checkpoint-{step}")) for step in (2, 3, 4)] == [False, False, True]


def drawn_by(monkeypatch) -> list[Draw]:
    """What trainings draw from now on, in their order."""
    draws: list[Draw] = []
    get = TrainingSamples.__getitem__
    monkeypatch.setattr(TrainingSamples, "__getitem__", lambda self, draw: draws.append(draw) or get(self, draw))
    return draws


def test_every_epoch_draws_every_row_once_in_an_order_of_its_own(clip, rows, tmp_path, monkeypatch):
    draws = drawn_by(monkeypatch)
    tiny_trainer(clip, rows, tmp_path, get_recipe("paper", batch_size=4, num_epochs=3), save_strategy="no").train()
    assert [epoch for epoch, _ in draws] == [0] * 24 + [1] * 24 + [2] * 24
    orders = [[row for epoch, row in draws if epoch == number] for number in range(3)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("after", [3, 4, 5])
def test_a_run_that_is_resumed_with_steps_split_otherwise_draws_what_an_unbroken_one_does(
    clip, rows, tmp_path, monkeypatch, after
):
    """23 images and 8 a step make 2 steps an epoch, be it in 4 batches, of which 3 are over, or in 1."""
    few, settings = rows.select(range(23)), {"save_steps": 1, "save_total_limit": None}
    recipes = [get_recipe("paper", batch_size=size, num_epochs=4) for size in (2, 8)]
    draws = drawn_by(monkeypatch)
    tiny_trainer(clip, few, tmp_path, recipes[0], gradient_accumulation_steps=4, **settings).train()
    unbroken = list(draws)
    assert len(unbroken) == 4 * 16
    draws.clear()
    resumed = tiny_trainer(clip, few, tmp_path, recipes[1], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{after}"))
    assert resumed.state.global_step == 8
    assert draws == unbroken[8 * after :]


def test_where_clip_and_data_lie_is_recorded_and_may_change_when_a_run_is_resumed(clip, rows, tmp_path):
    recipe = get_recipe("paper", batch_size=4)
    recorded = []
    for max_steps, base, dataset in ((1, str(clip), None), (2, "openai/clip", "ann/parts")):
        model, processor = start_model(clip, recipe)
        model.name_or_path = base
        args = training_arguments(tmp_path, recipe, max_steps=max_steps, save_steps=1, dataloader_num_workers=0)
        train(model, processor, rows, recipe, args, resume=True, dataset=dataset)
        recorded.append(json.loads((tmp_path / "recipe.json").read_text()))
    assert [one["base_model"] for one in recorded] == [clip.name, "openai/clip"]
    assert [one["selection"] for one in recorded] == ["the last of 1 steps", "the last of 2 steps"]
    assert [one["num_epochs"] for one in recorded] == [round(1 / 6, 4), round(2 / 6, 4)]
    assert [one["datasets"] for one in recorded] == [[rows[0]["dataset"]], ["ann/parts"]]
