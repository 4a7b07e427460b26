"""Full checkpoints as adapters and back, and loading adapters with the base they need."""

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import random_pixels, random_prompts, tiny_config, tiny_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

from moeclip_hf import MoECLIPModel
from moeclip_hf.adapters import adapter_to_full, full_to_adapter, load_adapter
from moeclip_hf.errors import CheckpointError
from moeclip_hf.tuner import MoELoraConfig

# Settings by which MoECLIPs may differ; each has to survive both ways.
VARIANTS = {
    "default": {},
    "every setting its own": {
        "moe_layers": [0, 4],
        "feature_layers": [2, 3, 8],
        "image_feature_layer": 3,
        "num_experts": 3,
        "num_experts_per_tok": 1,
        "lora_rank": 2,
        "lora_alpha": 5,
        "lora_dropout": 0.2,
        "residual_weight": 0.4,
        "aggregation_sizes": [1, 5],
        "shared_projections": False,
        "projection_activation": "leaky_relu",
        "use_fofs": False,
        "etf_loss_coef": 0.5,
    },
}


def full_model(**settings: Any) -> MoECLIPModel:
    """A random MoECLIP over always the same CLIP, which is that of `clip_folder`."""
    model, clip = tiny_model(**settings), tiny_model()
    for tower in ("vision_model", "text_model", "visual_projection", "text_projection"):
        model.get_submodule(tower).load_state_dict(clip.get_submodule(tower).state_dict())
    model.logit_scale.data.copy_(clip.logit_scale)
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> tuple[torch.Tensor, ...]:
    result = model(random_pixels(), **random_prompts(), output_router_logits=True)
    return (result.anomaly_logits, result.logits_per_image, result.text_embeds, *result.router_logits)


