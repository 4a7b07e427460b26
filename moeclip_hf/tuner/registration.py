"""Makes the PEFT type `MOE_LORA` known to PEFT."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from moeclip_hf.tuner.config import PEFT_TYPE, MoELoraConfig
from moeclip_hf.tuner.model import MoELoraModel


def _add_peft_type() -> None:
    """Give the enumeration `PeftType`, which PEFT has no way to extend, a member as Python's `enum` makes one."""
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    PeftType._member_names_.append(PEFT_TYPE)
    # Past EnumType.__setattr__, which refuses to rebind members.
    type.__setattr__(PeftType, PEFT_TYPE, member)


def register() -> None:
    """Register the tuner with PEFT, so that its adapters load by their type. Idempotent."""
    if PEFT_TYPE not in PeftType.__members__:
        _add_peft_type()
    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=MoELoraConfig, model_cls=MoELoraModel)
