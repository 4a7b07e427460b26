"""CLIPs of OpenAI's and transformers' come in whole, or not at all."""

import json

import pytest
import torch
from golden import CASES, golden_files
from plain_clip import CONTEXT_LENGTH, PlainCLIP, plain_inputs, save_torchscript
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from moeclip_hf.conversion import convert_openai_clip, load_clip
from moeclip_hf.errors import ConversionError


@pytest.fixture(scope="module")
def plain():
    return PlainCLIP()


@pytest.fixture
def tensors(plain):
    return {name: tensor.clone() for name, tensor in plain.state_dict().items()}


def assert_bit_equal(actual: CLIPModel, expected: CLIPModel) -> None:
    a, b = actual.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def features(clip: CLIPModel, pixels, input_ids):
    with torch.no_grad():
        images = clip.vision_model(pixel_values=pixels).pooler_output
        texts = clip.text_model(input_ids=input_ids).pooler_output
        return clip.visual_projection(images), clip.text_projection(texts)


# OpenAI's format


def test_a_converted_clip_embeds_as_the_plain_forward_pass_does(plain, tensors):
    clip = convert_openai_clip(tensors)
    inputs = plain_inputs(plain)
    for actual, expected in zip(features(clip, *inputs), plain(*inputs), strict=True):
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    assert clip.logit_scale == plain.logit_scale


def test_sizes_heads_ids_and_activation_are_inferred(tensors):
    config = convert_openai_clip(tensors).config
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (128, 8, 2)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size) == (12, 4, 512)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (64, 2, 1)
    assert (text.vocab_size, text.bos_token_id, text.eos_token_id) == (60, 58, 59)
    assert (text.max_position_embeddings, config.projection_dim) == (CONTEXT_LENGTH, 48)
    assert vision.hidden_act == text.hidden_act == "quick_gelu"


def test_settings_overrule_what_is_inferred(tensors):
    config = convert_openai_clip(
        tensors, vision_config={"num_attention_heads": 8}, text_config={"hidden_act": "gelu"}
    ).config
    assert (config.vision_config.num_attention_heads, config.vision_config.hidden_act) == (8, "quick_gelu")
    assert (config.text_config.num_attention_heads, config.text_config.hidden_act) == (1, "gelu")


@pytest.mark.parametrize("form", ["state_dict.pt", "legacy.pth", "weights.safetensors", "misnamed.bin"])
def test_every_form_of_file_holds_the_same_model(tmp_path, tensors, form):
    path = tmp_path / form
    if form == "weights.safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form != "legacy.pth")
    assert_bit_equal(load_clip(path), convert_openai_clip(tensors))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_half_precision_torchscript_archive_is_read_to_float32(tmp_path, plain, tensors):
    save_torchscript(plain, tmp_path / "ViT-tiny.pt")
    expected = convert_openai_clip({name: tensor.half().float() for name, tensor in tensors.items()})
    clip = load_clip(tmp_path / "ViT-tiny.pt")
    assert clip.dtype == torch.float32
    assert_bit_equal(clip, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_archive_with_shared_and_transposed_tensors_is_read_as_jit_loads_it(tmp_path):
    class Scripted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            base = torch.randn(4, 6)
            self.transposed = torch.nn.Parameter(base.t())
            self.row = torch.nn.Parameter(base[2])
            self.inner = torch.nn.Sequential(torch.nn.Linear(3, 2).bfloat16(), torch.nn.BatchNorm1d(2))
            self.empty = torch.nn.Parameter(torch.empty(0, 3))
            self.sizes = [1, 2, 3]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    from moeclip_hf.conversion.reading import read_checkpoint

    path = tmp_path / "scripted.pt"
    torch.jit.script(Scripted()).save(str(path))
    actual, expected = read_checkpoint(path), torch.jit.load(str(path)).state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def test_training_a_converted_model_leaves_the_given_tensors_alone(tensors):
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for parameter in convert_openai_clip(tensors).parameters():
            parameter.add_(1)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


# transformers' format


def test_a_transformers_folder_comes_in_as_it_is(tmp_path, tensors):
    clip = convert_openai_clip(tensors, vision_config={"num_attention_heads": 4})
    clip.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_clip(tmp_path)
    assert_bit_equal(loaded, clip)
    assert loaded.config.vision_config.num_attention_heads == 4
    assert load_clip(str(tmp_path), text_config={"hidden_act": "gelu"}).config.text_config.hidden_act == "gelu"


def test_bare_transformers_weights_come_in_with_the_position_indices_of_old_versions(tmp_path, tensors):
    clip = convert_openai_clip(tensors)
    weights = clip.state_dict() | {
        "text_model.embeddings.position_ids": torch.arange(CONTEXT_LENGTH).unsqueeze(0),
        "vision_model.embeddings.position_ids": torch.arange(10).unsqueeze(0),
    }
    save_file(weights, tmp_path / "model.safetensors")
    loaded = load_clip(tmp_path / "model.safetensors")
    assert_bit_equal(loaded, clip)
    assert loaded.config.vision_config.num_attention_heads == 2
    clip.config.save_pretrained(tmp_path)
    assert_bit_equal(load_clip(tmp_path), clip)


def test_a_clip_model_is_copied(tensors):
    clip = convert_openai_clip(tensors)
    copy = load_clip(clip, vision_config={"hidden_act": "gelu"})
    assert_bit_equal(copy, clip)
    assert (copy.config.vision_config.hidden_act, clip.config.vision_config.hidden_act) == ("gelu", "quick_gelu")
    assert copy.logit_scale.data_ptr() != clip.logit_scale.data_ptr()


def test_a_folder_that_lacks_weights_is_refused_with_their_names(tmp_path, tensors):
    convert_openai_clip(tensors).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    weights["text_model.extra"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConversionError, match=r"1 unknown \(text_model.extra\); 1 missing \(visual_projection.weight\)"
    ):
        load_clip(tmp_path)


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConversionError, match="is a bert model, not a clip one"):
        load_clip(tmp_path)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="cannot be loaded as a CLIP"):
        load_clip(tmp_path)


