"""Recipes: how MoECLIP is trained, and how its experts start.

`paper` is the default: the paper's objective, start and schedule, with gradients clipped, lest the first of them,
which is millions of times as long as any later one, spoil Adam's moments. `paper-literal` leaves gradients as they
are. `released` is what the public code does.
`docs/training.md` shows what was measured for each difference.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moeclip_hf.errors import MoECLIPError
from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel


@dataclass(frozen=True)
class Recipe:
    """
    Everything that decides what a training run learns, machines and bookkeeping apart.

    Args:
        num_epochs: passes over the data.
        batch_size: images a process and step.
        learning_rate: of projections, depth-wise adapter and text adapter.
        expert_learning_rate: of routers and experts.
        adam_beta1, adam_beta2, adam_epsilon: of Adam.
        warmup_steps: steps over which both learning rates rise from zero, linearly.
        halve_at: steps at which both learning rates are halved.
        max_grad_norm: gradients of the whole model are scaled down to this norm; 0 for never.
        expert_std: deviation that B is drawn with; 0 is the paper's start.
        router_std: deviation that G is drawn with; 0 is the paper's start.
        augment: rotate, shift and flip images with their masks.
        etf_loss_coef, router_aux_loss_coef, lora_dropout: as in `MoECLIPConfig`.
        residual_weight: lambda, as in `MoECLIPConfig`; if `None` that of the MoECLIP that training goes on from, and
            the paper's 0.1 over a plain CLIP.
        hidden_act: activation of both towers; the CLIP's own if `None`.
    """

    num_epochs: float = 20
    batch_size: int = 2
    learning_rate: float = 5e-4
    expert_learning_rate: float = 5e-4
    adam_beta1: float = 0.5
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    warmup_steps: int = 0
    halve_at: tuple[int, ...] = (16_000, 32_000)
    max_grad_norm: float = 0.0
    expert_std: float = 0.0
    router_std: float = 0.0
    augment: bool = True
    etf_loss_coef: float = 0.01
    router_aux_loss_coef: float = 0.01
    lora_dropout: float = 0.05
    residual_weight: float | None = None
    hidden_act: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise MoECLIPError(f"{name} ({value}) must be finite.")
        for name in ("num_epochs", "batch_size", "adam_epsilon"):
            if getattr(self, name) <= 0:
                raise MoECLIPError(f"{name} ({getattr(self, name)}) must be more than 0.")
        for name in (
            "learning_rate",
            "expert_learning_rate",
            "warmup_steps",
            "max_grad_norm",
            "expert_std",
            "router_std",
        ):
            if getattr(self, name) < 0:
                raise MoECLIPError(f"{name} ({getattr(self, name)}) must be 0 or more.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise MoECLIPError(f"{name} ({getattr(self, name)}) must lie between 0 and 1.")

    def learning_rate_factor(self, step: int) -> float:
        """What both learning rates are multiplied with in a step, counted from 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * 0.5 ** sum(step >= milestone for milestone in self.halve_at)

    def model_settings(self) -> dict[str, Any]:
        """The fields of `MoECLIPConfig` that this recipe sets."""
        names = ("etf_loss_coef", "router_aux_loss_coef", "lora_dropout", "residual_weight")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


PAPER_LITERAL = Recipe()

RECIPES: Mapping[str, Recipe] = {
    "paper": replace(PAPER_LITERAL, max_grad_norm=1.0),
    "paper-literal": PAPER_LITERAL,
    "released": replace(
        PAPER_LITERAL,
        learning_rate=5e-5,
        expert_learning_rate=5e-5,
        etf_loss_coef=0.0,
        router_aux_loss_coef=0.0,
        lora_dropout=0.0,
        hidden_act="gelu",
    ),
}
"""By name: `paper`, `paper-literal` and `released`."""


def get_recipe(name: str, **changes: Any) -> Recipe:
    """
    A recipe by its name, with some of its values replaced.

    Raises:
        MoECLIPError: there is no such recipe, or a value makes no sense.
    """
    if name not in RECIPES:
        raise MoECLIPError(f"no recipe {name!r}; there are {', '.join(RECIPES)}.")
    return replace(RECIPES[name], **changes)


def apply_recipe(config: MoECLIPConfig, recipe: Recipe) -> MoECLIPConfig:
    """A copy of a configuration with what the recipe sets of it."""
    values = config.to_dict() | recipe.model_settings()
    if recipe.hidden_act is not None:
        for tower in ("text_config", "vision_config"):
            values[tower] = values[tower] | {"hidden_act": recipe.hidden_act}
    return MoECLIPConfig(**values)


@torch.no_grad()
def draw_experts(model: MoECLIPModel, recipe: Recipe, seed: int = 0) -> None:
    """
    Start routers and experts as the recipe tells: G and B from Gaussians of its deviations, zeros where they are 0.

    Zeros are the paper's start, and have two costs. With B = 0 the experts' answer is divided by the epsilon of its
    norm, so that the first gradient is some 1e6 times as large as any later one. With G = 0 all experts tie, and top-k
    sends every token to the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.moe_layers:
        for weight, deviation in ((layer.router.weight, recipe.router_std), (layer.lora_B, recipe.expert_std)):
            drawn = torch.randn(weight.shape, generator=generator) * deviation
            weight.copy_(drawn)


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, to be stored with what it trained."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()}
