"""The layers of a MoE-LoRA adapter: a module of the base model, and the experts of every adapter beside it."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moeclip_hf.modeling.moe_lora import MoELora, MoELoraOutput
from moeclip_hf.tuner.config import MoELoraConfig

MERGE_REFUSAL = (
    "A MoE-LoRA adapter cannot be merged: a token's experts depend on the token, so no fixed weights do what they do. "
    "Keep the adapter; over a MoECLIP, moeclip_hf.adapters.adapter_to_full makes a full checkpoint of it."
)


class MoELoraLayer(nn.Module, BaseTunerLayer):
    """
    What the layers have in common: the experts, one [`MoELora`] an adapter.

    The experts' weights are float32 whatever the type of the base layer, unless PEFT is told otherwise
    (`autocast_adapter_dtype=False`); what passes through them is cast to their type and back.

    Args:
        base_layer (`nn.Module`): the module to adapt.
        adapter_name (`str`): the first adapter.
        config ([`MoELoraConfig`]): its configuration.
    """

    adapter_layer_names: tuple[str, ...] = ("moe_lora_experts",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoELoraConfig):
        super().__init__()
        self.base_layer = base_layer
        self.moe_lora_experts = nn.ModuleDict()
        # Where `record_outputs` wants to have what the experts return.
        self.moe_lora_outputs: list[MoELoraOutput] | None = None
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.update_layer(adapter_name, config)

    def features(self) -> tuple[int, int]:
        """How many features the experts read, and how many they answer with."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: MoELoraConfig, inference_mode: bool = False) -> None:
        """
        Give an adapter its experts here.

        Raises:
            ValueError: if with FOFS an expert's chunk has fewer than `config.r` features.
        """
        num_features, num_outputs = self.features()
        experts = MoELora(
            num_features,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            rank=config.r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            residual_weight=config.residual_weight,
            use_fofs=config.use_fofs,
            num_outputs=num_outputs,
        )
        with torch.no_grad():
            experts.reset_parameters()
            if config.initializer_range:
                experts.router.weight.normal_(std=config.initializer_range)
                experts.lora_B.normal_(std=config.initializer_range)
        self.moe_lora_experts[adapter_name] = experts
        # An adapter that is put into a model in eval mode is in eval mode too, without dropout.
        self.training = self.base_layer.training
        self.moe_lora_experts.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def cast_experts(self, adapter_name: str, dtype: torch.dtype | None) -> None:
        """Cast an adapter's experts, frozen projections too, to a type, or with `None` to that of the base layer."""
        if adapter_name in self.moe_lora_experts:
            weights = (weight for weight in self.get_base_layer().parameters() if weight.is_floating_point())
            self.moe_lora_experts[adapter_name].to(dtype or next(weights).dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse, with the reason."""
        raise ValueError(MERGE_REFUSAL)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # A block has no weight of its own to ask, and the experts keep their type.
        return next(base_layer.parameters()).device, None

    def _active_experts(self) -> Iterator[MoELora]:
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.moe_lora_experts:
                    yield self.moe_lora_experts[name]

    def _answer(self, experts: MoELora, hidden_states: torch.Tensor, residual: bool) -> torch.Tensor:
        """Ask the experts in their own type, record what they return, and give their answer in the type asked in."""
        answer = experts if residual else experts.mix
        inputs = self._cast_input_dtype(hidden_states, experts.lora_B.dtype)
        # Recorded or not: where gradient checkpointing runs the layer again, it has to do the same as before.
        output = answer(inputs, output_losses=self.training)
        if self.moe_lora_outputs is not None:
            self.moe_lora_outputs.append(output)
        return output.hidden_states.to(hidden_states.dtype)


class MoELoraBlock(MoELoraLayer):
    """
    A transformer block whose output is adapted: `lambda o' + (1 - lambda) x` of the block's output x.

    The block returns its hidden states (..., d), alone or first in a tuple. Several active adapters work one behind
    the other.

    Args:
        base_layer, adapter_name, config: as in [`MoELoraLayer`].

    Raises:
        TypeError: if the width d cannot be told, as no normalisation is among the block's children.
    """

    def features(self) -> tuple[int, int]:
        block = self.get_base_layer()
        for child in block.children():
            if type(child).__name__.endswith(("LayerNorm", "RMSNorm")):
                width = child.get_parameter("weight").numel()
                return width, width
        raise TypeError(
            f"{type(block).__name__} cannot be adapted: targets are nn.Linear and transformer blocks, which have a "
            f"LayerNorm or RMSNorm among their children."
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        hidden_states, *rest = output if isinstance(output, tuple) else (output,)
        for experts in self._active_experts():
            hidden_states = self._answer(experts, hidden_states, residual=True)
        return (hidden_states, *rest) if isinstance(output, tuple) else hidden_states


class MoELoraLinear(MoELoraLayer):
    """
    A linear layer with plain routed LoRA beside it: `W x + sum_i w_i (alpha / r) B_i A_i x`, the router reading x.

    There is no norm-matched residual: it weighs experts against a whole block's output, whereas W x is to stay.

    Args:
        base_layer, adapter_name, config: as in [`MoELoraLayer`]; the base layer is an `nn.Linear`.
    """

    def features(self) -> tuple[int, int]:
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)
        return linear.in_features, linear.out_features

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(hidden_states, *args, **kwargs)
        for experts in self._active_experts():
            result = result + self._answer(experts, hidden_states, residual=False).to(result.dtype)
        return result
