"""Configuration of a MoE-LoRA adapter."""

import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftType
from peft.config import PeftConfig

from moeclip_hf.tuner.expressions import is_bounded

PEFT_TYPE = "MOE_LORA"


@dataclass
class MoELoraConfig(PeftConfig):
    r"""
    Configuration of a [`MoELoraModel`]: mixtures of LoRA experts with routing by token (MoECLIP, arXiv 2603.03101,
    sections 3.2 to 3.4).

    A target may be a transformer block, whose output passes through the experts and the norm-matched residual, or an
    `nn.Linear`, to whose output the experts' answer is added: `W x + sum_i w_i (lora_alpha / r) B_i A_i x`.

    Args:
        r (`int`, *optional*, defaults to 8):
            Rank of an expert.
        lora_alpha (`float`, *optional*, defaults to 16):
            An expert's output is scaled by `lora_alpha / r`.
        lora_dropout (`float`, *optional*, defaults to 0.05):
            Dropout on the experts' input while training; the router reads the input as it is.
        num_experts (`int`, *optional*, defaults to 4):
            K, the number of experts of a target.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            k, the number of experts that a token is routed to; at most `num_experts`.
        use_fofs (`bool`, *optional*, defaults to `True`):
            Frozen orthogonal feature separation: every expert reads its own chunk of the features through a frozen
            projection with orthonormal rows, which is a buffer and saved with the adapter. `False` gives every expert
            a trained projection of all the features.
        residual_weight (`float`, *optional*, defaults to 0.1):
            lambda: an adapted block returns `lambda * experts + (1 - lambda) * block`, the experts' answer brought to
            the length of its token. Linear layers have no such residual.
        initializer_range (`float`, *optional*, defaults to 0):
            Standard deviation that routers and B are drawn with. 0 is the paper's start. Behind a block, where the
            residual divides by the norm of the experts' answer, the gradient of the first step from there is some
            10^6 times as large as any later one, and Adam does not recover from it soon: to train, use 0.02 or so.
        target_modules (`list[str]` or `str`, *optional*):
            Suffixes of module names, or a regular expression that must match a whole name. By default, for a CLIP, the
            vision tower's blocks at the quarters of its depth, and for a MoECLIP those that it takes features from.
            Mind that the suffix `layers.5` names a block of CLIP's text tower too; the expression
            `vision_model\.encoder\.layers\.(5|11)` names two blocks of the vision tower alone. An expression that
            Python could take hours over is refused: it may have two `*` or `+` over single characters, and groups of
            alternatives beside, not within, each other.
        exclude_modules (`list[str]` or `str`, *optional*):
            As `target_modules`: what is no target even so.
        modules_to_save (`list[str]`, *optional*):
            Modules to train in full and save with the adapter. By default MoECLIP's heads for a MoECLIP (they are as
            much a part of what is learnt), nothing for other models; `[]` for none.
        base_settings (`dict`, *optional*):
            What the adapter takes for granted in the settings of the MoECLIP below it, such as its taps. Filled in
            when the adapter is made, compared when it is loaded.

    Raises:
        ValueError: if two settings contradict each other; the message holds both values.
    """

    r: int = field(default=8, metadata={"help": "Rank of an expert."})
    lora_alpha: float = field(default=16, metadata={"help": "An expert's output is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the experts' input while training."})
    num_experts: int = field(default=4, metadata={"help": "Number of experts of a target."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Number of experts a token is routed to."})
    use_fofs: bool = field(
        default=True, metadata={"help": "Frozen orthogonal projections of disjoint features, one an expert."}
    )
    residual_weight: float = field(
        default=0.1, metadata={"help": "Weight of the experts against the block's own output."}
    )
    initializer_range: float = field(
        default=0.0, metadata={"help": "Standard deviation of routers and B at the start; 0 is the paper's start."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Suffixes of module names, or a regular expression that matches whole module names."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "As target_modules, for modules to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and save; by default the heads of a MoECLIP."}
    )
    base_settings: dict[str, Any] | None = field(
        default=None, metadata={"help": "Settings of the MoECLIP below that the adapter relies on. Filled in."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
            expression = getattr(self, name)
            if isinstance(expression, str) and not is_bounded(expression):
                raise ValueError(
                    f"{name} ({expression[:60]!r}) is an expression that could take hours to match: use simpler "
                    f"groups and fewer repetitions, or list the names."
                )
        for module in self.modules_to_save or ():
            if not (isinstance(module, str) and re.fullmatch(r"[\w.]+", module)):
                raise ValueError(f"modules_to_save ({str(module)[:60]!r}) takes names of modules.")
        if self.r < 1:
            raise ValueError(f"r ({self.r}) must be at least 1.")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and num_experts "
                f"({self.num_experts})."
            )
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range ({self.initializer_range}) must be 0 or more.")
        for name in ("lora_dropout", "residual_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must lie between 0 and 1.")
