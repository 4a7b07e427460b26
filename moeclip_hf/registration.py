"""Makes MoECLIP known to transformers' Auto classes and pipelines and to PEFT without importing any.

`import moeclip_hf` has to register with the Auto classes, and importing those takes seconds that `moeclip --help`
should not. The Auto classes themselves are lazy: they hold names, and import `transformers.models.<model type>` when a
name is first used. So MoECLIP's names join theirs once their modules are imported, by whomever, and this package
answers as `transformers.models.moeclip`. Where the Auto classes are there already, the classes are registered at once.
Pipelines and PEFT's adapter types are plain tables of classes: once either is imported, MoECLIP's part is, and its
classes are added.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

_MODEL_TYPE = "moeclip"
# Under both backends, lest an environment with torchvision look for another class.
_IMAGE_PROCESSORS = {"pil": "MoECLIPImageProcessor", "torchvision": "MoECLIPImageProcessor"}
_NAMES: dict[str, tuple[str, Any]] = {
    "transformers.models.auto.configuration_auto": ("CONFIG_MAPPING_NAMES", "MoECLIPConfig"),
    "transformers.models.auto.modeling_auto": ("MODEL_MAPPING_NAMES", "MoECLIPModel"),
    "transformers.models.auto.image_processing_auto": ("IMAGE_PROCESSOR_MAPPING_NAMES", _IMAGE_PROCESSORS),
    "transformers.models.auto.processing_auto": ("PROCESSOR_MAPPING_NAMES", "MoECLIPProcessor"),
}
PIPELINE_TASK = "zero-shot-anomaly-detection"
_PIPELINES = "transformers.pipelines"
_OWN_PIPELINE = "moeclip_hf.modeling.pipeline_moeclip"


def _register_with(module: ModuleType) -> None:
    """Register with a module that has just been imported."""
    if module.__name__ == "peft":
        importlib.import_module("moeclip_hf.tuner")
    elif module.__name__ == _PIPELINES:
        # Which may be what imports transformers' pipelines: so it is registered itself when it has been imported.
        importlib.import_module(_OWN_PIPELINE)
    elif module.__name__ == _OWN_PIPELINE:
        pipelines = sys.modules[_PIPELINES]
        pipelines.PIPELINE_REGISTRY.register_pipeline(
            PIPELINE_TASK, module.ZeroShotAnomalyDetectionPipeline, pt_model=pipelines.AutoModel, type="image"
        )
    else:
        table, name = _NAMES[module.__name__]
        getattr(module, table)[_MODEL_TYPE] = name


class _RegisteringLoader(importlib.abc.Loader):
    """Loads a module as its own loader would, then registers with it."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        """What else is asked of a module's loader, such as the files of its package."""
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register_with(module)


class _RegisteringFinder(importlib.abc.MetaPathFinder):
    """Finds the modules that are to be registered with."""

    def __init__(self, names: Collection[str]):
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def _register_now() -> None:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

    from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
    from moeclip_hf.modeling.image_processing_moeclip import MoECLIPImageProcessor
    from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
    from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor

    image_processors = dict.fromkeys(_IMAGE_PROCESSORS, MoECLIPImageProcessor)
    AutoConfig.register(_MODEL_TYPE, MoECLIPConfig, exist_ok=True)
    AutoModel.register(MoECLIPConfig, MoECLIPModel, exist_ok=True)
    AutoImageProcessor.register(MoECLIPConfig, image_processor_classes=image_processors, exist_ok=True)
    AutoProcessor.register(MoECLIPConfig, MoECLIPProcessor, exist_ok=True)


def register(package: ModuleType) -> None:
    """
    Register with the Auto classes, pipelines and PEFT, now or when they are imported.

    Args:
        package (`ModuleType`): `moeclip_hf`, which gives the classes by name.
    """
    awaited = {*_NAMES, _PIPELINES, _OWN_PIPELINE, "peft"} - set(sys.modules)
    if "transformers.models.auto.configuration_auto" in awaited:
        sys.modules[f"transformers.models.{_MODEL_TYPE}"] = package
    else:
        _register_now()
        awaited -= set(_NAMES)
    sys.meta_path.insert(0, _RegisteringFinder(awaited))
    for name in {_PIPELINES, "peft"} - awaited:
        _register_with(sys.modules[name])