# What does not fit


def test_unknown_missing_and_misshapen_entries_are_listed(tensors):
    tensors["visual.extra"] = torch.zeros(3)
    del tensors["transformer.resblocks.1.attn.in_proj_bias"]
    tensors["visual.transformer.resblocks.4.mlp.c_fc.weight"] = torch.zeros(511, 128)
    with pytest.raises(ConversionError) as error:
        convert_openai_clip(tensors)
    assert str(error.value) == (
        "The CLIP does not fit: 1 unknown (visual.extra); 1 missing (transformer.resblocks.1.attn.in_proj_bias); "
        "1 misshapen (visual.transformer.resblocks.4.mlp.c_fc.weight: (511, 128), not (512, 128))."
    )


def test_a_missing_block_is_counted_and_cut_short_in_the_list(tensors):
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("transformer.resblocks.0.")}
    with pytest.raises(ConversionError, match=r"12 missing \(transformer.resblocks.0.*and 4 more\)"):
        convert_openai_clip(kept)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.update(logit_scale=torch.tensor(float("nan"))), r"1 non-finite \(logit_scale\)"),
        (
            lambda t: t.update({"visual.proj": t["visual.proj"].to(torch.int8)}),
            r"1 of another type \(visual.proj: torch.int8",
        ),
        (lambda t: t.update({"visual.positional_embedding": torch.zeros(11, 128)}), "11 position embeddings"),
        (
            lambda t: t.update({"visual.conv1.weight": torch.zeros(128, 48)}),
            r"1 misshapen \(visual.conv1.weight: \(128, 48\)",
        ),
        (lambda t: t.update({"visual.layer1.0.conv1.weight": torch.zeros(1)}), "ResNet"),
        (lambda t: t.update({"visual.proj": torch.zeros(128, 48, 2)}), r"1 misshapen \(visual.proj: \(128, 48, 2\)"),
        (
            lambda t: t.update({"transformer.resblocks.0.attn.in_proj_bias": torch.tensor(1.0)}),
            r"1 misshapen \(transformer.resblocks.0.attn.in_proj_bias: \(\), not \(192,\)",
        ),
        (lambda t: t.update({"token_embedding.weight": torch.zeros(0, 64)}), r"1 misshapen \(token_embedding.weight"),
        (lambda t: t.update(epoch=3), r"1 non-tensor \(epoch\)"),
        (lambda t: t.pop("visual.conv1.weight"), r"1 missing \(visual.conv1.weight\)"),
    ],
)
def test_what_cannot_be_a_clip_is_refused_by_name(tensors, spoil, message):
    spoil(tensors)
    with pytest.raises(ConversionError, match=message):
        convert_openai_clip(tensors)


def test_tensors_of_no_clip_are_refused():
    with pytest.raises(ConversionError, match="is no CLIP"):
        load_clip({"encoder.weight": torch.zeros(2, 2)})


def test_settings_that_no_clip_has_are_refused(tensors):
    with pytest.raises(ConversionError, match=r"CLIPConfig has no setting projection_dims, vision_config.heads"):
        convert_openai_clip(tensors, projection_dims=3, vision_config={"heads": 2})


def test_a_tower_is_set_by_a_dict(tensors):
    with pytest.raises(ConversionError, match="vision_config must be a dict of settings, not int"):
        load_clip(tensors, vision_config=3)


def test_settings_that_contradict_each_other_are_refused(tensors):
    with pytest.raises(ConversionError, match=r"128.*5"):
        convert_openai_clip(tensors, vision_config={"num_attention_heads": 5})


@pytest.mark.parametrize("name", CASES)
def test_heads_of_unusual_width_are_asked_for(name):
    with pytest.raises(ConversionError, match=r'text_config=\{"num_attention_heads": n\} \(--text-heads\)'):
        load_clip(golden_files(name)[1], vision_config={"num_attention_heads": 4})


def test_a_configuration_of_transformers_default_is_that_of_openai_vit_b_32():
    """The tables must name every weight of the architecture, not only those of small models."""
    from moeclip_hf.conversion.assembly import expected_tensors
    from moeclip_hf.conversion.openai_clip import OPENAI_TABLE

    expected = expected_tensors(CLIPModel, CLIPConfig())
    names = OPENAI_TABLE.to_theirs(expected)
    # 12 entries a block, 12 blocks a tower, 8 besides in the vision tower, 5 in the text tower, and the scale.
    assert len(names) == 12 * 12 + 12 * 12 + 8 + 5 + 1
    assert sum(tensor.numel() for tensor in names.values()) == sum(tensor.numel() for tensor in expected.values())
