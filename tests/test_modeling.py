"""The model against the reference values, against its plain form, and in the eight traps of parity."""

import pytest
import torch
from golden import CASES, golden_case, golden_position_embeddings
from plain_moeclip import plain_forward
from tiny_models import PATCH_SIZE, random_anchors, random_pixels, random_prompts, tiny_config, tiny_model
from torch.nn import functional as F

from moeclip_hf import MoECLIPConfig, MoECLIPModel
from moeclip_hf.modeling.vision_moeclip import MoECLIPQuickGELU, interpolate_position_embeddings


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return golden_case(request.param)


# Reference values


def test_anchors_equal_the_reference(case):
    with torch.no_grad():
        anchors = case.model.get_text_embeds(case.input_ids, prompt_groups=case.prompt_groups)
    for index, name in enumerate(case.classes):
        assert relative_error(anchors[index].T, case.outputs[f"text_embeds.{name}"]) < 1e-5


def test_embeddings_and_image_score_equal_the_reference(case):
    class_index = case.class_index([case.config["score_class"]] * 3)
    with torch.no_grad():
        outputs = case.model(
            case.inputs["pixel_values"],
            input_ids=case.input_ids,
            prompt_groups=case.prompt_groups,
            class_index=class_index,
        )
    for index, embeds in enumerate(outputs.patch_embeds):
        assert relative_error(embeds, case.outputs[f"patch_embeds.{index}"]) < 1e-5
    assert f"patch_embeds.{len(outputs.patch_embeds)}" not in case.outputs
    assert relative_error(outputs.image_embeds, case.outputs["image_embeds"]) < 1e-5
    assert relative_error((outputs.logits_per_image[:, 1] + 1) / 2, case.outputs["image_score"]) < 1e-5


@pytest.mark.parametrize(("side", "embeddings", "expected"), golden_position_embeddings())
def test_position_embeddings_equal_the_reference(side, embeddings, expected):
    assert relative_error(interpolate_position_embeddings(embeddings, side, side), expected) < 1e-5


@pytest.mark.parametrize("recipe", ["released", "paper"])
def test_losses_and_gradients_equal_the_reference(recipe):
    case = golden_case("default")
    model, expected = case.model.freeze_backbone(), case.training
    for layer in model.moe_layers:
        layer.dropout.p = 0.0
    model.train(recipe == "paper")
    outputs = model(
        case.inputs["pixel_values"],
        input_ids=case.input_ids,
        prompt_groups=case.prompt_groups,
        class_index=case.class_index(case.config["train_batch_classes"]),
        labels=expected["labels"],
        masks=expected["masks"],
    )
    segmentation = expected[f"{recipe}.focal"] + expected[f"{recipe}.dice"]
    assert relative_error(outputs.losses["segmentation"], segmentation) < 1e-5
    assert relative_error(outputs.losses["classification"], expected[f"{recipe}.cross_entropy"]) < 1e-5
    for name in ("etf", "balance"):
        assert outputs.losses[name].item() == pytest.approx(expected[f"{recipe}.{name}"].item(), rel=1e-5)
    assert relative_error(outputs.loss, expected[f"{recipe}.loss"]) < 1e-5

    outputs.loss.backward()
    checked = 0
    for key, gradient in released_gradients(model).items():
        assert relative_error(gradient, expected[f"{recipe}.grad.{key}"]) < 1e-4, key
        checked += 1
    assert checked == sum(key.startswith(f"{recipe}.grad.") for key in expected)


def released_gradients(model: MoECLIPModel) -> dict[str, torch.Tensor]:
    """Gradients by the names of the reference values."""
    gradients = {"text_adapter.0.fc.0.weight": model.text_adapter.projection.weight.grad}
    for index, projection in enumerate(model.patch_projection.projections):
        gradients[f"image_adapter.seg_proj.{index}.fc.weight"] = projection.weight.grad
    for index, layer in enumerate(model.moe_layers):
        prefix = f"image_adapter.moe_adapters.{index}"
        gradients[f"{prefix}.gate.weight"] = layer.router.weight.grad
        for expert, gradient in enumerate(layer.lora_B.grad):
            gradients[f"{prefix}.experts.{expert}.lora_B.weight"] = gradient
    adapter = model.depthwise_adapter
    gradients["image_adapter.det_proj.ln.weight"] = adapter.layer_norm.weight.grad
    gradients["image_adapter.det_proj.ln.bias"] = adapter.layer_norm.bias.grad
    gradients["image_adapter.det_proj.adapter.0.weight"] = adapter.depthwise.weight.grad
    gradients["image_adapter.det_proj.adapter.2.weight"] = adapter.pointwise.weight.grad.unsqueeze(-1)
    return gradients


