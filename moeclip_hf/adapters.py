"""A full MoECLIP checkpoint as a PEFT adapter over its CLIP, and back; loading an adapter with the base it needs."""

import copy
from os import PathLike
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from torch import nn

from moeclip_hf.errors import CheckpointError
from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
from moeclip_hf.pretrained import fetch_adapter, fetch_clip, quiet_transformers
from moeclip_hf.stored_weights import (
    ADAPTER_WEIGHTS,
    MOECLIP_PARTS,
    StoredTensor,
    check_weights,
    find_faults,
    list_faults,
    read_headers,
    refuse_non_finite,
)
from moeclip_hf.tuner import MoELoraConfig, MoELoraLayer
from moeclip_hf.tuner.model import BASE_SETTINGS, vision_blocks

# The same settings by their two names: of an adapter, and of a full checkpoint.
_SETTING_NAMES = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "use_fofs": "use_fofs",
    "residual_weight": "residual_weight",
}


def full_to_adapter(model: MoECLIPModel, base: str | None = None, adapter_name: str = "default") -> PeftModel:
    """
    Split a MoECLIP into its CLIP and an adapter with the experts and heads. The outputs stay the same, to the bit.

    `save_pretrained` of the result then writes the adapter alone.

    Args:
        model ([`MoECLIPModel`]): a model with experts. It is left as it is; its CLIP's weights are not copied but
            shared with the result.
        base (`str`, *optional*): the checkpoint of that same CLIP, by which [`load_adapter`] will look for it: a Hub
            id or a folder. By default the one that the model came from.
        adapter_name (`str`): the adapter's name.

    Raises:
        CheckpointError: if the model has no experts.
    """
    if not model.config.moe_layers:
        raise CheckpointError("The model has no experts (moe_layers is empty), of which to make an adapter.")
    bare = _copy_sharing_weights(model)
    bare.moe_layers, bare.config.moe_layers = nn.ModuleList(), []
    if base is not None:
        bare.name_or_path = base
    config = MoELoraConfig(
        target_modules=vision_blocks(model.config.moe_layers),
        **{name: getattr(model.config, full_name) for name, full_name in _SETTING_NAMES.items()},
    )
    adapted = get_peft_model(bare, config, adapter_name=adapter_name)
    for block, experts in zip(model.config.moe_layers, model.moe_layers, strict=True):
        layer = bare.vision_model.encoder.layers[block]
        layer.moe_lora_experts[adapter_name] = copy.deepcopy(experts).requires_grad_(True)
    return adapted


def adapter_to_full(model: PeftModel, adapter_name: str | None = None) -> MoECLIPModel:
    """
    Join an adapter with its base to a MoECLIP, which needs no PEFT. The outputs stay the same, to the bit.

    Args:
        model (`PeftModel`): a MoECLIP without experts of its own, with the adapter. It is left as it is; its CLIP's
            weights are not copied but shared with the result.
        adapter_name (`str`, *optional*): which adapter; by default the active one.

    Raises:
        CheckpointError: if there is no such adapter, or the two are more than a MoECLIP can hold.
    """
    adapter_name = adapter_name or model.active_adapters[0]
    if not isinstance(model.peft_config.get(adapter_name), MoELoraConfig):
        raise CheckpointError(f"There is no MoE-LoRA adapter {adapter_name!r}; there are {sorted(model.peft_config)}.")
    base = model.get_base_model()
    if not isinstance(base, MoECLIPModel):
        raise CheckpointError(f"{type(base).__name__} has not the heads of a full checkpoint: adapt a MoECLIPModel.")
    if base.config.moe_layers:
        raise CheckpointError(
            f"The base has experts of its own, behind blocks {base.config.moe_layers}, and a full checkpoint holds "
            f"one set: make the adapter over a base with moe_layers=[]."
        )
    experts = _experts_by_block(base, adapter_name)
    heads = {
        name: module.modules_to_save[adapter_name]
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    }
    full = _copy_sharing_weights(model).unload()
    full.moe_layers = copy.deepcopy(nn.ModuleList(experts.values()))
    for name, head in heads.items():
        full.set_submodule(name, copy.deepcopy(head))
    for name, full_name in _SETTING_NAMES.items():
        setattr(full.config, full_name, getattr(model.peft_config[adapter_name], name))
    full.config.moe_layers = list(experts)
    return full


