"""Exporting a checkpoint to ONNX: a graph from images to maps and scores of fixed classes, for any runtime."""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moeclip_hf._version import __version__
from moeclip_hf.calibration import refuse_filled_folder
from moeclip_hf.errors import MoECLIPError
from moeclip_hf.modeling.processing_moeclip import patch_maps
from moeclip_hf.onnx_detector import GRAPH, INT8_GRAPH, METADATA_KEY, load_onnx
from moeclip_hf.pretrained import Detector, Pretrained

if TYPE_CHECKING:
    import onnx_ir

# The first that resizes with antialiasing, which positions of other grids take.
OPSET = 18

# How far a graph's maps and scores may lie from the model's.
TOLERANCE = 1e-4
_ATTEMPTS = 3

# A protobuf message holds 2 GB at most; beyond this, weights have a file of their own.
_LARGEST_FILE = 1_500_000_000

# Where one factor is a weight: products of two activations stay as they are.
_QUANTISED = ["MatMul", "Gemm"]


@dataclass(frozen=True)
class Export:
    """
    What was exported.

    Args:
        folder: that holds it.
        class_names: in the order of the graph's `class_index`.
        sizes: bytes of every graph with its weights, by the graph's file name.
        largest_difference: of maps and scores from the model's, over some random images.
        int8_difference: the same of the quantised graph, if there is one.
    """

    folder: Path
    class_names: tuple[str, ...]
    sizes: dict[str, int]
    largest_difference: float
    int8_difference: float | None = None