# The fast forms against the plain ones, whatever the settings

SETTINGS = {
    "paper": {},
    "K does not divide d": {"num_experts": 5},
    "k = 1": {"num_experts_per_tok": 1},
    "k = K": {"num_experts_per_tok": 4},
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "separate projections": {"shared_projections": False},
    "LeakyReLU projections": {"projection_activation": "leaky_relu"},
    "separate LeakyReLU projections": {"shared_projections": False, "projection_activation": "leaky_relu"},
    "FOFS off": {"use_fofs": False},
    "PAA off": {"aggregation_sizes": [1]},
    "larger windows only": {"aggregation_sizes": [3, 7]},
    "taps unlike MoE layers": {"feature_layers": [1, 5], "moe_layers": [0, 2, 3]},
    "MoE behind the last tap": {"feature_layers": [3], "moe_layers": [1, 6]},
    "no MoE": {"moe_layers": []},
    "image from another tap": {"image_feature_layer": 4},
    "other weights": {"residual_weight": 0.6, "lora_alpha": 3.5, "lora_rank": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("size", [(20, 20), (12, 12), (16, 36)], ids=str)
def test_every_setting_equals_the_plain_computation(settings, size):
    model = tiny_model(**settings).double()
    pixel_values = random_pixels(2, *size).double()
    model.train()
    for layer in model.moe_layers:
        layer.dropout.p = 0.0
    with torch.no_grad():
        expected = plain_forward(model, pixel_values)
        outputs = model(pixel_values, text_embeds=random_anchors(), labels=torch.tensor([0, 1]))
    assert len(outputs.patch_embeds) == len(expected.patch_embeds) == model.config.num_maps
    for actual, plain in zip(outputs.patch_embeds, expected.patch_embeds, strict=True):
        assert relative_error(actual, plain) < 1e-5
    assert relative_error(outputs.image_embeds, expected.image_embeds) < 1e-5
    assert outputs.losses["etf"].item() == pytest.approx(expected.etf.item(), rel=1e-5, abs=1e-8)
    assert outputs.losses["balance"].item() == pytest.approx(expected.balance.item(), rel=1e-4, abs=1e-8)


def test_anomaly_logits_are_a_hundred_times_the_difference_of_cosines():
    model, anchors = tiny_model(), random_anchors(3)
    class_index = torch.tensor([2, 0])
    with torch.no_grad():
        outputs = model(random_pixels(), text_embeds=anchors, class_index=class_index)
    for image, index in enumerate(class_index):
        normal, abnormal = anchors[index]
        for number, embeds in enumerate(outputs.patch_embeds):
            expected = [100 * (torch.dot(patch, abnormal) - torch.dot(patch, normal)) for patch in embeds[image]]
            assert torch.allclose(outputs.anomaly_logits[image, number].flatten(), torch.stack(expected), atol=1e-4)
        cosines = torch.stack([outputs.image_embeds[image] @ anchor for anchor in (normal, abnormal)])
        assert torch.allclose(outputs.logits_per_image[image], cosines, atol=1e-6)


# The traps of parity


class QuickGELU(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def test_trap_1_activation_is_the_configurations_and_matters():
    pixel_values, anchors = random_pixels(), random_anchors()
    exact, quick = tiny_model(), tiny_model()
    for block in quick.vision_model.encoder.layers:
        block.mlp.activation_fn = QuickGELU()
    config = tiny_config()
    config.vision_config.hidden_act = "quick_gelu"
    configured = MoECLIPModel(config).eval()
    configured.load_state_dict(exact.state_dict())
    with torch.no_grad():
        a, b, c = (m(pixel_values, text_embeds=anchors).anomaly_logits for m in (exact, quick, configured))
    assert torch.allclose(b, c, atol=1e-4)
    assert (a - b).abs().max() > 1e-3


def test_trap_2_positions_are_not_resampled_as_transformers_clip_does():
    embeddings = torch.randn(1 + 24 * 24, 8, generator=torch.Generator().manual_seed(0))
    square = embeddings[1:].T.reshape(1, 8, 24, 24)
    plain = F.interpolate(square, size=(37, 37), mode="bicubic", align_corners=False).flatten(2)[0].T
    ours = interpolate_position_embeddings(embeddings, 37, 37)[1:]
    assert (ours - plain).abs().max() > 0.1


@pytest.mark.parametrize("padding", [0, 63])
def test_trap_3_anchors_read_the_first_end_of_text_whatever_the_padding(padding):
    model, prompts = tiny_model(), random_prompts(2)
    trimmed = prompts["input_ids"][:, :9]
    padded = F.pad(trimmed, (0, 5), value=padding)
    with torch.no_grad():
        expected = model.get_text_embeds(trimmed, prompt_groups=prompts["prompt_groups"])
        actual = model.get_text_embeds(padded, prompt_groups=prompts["prompt_groups"])
    assert torch.allclose(actual, expected, atol=1e-6)


def test_trap_4_without_paa_converted_checkpoints_embed_the_image_from_the_third_last_tap():
    converted = golden_case("no_paa").model
    assert converted.config.image_feature_layer == converted.config.feature_layers[-3]
    fresh = tiny_config(aggregation_sizes=[1])
    assert fresh.image_feature_layer == fresh.feature_layers[-1]


def test_trap_5_a_fresh_router_ties_and_still_sends_every_token_to_k_experts():
    model = MoECLIPModel(tiny_config())
    weights = model.moe_layers[0].router.weight
    assert weights.abs().sum() == 0
    with torch.no_grad():
        outputs = model(random_pixels(), text_embeds=random_anchors(), output_router_logits=True)
    assert torch.isfinite(outputs.anomaly_logits).all()
    assert all((logits == 0).all() for logits in outputs.router_logits)


def test_trap_6_a_fresh_expert_shrinks_its_block_and_has_an_exploding_first_gradient():
    model = MoECLIPModel(tiny_config()).freeze_backbone()
    layer = model.moe_layers[0]
    hidden_states = torch.randn(2, 7, 32)
    adapted = layer(hidden_states).hidden_states
    assert torch.allclose(adapted, 0.9 * hidden_states)
    adapted.square().sum().backward()
    first = layer.lora_B.grad.norm()
    layer.zero_grad()
    torch.nn.init.normal_(layer.lora_B, std=0.02)
    layer(hidden_states).hidden_states.square().sum().backward()
    assert first > 1000 * layer.lora_B.grad.norm()


# Sizes, types, batches


@pytest.mark.parametrize(("height", "width"), [(12, 12), (12, 40), (36, 20), (22, 31)])
def test_any_resolution_and_aspect(height, width):
    with torch.no_grad():
        outputs = tiny_model()(random_pixels(1, height, width), text_embeds=random_anchors())
    assert outputs.anomaly_logits.shape == (1, 12, height // PATCH_SIZE, width // PATCH_SIZE)
    assert torch.isfinite(outputs.anomaly_logits).all()


def test_an_image_scores_the_same_alone_and_in_a_batch():
    model, pixel_values, anchors = tiny_model(), random_pixels(5), random_anchors()
    with torch.no_grad():
        together = model(pixel_values, text_embeds=anchors)
        for index, image in enumerate(pixel_values):
            alone = model(image.unsqueeze(0), text_embeds=anchors)
            assert torch.allclose(alone.anomaly_logits[0], together.anomaly_logits[index], atol=1e-4)
            assert torch.allclose(alone.logits_per_image[0], together.logits_per_image[index], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_near_even_for_huge_activations(dtype):
    model, pixel_values, anchors = tiny_model(), random_pixels(), random_anchors()
    with torch.no_grad():
        model.vision_model.pre_layrnorm.weight.mul_(300)
        expected = model(pixel_values, text_embeds=anchors)
        outputs = model.to(dtype)(pixel_values.to(dtype), text_embeds=anchors.to(dtype))
    assert torch.isfinite(outputs.anomaly_logits).all()
    assert relative_error(outputs.anomaly_logits, expected.anomaly_logits) < (0.02 if dtype == torch.float16 else 0.12)


def test_half_precision_trains_without_a_non_finite_gradient():
    model = tiny_model().bfloat16().freeze_backbone().train()
    outputs = model(
        random_pixels().bfloat16(),
        text_embeds=random_anchors().bfloat16(),
        labels=torch.tensor([0, 1]),
        masks=torch.ones(2, 20, 20),
    )
    outputs.loss.backward()
    gradients = [parameter.grad for parameter in model.moe_layers.parameters()]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_anchors_may_be_of_another_type_than_the_model(dtype):
    model, pixel_values, anchors = tiny_model(), random_pixels(), random_anchors().to(dtype)
    with torch.no_grad():
        expected = model(pixel_values, text_embeds=anchors.float())
        outputs = model(pixel_values, text_embeds=anchors)
    torch.testing.assert_close(outputs.anomaly_logits, expected.anomaly_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.logits_per_image, expected.logits_per_image)


def test_cosines_and_anchors_are_not_rounded_under_autocast():
    model, pixel_values, prompts = tiny_model(), random_pixels(), random_prompts()
    with torch.no_grad():
        features = model.get_prompt_features(prompts["input_ids"])
        expected = model.pool_prompt_features(features, prompts["prompt_groups"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            anchors = model.pool_prompt_features(features, prompts["prompt_groups"])
            outputs = model(pixel_values, text_embeds=anchors)
    torch.testing.assert_close(anchors, expected)
    assert outputs.patch_embeds[0].dtype == torch.bfloat16  # the towers and projections do round
    direction = (anchors[:, 1] - anchors[:, 0]).squeeze(0)
    logits = 100 * torch.stack([embeds.float() @ direction for embeds in outputs.patch_embeds], dim=1)
    torch.testing.assert_close(outputs.anomaly_logits.flatten(2), logits)
    torch.testing.assert_close(outputs.logits_per_image, outputs.image_embeds.float() @ anchors[0].T)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation):
    model, pixel_values, anchors = tiny_model(), random_pixels(), random_anchors()
    with torch.no_grad():
        expected = model(pixel_values, text_embeds=anchors).anomaly_logits
        model.set_attn_implementation(implementation)
        assert model.vision_model.config._attn_implementation == implementation
        assert torch.allclose(model(pixel_values, text_embeds=anchors).anomaly_logits, expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_model_equals_the_eager_one():
    model, pixel_values, anchors = tiny_model(), random_pixels(), random_anchors()
    with torch.no_grad():
        expected = model(pixel_values, text_embeds=anchors).anomaly_logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(pixel_values, text_embeds=anchors).anomaly_logits, expected, atol=1e-4)


# Training


def test_gradient_checkpointing_changes_no_gradient():
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model(lora_dropout=0.0).freeze_backbone().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        outputs = model(
            random_pixels(), **random_prompts(), labels=torch.tensor([0, 1]), masks=random_pixels()[:, 0] > 1
        )
        outputs.loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name


def test_freezing_leaves_just_the_moeclip_parts_to_train():
    def trained(**settings):
        names = dict(MoECLIPModel(tiny_config(**settings)).freeze_backbone().named_parameters())
        return {name.split(".")[0] for name, p in names.items() if p.requires_grad}, names

    parts, names = trained()
    assert parts == {"moe_layers", "text_adapter", "patch_projection", "depthwise_adapter"}
    assert "moe_layers.0.lora_A" not in names
    _, names = trained(use_fofs=False)
    assert names["moe_layers.0.lora_A"].requires_grad


def test_auxiliary_losses_are_live_in_training_alone_and_reach_the_experts():
    model = tiny_model(lora_dropout=0.0).freeze_backbone()
    labels = torch.tensor([0, 1])
    assert model(random_pixels(), text_embeds=random_anchors(), labels=labels).losses["etf"] == 0
    model.train()
    losses = model(random_pixels(), text_embeds=random_anchors(), labels=labels).losses
    (losses["etf"] + losses["balance"]).backward()
    for layer in model.moe_layers:
        assert layer.lora_B.grad.abs().sum() > 0
        assert layer.router.weight.grad.abs().sum() > 0


def test_terms_of_the_loss_come_to_one_device_wherever_a_device_map_has_put_the_parts():
    model, anomaly_logits = tiny_model(), torch.zeros(2, 12, 5, 5, device="meta")
    losses = model._losses(anomaly_logits, torch.zeros(2, 2), [], torch.tensor([0, 1]), None)
    assert set(losses) == {"classification", "etf", "balance"}
    assert {term.device for term in losses.values()} == {anomaly_logits.device}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_training_step_has_the_gradients_of_the_eager_one():
    gradients = []
    for compiled in (False, True):
        model = tiny_model(lora_dropout=0.0).freeze_backbone().train()
        run = torch.compile(model, backend="eager") if compiled else model
        masks = torch.zeros(2, 20, 20)
        masks[1, :9] = 1
        run(random_pixels(), text_embeds=random_anchors(), labels=torch.tensor([0, 1]), masks=masks).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-3)


def test_nothing_is_recorded_below_the_first_adapted_block():
    model = tiny_model(moe_layers=(2, 5)).freeze_backbone().train()
    recorded = []
    for block in model.vision_model.encoder.layers:
        block.register_forward_hook(lambda block, inputs, output: recorded.append(output.requires_grad))
    model(random_pixels(), text_embeds=random_anchors(), labels=torch.tensor([0, 1]))
    assert recorded == [False] * 3 + [True] * 5


def test_prompt_features_computed_once_give_the_same_anchors():
    model, prompts = tiny_model(), random_prompts(3)
    groups = prompts["prompt_groups"]
    with torch.no_grad():
        features = model.get_prompt_features(prompts["input_ids"])
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
        anchors = model.pool_prompt_features(features[order], groups[order])
        assert torch.allclose(anchors, model.get_text_embeds(**prompts), atol=1e-6)
    assert torch.allclose(anchors.norm(dim=-1), torch.ones(3, 2), atol=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts_per_tok": 5}, ["num_experts_per_tok (5)", "num_experts (4)"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok (0)"]),
        ({"num_experts": -1}, ["num_experts (-1)"]),
        ({"lora_rank": 9}, ["lora_rank (9)", "num_experts (4)", "32"]),
        ({"lora_rank": 0}, ["lora_rank (0)"]),
        ({"residual_weight": 1.5}, ["residual_weight (1.5)"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha (nan)"]),
        ({"moe_layers": [3, 8]}, ["moe_layers", "[3, 8]", "8 blocks"]),
        ({"moe_layers": [3, 3]}, ["moe_layers", "ascend"]),
        ({"feature_layers": [0, 3]}, ["feature_layers", "[0, 3]"]),
        ({"feature_layers": []}, ["feature_layers is empty"]),
        ({"image_feature_layer": 5}, ["image_feature_layer (5)", "[2, 4, 6, 8]"]),
        ({"aggregation_sizes": [1, 2]}, ["aggregation_sizes ([1, 2])"]),
        ({"projection_activation": "relu"}, ["'relu'", "leaky_relu"]),
    ],
    ids=str,
)
def test_contradictory_settings_are_refused_with_both_values(settings, words):
    with pytest.raises(ValueError) as refusal:
        tiny_config(**settings)
    assert all(word in str(refusal.value) for word in words)


def test_configuration_defaults_are_the_papers_and_follow_the_depth():
    paper = MoECLIPConfig()
    assert (paper.moe_layers, paper.feature_layers) == ([5, 11, 17, 23], [6, 12, 18, 24])
    assert (paper.vision_config.hidden_size, paper.vision_config.image_size, paper.projection_dim) == (1024, 336, 768)
    base = MoECLIPConfig(vision_config={"num_hidden_layers": 12}, text_config={})
    assert (base.moe_layers, base.feature_layers) == ([2, 5, 8, 11], [3, 6, 9, 12])


def test_inputs_that_do_not_fit_are_refused_with_the_remedy():
    model, pixel_values = tiny_model(), random_pixels(2)
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model(text_embeds=random_anchors())
    with pytest.raises(ValueError, match="input_ids with prompt_groups"):
        model(pixel_values)
    with pytest.raises(ValueError, match="prompt_groups is missing"):
        model(pixel_values, input_ids=random_prompts()["input_ids"])
    with pytest.raises(ValueError, match="3 classes and 2 images: pass class_index"):
        model(pixel_values, text_embeds=random_anchors(3))
    with pytest.raises(ValueError, match=r"labels \(1,\) must be \(2,\)"):
        model(pixel_values, text_embeds=random_anchors(), labels=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"masks \(1, 20, 20\) must be \(2, H, W\)"):
        model(pixel_values, text_embeds=random_anchors(), masks=torch.zeros(1, 20, 20))
    with pytest.raises(ValueError, match="must name one of 3 classes"):
        model(pixel_values, text_embeds=random_anchors(3), class_index=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="hold no patch of 4 pixels"):
        model(pixel_values[..., :3], text_embeds=random_anchors())
    with pytest.raises(ValueError, match="must be \\(classes, 2, width\\)"):
        model(pixel_values, text_embeds=random_anchors()[0])
    with pytest.raises(ValueError, match="normal and abnormal sentences"):
        model.get_text_embeds(random_prompts()["input_ids"], prompt_groups=torch.zeros(16, dtype=torch.long))


def test_quick_gelu_is_clips_own_and_keeps_one_tensor_for_the_backward_pass():
    values = torch.linspace(-20, 20, 1001, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        actual = MoECLIPQuickGELU()(values)
    expected = values * torch.sigmoid(1.702 * values)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(output.sum(), values)[0] for output in (actual, expected)]
    torch.testing.assert_close(*gradients)
    assert len(saved) == 1
    config = tiny_config()
    config.vision_config.hidden_act = "quick_gelu"
    activations = {type(block.mlp.activation_fn) for block in MoECLIPModel(config).vision_model.encoder.layers}
    assert activations == {MoECLIPQuickGELU}
