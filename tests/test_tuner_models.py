"""The tuner in models, as PEFT tests its own: injection, gradients, files, several adapters, types, refusals."""

import copy

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny_models import random_anchors, random_pixels, tiny_config, tiny_model
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from moeclip_hf import MoECLIPModel
from moeclip_hf.errors import CheckpointError
from moeclip_hf.tuner import MoELoraBlock, MoELoraConfig, MoELoraLayer, MoELoraLinear, record_outputs

BLOCKS = r"vision_model\.encoder\.layers\.(2|5)"
LINEAR = r"vision_model\.encoder\.layers\.\d\.self_attn\.(q|v)_proj"
TARGETS = pytest.mark.parametrize("targets", [BLOCKS, LINEAR], ids=["blocks", "linear layers"])
HEADS = ["text_adapter", "patch_projection", "depthwise_adapter"]


def tiny_clip() -> CLIPModel:
    config = tiny_config()
    towers = {tower: getattr(config, tower).to_dict() for tower in ("text_config", "vision_config")}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(projection_dim=config.projection_dim, **towers)).eval()


def tiny_base(**settings) -> MoECLIPModel:
    return tiny_model(moe_layers=[], **settings)


def config_for(targets: str | None = BLOCKS, **settings) -> MoELoraConfig:
    return MoELoraConfig(**({"r": 4, "target_modules": targets} | settings))