def assert_same_outputs(actual: nn.Module, expected: nn.Module) -> None:
    for ours, theirs in zip(outputs(actual), outputs(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def clip_folder(tmp_path):
    """The plain CLIP of `full_model`, whose config says quick_gelu where the MoECLIP runs it with gelu."""
    full = full_model()
    towers = {name: getattr(full.config, name).to_dict() for name in ("text_config", "vision_config")}
    for tower in towers.values():
        tower["hidden_act"] = "quick_gelu"
    clip = CLIPModel(CLIPConfig(projection_dim=full.config.projection_dim, **towers))
    clip.load_state_dict({key: value for key, value in full.state_dict().items() if key in clip.state_dict()})
    clip.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_model_becomes_an_adapter_and_full_again_to_the_bit(settings, dtype):
    full = full_model(**settings).to(dtype)
    adapted = full_to_adapter(full)
    assert_same_outputs(adapted, full)
    again = adapter_to_full(adapted)
    assert type(again) is MoECLIPModel
    assert_same_outputs(again, full)
    state, expected = again.state_dict(), full.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) and state[key].dtype == expected[key].dtype for key in expected)
    assert again.config.to_dict() == full.config.to_dict()


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_both_ways_through_folders_are_exact_to_the_bit(tmp_path, settings, clip_folder):
    full = full_model(**settings)
    full_to_adapter(full, base=str(clip_folder)).save_pretrained(tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = load_adapter(tmp_path / "adapter")
    assert_same_outputs(loaded, full)
    adapter_to_full(loaded).save_pretrained(tmp_path / "full")
    assert_same_outputs(MoECLIPModel.from_pretrained(tmp_path / "full").eval(), full)


def test_float32_experts_over_a_base_in_half_precision_become_a_full_model_to_the_bit(tmp_path, clip_folder):
    full_to_adapter(full_model(), base=str(clip_folder)).save_pretrained(tmp_path / "adapter")
    adapted = load_adapter(tmp_path / "adapter", dtype=torch.bfloat16)
    full = adapter_to_full(adapted)
    assert {experts.lora_B.dtype for experts in full.moe_layers} == {torch.float32}
    assert_same_outputs(full, adapted)


def test_the_backbone_is_shared_and_what_trains_is_not():
    full = full_model()
    before = {key: tensor.clone() for key, tensor in full.state_dict().items()}
    adapted = full_to_adapter(full)
    weight = adapted.vision_model.encoder.layers[0].mlp.fc1.weight
    assert weight.data_ptr() == full.vision_model.encoder.layers[0].mlp.fc1.weight.data_ptr()
    assert not weight.requires_grad and full.vision_model.encoder.layers[0].mlp.fc1.weight.requires_grad
    again = adapter_to_full(adapted)
    with torch.no_grad():
        for model in (adapted, again):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            assert len(trained) == 4 * 2 + 1 + 4 + 4, "experts, text adapter, projections, depth-wise adapter"
            for parameter in trained:
                parameter.add_(1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in full.state_dict().items())
    assert full.config.moe_layers == [1, 3, 5, 7]


def test_an_adapter_trained_on_becomes_the_full_model_of_its_new_weights():
    adapted = full_to_adapter(full_model()).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    labels, masks = torch.tensor([0, 1]), torch.ones(2, 20, 20)
    adapted(random_pixels(), **random_prompts(), labels=labels, masks=masks).loss.backward()
    optimizer.step()
    full = adapter_to_full(adapted.eval())
    assert_same_outputs(full, adapted)
    assert not torch.equal(outputs(full)[0], outputs(full_model())[0])


def test_one_of_several_adapters_is_picked_by_its_name():
    visa, mvtec = full_model(moe_layers=[1, 5]), full_model(moe_layers=[3], residual_weight=0.3)
    adapted = full_to_adapter(visa, adapter_name="visa")
    adapted.add_adapter("mvtec", full_to_adapter(mvtec).peft_config["default"])
    donor = full_to_adapter(mvtec, adapter_name="mvtec").state_dict()
    adapted.load_state_dict({key: tensor for key, tensor in donor.items() if ".mvtec." in key}, strict=False)
    assert_same_outputs(adapter_to_full(adapted, "mvtec"), mvtec)
    assert_same_outputs(adapter_to_full(adapted), visa)
    with pytest.raises(CheckpointError, match=r"no MoE-LoRA adapter 'btad'; there are \['mvtec', 'visa'\]"):
        adapter_to_full(adapted, "btad")


def test_a_fresh_adapter_over_a_plain_clip_can_become_a_full_model(clip_folder):
    torch.manual_seed(0)
    base = MoECLIPModel.from_pretrained(clip_folder, moe_layers=[])
    adapted = get_peft_model(base, MoELoraConfig()).eval()
    full = adapter_to_full(adapted)
    assert full.config.moe_layers == [1, 3, 5, 7]
    assert_same_outputs(full, adapted)


# What a full checkpoint cannot hold


def test_a_model_without_experts_makes_no_adapter():
    with pytest.raises(CheckpointError, match=r"no experts \(moe_layers is empty\)"):
        full_to_adapter(full_model(moe_layers=[]))


@pytest.mark.parametrize(
    ("make_base", "targets", "message"),
    [
        (lambda: full_model(moe_layers=[2]), None, r"experts of its own, behind blocks \[2\]"),
        (lambda: full_model(moe_layers=[]), ["fc1"], r"text_model\.encoder\.layers\.0\.mlp\.fc1 is adapted"),
        (lambda: full_model(moe_layers=[]), ["layers.1"], r"text_model\.encoder\.layers\.1 is adapted"),
        (lambda: CLIPModel(CLIPConfig(**plain_towers())), None, "CLIPModel has not the heads"),
    ],
    ids=["experts twice", "linear layers", "text blocks", "no heads"],
)
def test_what_is_no_moeclip_stays_an_adapter(make_base, targets, message):
    adapted = get_peft_model(make_base(), MoELoraConfig(r=4, target_modules=targets))
    with pytest.raises(CheckpointError, match=message):
        adapter_to_full(adapted)


def plain_towers() -> dict[str, dict]:
    return {name: getattr(tiny_config(), name).to_dict() for name in ("text_config", "vision_config")}


# Loading


def test_an_adapter_loads_over_a_full_checkpoint_as_well(tmp_path):
    full, other = full_model(), full_model()
    with torch.no_grad():
        for experts in other.moe_layers:
            experts.lora_B.zero_()
        other.text_adapter.projection.weight.zero_()
    other.save_pretrained(tmp_path / "other")
    full_to_adapter(full, base="nowhere/to-be-found").save_pretrained(tmp_path / "adapter")
    assert_same_outputs(load_adapter(tmp_path / "adapter", base=tmp_path / "other"), full)


def test_one_clip_in_memory_serves_two_adapters_chosen_per_call(tmp_path, clip_folder):
    full = {name: full_model(moe_layers=blocks) for name, blocks in (("visa", [1, 5]), ("mvtec", [3, 7]))}
    with torch.no_grad():
        for parameter in full["mvtec"].text_adapter.parameters():
            parameter.mul_(-0.5)
    for name, model in full.items():
        full_to_adapter(model, base=str(clip_folder)).save_pretrained(tmp_path / name)

    served = load_adapter(tmp_path / "visa", adapter_name="visa")
    tensors = len(list(served.get_base_model().vision_model.encoder.layers[0].parameters()))
    served.load_adapter(str(tmp_path / "mvtec"), adapter_name="mvtec")
    assert len(list(served.get_base_model().vision_model.encoder.layers[0].parameters())) == tensors
    for name in ("visa", "mvtec", "visa", "mvtec"):
        served.set_adapter(name)
        assert_same_outputs(served, full[name])


def test_what_is_loaded_is_told_the_type_and_whether_it_trains(tmp_path, clip_folder):
    full_to_adapter(full_model(), base=str(clip_folder)).save_pretrained(tmp_path / "adapter")
    model = load_adapter(tmp_path / "adapter", is_trainable=True, dtype=torch.bfloat16)
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert not load_adapter(tmp_path / "adapter").training


def test_an_adapter_over_weights_on_the_disk_is_refused_with_the_remedy(tmp_path, clip_folder):
    full = full_model()
    full_to_adapter(full, base=str(clip_folder)).save_pretrained(tmp_path / "adapter")
    parts = [name for name, _ in full.named_children()]
    device_map = {**dict.fromkeys([*parts, "logit_scale"], "cpu"), "text_model": "disk"}
    with pytest.raises(CheckpointError, match="weights on the disk: name other devices in device_map, or make a full"):
        load_adapter(tmp_path / "adapter", device_map=device_map, offload_folder=tmp_path / "offload")


def test_loading_says_nothing_about_heads_that_the_adapter_brings(tmp_path, clip_folder, caplog, capfd):
    full_to_adapter(full_model(), base=str(clip_folder)).save_pretrained(tmp_path / "adapter")
    capfd.readouterr()
    load_adapter(tmp_path / "adapter")
    assert "MISSING" not in capfd.readouterr().err + caplog.text


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be read as an adapter: Can't find 'adapter_config\.json'"):
        load_adapter(tmp_path)


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    get_peft_model(full_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not a MoE-LoRA adapter made over a MoECLIP"):
        load_adapter(tmp_path)


def test_an_adapter_that_names_no_base_asks_for_one(tmp_path):
    full_to_adapter(full_model()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not name its base: pass base"):
        load_adapter(tmp_path)


def test_a_base_that_is_not_there_is_named(tmp_path):
    full_to_adapter(full_model(), base="nowhere/to-be-found").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"^nowhere/to-be-found: cannot be loaded as the base of") as error:
        load_adapter(tmp_path)
    assert "\n" not in str(error.value)


def test_a_base_is_loaded_in_the_revision_that_the_adapter_names(tmp_path, clip_folder, monkeypatch):
    adapter = full_to_adapter(full_model(), base="ann/clip")
    adapter.peft_config["default"].revision = "v1"
    adapter.save_pretrained(tmp_path)
    asked = []

    def fetch(base, revision=None):
        asked.append((base, revision))
        return clip_folder

    monkeypatch.setattr("moeclip_hf.adapters.fetch_clip", fetch)
    assert load_adapter(tmp_path).get_base_model().name_or_path == "ann/clip"
    load_adapter(tmp_path, base="ann/other")
    assert asked == [("ann/clip", "v1"), ("ann/other", None)]


def test_a_base_that_lacks_weights_of_clip_is_refused(tmp_path, clip_folder):
    full_to_adapter(full_model(), base=str(clip_folder)).save_pretrained(tmp_path / "adapter")
    clip = CLIPModel.from_pretrained(clip_folder)
    clip.save_pretrained(clip_folder, state_dict={k: v for k, v in clip.state_dict().items() if ".fc1." not in k})
    with pytest.raises(CheckpointError, match=r"lacks 20 of the weights of a CLIP \(text_model\.encoder\.layers\.0"):
        load_adapter(tmp_path / "adapter")


def test_the_other_way_to_load_over_the_wrong_base_names_the_right_one(tmp_path, clip_folder):
    full_to_adapter(full_model(), base=str(clip_folder)).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_settings"]["moe_layers"] == []
    with pytest.raises(CheckpointError, match=r"moe_layers was \[\] and is .*moeclip_hf\.adapters\.load_adapter"):
        MoECLIPModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="hidden_act"):
        PeftModel.from_pretrained(MoECLIPModel.from_pretrained(clip_folder, moe_layers=[]), tmp_path / "adapter")