def load_adapter(
    adapter: "str | PathLike[str]",
    base: "str | PathLike[str] | None" = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    revision: str | None = None,
    **base_kwargs: Any,
) -> PeftModel:
    """
    Load an adapter over the base it needs: its CLIP as a MoECLIP without experts, with the taps, window sizes and
    activations that the adapter was made with. `PeftModel.load_adapter` then adds others over the same base.

    Args:
        adapter (`str` or path): a folder or a Hub id.
        base (`str` or path, *optional*): the CLIP's checkpoint; by default the one that the adapter names, of the
            revision that it names.
        adapter_name (`str`): the name that the adapter gets.
        is_trainable (`bool`): whether the adapter is to be trained on.
        revision (`str`, *optional*): of the adapter's Hub repository.
        base_kwargs: for [`MoECLIPModel.from_pretrained`], such as `dtype` and `device_map`; no part may rest on the
            disk.

    Returns:
        `PeftModel`, in eval mode unless trainable.

    Raises:
        CheckpointError: if either is not there or not what it should be.
    """
    folder = fetch_adapter(adapter, revision)
    config, stored = read_adapter(str(adapter), folder)
    base_revision = None if base else config.revision
    base = base or config.base_model_name_or_path
    if base is None:
        raise CheckpointError(f"{adapter}: does not name its base: pass base, the CLIP that it was made over.")
    assert config.base_settings is not None  # or it would not have been read
    bare = _load_base(str(base), str(adapter), config.base_settings, base_revision, **base_kwargs)
    if "disk" in getattr(bare, "hf_device_map", {}).values():
        raise CheckpointError(
            f"{adapter}: PEFT cannot put it into a model with weights on the disk: name other devices in device_map, "
            "or make a full checkpoint of the two (moeclip_hf.adapters.adapter_to_full), which may rest there."
        )
    try:
        adapted = PeftModel.from_pretrained(bare, str(folder), adapter_name=adapter_name, is_trainable=is_trainable)
    except KeyError as error:
        raise CheckpointError(f"{adapter}: lacks a weight of its heads: {_one_line(error)}.") from error
    except Exception as error:  # whatever settings that do not fit the base lead to
        raise CheckpointError(f"{adapter}: cannot be put into {base}: {_one_line(error)}") from error
    loaded = get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
    if listed := list_faults(find_faults(stored, loaded)):
        raise CheckpointError(f"{adapter}: does not fit {base}: {listed}.")
    refuse_non_finite(str(adapter), loaded.items())
    return adapted


def read_adapter(adapter: str, folder: Path) -> tuple[MoELoraConfig, dict[str, StoredTensor]]:
    """
    Read an adapter's settings and what its file holds, once the two agree on the sizes of the experts.

    Args:
        adapter: names it in errors.
        folder: of the adapter.

    Raises:
        CheckpointError: if it is no adapter over a MoECLIP, or the two do not agree.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise CheckpointError(f"{adapter}: cannot be read as an adapter: {_one_line(error)}") from error
    if not isinstance(config, MoELoraConfig) or not isinstance(config.base_settings, dict):
        raise CheckpointError(f"{adapter}: is not a MoE-LoRA adapter made over a MoECLIP.")
    stored = read_headers(folder, [ADAPTER_WEIGHTS])
    projections = {name: tensor for name, tensor in stored.items() if name.endswith(".lora_A")}
    if not projections:
        raise CheckpointError(f"{adapter}: holds no experts: it has no weights of the name lora_A.")
    for name, tensor in projections.items():
        if tensor.shape[:2] != (config.num_experts, config.r):
            raise CheckpointError(
                f"{adapter}: {name} is {tensor.shape}, and its configuration asks for {config.num_experts} experts of "
                f"rank {config.r}."
            )
    return config, stored


def _load_base(base: str, adapter: str, settings: dict[str, Any], revision: str | None, **kwargs: Any) -> MoECLIPModel:
    """The CLIP beneath an adapter, as a MoECLIP without experts."""
    try:
        folder = fetch_clip(base, revision)
        config = _base_config(folder, settings)
        missing = check_weights(base, read_headers(folder), MoECLIPModel, config, MOECLIP_PARTS)
        lacking = [name for name in missing if not name.startswith(MOECLIP_PARTS)]
        if lacking:
            raise CheckpointError(f"it lacks {len(lacking)} of the weights of a CLIP ({lacking[0]}, ...).")
        with quiet_transformers():  # of heads that a CLIP has not: the adapter brings them
            bare = MoECLIPModel.from_pretrained(folder, config=config, **kwargs)
    except Exception as error:  # whatever a missing, foreign or damaged checkpoint leads to
        reason = _one_line(error).removeprefix(f"{base}: ")
        raise CheckpointError(f"{base}: cannot be loaded as the base of {adapter}: {reason}") from error
    refuse_non_finite(base, bare.state_dict().items())
    bare.name_or_path = bare.config.name_or_path = base
    return bare


def _experts_by_block(base: MoECLIPModel, adapter_name: str) -> dict[int, nn.Module]:
    """An adapter's experts by the block of the vision tower that they stand behind, counted from 0."""
    layers = {
        name: module.moe_lora_experts[adapter_name]
        for name, module in base.named_modules()
        if isinstance(module, MoELoraLayer) and adapter_name in module.moe_lora_experts
    }
    blocks = {f"vision_model.encoder.layers.{block}": block for block in range(len(base.vision_model.encoder.layers))}
    for name in layers:
        if name not in blocks:
            raise CheckpointError(
                f"{name} is adapted, and a full checkpoint has experts behind blocks of the vision tower alone."
            )
    return {blocks[name]: experts for name, experts in layers.items()}


def _base_config(folder: Path, settings: dict[str, Any]) -> MoECLIPConfig:
    towers = ("text_config", "vision_config")
    for name in settings:
        if name not in (*BASE_SETTINGS, *towers):
            raise CheckpointError(f"{name} ({settings[name]!r}) is no setting that an adapter relies on.")
    config = MoECLIPConfig.from_pretrained(
        folder, **{name: value for name, value in settings.items() if name not in towers}
    )
    for tower in towers:
        getattr(config, tower).hidden_act = settings[tower]["hidden_act"]
    config.validate_architecture()
    return config


def _copy_sharing_weights(model: nn.Module) -> Any:
    """Copy a model's modules and configuration, but not its tensors; whether they train is each model's own affair."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
