"""Recipes: `released` against the reference values, `paper` against its own literal form."""

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from golden import golden_case
from tiny_models import random_pixels, random_prompts, tiny_config

from moeclip_hf import MoECLIPImageProcessor, MoECLIPModel
from moeclip_hf.data.records import Record, to_dataset
from moeclip_hf.errors import MoECLIPError
from moeclip_hf.training import MoECLIPTrainer, get_recipe, training_arguments
from moeclip_hf.training.recipes import Recipe, apply_recipe, draw_experts


class GoldenSamples(torch.utils.data.Dataset):
    """The reference batch, as a data set of its own."""

    def __init__(self, case):
        self.case = case
        self.dataset_names = ["reference"]
        self.prompt_names = case.classes
        labels = zip("abc", case.training["labels"].tolist(), case.config["train_batch_classes"], strict=True)
        self.rows = to_dataset([Record(path, None, label, path, *[name] * 5) for path, label, name in labels])

    def __len__(self):
        return 3

    def __getitem__(self, draw):
        case, row = self.case, draw.row
        return {
            "pixel_values": case.inputs["pixel_values"][row],
            "masks": case.training["masks"][row],
            "labels": case.training["labels"][row],
            "class_index": case.classes.index(case.config["train_batch_classes"][row]),
            "sample_seeds": row,
        }


def golden_processor(case):
    """Looks the sentences of a class up."""

    def encode(text, return_tensors):
        rows = case.prompt_groups // 2 == case.classes.index(text[0])
        prompts = {"input_ids": case.input_ids[rows], "prompt_groups": case.prompt_groups[rows] % 2}
        return SimpleNamespace(to=lambda device: prompts)

    encode.image_processor = MoECLIPImageProcessor()
    return encode


def test_released_recipe_reproduces_three_reference_steps(tmp_path):
    case = golden_case("default")
    recipe = get_recipe("released", batch_size=3, num_epochs=3)
    config = apply_recipe(case.model.config, recipe)
    model = MoECLIPModel(config)
    model.load_state_dict(case.model.state_dict())
    args = training_arguments(
        tmp_path, recipe, use_cpu=True, logging_steps=1, dataloader_num_workers=0, save_strategy="no"
    )
    trainer = MoECLIPTrainer(model, args, GoldenSamples(case), golden_processor(case), recipe)
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(case.training["released.three_step_losses"].tolist(), rel=1e-5)
    prefix, checked = "released.after_three_steps.", 0
    for key, weight in released_weights(model).items():
        assert (weight - case.training[prefix + key]).abs().max() < 5e-6, key
        checked += 1
    assert checked == sum(key.startswith(prefix) for key in case.training)


def released_weights(model):
    """What trains, by the names of the reference values."""
    weights = {"text_adapter.0.fc.0.weight": model.text_adapter.projection.weight}
    for index, projection in enumerate(model.patch_projection.projections):
        weights[f"image_adapter.seg_proj.{index}.fc.weight"] = projection.weight
    for index, layer in enumerate(model.moe_layers):
        prefix = f"image_adapter.moe_adapters.{index}"
        weights[f"{prefix}.gate.weight"] = layer.router.weight
        for expert, weight in enumerate(layer.lora_B):
            weights[f"{prefix}.experts.{expert}.lora_B.weight"] = weight
    adapter = model.depthwise_adapter
    weights["image_adapter.det_proj.ln.weight"] = adapter.layer_norm.weight
    weights["image_adapter.det_proj.ln.bias"] = adapter.layer_norm.bias
    weights["image_adapter.det_proj.adapter.0.weight"] = adapter.depthwise.weight
    weights["image_adapter.det_proj.adapter.2.weight"] = adapter.pointwise.weight.unsqueeze(-1)
    return weights


@pytest.mark.parametrize(
    ("name", "coefficient", "weight"),
    [("etf", "etf_loss_coef", "lora_B"), ("balance", "router_aux_loss_coef", "router.weight")],
)
def test_etf_and_balance_change_the_gradients_of_the_paper_recipe(name, coefficient, weight):
    def gradient(loss_of, **changes):
        recipe = get_recipe("paper", lora_dropout=0.0, expert_std=0.1, router_std=0.3, **changes)
        torch.manual_seed(0)
        model = MoECLIPModel(apply_recipe(tiny_config(), recipe)).double().freeze_backbone().train()
        draw_experts(model, recipe)
        masks = torch.zeros(2, 20, 20)
        masks[1, 5:9, 5:9] = 1
        labels = torch.tensor([0, 1])
        loss_of(model(random_pixels().double(), **random_prompts(2), labels=labels, masks=masks)).backward()
        return torch.stack([dict(model.named_parameters())[f"moe_layers.{i}.{weight}"].grad for i in range(4)])

    live = gradient(lambda outputs: outputs.loss)
    silenced = gradient(lambda outputs: outputs.loss, **{coefficient: 0.0})
    alone = gradient(lambda outputs: outputs.losses[name])
    assert alone.norm() > 1e-3
    torch.testing.assert_close(live - silenced, 0.01 * alone)


def test_learning_rates_are_warmed_up_and_halved_at_their_steps():
    recipe = get_recipe("paper", warmup_steps=4, halve_at=(10, 20))
    factors = [recipe.learning_rate_factor(step) for step in (0, 3, 9, 10, 19, 20)]
    assert factors == [0.25, 1, 1, 0.5, 0.5, 0.25]


def test_released_recipe_is_the_public_code_and_paper_the_papers_numbers():
    released, paper = get_recipe("released"), get_recipe("paper")
    assert (released.learning_rate, paper.learning_rate) == (5e-5, 5e-4)
    assert (released.etf_loss_coef, released.router_aux_loss_coef, released.lora_dropout) == (0, 0, 0)
    assert (paper.etf_loss_coef, paper.router_aux_loss_coef, paper.lora_dropout) == (0.01, 0.01, 0.05)
    assert paper.halve_at == released.halve_at == (16_000, 32_000)
    assert apply_recipe(tiny_config(), released).vision_config.hidden_act == "gelu"


def test_experts_are_drawn_alike_from_a_seed_with_the_recipes_deviations():
    recipe = get_recipe("paper", expert_std=0.1, router_std=0.5)
    first, second = (MoECLIPModel(tiny_config()) for _ in range(2))
    for model in (first, second):
        draw_experts(model, recipe, seed=3)
    assert all(torch.equal(a.lora_B, b.lora_B) for a, b in zip(first.moe_layers, second.moe_layers, strict=True))
    weights = torch.cat([layer.lora_B.flatten() for layer in first.moe_layers])
    assert math.isclose(weights.std().item(), 0.1, rel_tol=0.1)
    assert math.isclose(first.moe_layers[0].router.weight.std().item(), 0.5, rel_tol=0.3)


def test_senseless_values_are_refused():
    with pytest.raises(MoECLIPError, match=r"batch_size \(0\)"):
        get_recipe("paper", batch_size=0)
    with pytest.raises(MoECLIPError, match="no recipe 'papers'"):
        get_recipe("papers")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", [one.name for one in fields(Recipe) if "float" in str(one.type)])
def test_values_that_are_not_finite_are_refused(field, value):
    """NaN is neither below nor above any bound."""
    with pytest.raises(MoECLIPError, match=rf"^{field} \({value}\) must be finite"):
        get_recipe("paper", **{field: value})
