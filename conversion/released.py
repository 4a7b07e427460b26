"""The adapter checkpoints of MoECLIP's released research code, in and out.

Such a file holds `epoch`, `optimizer_state_dict` and the two parts that are trained, `text_adapter` and
`image_adapter`. The CLIP beneath is not in it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moeclip_hf.conversion.assembly import (
    Settings,
    build_model,
    check_setting_names,
    clip_settings,
    copy_to_float32,
    make_config,
    merge_settings,
)
from moeclip_hf.conversion.key_table import (
    POINTWISE,
    KeyTable,
    Row,
    Tensors,
    check_tensors,
    count_indices,
    find_indices,
    refuse,
)
from moeclip_hf.conversion.reading import check_entries, describe, read_checkpoint
from moeclip_hf.conversion.transformers_clip import CLIPSource, load_clip
from moeclip_hf.errors import ConversionError
from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
from moeclip_hf.stored_weights import expected_tensors

Adapter = Mapping[str, Any]

_MOE = "image_adapter.moe_adapters.{layer}."
_EXPERTS = _MOE + "experts.{expert}."
_PARTS = ("text_adapter", "image_adapter")
_BOOKKEEPING = ("epoch", "optimizer_state_dict")
_CLIP_SETTINGS = ("text_config", "vision_config", "projection_dim", "logit_scale_init_value", "initializer_factor")


def _released_table(activated: bool) -> KeyTable:
    """The names of a released adapter; an activation behind the patch projections moves these one level down."""
    seg_proj = "image_adapter.seg_proj.{tap}.fc.0.weight" if activated else "image_adapter.seg_proj.{tap}.fc.weight"
    # fmt: off
    return KeyTable(
        Row("text_adapter.0.fc.0.weight",              "text_adapter.projection.weight"),
        Row(seg_proj,                                  "patch_projection.projections.{tap}.weight"),
        Row("image_adapter.det_proj.ln.{part}",        "depthwise_adapter.layer_norm.{part}"),
        Row("image_adapter.det_proj.adapter.0.weight", "depthwise_adapter.depthwise.weight"),
        Row("image_adapter.det_proj.adapter.2.weight", "depthwise_adapter.pointwise.weight", POINTWISE),
        Row(_MOE + "gate.weight",                      "moe_layers.{layer}.router.weight"),
        Row(_EXPERTS + "lora_A.weight",                "moe_layers.{layer}.lora_A"),
        Row(_EXPERTS + "lora_B.weight",                "moe_layers.{layer}.lora_B"),
    )
    # fmt: on


def convert_released(adapter: str | Path | Adapter, clip: CLIPSource, **config: Any) -> MoECLIPModel:
    """
    Put a released adapter and its CLIP together to a MoECLIP model.

    What the adapter's names and shapes tell is inferred: number and rank of the experts, `use_fofs`, shared or
    separate projections and their activation. What they do not has the released defaults: layers and taps at the
    quarters of the tower's depth, two experts a token, alpha 16, residual weight 0.1, window sizes 1, 3 and 5.

    Two habits of the released code, which checkpoints trained with it bake in, are kept unless `config` says
    otherwise: the CLIP runs with exact GELU (`hidden_act="gelu"`), whatever it was pretrained with; and with
    `aggregation_sizes=[1]` the image embedding is made from the third last tap.

    Args:
        adapter (`str`, `Path` or mapping): a released `.pth`, or what it holds.
        clip: the CLIP that the adapter was trained on: a file of OpenAI's, a transformers folder or Hub id, tensors by
            name, or a [`~transformers.CLIPModel`].
        config: fields of [`MoECLIPConfig`], nested ones too: `vision_config={"num_attention_heads": 4}`.

    Returns:
        [`MoECLIPModel`] in float32 and eval mode.

    Raises:
        ConversionError: if a file cannot be read; if settings contradict the adapter; or lists the unknown, missing,
            misshapen or unusable entries.
    """
    check_setting_names(config, MoECLIPConfig)
    of_clip = {name: config.pop(name) for name in _CLIP_SETTINGS if name in config}
    exact_gelu = {"text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "gelu"}}
    clip_model = load_clip(clip, **merge_settings(exact_gelu, of_clip))

    source = describe(adapter, "The adapter")
    tensors = _read_adapter(adapter, source)
    _refuse_other_clip(tensors, clip_model.config, source)
    inferred = _infer_settings(tensors, source)
    _refuse_contradictions(inferred, config, source)
    defaults = {"num_experts_per_tok": min(2, inferred.get("num_experts", 2))}
    settings = {**clip_settings(clip_model.config), **defaults, **inferred, **config}
    model_config = _make_moeclip_config(tensors, source, settings)

    table = _released_table(model_config.projection_activation is not None)
    expected = table.to_theirs(expected_tensors(MoECLIPModel, model_config))
    check_tensors(tensors, expected, source)
    return build_model(
        MoECLIPModel, model_config, {**clip_model.state_dict(), **copy_to_float32(table.to_ours(tensors))}
    )


def export_released(model: MoECLIPModel) -> dict[str, dict[str, torch.Tensor]]:
    """
    Give a model's trained parts the form of the released adapter checkpoints.

    Args:
        model ([`MoECLIPModel`])

    Returns:
        `{"text_adapter": ..., "image_adapter": ...}`, float32 tensors by their released names, bit-equal to the
        converted file's where the model was neither trained nor cast. Layers, taps, k, alpha, lambda and window sizes
        have no place in that format: see [`settings_beside_adapter`].
    """
    table = _released_table(model.config.projection_activation is not None)
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in table.to_theirs(model.state_dict()).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor.to("cpu", torch.float32, copy=True).contiguous()
    return parts


def settings_beside_adapter(config: MoECLIPConfig) -> dict[str, Any]:
    """
    The settings that a released adapter's shapes do not tell, and that its user must know, as [`convert_released`]
    takes them. The activation of both towers is among them, as the released code runs any CLIP with exact GELU.
    """
    names = (
        "moe_layers",
        "feature_layers",
        "num_experts_per_tok",
        "lora_alpha",
        "residual_weight",
        "aggregation_sizes",
        "image_feature_layer",
    )
    towers = {tower: {"hidden_act": getattr(config, tower).hidden_act} for tower in ("text_config", "vision_config")}
    return {name: getattr(config, name) for name in names} | towers


def _read_adapter(adapter: str | Path | Adapter, source: str) -> dict[str, torch.Tensor]:
    """Read an adapter's two parts as one flat mapping, `text_adapter.*` and `image_adapter.*`."""
    content = read_checkpoint(adapter) if isinstance(adapter, (str, Path)) else adapter
    refuse(
        source,
        {
            "unknown": sorted(str(key) for key in content if key not in _PARTS + _BOOKKEEPING),
            "missing": [part for part in _PARTS if not isinstance(content.get(part), Mapping)],
        },
    )
    flat = {f"{part}.{name}": value for part in _PARTS for name, value in content[part].items()}
    check_entries(flat, source)
    return flat


