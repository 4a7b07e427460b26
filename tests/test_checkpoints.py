"""Checkpoints come back bit-equal, whatever way they went."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import random_anchors, random_pixels, random_prompts, tiny_config, tiny_model
from transformers import AutoModel, CLIPConfig, CLIPModel

from moeclip_hf import MoECLIPModel
from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.pretrained import load_pretrained
from moeclip_hf.stored_weights import refuse_non_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def shifted_model() -> MoECLIPModel:
    """Its FOFS projections are such as no code would draw again."""
    model = tiny_model()
    for number, layer in enumerate(model.moe_layers, start=1):
        layer.lora_A += 0.125 * number
    return model


def assert_bit_equal(actual: MoECLIPModel, expected: MoECLIPModel) -> None:
    a, b = actual.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype, name
        assert torch.equal(a[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_a_checkpoint_comes_back_bit_equal(tmp_path, dtype, max_shard_size):
    model = shifted_model().to(dtype)
    model.save_pretrained(tmp_path / "moeclip", max_shard_size=max_shard_size)
    shards = list((tmp_path / "moeclip").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size == "20KB")
    assert_bit_equal(AutoModel.from_pretrained(tmp_path / "moeclip"), model)
    assert_bit_equal(MoECLIPModel.from_pretrained(tmp_path / "moeclip", device_map={"": "cpu"}), model)


@pytest.mark.parametrize(
    "part",
    [
        "patch_projection",
        "vision_model",
        "vision_model.post_layernorm",
        "depthwise_adapter",
        "moe_layers",
        "text_model",
        "text_adapter",
    ],
)
def test_parts_may_rest_on_the_disk_until_they_are_needed(tmp_path, part):
    model = shifted_model()
    model.save_pretrained(tmp_path / "moeclip")
    parts = [name for name, _ in model.named_children() if name not in part] + ["logit_scale"]
    if "." in part:
        parts += [f"vision_model.{name}" for name, _ in model.vision_model.named_children()]
    device_map = {**dict.fromkeys(parts, "cpu"), part: "disk"}
    offloaded = MoECLIPModel.from_pretrained(
        tmp_path / "moeclip", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    prompts = random_prompts()
    with torch.no_grad():
        expected = model(random_pixels(), **prompts)
        actual = offloaded(random_pixels(), **prompts)
    assert torch.allclose(actual.anomaly_logits, expected.anomaly_logits, atol=1e-4)
    assert torch.allclose(actual.logits_per_image, expected.logits_per_image, atol=1e-6)


def test_weights_that_are_offloaded_are_not_asked_whether_they_are_finite_and_others_are():
    offloaded, rotten = torch.empty(2, 3, device="meta"), torch.tensor([1.0, float("nan")])
    refuse_non_finite("it", {"offloaded": offloaded, "sound": torch.zeros(2)}.items())
    with pytest.raises(CheckpointError, match=r"^it: holds NaN or infinity: 1 non-finite \(rotten\)"):
        refuse_non_finite("it", {"offloaded": offloaded, "rotten": rotten}.items())


@pytest.mark.parametrize("dtype", ["auto", "fp16", "load", "int8", torch.int8])
def test_a_type_that_no_model_computes_in_is_refused_with_those_that_one_can(dtype):
    with pytest.raises(MoECLIPError, match=r"^dtype \(.*\) must be one of float16, bfloat16, float32, float64\.$"):
        load_pretrained(device="cpu", dtype=dtype)


def test_a_model_is_drawn_in_half_precision_too():
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModel.from_config(tiny_config(), dtype=dtype)
        assert model.moe_layers[0].lora_A.dtype == dtype
        assert model.moe_layers[0].lora_A.count_nonzero() > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\)"),
        ({"moe_layers": [99]}, r"\[99\]"),
        ({"residual_weight": 7}, r"residual_weight \(7\)"),
        ({"projection_activation": "relu"}, "'relu'"),
        ({"aggregation_sizes": [2]}, r"\[2\]"),
    ],
)
def test_settings_given_on_loading_are_checked(tmp_path, settings, words):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        MoECLIPModel.from_pretrained(tmp_path, **settings)


def test_taps_given_on_loading_move_the_image_embedding_with_them(tmp_path):
    config = tiny_config()
    CLIPModel(CLIPConfig(**_towers(), projection_dim=config.projection_dim)).save_pretrained(tmp_path / "clip")
    config.save_pretrained(tmp_path / "moeclip")
    for folder in ("clip", "moeclip"):
        loaded = type(config).from_pretrained(tmp_path / folder, feature_layers=[1, 2])
        assert (loaded.feature_layers, loaded.image_feature_layer) == ([1, 2], 2)
    model = MoECLIPModel.from_pretrained(tmp_path / "clip", feature_layers=[1, 2], lora_rank=4)
    with torch.no_grad():
        assert model(random_pixels(), text_embeds=random_anchors()).anomaly_logits.shape[1] == 6


def test_fofs_projections_are_in_the_file(tmp_path):
    model = shifted_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for number, layer in enumerate(model.moe_layers):
            assert torch.equal(file.get_tensor(f"moe_layers.{number}.lora_A"), layer.lora_A)


def test_a_fresh_process_loads_it_by_name_and_scores_the_same(tmp_path):
    model = shifted_model()
    model.save_pretrained(tmp_path / "moeclip")
    with torch.no_grad():
        expected = model(random_pixels(), text_embeds=random_anchors()).anomaly_logits
    torch.save(expected, tmp_path / "expected.pt")
    code = (
        "import torch, moeclip_hf\n"
        "from transformers import AutoModel\n"
        "from tiny_models import random_anchors, random_pixels\n"
        "model = AutoModel.from_pretrained('moeclip')\n"
        "with torch.no_grad():\n"
        "    logits = model(random_pixels(), text_embeds=random_anchors()).anomaly_logits\n"
        "assert torch.equal(logits, torch.load('expected.pt'))\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment | _inherited(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def _inherited() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


@pytest.mark.parametrize("depth", [3, 8, 12])
def test_a_plain_clip_of_any_size_lacks_just_the_moeclip_parts(tmp_path, depth):
    config = tiny_config()
    vision = config.vision_config.to_dict() | {"num_hidden_layers": depth}
    plain = CLIPModel(CLIPConfig(vision_config=vision, text_config=config.text_config.to_dict(), projection_dim=24))
    plain.save_pretrained(tmp_path)
    model, report = MoECLIPModel.from_pretrained(tmp_path, output_loading_info=True)

    parts = ("moe_layers.", "text_adapter.", "patch_projection.", "depthwise_adapter.")
    assert report["missing_keys"] == {name for name in model.state_dict() if name.startswith(parts)}
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for layer in model.moe_layers:
        rows = layer.lora_A.flatten(0, 1)
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)
        assert layer.lora_B.count_nonzero() == 0
    with torch.no_grad():
        outputs = model.eval()(random_pixels(), text_embeds=random_anchors())
    assert torch.isfinite(outputs.anomaly_logits).all()
    assert outputs.anomaly_logits.std() > 0
    assert len(set(model.config.feature_layers)) == min(depth, 4)


def test_fresh_models_draw_projections_of_their_own(tmp_path):
    CLIPModel(CLIPConfig(**_towers())).save_pretrained(tmp_path)
    projections = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        projections.append(MoECLIPModel.from_pretrained(tmp_path).moe_layers[0].lora_A)
    assert torch.equal(projections[0], projections[1])
    assert not torch.equal(projections[0], projections[2])


def _towers() -> dict:
    config = tiny_config()
    return {"vision_config": config.vision_config.to_dict(), "text_config": config.text_config.to_dict()}


def test_the_configuration_survives_its_file(tmp_path):
    config = tiny_config(moe_layers=[2], feature_layers=[3, 5], aggregation_sizes=[1, 7], shared_projections=False)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "moeclip"
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()
