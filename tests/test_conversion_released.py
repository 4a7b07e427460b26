"""Released adapters come in with what their shapes tell, and go out bit-equal."""

import pytest
import torch
from golden import CASES, golden_case, golden_files, golden_settings
from plain_clip import PlainCLIP
from released_adapters import assert_same_adapter, random_adapter

from moeclip_hf.conversion import convert_openai_clip, convert_released, export_released, settings_beside_adapter
from moeclip_hf.errors import ConversionError


@pytest.fixture(scope="module")
def clip():
    return PlainCLIP().state_dict()


def scores(case, model):
    with torch.no_grad():
        anchors = model.get_text_embeds(case.input_ids, prompt_groups=case.prompt_groups)
        class_index = case.class_index([case.config["score_class"]] * 3)
        logits = model(case.inputs["pixel_values"], text_embeds=anchors, class_index=class_index).logits_per_image
    return (logits[:, 1] + 1) / 2


# Reference values


@pytest.mark.parametrize("name", CASES)
def test_image_scores_equal_the_reference_through_a_transformers_folder(tmp_path, name):
    case = golden_case(name)
    adapter, clip = golden_files(name)
    settings = golden_settings(case.config)
    heads = {tower: settings[tower] for tower in ("vision_config", "text_config")}
    convert_openai_clip(clip, **heads).save_pretrained(tmp_path)
    del settings["vision_config"], settings["text_config"]
    model = convert_released(adapter, tmp_path, **settings)
    expected = case.outputs["image_score"]
    assert (scores(case, model) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_reference_adapter_goes_out_bit_equal(name):
    adapter = torch.load(golden_files(name)[0], weights_only=True)
    assert_same_adapter(export_released(golden_case(name).model), adapter)


@pytest.mark.parametrize("name", CASES)
def test_any_padding_makes_the_same_anchors(name):
    case = golden_case(name)
    end = int(case.input_ids.max())
    padding = case.input_ids.eq(0)
    assert padding.any()
    ends_padded = case.input_ids.masked_fill(padding, end)
    with torch.no_grad():
        of_zeros = case.model.get_text_embeds(case.input_ids, None, case.prompt_groups)
        of_ends = case.model.get_text_embeds(ends_padded, padding.logical_not().long(), case.prompt_groups)
    assert (of_zeros - of_ends).abs().max() < 1e-6


# What the shapes tell

VARIANTS = {
    "released": ({}, {}),
    "eight small experts": ({"num_experts": 8, "rank": 2}, {}),
    "features that five experts do not divide": ({"num_experts": 5, "rank": 25}, {}),
    "one expert": ({"num_experts": 1}, {}),
    "trained projections": ({"fofs": False}, {}),
    "one expert with a trained projection": ({"num_experts": 1, "fofs": False}, {}),
    "activated": ({"activated": True}, {}),
    "separate": ({"num_projections": 12}, {}),
    "separate and activated": ({"num_projections": 12, "activated": True}, {}),
    "no averages": ({}, {"aggregation_sizes": [1]}),
    "two layers and three taps": (
        {"num_layers": 2, "num_projections": 3},
        {"moe_layers": [0, 6], "feature_layers": [3, 5, 8]},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_inferred_and_goes_out_bit_equal(clip, variant):
    shape, settings = VARIANTS[variant]
    adapter = random_adapter(**shape)
    model = convert_released(adapter, clip, **settings)
    config = model.config
    assert config.num_experts == shape.get("num_experts", 4)
    assert config.num_experts_per_tok == min(2, config.num_experts)
    assert config.lora_rank == shape.get("rank", 8)
    assert config.use_fofs == shape.get("fofs", True)
    assert config.shared_projections == (shape.get("num_projections", 4) != 12)
    assert config.projection_activation == ("leaky_relu" if shape.get("activated") else None)
    assert config.lora_alpha == 16
    assert config.residual_weight == 0.1
    assert config.moe_layers == settings.get("moe_layers", [1, 3, 5, 7])
    assert config.feature_layers == settings.get("feature_layers", [2, 4, 6, 8])
    assert_same_adapter(export_released(model), adapter)


def test_every_tensor_lands_where_it_belongs(clip):
    adapter = random_adapter(num_projections=12, activated=True)
    image = adapter["image_adapter"]
    model = convert_released(adapter, clip)
    for layer, moe in enumerate(model.moe_layers):
        assert torch.equal(moe.router.weight, image[f"moe_adapters.{layer}.gate.weight"])
        for expert in range(4):
            assert torch.equal(moe.lora_A[expert], image[f"moe_adapters.{layer}.experts.{expert}.lora_A.weight"])
            assert torch.equal(moe.lora_B[expert], image[f"moe_adapters.{layer}.experts.{expert}.lora_B.weight"])
    for index, projection in enumerate(model.patch_projection.projections):
        assert torch.equal(projection.weight, image[f"seg_proj.{index}.fc.0.weight"])


def test_frozen_projections_are_a_buffer_and_trained_ones_a_parameter(clip):
    assert "moe_layers.0.lora_A" not in dict(convert_released(random_adapter(), clip).named_parameters())
    assert "moe_layers.0.lora_A" in dict(convert_released(random_adapter(fofs=False), clip).named_parameters())


@pytest.mark.parametrize(("column", "use_fofs"), [(25, True), (26, False)])
def test_one_number_beyond_a_chunk_is_no_fofs(clip, column, use_fofs):
    """128 features in five chunks: 26, 26, 26, 25, 25."""
    adapter = random_adapter(num_experts=5)
    adapter["image_adapter"]["moe_adapters.2.experts.0.lora_A.weight"][3, column] = 1e-30
    assert convert_released(adapter, clip).config.use_fofs == use_fofs


# Two habits of the released code


def test_the_activation_is_exact_gelu_whatever_the_clip_has(clip):
    openai = convert_openai_clip(clip)
    assert openai.config.vision_config.hidden_act == "quick_gelu"
    for given in (clip, openai):
        config = convert_released(random_adapter(), given).config
        assert config.vision_config.hidden_act == config.text_config.hidden_act == "gelu"
    kept = convert_released(random_adapter(), openai, vision_config={"hidden_act": "quick_gelu"}).config
    assert (kept.vision_config.hidden_act, kept.text_config.hidden_act) == ("quick_gelu", "gelu")


def test_without_averages_the_image_embedding_comes_from_the_third_last_tap(clip):
    without = {"aggregation_sizes": [1]}
    assert convert_released(random_adapter(), clip, **without).config.image_feature_layer == 4
    assert convert_released(random_adapter(), clip, **without, image_feature_layer=8).config.image_feature_layer == 8
    assert convert_released(random_adapter(), clip).config.image_feature_layer == 8


# Out


def test_an_export_is_a_copy(clip):
    model = convert_released(random_adapter(), clip)
    exported = export_released(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_adapter(exported, random_adapter())


def test_training_a_converted_model_leaves_the_given_adapter_and_clip_alone():
    adapter, clip = random_adapter(), convert_openai_clip(PlainCLIP().state_dict())
    model = convert_released(adapter, clip)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_adapter(adapter, random_adapter())
    untouched = convert_openai_clip(PlainCLIP().state_dict()).state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in clip.state_dict().items())


def test_a_trained_model_exports_what_it_learnt_and_comes_back(clip):
    model = convert_released(random_adapter(), clip)
    with torch.no_grad():
        model.moe_layers[2].lora_B[1, 5, 3] = 7.5
        model.depthwise_adapter.pointwise.weight[4, 9] = -2.5
    exported = export_released(model)
    assert exported["image_adapter"]["moe_adapters.2.experts.1.lora_B.weight"][5, 3] == 7.5
    assert exported["image_adapter"]["det_proj.adapter.2.weight"][4, 9, 0] == -2.5
    again = convert_released(exported, clip).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_half_precision_model_exports_float32(clip):
    adapter = random_adapter()
    rounded = {
        part: {n: t.half().float() for n, t in adapter[part].items()} for part in ("text_adapter", "image_adapter")
    }
    assert_same_adapter(export_released(convert_released(adapter, clip).half()), rounded)


def test_the_settings_that_the_format_has_no_place_for_are_told(clip):
    settings = {
        "moe_layers": [0, 2, 4, 6],
        "feature_layers": [1, 3, 5, 7],
        "num_experts_per_tok": 3,
        "lora_alpha": 4,
        "residual_weight": 0.3,
        "aggregation_sizes": [1, 5],
        "image_feature_layer": 5,
    }
    exact_gelu = {"text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "gelu"}}
    told = settings_beside_adapter(convert_released(random_adapter(), clip, **settings).config)
    assert told == settings | exact_gelu


def test_a_model_goes_there_and_back_with_the_settings_that_are_told(clip):
    quick = {"text_config": {"hidden_act": "quick_gelu"}, "vision_config": {"hidden_act": "quick_gelu"}}
    model = convert_released(random_adapter(), clip, lora_alpha=4, residual_weight=0.5, **quick)
    back = convert_released(export_released(model), clip, **settings_beside_adapter(model.config))
    assert back.config.to_dict() == model.config.to_dict()
    pixels = torch.rand(2, 3, 12, 12)
    with torch.inference_mode():
        embeds = torch.randn(1, 2, model.config.projection_dim)
        outputs = [one(pixels, text_embeds=embeds).anomaly_logits for one in (model, back)]
    assert torch.equal(*outputs)


# What does not fit


def test_unknown_missing_and_misshapen_entries_are_listed_by_their_released_names(clip):
    adapter = random_adapter()
    image = adapter["image_adapter"]
    image["seg_proj.0.fc.bias"] = torch.zeros(48)
    del image["moe_adapters.1.experts.2.lora_B.weight"]
    image["moe_adapters.3.gate.weight"] = torch.zeros(5, 128)
    with pytest.raises(ConversionError) as error:
        convert_released(adapter, clip)
    assert str(error.value) == (
        "The adapter does not fit: 1 unknown (image_adapter.seg_proj.0.fc.bias); "
        "1 missing (image_adapter.moe_adapters.1.experts.2.lora_B.weight); "
        "1 misshapen (image_adapter.moe_adapters.3.gate.weight: (5, 128), not (4, 128))."
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.update(scheduler={}), r"1 unknown \(scheduler\)"),
        (lambda a: a.pop("image_adapter"), r"1 missing \(image_adapter\)"),
        (lambda a: a["text_adapter"].update({"0.fc.0.weight": [1.0]}), r"1 non-tensor \(text_adapter.0.fc.0.weight\)"),
        (lambda a: a["text_adapter"].clear(), r"1 missing \(text_adapter.0.fc.0.weight\)"),
        (
            lambda a: a["image_adapter"]["det_proj.ln.bias"].fill_(float("inf")),
            r"1 non-finite \(image_adapter.det_proj.ln.bias\)",
        ),
        (
            lambda a: a["image_adapter"].update({"moe_adapters.0.experts.0.lora_A.weight": torch.zeros(8)}),
            r"1 misshapen \(image_adapter.moe_adapters.0.experts.0.lora_A.weight: \(8,\)\)",
        ),
        (
            lambda a: a["image_adapter"].update({"moe_adapters.0.experts.9999.lora_A.weight": torch.zeros(8, 128)}),
            r"1 unknown \(image_adapter.moe_adapters.0.experts.9999.lora_A.weight\); 232 missing",
        ),
        (
            lambda a: a["image_adapter"].update(
                {"moe_adapters.0.experts.123456789.lora_A.weight": torch.zeros(8, 128)}
            ),
            r"1 unknown \(image_adapter.moe_adapters.0.experts.123456789.lora_A.weight\)",
        ),
        (
            lambda a: a["image_adapter"].update({"seg_proj.2.fc.0.weight": torch.zeros(48, 128)}),
            r"4 unknown \(image_adapter.seg_proj.0.fc.weight",
        ),
    ],
)
def test_what_cannot_be_an_adapter_is_refused_by_name(clip, spoil, message):
    adapter = random_adapter()
    spoil(adapter)
    with pytest.raises(ConversionError, match=message):
        convert_released(adapter, clip)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"moe_layers": [1, 3]},
            r"adapts 4 blocks, but moe_layers \(\[1, 3\]\) names 2: set moe_layers \(--moe-layers\)",
        ),
        ({"feature_layers": [4, 8]}, r"4 patch projections, but feature_layers \(\[4, 8\]\).*2, or 6 if separate"),
        ({"feature_layers": [4, 12]}, r"feature_layers \(\[4, 12\]\) must ascend within 1 to 8"),
        ({"num_experts": 8}, "The adapter has num_experts 4, not 8"),
        ({"lora_rank": 4}, "lora_rank 8, not 4"),
        ({"projection_activation": "leaky_relu"}, "projection_activation None, not 'leaky_relu'"),
        ({"shared_projections": False}, r"shared_projections True \(4 for 4 taps with 12 maps\), not False"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok \(5\) must lie between 1 and num_experts \(4\)"),
        ({"lora_dropuot": 0.1}, "MoECLIPConfig has no setting lora_dropuot"),
    ],
)
def test_settings_that_contradict_the_adapter_are_refused_with_both_values(clip, settings, message):
    with pytest.raises(ConversionError, match=message):
        convert_released(random_adapter(), clip, **settings)


def test_trained_projections_cannot_be_called_frozen_but_frozen_ones_may_be_trained_on(clip):
    with pytest.raises(ConversionError, match="use_fofs False, not True"):
        convert_released(random_adapter(fofs=False), clip, use_fofs=True)
    assert not convert_released(random_adapter(), clip, use_fofs=False).config.use_fofs


def test_the_adapter_of_another_clip_is_told(clip):
    with pytest.raises(ConversionError, match=r"vision width 64, .*; this one has vision width 128.*was trained on"):
        convert_released(random_adapter(vision_width=64), clip)