class ExportedGraph(nn.Module):
    """
    What a graph computes: images to smoothed maps and scores, 0 to 1.

    Args:
        pretrained ([`Pretrained`])
        class_names: whose anchors the graph holds; the text tower stays behind.
    """

    anchors: torch.Tensor

    def __init__(self, pretrained: Pretrained, class_names: Sequence[str]):
        super().__init__()
        self.model = pretrained.model
        self.domain = pretrained.processor.domain
        self.register_buffer("anchors", torch.cat([pretrained.encode_class(name) for name in class_names]))

    def forward(
        self, pixel_values: torch.Tensor, class_index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Score images.

        Args:
            pixel_values (`torch.Tensor`): (B, 3, H, W), normalised, H and W in whole patches.
            class_index (`torch.Tensor`, *optional*): (B,), int64, the class of each image; where there are several.

        Returns:
            `anomaly_map` (B, h, w) on the patch grid and `score` (B,).
        """
        anchors = self.anchors if class_index is None else self.anchors[class_index]
        return patch_maps(self.model(pixel_values, text_embeds=anchors), self.domain)


def export_onnx(pretrained: Pretrained, class_names: Sequence[str], output: Path, int8: bool = False) -> Export:
    """
    Write a folder that scores images of some classes without torch's model.

    It holds `model.onnx` (float32, with its weights; beyond 1.5 GB these lie in `model.onnx.data`), the processor, and
    on request `model_int8.onnx`. Batch, height and width are free. Before it is kept, onnxruntime is held to the model
    on random images of two sizes in batches of one and of three.

    Args:
        pretrained ([`Pretrained`]): in float32 on the CPU.
        class_names: what images will show.
        output (`Path`): new or empty folder.
        int8 (`bool`): also write a graph that [`quantise`] made.

    Raises:
        MoECLIPError: if a class name cannot be used, a package is missing, or the graph is not as exact as it must be.
        CheckpointError: if the folder is not empty.
    """
    require_exporter()
    names = tuple(dict.fromkeys(name.strip() for name in class_names))
    if not names:
        raise MoECLIPError('There is no class name to export for: use "object" when none is known.')
    refuse_filled_folder(output)
    if pretrained.model.dtype != torch.float32 or pretrained.model.device.type != "cpu":
        raise MoECLIPError("A graph is exported in float32 on the CPU: load the model so.")
    graph = ExportedGraph(pretrained, names)
    output.mkdir(parents=True, exist_ok=True)
    try:
        _write_graph(graph, _describe(pretrained, names), output / GRAPH)
        pretrained.processor.save_pretrained(output)
        difference = _checked_difference(pretrained, load_onnx(output, "cpu"), names)
        int8_difference = None
        if int8:
            quantise(output / GRAPH, output / INT8_GRAPH)
            int8_difference = largest_difference(pretrained, load_onnx(output / INT8_GRAPH, "cpu"), names)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    sizes = {path.name: _size_on_disk(path) for path in (output / GRAPH, output / INT8_GRAPH) if path.exists()}
    return Export(output, names, sizes, difference, int8_difference)


def require_exporter() -> None:
    """
    Import what exporting takes.

    Raises:
        MoECLIPError: naming the package that is missing, and how to install it.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MoECLIPError(f"Exporting takes {error.name}: pip install 'moeclip-hf[onnx]'.") from error


def _describe(pretrained: Pretrained, class_names: Sequence[str]) -> dict[str, Any]:
    """What a graph carries along, so that it can be used with nothing but itself."""
    processor = pretrained.processor
    images = processor.image_processor
    return {
        "class_names": list(class_names),
        "domain": processor.domain,
        "image_threshold": processor.image_threshold,
        "pixel_threshold": processor.pixel_threshold,
        "size": images.size,
        "patch_size": images.patch_size,
        "image_mean": images.image_mean,
        "image_std": images.image_std,
        "moeclip_hf_version": __version__,
    }


def _write_graph(graph: ExportedGraph, description: dict[str, Any], path: Path) -> None:
    vision: Any = graph.model.config.vision_config
    patch_size, side = vision.patch_size, vision.image_size // vision.patch_size
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "grid_height", "grid_width"))
    # No edge is that of the tower's own grid, for which positions take another way.
    inputs = {"pixel_values": torch.zeros(2, 3, (side + 1) * patch_size, (side + 2) * patch_size)}
    dynamic: dict[str, Any] = {"pixel_values": {0: batch, 2: patch_size * height, 3: patch_size * width}}
    if len(graph.anchors) > 1:
        inputs["class_index"] = torch.zeros(2, dtype=torch.int64)
        dynamic["class_index"] = {0: batch}
    with torch.no_grad(), _quiet_exporter():
        # Captured strictly, since otherwise the length of a batch is taken for a constant.
        program = torch.export.export(graph.eval(), (), inputs, dynamic_shapes=dynamic, strict=True)
        exported = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=["anomaly_map", "score"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert exported is not None  # it was not asked to write a file
    model = exported.model
    _name_dimensions(model.graph)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # where in whose files it was traced
    model.metadata_props[METADATA_KEY] = json.dumps(description)
    weights = [value.const_value for value in model.graph.initializers.values()]
    exported.save(path, external_data=sum(weight.nbytes for weight in weights if weight is not None) > _LARGEST_FILE)


def _name_dimensions(graph: "onnx_ir.Graph") -> None:
    """Call the free dimensions by names, where the exporter has numbers."""
    shape = graph.inputs[0].shape
    assert shape is not None
    symbols = [re.findall(r"\bs\d+", str(shape[axis]))[0] for axis in (0, 2, 3)]
    names = dict(zip(symbols, ("batch", "grid_height", "grid_width"), strict=True))
    values = [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            for axis, dimension in enumerate(value.shape):
                if not isinstance(dimension, int):
                    named = re.sub(r"\bs\d+", lambda match: names.get(match[0], match[0]), str(dimension))
                    value.shape[axis] = named


def _checked_difference(pretrained: Pretrained, exported: Detector, class_names: Sequence[str]) -> float:
    # Where two experts are as likely as each other, rounding tells which is taken: other images are drawn then.
    for seed in range(_ATTEMPTS):
        difference = largest_difference(pretrained, exported, class_names, seed)
        if difference <= TOLERANCE:
            return difference
    raise MoECLIPError(
        f"The exported graph differs from the model by {difference:.1e}, more than {TOLERANCE:.0e}: it is not kept. "
        "Please report it with the versions of torch, onnxscript and onnxruntime."
    )


def quantise(source: Path, target: Path) -> None:
    """
    Quantise a graph's products with weights to 8 bits, dynamically.

    Weights are kept as signed integers with a scale a channel, of 7 bits, since sums of products of 8 saturate on x86
    processors without VNNI; activations are quantised as they come, a scale a tensor. Convolution, normalisation,
    softmax, and all that maps and scores are made of stay in float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet_exporter():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=_QUANTISED,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=_weights_file(source).exists(),
        )


def largest_difference(reference: Detector, other: Detector, class_names: Sequence[str], seed: int = 0) -> float:
    """
    The largest difference between the maps and scores of two detectors.

    Over random images, of the processor's size and of another shape, in batches of one and of three; the classes take
    turns.
    """
    patch_size = reference.processor.image_processor.patch_size
    side = min(reference.processor.image_processor.size.values()) // patch_size
    generator = torch.Generator().manual_seed(seed)
    largest = 0.0
    cases = product((1, 3), [(side, side), (side + 1, side // 2 + 1)])
    for class_name, (batch_size, (height, width)) in zip(cycle(class_names), cases, strict=False):
        pixel_values = torch.randn(batch_size, 3, height * patch_size, width * patch_size, generator=generator)
        found = [one.patch_maps(pixel_values, one.encode_class(class_name)) for one in (reference, other)]
        largest = max(largest, *(float((ours - theirs).abs().max()) for ours, theirs in zip(*found, strict=True)))
    return largest


def _weights_file(graph: Path) -> Path:
    """Where the weights of a graph too large for one file lie."""
    return graph.with_name(f"{graph.name}.data")


def _size_on_disk(graph: Path) -> int:
    return sum(path.stat().st_size for path in (graph, _weights_file(graph)) if path.exists())


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's and the quantiser's notes on their own work from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


__all__ = ["OPSET", "TOLERANCE", "Export", "ExportedGraph", "export_onnx", "largest_difference", "quantise"]
