"""OpenAI's CLIP: the TorchScript archives that its repository downloads, state dicts, safetensors of those names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPModel

from moeclip_hf.conversion.assembly import Settings, check_setting_names, clip_from_tensors, merge_settings
from moeclip_hf.conversion.key_table import TRANSPOSED, KeyTable, Row, Tensors
from moeclip_hf.conversion.reading import describe, read_tensors
from moeclip_hf.errors import ConversionError

# What OpenAI trained its weights with.
_QUICK_GELU = {"text_config": {"hidden_act": "quick_gelu"}, "vision_config": {"hidden_act": "quick_gelu"}}

# fmt: off
_BLOCK_ROWS = (
    ("ln_1.{part}",          "layer_norm1.{part}"),
    ("attn.in_proj_{part}",  "self_attn.{qkv}_proj.{part}"),
    ("attn.out_proj.{part}", "self_attn.out_proj.{part}"),
    ("ln_2.{part}",          "layer_norm2.{part}"),
    ("mlp.c_fc.{part}",      "mlp.fc1.{part}"),
    ("mlp.c_proj.{part}",    "mlp.fc2.{part}"),
)


def _blocks(theirs: str, ours: str) -> Iterator[Row]:
    """The rows of a tower's blocks, which are alike in both towers."""
    for their_part, our_part in _BLOCK_ROWS:
        yield Row(f"{theirs}.{{layer}}.{their_part}", f"{ours}.{{layer}}.{our_part}")


OPENAI_TABLE = KeyTable(
    Row("logit_scale",                 "logit_scale"),
    Row("visual.class_embedding",      "vision_model.embeddings.class_embedding"),
    Row("visual.conv1.weight",         "vision_model.embeddings.patch_embedding.weight"),
    Row("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Row("visual.ln_pre.{part}",        "vision_model.pre_layrnorm.{part}"),
    *_blocks("visual.transformer.resblocks", "vision_model.encoder.layers"),
    Row("visual.ln_post.{part}",       "vision_model.post_layernorm.{part}"),
    Row("visual.proj",                 "visual_projection.weight", TRANSPOSED),
    Row("token_embedding.weight",      "text_model.embeddings.token_embedding.weight"),
    Row("positional_embedding",        "text_model.embeddings.position_embedding.weight"),
    *_blocks("transformer.resblocks",  "text_model.encoder.layers"),
    Row("ln_final.{part}",             "text_model.final_layer_norm.{part}"),
    Row("text_projection",             "text_projection.weight", TRANSPOSED),
    ignored=("input_resolution", "context_length", "vocab_size"),
)
# fmt: on


def is_openai_clip(tensors: Tensors) -> bool:
    """Whether tensors bear OpenAI's names."""
    return any(name.startswith("visual.") for name in tensors)


def convert_openai_clip(clip: str | Path | Tensors, **config: Any) -> CLIPModel:
    """
    Convert a vision-transformer CLIP of OpenAI's to transformers.

    Sizes are inferred from the shapes of the weights, attention heads as OpenAI makes them (64 wide); the activation
    is the one that OpenAI trained with, `quick_gelu`.

    Args:
        clip (`str`, `Path` or mapping of names to tensors): a TorchScript archive, a saved state dict or a safetensors
            file, in any floating-point type; or the tensors themselves.
        config: fields of [`~transformers.CLIPConfig`], nested ones too, over the inferred ones:
            `vision_config={"num_attention_heads": 4}`.

    Returns:
        [`~transformers.CLIPModel`] in float32 and eval mode.

    Raises:
        ConversionError: if the file cannot be read, or lists the unknown, missing, misshapen or unusable entries.
    """
    check_setting_names(config, CLIPConfig)
    source = describe(clip, "The CLIP")
    return openai_clip_from_tensors(read_tensors(clip, source), source, config)


def openai_clip_from_tensors(tensors: Tensors, source: str, settings: Settings) -> CLIPModel:
    """As [`convert_openai_clip`], of tensors read from `source`."""
    if any(name.startswith("visual.layer1.") for name in tensors):
        raise ConversionError(
            f"{source} is a ResNet CLIP, which has no patches to score: use a vision transformer, such as ViT-L/14."
        )
    return clip_from_tensors(tensors, OPENAI_TABLE, source, merge_settings(_QUICK_GELU, settings))
