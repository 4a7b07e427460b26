"""Using what was exported: a graph that onnxruntime computes, in place of torch's model."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor
from moeclip_hf.pretrained import check_processor, refuse_links

if TYPE_CHECKING:
    from os import PathLike

    import onnxruntime

GRAPH = "model.onnx"
INT8_GRAPH = "model_int8.onnx"

# Under which a graph carries what it was exported with, as JSON.
METADATA_KEY = "moeclip"

_OUTPUTS = ["anomaly_map", "score"]
_ONLY_ERRORS = 3


class OnnxDetector(NamedTuple):
    """An exported graph for some classes, its processor and file: a [`~moeclip_hf.pretrained.Detector`]."""

    session: "onnxruntime.InferenceSession"
    class_names: tuple[str, ...]
    processor: MoECLIPProcessor
    path: Path

    def encode_class(self, class_name: str) -> torch.Tensor:
        """The class's place among the exported ones, (1,)."""
        if class_name.strip() not in self.class_names:
            known = ", ".join(map(repr, self.class_names))
            raise MoECLIPError(
                f"class name {class_name[:60]!r}: the graph was exported for {known}; `moeclip export --class-name` "
                "exports others."
            )
        return torch.tensor([self.class_names.index(class_name.strip())])

    def patch_maps(self, pixel_values: torch.Tensor, encoded_class: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smoothed maps (B, h, w) and scores (B,) of prepared images (B, 3, H, W)."""
        inputs = {"pixel_values": pixel_values.numpy()}
        if len(self.class_names) > 1:
            inputs["class_index"] = encoded_class.expand(len(pixel_values)).numpy()
        try:
            grids, scores = self.session.run(_OUTPUTS, inputs)
        except Exception as error:  # onnxruntime's own know no common base
            if isinstance(error, MemoryError) or re.search("bad_alloc|[Ff]ailed to allocate", str(error)):
                raise MemoryError from error
            raise MoECLIPError(f"{self.path}: the graph cannot be computed: {_reason(error)}") from error
        return torch.from_numpy(np.asarray(grids)), torch.from_numpy(np.asarray(scores))


def is_onnx(source: "str | PathLike[str]") -> bool:
    """Whether a path is an ONNX file, or a folder that holds an exported graph and no checkpoint."""
    path = Path(source)
    return path.suffix == ".onnx" or ((path / GRAPH).exists() and not (path / "config.json").exists())


def load_onnx(source: "str | PathLike[str]", device: str | None = None) -> OnnxDetector:
    """
    Load what [`export_onnx`] wrote. Nothing of torch's model is needed.

    Args:
        source (`str` or path): the folder, or one of its ONNX files.
        device (`str`, *optional*): `"cpu"` or, with a build of onnxruntime for it, `"cuda"`; the latter by default
            where it can be had.

    Raises:
        MoECLIPError: if onnxruntime is missing, or has no such device.
        CheckpointError: if there is no such graph, it cannot be loaded, or no image could be scored with the
            processor beside it. onnxruntime refuses a graph whose weights lie outside its folder.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MoECLIPError("Exported graphs take onnxruntime: pip install 'moeclip-hf[onnx]'.") from error

    path = Path(source)
    path = path / GRAPH if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: `moeclip export` writes a folder that holds it.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ONLY_ERRORS
    options.intra_op_num_threads = torch.get_num_threads()
    providers = _providers(device, onnxruntime.get_available_providers())
    refuse_links(path.parent)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        description = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
        processor = MoECLIPProcessor.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
        check_processor(str(path.parent), processor)
        _check_description(path, description, session, processor)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: was not written by `moeclip export`.") from error
    except Exception as error:  # onnxruntime's own know no common base
        raise CheckpointError(f"{path}: cannot be loaded as an exported graph: {_reason(error)}") from error
    return OnnxDetector(session, tuple(description["class_names"]), processor, path)


def _check_description(
    path: Path, description: Any, session: "onnxruntime.InferenceSession", processor: MoECLIPProcessor
) -> None:
    """Refuse a graph that is not what its metadata say, or that the processor beside it does not fit."""
    names = description.get("class_names") if isinstance(description, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: its metadata name no classes: export it anew.")
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    wanted = ["pixel_values", "class_index"] if len(names) > 1 else ["pixel_values"]
    if inputs != wanted or outputs != _OUTPUTS:
        raise CheckpointError(
            f"{path}: its graph, from {', '.join(inputs)} to {', '.join(outputs)}, is none for the classes "
            f"that its metadata name ({', '.join(map(repr, names))}): export it anew."
        )
    images = processor.image_processor
    for name in ("patch_size", "image_mean", "image_std"):
        if description.get(name) != getattr(images, name):
            raise CheckpointError(
                f"{path.parent}: its processor is another model's: {name} is {getattr(images, name)}, and "
                f"{description.get(name)} in the metadata of {path.name}."
            )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _providers(device: str | None, available: list[str]) -> list[str | tuple[str, dict[str, int]]]:
    """onnxruntime's name of a device, with the CPU for what it cannot compute."""
    kind, _, index = (device or "").partition(":")
    has_cuda = "CUDAExecutionProvider" in available
    if kind == "cpu" or (not kind and not has_cuda):
        return ["CPUExecutionProvider"]
    if kind not in ("", "cuda") or not (index or "0").isdecimal() or not has_cuda:
        raise MoECLIPError(f"device {device!r} cannot be used here: this onnxruntime has {', '.join(available)}.")
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


__all__ = ["GRAPH", "INT8_GRAPH", "METADATA_KEY", "OnnxDetector", "is_onnx", "load_onnx"]