def randomise(model: nn.Module, adapter_name: str = "default", seed: int = 7) -> nn.Module:
    """Give an adapter weights as if it were trained, and projections that FOFS would never draw."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MoELoraLayer) and adapter_name in module.moe_lora_experts:
                for tensor in module.moe_lora_experts[adapter_name].state_dict().values():
                    tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def features(model: nn.Module) -> torch.Tensor:
    """What the vision tower of a CLIP makes of the images, whatever is wrapped around the CLIP."""
    return model.vision_model(random_pixels()).last_hidden_state


@torch.no_grad()
def maps(model: nn.Module) -> torch.Tensor:
    return model(random_pixels(), text_embeds=random_anchors()).anomaly_logits


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MoELoraLayer)]


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# Injection


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_clip, [f"vision_model.encoder.layers.{block}" for block in (1, 3, 5, 7)]),
        (lambda: tiny_clip().vision_model, [f"encoder.layers.{block}" for block in (1, 3, 5, 7)]),
        (lambda: tiny_base(feature_layers=[3, 8]), [f"vision_model.encoder.layers.{block}" for block in (2, 7)]),
    ],
    ids=["CLIP", "vision tower", "MoECLIP"],
)
def test_by_default_the_blocks_of_the_method_are_adapted_and_none_of_the_text_tower(make, expected):
    model = make()
    get_peft_model(model, config_for(None))
    assert adapted_names(model) == expected


def test_blocks_and_linear_layers_each_get_their_kind_of_layer():
    model = tiny_clip()
    get_peft_model(model, config_for(r"vision_model\.encoder\.layers\.(2|3\.mlp\.fc1)"))
    layers = [model.get_submodule(name) for name in adapted_names(model)]
    assert [type(layer) for layer in layers] == [MoELoraBlock, MoELoraLinear]


@TARGETS
@pytest.mark.parametrize("training", [True, False])
def test_what_is_put_into_a_model_is_in_its_mode(targets, training):
    model = get_peft_model(tiny_clip().train(training), config_for(targets))
    model.add_adapter("another", config_for(targets))
    assert {module.training for module in model.get_base_model().modules()} == {training}


@TARGETS
def test_only_the_experts_train_and_all_of_them_get_gradients(targets):
    model = randomise(get_peft_model(tiny_clip(), config_for(targets))).train()
    output = model.vision_model(random_pixels()).last_hidden_state
    (output * torch.randn(output.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        in_adapter = ".moe_lora_experts.default." in name
        assert parameter.requires_grad == in_adapter, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == in_adapter, name


@pytest.mark.parametrize("use_fofs", [True, False])
def test_projections_train_without_fofs_and_are_a_saved_buffer_with_it(use_fofs):
    model = get_peft_model(tiny_clip(), config_for(use_fofs=use_fofs))
    trained = {name.rpartition(".")[2] for name in trained_names(model)}
    assert trained == ({"lora_B", "weight"} if use_fofs else {"lora_A", "lora_B", "weight"})
    assert sum(key.endswith("lora_A") for key in get_peft_model_state_dict(model)) == 2


def test_trainable_parameters_are_counted_by_hand(capsys):
    clip = tiny_clip()
    total = sum(parameter.numel() for parameter in clip.parameters())
    model = get_peft_model(clip, config_for(num_experts=3))
    experts = 2 * (3 * 32 + 3 * 32 * 4)  # two blocks of width 32, with a router and B of rank 4 for each of 3 experts
    model.print_trainable_parameters()
    assert f"trainable params: {experts:,} || all params: {total + experts:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_class", "config", "targets"),
    [
        (ViTModel, ViTConfig, r"(encoder\.)?layers?\.1"),
        (Dinov2Model, Dinov2Config, r"encoder\.layer\.1"),
        (SiglipVisionModel, SiglipVisionConfig, r"(vision_model\.)?encoder\.layers\.1"),
    ],
)
def test_other_vision_transformers_can_be_adapted(model_class, config, targets):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = model_class(config(image_size=20, patch_size=4, **sizes)).eval()
    with torch.no_grad():
        before = model(random_pixels()).last_hidden_state
        adapted = randomise(get_peft_model(model, config_for(targets)))
        after = adapted(random_pixels()).last_hidden_state
        assert len(adapted_names(adapted)) == 1
        assert not torch.allclose(before, after, atol=0.01)
        with adapted.disable_adapter():
            assert torch.equal(adapted(random_pixels()).last_hidden_state, before)


# Files


@TARGETS
def test_the_file_holds_the_experts_alone_by_names_without_the_adapters(tmp_path, targets):
    model = randomise(get_peft_model(tiny_clip(), config_for(targets), adapter_name="visa"), "visa")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "visa" / "adapter_model.safetensors")
    expected = {}
    for name in adapted_names(model):
        for key, tensor in model.get_submodule(name).moe_lora_experts["visa"].state_dict().items():
            expected[f"{name}.moe_lora_experts.{key}"] = tensor
    assert saved.keys() == expected.keys()
    assert {key.split("moe_lora_experts.")[1] for key in saved} == {"router.weight", "lora_A", "lora_B"}
    for key, tensor in expected.items():
        assert torch.equal(saved[key], tensor)


@TARGETS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_survives_a_folder_with_projections_that_fofs_would_not_draw(tmp_path, targets, low_cpu_mem_usage):
    model = randomise(get_peft_model(tiny_clip(), config_for(targets)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(features(loaded), features(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_a_loaded_adapter_trains_on_where_it_is_told_to(tmp_path):
    get_peft_model(tiny_base(), config_for()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path, is_trainable=True)
    trained = trained_names(loaded)
    assert trained
    assert all(".moe_lora_experts.default." in name or ".modules_to_save.default." in name for name in trained)


def test_a_lacking_weight_is_reported(tmp_path):
    get_peft_model(tiny_clip(), config_for()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    lacking = next(key for key in weights if key.endswith("layers.5.moe_lora_experts.lora_A"))
    save_file(
        {key: tensor for key, tensor in weights.items() if key != lacking}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.warns(UserWarning, match=r"layers\.5\.moe_lora_experts\.default\.lora_A"):
        PeftModel.from_pretrained(tiny_clip(), tmp_path)


def test_transformers_own_interface_adds_saves_and_loads_adapters(tmp_path):
    model = tiny_clip()
    base = features(model)
    model.add_adapter(config_for(), adapter_name="visa")
    randomise(model, "visa")
    adapted = features(model)
    assert not torch.allclose(adapted, base, atol=0.01)
    model.disable_adapters()
    assert torch.equal(features(model), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)

    loaded = tiny_clip()
    report = loaded.load_adapter(str(tmp_path), adapter_name="of_another_name")
    assert not report.missing_keys and not report.unexpected_keys
    assert torch.equal(features(loaded.eval()), adapted)
    loaded.delete_adapter("of_another_name")
    assert torch.equal(features(loaded), base)


def test_the_heads_of_a_moeclip_go_with_the_adapter_by_default_and_not_if_told(tmp_path):
    model = randomise(get_peft_model(tiny_base(), config_for()))
    with torch.no_grad():
        for name in HEADS:
            for parameter in model.get_base_model().get_submodule(name).modules_to_save["default"].parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path)
    assert torch.equal(maps(loaded), maps(model))
    assert not torch.allclose(maps(loaded), maps(randomise(get_peft_model(tiny_base(), config_for()))), atol=0.01)

    without_heads = get_peft_model(tiny_base(), config_for(modules_to_save=[]))
    assert all("moe_lora_experts" in key for key in get_peft_model_state_dict(without_heads))


def test_an_adapter_can_be_injected_into_a_bare_model():
    model = inject_adapter_in_model(config_for(), tiny_clip())
    state = get_peft_model_state_dict(randomise(model))
    twin = inject_adapter_in_model(config_for(), tiny_clip(), state_dict=state)
    assert adapted_names(twin) == adapted_names(model)
    assert not set_peft_model_state_dict(twin, state).unexpected_keys
    assert torch.equal(features(twin.eval()), features(model))


# Several adapters


@TARGETS
def test_without_the_adapter_the_model_is_the_base_again(targets):
    base = features(tiny_clip())
    model = randomise(get_peft_model(tiny_clip(), config_for(targets)))
    assert not torch.allclose(features(model), base, atol=0.01)
    with model.disable_adapter():
        assert torch.equal(features(model), base)
    clip = model.unload()
    assert torch.equal(features(clip), base)
    assert clip.state_dict().keys() == tiny_clip().state_dict().keys()


def test_adapters_of_different_shapes_take_turns_and_can_be_deleted():
    visa, mvtec = config_for(), config_for(r"vision_model\.encoder\.layers\.(5|7)", r=2, num_experts=6)
    alone = {}
    for name, config in (("visa", visa), ("mvtec", mvtec)):
        alone[name] = features(randomise(get_peft_model(tiny_clip(), copy.deepcopy(config), name), name))

    model = randomise(get_peft_model(tiny_clip(), visa, "visa"), "visa")
    model.add_adapter("mvtec", mvtec)
    randomise(model, "mvtec")
    assert torch.equal(features(model), alone["visa"]), "a new adapter is not active"
    assert all(".visa." in name for name in trained_names(model))
    for name in ("mvtec", "visa", "mvtec"):
        model.set_adapter(name)
        assert torch.equal(features(model), alone[name])
        assert trained_names(model)
        assert all(f".{name}." in parameter for parameter in trained_names(model))

    with pytest.warns(UserWarning, match="Setting active adapter to visa"):
        model.delete_adapter("mvtec")
    assert torch.equal(features(model), alone["visa"])
    assert not any("mvtec" in key for key in model.state_dict())


def test_each_adapter_is_saved_to_a_folder_of_its_own(tmp_path):
    model = randomise(get_peft_model(tiny_base(), config_for(), "visa"), "visa")
    model.add_adapter("mvtec", config_for())
    randomise(model, "mvtec", seed=8)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "visa", adapter_name="first")
    loaded.load_adapter(str(tmp_path / "mvtec"), adapter_name="second")
    for ours, theirs in (("visa", "first"), ("mvtec", "second")):
        model.set_adapter(ours)
        loaded.set_adapter(theirs)
        assert torch.equal(maps(loaded), maps(model))


# Losses


def training_step(model: nn.Module):
    """One forward and backward pass."""
    masks = (torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(5)) > 0.7).long()
    output = model(random_pixels(), text_embeds=random_anchors(), labels=torch.tensor([0, 1]), masks=masks)
    output.loss.backward()
    return output


def as_adapter(full: MoECLIPModel, **settings) -> PeftModel:
    """The experts of a MoECLIP as an adapter, put together by hand."""
    base = tiny_base(**settings)
    base.load_state_dict({key: value for key, value in full.state_dict().items() if not key.startswith("moe_layers.")})
    model = get_peft_model(base, config_for(None, lora_dropout=full.config.lora_dropout))
    for experts, block in zip(full.moe_layers, full.config.moe_layers, strict=True):
        layer = base.vision_model.encoder.layers[block]
        layer.moe_lora_experts["default"].load_state_dict(experts.state_dict())
    return model


def test_all_terms_of_the_loss_and_their_gradients_are_those_of_the_full_model():
    full = tiny_model(lora_dropout=0.0).freeze_backbone()
    model = as_adapter(full).train()
    expected, actual = training_step(full.train()), training_step(model)
    assert set(actual.losses) == {"segmentation", "classification", "etf", "balance"}
    for name, term in expected.losses.items():
        assert term > 0
        assert torch.equal(actual.losses[name], term), name
    assert torch.equal(actual.loss, expected.loss)
    for experts, block in zip(full.moe_layers, full.config.moe_layers, strict=True):
        adapter = model.vision_model.encoder.layers[block].moe_lora_experts["default"]
        assert torch.equal(adapter.lora_B.grad, experts.lora_B.grad)
        assert torch.equal(adapter.router.weight.grad, experts.router.weight.grad)
    heads = model.get_base_model().patch_projection.modules_to_save["default"]
    assert torch.equal(heads.projections[0].weight.grad, full.patch_projection.projections[0].weight.grad)


@TARGETS
def test_gradient_checkpointing_changes_neither_losses_nor_gradients(targets):
    results = []
    for checkpointing in (False, True):
        model = randomise(get_peft_model(tiny_base(), config_for(targets, lora_dropout=0.0))).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        output = training_step(model)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and "text_adapter" not in n}
        results.append((output.losses, gradients))
    (plain_losses, plain), (losses, checkpointed) = results
    assert losses["etf"] > 0 and losses["balance"] > 0
    for name in losses:
        assert torch.equal(losses[name], plain_losses[name]), name
    for name in plain:
        assert plain[name].any(), name
        assert torch.equal(checkpointed[name], plain[name]), name


def test_linear_layers_within_the_blocks_bring_their_terms_too():
    model = randomise(get_peft_model(tiny_base(), config_for(LINEAR))).train()
    with record_outputs(model) as outputs:
        model.vision_model(random_pixels())
    assert len(outputs) == 2 * 8
    losses = training_step(get_peft_model(tiny_base(), config_for(LINEAR, lora_dropout=0.0)).train()).losses
    assert losses["etf"] > 0


def test_router_logits_are_given_on_request_in_the_order_of_the_blocks():
    full = tiny_model()
    expected = full(random_pixels(), text_embeds=random_anchors(), output_router_logits=True).router_logits
    model = as_adapter(full).eval()
    actual = model(random_pixels(), text_embeds=random_anchors(), output_router_logits=True).router_logits
    assert len(actual) == len(expected) == 4
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_an_adapted_model_compiles_without_a_break_in_its_graph():
    model = randomise(get_peft_model(tiny_base(), config_for()))
    expected = maps(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(maps(compiled), expected)


# Types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@TARGETS
def test_experts_are_float32_over_a_half_precision_model_unless_told_otherwise(tmp_path, dtype, targets):
    model = randomise(get_peft_model(tiny_base().to(dtype), config_for(targets)))
    experts = [tensor for key, tensor in model.state_dict().items() if "moe_lora" in key]
    assert {tensor.dtype for tensor in experts} == {torch.float32}
    assert maps(model).isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base().to(dtype), tmp_path)
    assert torch.equal(maps(loaded), maps(model)), "projections did not pass through the shorter type"

    in_half = get_peft_model(tiny_base().to(dtype), config_for(targets), autocast_adapter_dtype=False)
    assert {tensor.dtype for key, tensor in in_half.state_dict().items() if "moe_lora" in key} == {dtype}
    assert maps(randomise(in_half)).isfinite().all()


def test_fofs_stays_orthonormal_to_float32_over_a_half_precision_model():
    model = get_peft_model(tiny_base().bfloat16(), config_for())
    rows = model.vision_model.encoder.layers[2].moe_lora_experts["default"].lora_A.flatten(0, 1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16))


def test_a_step_under_autocast_has_finite_gradients():
    model = randomise(get_peft_model(tiny_base(), config_for())).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = training_step(model)
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Refusals


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_with_the_reason(merge):
    model = get_peft_model(tiny_clip(), config_for())
    with pytest.raises(ValueError, match="cannot be merged: a token's experts depend on the token"):
        getattr(model, merge)()
    assert adapted_names(model)


def test_a_target_within_a_target_is_refused():
    with pytest.raises(ValueError, match=r"matches '.*layers\.2' and, within it, '.*layers\.2\..*': name either"):
        get_peft_model(tiny_clip(), config_for(r"vision_model\.encoder\.layers\.2.*"))


@pytest.mark.parametrize(("first", "second"), [(LINEAR, BLOCKS), (BLOCKS, LINEAR)], ids=["around", "within"])
def test_a_target_around_or_within_what_another_adapter_adapts_is_refused(first, second):
    model = get_peft_model(tiny_clip(), config_for(first), "first")
    before = adapted_names(model)
    message = r"an adapter that is there match '.*layers\.2' and, within it, '.*layers\.2\.self_attn\.[qv]_proj': name"
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config_for(second))
    assert adapted_names(model) == before
    assert list(model.peft_config) == ["first"]


def test_models_without_a_default_ask_for_targets():
    with pytest.raises(
        ValueError, match="target_modules is not set, and there is no default for models of type 'vit'"
    ):
        get_peft_model(
            ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)), MoELoraConfig()
        )


def test_untrained_experts_of_the_base_are_pointed_out():
    base = MoECLIPModel(tiny_config())
    with pytest.warns(UserWarning, match=r"experts of its own that were never trained.*moe_layers=\[\]"):
        get_peft_model(base, config_for())


@pytest.mark.parametrize(
    ("base", "difference"),
    [
        (lambda: tiny_model(), r"moe_layers was \[\] and is \[1, 3, 5, 7\]"),
        (lambda: tiny_base(aggregation_sizes=[1, 3]), r"aggregation_sizes was \[1, 3, 5\] and is \[1, 3\]"),
        (tiny_clip, "the model is no MoECLIP"),
    ],
    ids=["experts", "window sizes", "plain CLIP"],
)
def test_an_adapter_is_not_loaded_over_a_base_with_other_settings(tmp_path, base, difference):
    get_peft_model(tiny_base(), config_for()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=difference):
        PeftModel.from_pretrained(base(), tmp_path)


def test_the_activation_below_an_adapter_is_compared_too(tmp_path):
    get_peft_model(tiny_base(), config_for()).save_pretrained(tmp_path)
    base = tiny_base()
    base.config.vision_config.hidden_act = "quick_gelu"
    with pytest.raises(CheckpointError, match=r"vision_config was \{'hidden_act': 'gelu'\} and is \{'hidden_act': 'q"):
        PeftModel.from_pretrained(base, tmp_path)
