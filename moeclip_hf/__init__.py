"""MoECLIP for Hugging Face: zero-shot anomaly detection with a frozen CLIP and routed LoRA experts.

Importing the package registers its classes with transformers' Auto classes and imports nothing heavy: every name below
is loaded when it is first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from moeclip_hf import registration
from moeclip_hf._version import __version__

if TYPE_CHECKING:
    from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
    from moeclip_hf.modeling.image_processing_moeclip import MoECLIPImageProcessor
    from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel, MoECLIPOutput
    from moeclip_hf.modeling.pipeline_moeclip import ZeroShotAnomalyDetectionPipeline
    from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor

_HOMES = {
    "MoECLIPConfig": "moeclip_hf.modeling.configuration_moeclip",
    "MoECLIPImageProcessor": "moeclip_hf.modeling.image_processing_moeclip",
    "MoECLIPModel": "moeclip_hf.modeling.modeling_moeclip",
    "MoECLIPOutput": "moeclip_hf.modeling.modeling_moeclip",
    "MoECLIPProcessor": "moeclip_hf.modeling.processing_moeclip",
    "ZeroShotAnomalyDetectionPipeline": "moeclip_hf.modeling.pipeline_moeclip",
}

__all__ = [
    "MoECLIPConfig",
    "MoECLIPImageProcessor",
    "MoECLIPModel",
    "MoECLIPOutput",
    "MoECLIPProcessor",
    "ZeroShotAnomalyDetectionPipeline",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.register(sys.modules[__name__])
