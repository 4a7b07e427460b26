"""Training runs: what is trained and saved, resuming, and what is told to the user."""

import errno
import json
import os
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import random_anchors, random_pixels
from training_runs import interrupt_second_step, logged, tiny_trainer, write_folder
from transformers import CLIPImageProcessorPil

from moeclip_hf.data import load_folder
from moeclip_hf.errors import CheckpointError, DatasetError, MoECLIPError
from moeclip_hf.pretrained import load_pretrained
from moeclip_hf.training import TrainingSamples, get_recipe, start_model, train, training_arguments
from moeclip_hf.training.samples import Draw


def test_only_moeclips_own_parts_change_and_are_saved(clip, rows, tmp_path):
    trainer = tiny_trainer(clip, rows, tmp_path, save_steps=3, max_steps=3)
    before = {name: tensor.clone() for name, tensor in trainer.moeclip.state_dict().items()}
    trainer.train()
    after = trainer.moeclip.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    parts = {"moe_layers", "text_adapter", "patch_projection", "depthwise_adapter"}
    assert {name.split(".")[0] for name in changed} == parts
    saved = load_file(tmp_path / "checkpoint-3" / "trained.safetensors")
    assert changed <= set(saved)
    assert set(saved) - changed == {f"moe_layers.{number}.lora_A" for number in range(4)}
    assert not [path for path in (tmp_path / "checkpoint-3").iterdir() if path.name == "model.safetensors"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_training_leaves_the_model_its_own_dropout_and_no_hooks(clip, rows, tmp_path, monkeypatch, interrupted):
    recipe = get_recipe("paper", batch_size=4, lora_dropout=0.5, expert_std=0.1)
    trainer = tiny_trainer(clip, rows, tmp_path, recipe, max_steps=2, save_strategy="no")
    if interrupted:
        interrupt_second_step(monkeypatch)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        trainer.train()
    model = trainer.moeclip.train()
    for num_images in (3, 4):
        pixels = random_pixels(num_images)
        with torch.no_grad():
            first, second = (model(pixels, text_embeds=random_anchors()).anomaly_logits for _ in range(2))
        assert not torch.equal(first, second)
    again = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_papers_recipe_keeps_the_exploding_first_gradient_out_of_adams_moments(clip, rows, tmp_path):
    lengths = {}
    for name in ("paper-literal", "paper"):
        trainer = tiny_trainer(clip, rows, tmp_path / name, get_recipe(name, batch_size=4), max_steps=1)
        trainer.train()
        moments = [trainer.optimizer.state[layer.lora_B]["exp_avg_sq"] for layer in trainer.moeclip.moe_layers]
        # After one step the second moment is (1 - beta2) times the squared gradient.
        lengths[name] = (torch.stack(moments).sum() / (1 - trainer.args.adam_beta2)).sqrt()
    assert lengths["paper-literal"] > 1e4
    assert lengths["paper"] < 1.001


def test_each_checkpoint_logs_what_the_experts_gain_on_the_last_batch(clip, rows, tmp_path):
    recipe = get_recipe("paper", batch_size=4, num_epochs=2, expert_std=0.02, residual_weight=0.5)
    trainer = tiny_trainer(clip, rows, tmp_path, recipe, save_steps=3, max_steps=6)
    trainer.train()
    gains = logged(trainer, "expert_gain")
    assert len(gains) == 2
    model = trainer.moeclip.eval()
    losses = []
    for residual_weight in (0.5, 0.0):
        for layer in model.moe_layers:
            assert layer.residual_weight == 0.5 or residual_weight == 0
            layer.residual_weight = residual_weight
        with torch.no_grad():
            losses.append(model(**trainer.batch).losses["segmentation"].item())
    assert gains[-1] == pytest.approx(losses[1] - losses[0], rel=1e-4, abs=1e-7)
    assert abs(gains[-1]) > 1e-4


@pytest.mark.parametrize("settings", [{"logging_steps": 1}, {"logging_steps": 100}])
def test_a_run_that_diverges_ends_and_keeps_its_last_finite_checkpoint(clip, rows, tmp_path, settings):
    recipe = get_recipe("paper-literal", batch_size=4, num_epochs=2, learning_rate=1e30, expert_learning_rate=1e30)
    trainer = tiny_trainer(clip, rows, tmp_path, recipe, save_steps=1, save_total_limit=1, **settings)
    with pytest.raises(MoECLIPError, match="at step 2 the weights are not finite any more"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    saved = load_file(tmp_path / "checkpoint-1" / "trained.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    with pytest.raises(MoECLIPError, match="not finite"):
        trainer.save_model()
    assert not (tmp_path / "config.json").exists()


def test_run_ends_in_a_complete_checkpoint_with_recipe_and_curves(clip, rows, tmp_path):
    recipe = get_recipe("paper", batch_size=4, num_epochs=1)
    model, processor = start_model(clip, recipe)
    args = training_arguments(tmp_path / "out", recipe, use_cpu=True, dataloader_num_workers=0, logging_steps=1)
    folder = train(model, processor, rows, recipe, args)
    loaded = load_pretrained(folder, device="cpu")
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    recipe_file = json.loads((folder / "recipe.json").read_text())
    assert recipe_file["learning_rate"] == 5e-4
    # Of folders the names alone: where they lie is nobody's affair.
    assert (recipe_file["base_model"], recipe_file["datasets"]) == (clip.name, [rows[0]["dataset"]])
    assert str(tmp_path.parent) not in (folder / "recipe.json").read_text()
    assert (recipe_file["selection"], recipe_file["num_epochs"]) == ("the last of 6 steps", 1)
    assert (folder / "training_curves.png").stat().st_size > 10_000
    assert not (folder / ".staging").exists()
    with pytest.raises(MoECLIPError, match="holds checkpoints of another run"):
        train(model, processor, rows, recipe, args)


def test_logs_tell_terms_speed_and_what_the_experts_do(clip, rows, tmp_path):
    trainer = tiny_trainer(clip, rows, tmp_path, max_steps=2, save_strategy="no")
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    weighted = entry["segmentation"] + entry["classification"] + 0.01 * (entry["etf"] + entry["balance"])
    assert entry["loss"] == pytest.approx(weighted, rel=1e-5)
    for block in (1, 3, 5, 7):
        loads = [entry[f"expert_load/block_{block}/{expert}"] for expert in range(4)]
        assert sum(loads) == pytest.approx(1)
    assert -1 <= entry["expert_cosine"] <= 1
    assert entry["images_per_second"] > 0


def test_logged_gradient_of_the_experts_is_that_before_clipping(clip, rows, tmp_path):
    norms = {}
    for name in ("paper-literal", "paper"):
        trainer = tiny_trainer(clip, rows, tmp_path / name, get_recipe(name, batch_size=4), max_steps=1)
        trainer.train()
        (norms[name],) = logged(trainer, "expert_grad_norm")
    assert norms["paper"] > 1e4
    assert norms["paper"] == pytest.approx(norms["paper-literal"], rel=1e-4)


@pytest.mark.parametrize("std", [0.0, 0.02])
def test_drift_is_the_turn_of_b_from_its_start_or_from_zero_since_the_first_step(clip, rows, tmp_path, std):
    recipe = get_recipe("paper", batch_size=4, num_epochs=2, expert_std=std)
    weights = []  # of B: as drawn, after one step, after four
    for steps in (0, 1, 4):
        trainer = tiny_trainer(clip, rows, tmp_path, recipe, max_steps=max(1, steps), save_strategy="no")
        if steps:
            trainer.train()
        weights.append(torch.cat([layer.lora_B.detach().double().flatten() for layer in trainer.experts]))
    drawn, stepped, end = weights
    expected = 1 - torch.nn.functional.cosine_similarity(drawn if std else stepped, end, dim=0).item()
    assert expected > 1e-4
    assert logged(trainer, "expert_drift")[-1] == pytest.approx(expected, rel=1e-3)


def test_expert_cosine_is_that_of_the_outputs(clip, rows, tmp_path):
    trainer = tiny_trainer(clip, rows, tmp_path, get_recipe("paper", batch_size=4, lora_dropout=0.0))
    layer = trainer.moeclip.moe_layers[2]
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    trainer.monitor._reset()
    batch = trainer.data_collator([trainer.train_dataset[Draw(0, row)] for row in range(4)])
    trainer.moeclip.train()
    with trainer.monitor.watching():
        trainer.compute_loss(trainer.moeclip, batch)
    outputs = torch.nn.functional.normalize(
        torch.stack([seen[0] @ a.T @ b.T for a, b in zip(layer.lora_A, layer.lora_B, strict=True)], dim=-2), dim=-1
    )
    pairs = [(outputs[..., i, :] * outputs[..., j, :]).sum(-1).mean() for i in range(4) for j in range(i)]
    assert trainer.monitor.cosines[2].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


def test_text_tower_runs_once_a_class_not_once_a_step(clip, rows, tmp_path):
    trainer = tiny_trainer(clip, rows, tmp_path, max_steps=2, save_strategy="no")
    assert trainer.prompt_features.shape[:2] == (2, 16)
    trainer.moeclip.text_model.forward = None  # calling it would fail
    trainer.train()


def test_samples_depend_on_seed_epoch_and_row_alone(clip, rows):
    _, processor = start_model(clip, get_recipe("paper"))
    samples = TrainingSamples(rows, processor, seed=3)
    again = TrainingSamples(rows, processor, seed=3)
    [again[Draw(0, row)] for row in range(5)]
    first = samples[Draw(1, 7)]
    assert torch.equal(first["pixel_values"], again[Draw(1, 7)]["pixel_values"])
    others = [samples[Draw(2, 7)], TrainingSamples(rows, processor, seed=4)[Draw(1, 7)]]
    assert len({other["sample_seeds"] for other in [first, *others]}) == 3


def test_image_and_mask_move_together_and_black_comes_into_view(clip, rows):
    _, processor = start_model(clip, get_recipe("paper"))
    samples = TrainingSamples(rows, processor, seed=0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (
        processor.image_processor.image_mean, processor.image_processor.image_std))  # fmt: skip
    abnormal = [row for row in range(len(rows)) if rows[row]["label"]]
    darkest = 1.0
    for row in abnormal:
        sample = samples[Draw(0, row)]
        pixels = sample["pixel_values"] * std + mean
        inner = torch.nn.functional.avg_pool2d(sample["masks"][None].float(), 3, 1, 1)[0] > 0.99
        if inner.any():
            assert pixels.mean(dim=0)[inner].min() > 0.7  # the bright square lies under its mask
        darkest = min(darkest, pixels.min().item())
    assert darkest == pytest.approx(0, abs=1e-5)


def test_anomalous_image_without_a_mask_is_named(clip, rows, tmp_path):
    _, processor = start_model(clip, get_recipe("paper"))
    root = write_folder(tmp_path)
    (root / "nut" / "masks" / "2.png").unlink()
    with pytest.raises(DatasetError, match=r"nut/abnormal/2.png is anomalous and has no mask"):
        TrainingSamples(load_folder(root), processor)
    with pytest.raises(DatasetError, match="no anomalous image"):
        TrainingSamples(rows.filter(lambda label: label == 0, input_columns="label"), processor)


def test_batch_larger_than_the_data_is_refused(clip, rows, tmp_path):
    with pytest.raises(MoECLIPError, match="a step takes 50 images and there are 24"):
        tiny_trainer(clip, rows, tmp_path, get_recipe("paper", batch_size=50))


def test_accumulated_batches_make_the_step_of_one_large_batch(clip, rows, tmp_path):
    """Exact where the objective is linear in the batch, which all terms but the balance are."""
    losses = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        recipe = get_recipe("paper", batch_size=batch_size, router_aux_loss_coef=0.0)
        trainer = tiny_trainer(
            clip, rows, tmp_path, recipe, max_steps=4, save_strategy="no", gradient_accumulation_steps=accumulated
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_activation_checkpointing_changes_no_loss(clip, rows, tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer = tiny_trainer(
            clip, rows, tmp_path, max_steps=3, save_strategy="no", activation_checkpointing=checkpointing
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_half_precision_stays_near_single(clip, rows, tmp_path):
    losses = []
    for settings in ({}, {"bf16": True}):
        trainer = tiny_trainer(clip, rows, tmp_path, max_steps=3, save_strategy="no", **settings)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_half_precision_that_a_cpu_would_pass_over_is_refused(clip, rows, tmp_path):
    with pytest.raises(MoECLIPError, match="fp16 takes a GPU: on a CPU train in bf16"):
        tiny_trainer(clip, rows, tmp_path, fp16=True)


def test_going_on_from_a_moeclip_keeps_its_experts(clip, rows, tmp_path):
    recipe = get_recipe("paper", batch_size=4)
    first, processor = start_model(clip, recipe)
    with torch.no_grad():
        first.moe_layers[0].lora_B.fill_(0.5)
    first.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    second, _ = start_model(tmp_path, recipe, seed=1)
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in first.state_dict().items())


def test_a_clip_from_before_safetensors_is_read_from_its_folder(clip, tmp_path):
    """OpenAI's of 336 pixels is one, and holds the indices of its positions beside its weights."""
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        tensors | {"text_model.embeddings.position_ids": torch.arange(20)[None]}, tmp_path / "pytorch_model.bin"
    )
    recipe = get_recipe("paper", batch_size=4)
    (new, _), (old, _) = start_model(clip, recipe), start_model(tmp_path, recipe)
    assert old.name_or_path == old.config.name_or_path == str(tmp_path)
    assert old.state_dict().keys() == new.state_dict().keys()
    assert all(torch.equal(old.state_dict()[name], tensor) for name, tensor in new.state_dict().items())


def test_a_clip_keeps_how_its_images_are_normalised_and_a_moeclip_its_domain_too(clip, tmp_path):
    recipe = get_recipe("paper", batch_size=4)
    shutil.copytree(clip, tmp_path / "clip")
    CLIPImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path / "clip")
    model, processor = start_model(tmp_path / "clip", recipe)
    assert processor.image_processor.size == {"height": 20, "width": 20}
    processor.domain, processor.image_threshold = "medical", 0.25
    model.save_pretrained(tmp_path / "moeclip")
    processor.save_pretrained(tmp_path / "moeclip")
    for source, size, domain in (("clip", 16, "industrial"), ("moeclip", 16, "medical"), ("moeclip", None, "medical")):
        _, found = start_model(tmp_path / source, recipe, image_size=size)
        assert (found.image_processor.image_mean, found.image_processor.image_std) == (
            [0.5, 0.4, 0.3],
            [0.2, 0.3, 0.4],
        )
        assert found.image_processor.size == {"height": size or 20, "width": size or 20}
        assert (found.domain, found.image_threshold) == (domain, 0.5)


def test_a_model_that_keeps_aspect_ratios_asks_for_a_size_where_shapes_differ(clip, rows, tmp_path):
    recipe = get_recipe("paper", batch_size=24)
    model, processor = start_model(clip, recipe)
    processor.image_processor.size = {"shortest_edge": 20}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write_folder(tmp_path / "data")
    args = training_arguments(tmp_path / "run", recipe, use_cpu=True, max_steps=1, dataloader_num_workers=0)
    train(*start_model(tmp_path, recipe), load_folder(tmp_path / "data"), recipe, args)
    strip = next((tmp_path / "data" / "nut" / "normal").iterdir())
    Image.open(strip).resize((40, 20)).save(strip)
    for workers in (0, 1):
        args = training_arguments(
            tmp_path / f"run{workers}", recipe, use_cpu=True, max_steps=1, dataloader_num_workers=workers
        )
        with pytest.raises(MoECLIPError, match="images of unlike shapes make no batch: name an image size"):
            train(*start_model(tmp_path, recipe), load_folder(tmp_path / "data"), recipe, args)
    assert start_model(tmp_path, recipe, image_size=16)[1].image_processor.size == {"height": 16, "width": 16}


def test_a_model_is_saved_to_another_file_system_too(clip, rows, tmp_path, monkeypatch):
    trainer = tiny_trainer(clip, rows, tmp_path / "run", max_steps=1)
    replace = os.replace

    def replace_within_a_disk(source, target):
        if (tmp_path / "run" in Path(source).parents) != (tmp_path / "run" in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_within_a_disk)
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert {"config.json", "model.safetensors", "recipe.json"} <= {p.name for p in (tmp_path / "elsewhere").iterdir()}
    assert load_pretrained(tmp_path / "elsewhere", device="cpu").model.config.moe_layers == [1, 3, 5, 7]


def test_a_model_cannot_be_saved_where_a_file_is(clip, rows, tmp_path):
    trainer = tiny_trainer(clip, rows, tmp_path / "run", max_steps=1)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(MoECLIPError, match=r"file: step 0 cannot be saved"):
        trainer.save_model(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"


def test_new_experts_that_no_tap_would_see_are_refused(clip):
    told = r"moe_layers \[5, 7\] \(from 0\) lie behind the last tap, 4 \(from 1\).*--moe-layers 1,3\)"
    with pytest.raises(CheckpointError, match=told):
        start_model(clip, get_recipe("paper"), feature_layers=[2, 4])
    start_model(clip, get_recipe("paper"), feature_layers=[2, 4], moe_layers=[1, 3])
    with pytest.raises(CheckpointError, match=r"name a later tap \(--feature-layers\)"):
        start_model(clip, get_recipe("paper"), feature_layers=[2, 4], moe_layers=[6])


def test_source_that_is_no_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="cannot be loaded to train on"):
        start_model(tmp_path / "nothing", get_recipe("paper"))


def test_going_on_from_a_moeclip_keeps_its_residual_weight_unless_told_otherwise():
    checkpoint = load_pretrained(device="cpu").model.config
    kept, _ = start_model("embedded", get_recipe("paper"))
    told, _ = start_model("embedded", get_recipe("paper", residual_weight=0.2))
    assert checkpoint.residual_weight != 0.1
    assert kept.config.residual_weight == checkpoint.residual_weight
    assert told.config.residual_weight == 0.2