def _refuse_other_clip(tensors: Tensors, clip: Any, source: str) -> None:
    """Tell a CLIP of other widths than the adapter's before every single tensor is called misshapen."""
    text = tensors.get("text_adapter.0.fc.0.weight")
    image = tensors.get("image_adapter.det_proj.ln.weight")
    if text is None or image is None or text.dim() != 2 or image.dim() != 1:
        return  # which the check of all tensors reports
    of_adapter = {"vision width": len(image), "text width": text.shape[1], "embedding width": text.shape[0]}
    of_clip = {
        "vision width": clip.vision_config.hidden_size,
        "text width": clip.text_config.hidden_size,
        "embedding width": clip.projection_dim,
    }
    if of_adapter != of_clip:
        adapter_widths, clip_widths = (
            ", ".join(f"{name} {width}" for name, width in widths.items()) for widths in (of_adapter, of_clip)
        )
        raise ConversionError(
            f"{source} was trained on another CLIP, of {adapter_widths}; this one has {clip_widths}: pass the one it "
            "was trained on."
        )


def _infer_settings(tensors: Tensors, source: str) -> dict[str, Any]:
    """Read off an adapter's names and shapes what they tell of its experts and projections."""
    activated = count_indices(tensors, "image_adapter.seg_proj.{tap}.fc.0.weight", "tap") > 0
    settings: dict[str, Any] = {"projection_activation": "leaky_relu" if activated else None}
    experts = find_indices(tensors, _EXPERTS + "lora_A.weight", "expert")
    refuse(
        source,
        {"misshapen": [f"{name}: {tuple(tensors[name].shape)}" for name in experts if tensors[name].dim() != 2]},
    )
    if experts:
        num_experts = count_indices(tensors, _EXPERTS, "expert")
        settings["num_experts"] = num_experts
        settings["lora_rank"] = len(tensors[next(iter(experts))])
        settings["use_fofs"] = all(
            expert < num_experts and _is_fofs_projection(tensors[name], expert, num_experts)
            for name, expert in experts.items()
        )
    return settings


