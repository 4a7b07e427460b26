"""Puts converted tensors and settings together to a model, strictly."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig, PreTrainedModel

from moeclip_hf.conversion.key_table import KeyTable, Tensors, check_tensors, count_indices, refuse
from moeclip_hf.errors import ConversionError
from moeclip_hf.stored_weights import expected_tensors

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)
ModelT = TypeVar("ModelT", bound=PreTrainedModel)
Settings = Mapping[str, Any]

# OpenAI makes every attention head this wide, in both towers.
_HEAD_WIDTH = 64
# Weights and biases of q, k, v, output, two norms and two layers.
_BLOCK_TENSORS = 16
_TOWERS: dict[str, type[PreTrainedConfig]] = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}


def merge_settings(base: Settings, overriding: Settings) -> dict[str, Any]:
    """Lay settings over others; those of `text_config` and `vision_config` one by one."""
    merged = {**base, **overriding}
    for tower in _TOWERS:
        if tower in base or tower in overriding:
            merged[tower] = {**base.get(tower, {}), **overriding.get(tower, {})}
    return merged


def check_setting_names(settings: Settings, config_class: type[PreTrainedConfig]) -> None:
    """Refuse settings that a configuration, or its towers', does not know."""
    unknown = sorted(set(settings) - set(config_class.__dataclass_fields__))
    for tower, tower_class in _TOWERS.items():
        given = settings.get(tower, {})
        if not isinstance(given, Mapping):
            raise ConversionError(f"{tower} must be a dict of settings, not {type(given).__name__}.")
        unknown += sorted(f"{tower}.{name}" for name in set(given) - set(tower_class.__dataclass_fields__))
    if unknown:
        raise ConversionError(f"{config_class.__name__} has no setting {', '.join(unknown)}.")


def make_config(config_class: type[ConfigT], settings: Settings) -> ConfigT:
    """Make a configuration; a combination that it refuses is a `ConversionError`."""
    try:
        return config_class(**settings)
    except StrictDataclassError as error:
        raise ConversionError(str(error.__cause__ or error)) from error
    except ValueError as error:
        raise ConversionError(str(error)) from error


def clip_settings(config: CLIPConfig) -> dict[str, Any]:
    """What of a CLIP's configuration describes the model, not how it was saved."""
    bookkeeping = {"architectures", "dtype", "model_type", "transformers_version"}
    settings = {
        name: getattr(config, name) for name in ("projection_dim", "logit_scale_init_value", "initializer_factor")
    }
    for tower in _TOWERS:
        values = getattr(config, tower).to_dict()
        settings[tower] = {name: value for name, value in values.items() if name not in bookkeeping}
    return settings


def copy_to_float32(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Copy what is the caller's, so that training the model does not change it."""
    return {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}


def build_model(model_class: type[ModelT], config: PreTrainedConfig, tensors: Tensors) -> ModelT:
    """Make a model, in eval mode, of float32 tensors that are known to be complete and become the model's own."""
    loaded: Any = model_class.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    faults = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    refuse(model_class.__name__, faults)
    return model


def clip_from_tensors(tensors: Tensors, table: KeyTable, source: str, settings: Settings) -> CLIPModel:
    """
    Make a CLIP of its tensors, inferring its configuration from their shapes.

    Args:
        tensors: under the names of `table`.
        table ([`KeyTable`])
        source (`str`): names the file in errors.
        settings: of [`~transformers.CLIPConfig`], over what the shapes tell.

    Raises:
        ConversionError: lists unknown, missing, misshapen and unusable tensors, and settings that do not fit them.
    """
    tensors = table.without_ignored(tensors)
    inferred = _infer_clip_settings(tensors, table, source, settings)
    config = make_config(CLIPConfig, merge_settings(inferred, settings))
    check_tensors(tensors, table.to_theirs(expected_tensors(CLIPModel, config)), source)
    return build_model(CLIPModel, config, copy_to_float32(table.to_ours(tensors)))


def _infer_clip_settings(tensors: Tensors, table: KeyTable, source: str, settings: Settings) -> dict[str, Any]:
    """Read a CLIP's sizes off its tensors."""
    ours = table.to_ours(tensors)
    needed = {
        "patch": "vision_model.embeddings.patch_embedding.weight",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "tokens": "text_model.embeddings.token_embedding.weight",
        "text_positions": "text_model.embeddings.position_embedding.weight",
        "projection": "visual_projection.weight",
    }
    refuse(source, {"missing": [table.their_name(name) for name in needed.values() if name not in ours]})
    shapes = {role: tuple(ours[name].shape) for role, name in needed.items()}
    misshapen = [
        table.their_name(needed[role])
        for role, shape in shapes.items()
        if len(shape) != (4 if role == "patch" else 2) or 0 in shape
    ]
    refuse(source, {"misshapen": [f"{name}: {tuple(tensors[name].shape)}" for name in misshapen]})
    side = round((shapes["positions"][0] - 1) ** 0.5)
    if side * side + 1 != shapes["positions"][0]:
        raise ConversionError(
            f"{source} has {shapes['positions'][0]} position embeddings, not 1 + n x n of a square grid."
        )
    vocabulary, patch_size = shapes["tokens"][0], shapes["patch"][-1]
    return {
        "projection_dim": shapes["projection"][0],
        "text_config": {
            **_infer_tower(ours, "text", shapes["tokens"][1], settings),
            "vocab_size": vocabulary,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "max_position_embeddings": shapes["text_positions"][0],
            "projection_dim": shapes["projection"][0],
        },
        "vision_config": {
            **_infer_tower(ours, "vision", shapes["patch"][0], settings),
            "num_channels": shapes["patch"][1],
            "patch_size": patch_size,
            "image_size": side * patch_size,
            "projection_dim": shapes["projection"][0],
        },
    }


def _infer_tower(tensors: Tensors, tower: str, width: int, settings: Settings) -> dict[str, Any]:
    feed_forward = tensors.get(f"{tower}_model.encoder.layers.0.mlp.fc1.bias", torch.empty(4 * width, device="meta"))
    num_layers = count_indices(tensors, f"{tower}_model.encoder.layers.{{layer}}.", "layer")
    if width % _HEAD_WIDTH and "num_attention_heads" not in settings.get(f"{tower}_config", {}):
        raise ConversionError(
            f"The {tower} tower is {width} wide, no multiple of the {_HEAD_WIDTH} of one of OpenAI's attention heads: "
            f'set {tower}_config={{"num_attention_heads": n}} (--{tower}-heads).'
        )
    return {
        "hidden_size": width,
        "intermediate_size": feed_forward.shape[0] if feed_forward.dim() else 4 * width,
        # As many as there can be, so that a bias each does not ask for thousands.
        "num_hidden_layers": min(num_layers, len(tensors) // _BLOCK_TENSORS),
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
    }
