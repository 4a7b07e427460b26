"""Puts MoE-LoRA layers into a model, and reads and writes their weights."""

import re
import warnings
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from moeclip_hf.errors import CheckpointError
from moeclip_hf.modeling.configuration_moeclip import quarters
from moeclip_hf.tuner.layer import MERGE_REFUSAL, MoELoraBlock, MoELoraLayer, MoELoraLinear

MOECLIP_HEADS = ("text_adapter", "patch_projection", "depthwise_adapter")

# What an adapter over a MoECLIP takes for granted below it: its scores mean nothing where these differ.
BASE_SETTINGS = (
    "moe_layers",
    "feature_layers",
    "image_feature_layer",
    "aggregation_sizes",
    "shared_projections",
    "projection_activation",
)


def vision_blocks(blocks: Iterable[int]) -> str:
    """A regular expression for blocks, counted from 0, of a CLIP's vision tower, which its text tower cannot match."""
    return rf"(vision_model\.)?encoder\.layers\.({'|'.join(map(str, blocks))})"


class MoELoraModel(BaseTuner):
    """
    Mixtures of LoRA experts in a frozen model (MoECLIP, arXiv 2603.03101, sections 3.2 to 3.4).

    Args:
        model (`nn.Module`): the model to adapt: any CLIP, a MoECLIP, or another model whose blocks return their hidden
            states, alone or first in a tuple.
        config ([`MoELoraConfig`]): the configuration.
        adapter_name (`str`): the adapter's name.
        low_cpu_mem_usage (`bool`): make empty weights on the meta device, to be loaded.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from moeclip_hf import MoECLIPModel
    >>> from moeclip_hf.tuner import MoELoraConfig

    >>> base = MoECLIPModel.from_pretrained("openai/clip-vit-large-patch14-336", moe_layers=[])
    >>> model = get_peft_model(base, MoELoraConfig(initializer_range=0.02))
    ```
    """

    prefix = "moe_lora_"
    tuner_layer_cls = MoELoraLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Fill in what the kind of model tells: targets, heads and, for a MoECLIP, what the adapter relies on."""
        if peft_config.target_modules is None:
            peft_config.target_modules = _default_targets(model_config)
        over_moeclip = model_config.get("model_type") == "moeclip"
        if over_moeclip and peft_config.modules_to_save is None:
            peft_config.modules_to_save = list(MOECLIP_HEADS)
        settings = _base_settings(model_config) if over_moeclip else None
        if peft_config.base_settings is None:
            peft_config.base_settings = settings
        difference = _first_difference(peft_config.base_settings, settings)
        if difference:
            raise CheckpointError(
                f"The adapter was made over a MoECLIP with other settings: {difference}. "
                f"moeclip_hf.adapters.load_adapter loads it over the right one."
            )
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """
        Look out for mistakes that would go unnoticed.

        Raises:
            ValueError: if a target lies within another, or around or within what another adapter adapts.
        """
        names = dict.fromkeys(_base_name(name) for name, _ in model.named_modules() if ".moe_lora_experts" not in name)
        targets = [name for name in names if self._check_target_module_exists(peft_config, name)]
        for inner in targets:
            outer = next((name for name in targets if inner.startswith(f"{name}.")), None)
            if outer:
                raise ValueError(f"target_modules matches {outer!r} and, within it, {inner!r}: name either of them.")
        adapted = [_base_name(name) for name, module in model.named_modules() if isinstance(module, MoELoraLayer)]
        for outer, inner in (*product(targets, adapted), *product(adapted, targets)):
            if inner.startswith(f"{outer}."):
                raise ValueError(
                    f"target_modules and an adapter that is there match {outer!r} and, within it, {inner!r}: name "
                    f"either of them for both."
                )
        own_experts = list(model.get_submodule("moe_layers").children()) if peft_config.base_settings else []
        if own_experts and not any(experts.get_parameter("lora_B").any() for experts in own_experts):
            warnings.warn(
                "The base model has experts of its own that were never trained, behind those of the adapter; make it "
                "with moe_layers=[] to have the adapter's alone.",
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MoELoraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer_class = MoELoraLinear if isinstance(base_layer, nn.Linear) else MoELoraBlock
        layer = layer_class(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            # An additional adapter is not active, and does not train, until it is told to.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own hands over `weight`, which a block has not; the experts are on their device already.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, MoELoraLayer):
                module.cast_experts(adapter_name, torch.float32 if autocast_adapter_dtype else None)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSAL)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own finds a name in the last two places only, and the router is one level deeper.
        before, experts, after = key.partition(f".moe_lora_experts.{adapter_name}.")
        if experts:
            return f"{before}.moe_lora_experts.{after}"
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _base_name(name: str) -> str:
    """The name that a module had before adapters were put around it, or around what it lies in."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


def _default_targets(model_config: dict[str, Any]) -> str:
    """The blocks that MoECLIP adapts: those at its taps, by default the quarters of the vision tower's depth."""
    match model_config.get("model_type"):
        case "moeclip":
            taps = model_config["feature_layers"]
        case "clip":
            taps = quarters(model_config["vision_config"]["num_hidden_layers"])
        case "clip_vision_model":
            taps = quarters(model_config["num_hidden_layers"])
        case model_type:
            raise ValueError(
                f"target_modules is not set, and there is no default for models of type {model_type!r}: name blocks "
                f"or linear layers, such as r'.*encoder\\.layer\\.(5|11)'."
            )
    return vision_blocks(tap - 1 for tap in taps)


def _base_settings(model_config: dict[str, Any]) -> dict[str, Any]:
    towers = ("text_config", "vision_config")
    activations = {tower: {"hidden_act": model_config[tower]["hidden_act"]} for tower in towers}
    return {name: model_config[name] for name in BASE_SETTINGS} | activations


def _first_difference(recorded: dict[str, Any] | None, found: dict[str, Any] | None) -> str | None:
    """The first of the recorded settings that is another one in the model."""
    for name, value in (recorded or {}).items():
        if found is None:
            return "the model is no MoECLIP"
        if found.get(name) != value:
            return f"{name} was {value} and is {found.get(name)}"
    return None