def _is_fofs_projection(lora_A: torch.Tensor, expert: int, num_experts: int) -> bool:
    """Whether an expert's (r, d) projection reads its own chunk of the features alone."""
    rank, num_features = lora_A.shape
    if num_features // num_experts < rank:
        return False
    if num_experts == 1:  # the chunk is all there is, but FOFS has orthonormal rows
        return torch.allclose(lora_A.float() @ lora_A.float().T, torch.eye(rank), atol=1e-3)
    chunk = torch.arange(num_features).tensor_split(num_experts)[expert]
    return not lora_A.index_fill(1, chunk, 0).any()


def _refuse_contradictions(inferred: Settings, given: Settings, source: str) -> None:
    for name, value in inferred.items():
        # Projections that FOFS made may be trained on as plain ones; the reverse is no FOFS.
        may_differ = name == "use_fofs" and value
        if name in given and given[name] != value and not may_differ:
            raise ConversionError(f"{source} has {name} {value!r}, not {given[name]!r}.")


def _make_moeclip_config(tensors: Tensors, source: str, settings: Settings) -> MoECLIPConfig:
    """Make the configuration, and compare the layers and taps it names with those that the adapter holds."""
    config = make_config(MoECLIPConfig, settings)
    num_layers = count_indices(tensors, _MOE, "layer")
    if num_layers != len(config.moe_layers):
        raise ConversionError(
            f"{source} adapts {num_layers} blocks, but moe_layers ({config.moe_layers}) names "
            f"{len(config.moe_layers)}: set moe_layers (--moe-layers)."
        )
    num_taps, num_maps = len(config.feature_layers), config.num_maps
    num_projections = count_indices(tensors, "image_adapter.seg_proj.{tap}.", "tap")
    if num_projections not in (num_taps, num_maps):
        raise ConversionError(
            f"{source} holds {num_projections} patch projections, but feature_layers ({config.feature_layers}) and "
            f"aggregation_sizes ({config.aggregation_sizes}) ask for {num_taps}, or {num_maps} if separate: set them "
            "(--feature-layers, --aggregation-sizes)."
        )
    shared = num_projections == num_taps
    if settings.get("shared_projections", shared) != shared and num_taps != num_maps:
        raise ConversionError(
            f"{source} has shared_projections {shared} ({num_projections} for {num_taps} taps with {num_maps} maps), "
            f"not {settings['shared_projections']}."
        )
    completed = {"shared_projections": shared, **settings}
    if config.aggregation_sizes == [1] and num_taps >= 3:
        completed.setdefault("image_feature_layer", config.feature_layers[-3])
    return make_config(MoECLIPConfig, completed)
