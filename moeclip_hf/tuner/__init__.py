"""MoE-LoRA as a PEFT tuner: routed LoRA experts behind transformer blocks, or beside linear layers."""

from moeclip_hf.modeling.moe_lora import record_outputs
from moeclip_hf.tuner.config import MoELoraConfig
from moeclip_hf.tuner.layer import MoELoraBlock, MoELoraLayer, MoELoraLinear
from moeclip_hf.tuner.model import MoELoraModel
from moeclip_hf.tuner.registration import register

__all__ = [
    "MoELoraBlock",
    "MoELoraConfig",
    "MoELoraLayer",
    "MoELoraLinear",
    "MoELoraModel",
    "record_outputs",
    "register",
]

register()
