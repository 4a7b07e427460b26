"""Exported graphs compute what the model computes, whatever the settings, the batch and the size of images."""

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_models import PATCH_SIZE, random_anchors, random_pixels, tiny_model

from moeclip_hf import MoECLIPImageProcessor, MoECLIPProcessor, export
from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.export import export_onnx
from moeclip_hf.modeling.vision_moeclip import MoECLIPQuickGELU
from moeclip_hf.onnx_detector import load_onnx
from moeclip_hf.pretrained import Pretrained

ROOT = Path(__file__).resolve().parent.parent
TWO_CLASSES = ["bolt", "gear"]
# The tiny model's own grid is 5 x 5: larger and smaller ones, of other shapes, and a single patch.
SHAPES = [(1, 5, 5), (3, 5, 5), (1, 7, 10), (3, 3, 2), (2, 1, 1)]
FIRST_SEED = 45
FEW_BLOCKS = {"feature_layers": [1, 2], "moe_layers": [0, 1]}


class TinyPretrained(Pretrained):
    """A tiny model whose text tower knows no words: anchors are drawn by the class name."""

    def encode_class(self, class_name: str) -> torch.Tensor:
        return random_anchors(seed=sum(map(ord, class_name)))


class FaultlessPretrained(Pretrained):
    """A tiny model of one block and one map, to which every patch is alike, and normal beyond doubt."""

    def encode_class(self, class_name: str) -> torch.Tensor:
        with torch.no_grad():
            patches = self.model(random_pixels(), text_embeds=random_anchors()).patch_embeds[0]
        normal = torch.nn.functional.normalize(patches.mean(dim=(0, 1)), dim=0)
        return 0.2 * torch.stack([normal, -normal]).unsqueeze(0)  # float32 still holds the probabilities


def tiny_pretrained(tokenizer, domain="industrial", quick_gelu=False, **settings) -> TinyPretrained:
    model = tiny_model(**settings)
    if quick_gelu:
        for block in model.vision_model.encoder.layers:
            block.mlp.activation_fn = MoECLIPQuickGELU()
    images = MoECLIPImageProcessor(size={"height": 20, "width": 20}, patch_size=PATCH_SIZE)
    return TinyPretrained(model, MoECLIPProcessor(images, tokenizer, domain=domain, pixel_threshold=0.4))


def assert_equal_results(pretrained: Pretrained, folder: Path, class_names: list[str]) -> None:
    """Maps, scores and regions of the graph are those that the model and its processor give."""
    detector = load_onnx(folder, "cpu")
    for number, (batch_size, rows, columns) in enumerate(SHAPES, start=FIRST_SEED):
        pixels = random_pixels(batch_size, rows * PATCH_SIZE, columns * PATCH_SIZE, seed=number)
        for name in class_names:
            with torch.no_grad():
                outputs = pretrained.model(
                    pixels, text_embeds=pretrained.encode_class(name), output_router_logits=True
                )
            assert_choices_are_clear(outputs.router_logits, pretrained.model.config.num_experts_per_tok)
            expected = pretrained.processor.post_process_anomaly_detection(outputs, (37, 53))
            grids, scores = detector.patch_maps(pixels, detector.encode_class(name))
            assert grids.shape == (batch_size, rows, columns)
            for result, other in zip(
                detector.processor.read_patch_maps(grids, scores, (37, 53)), expected, strict=True
            ):
                assert result["score"] == pytest.approx(other["score"], abs=1e-4)
                assert torch.allclose(result["map"], other["map"], atol=1e-4)
                assert [region["box"] for region in result["regions"]] == [
                    region["box"] for region in other["regions"]
                ]


def assert_choices_are_clear(router_logits: tuple[torch.Tensor, ...], k: int) -> None:
    """Where two experts are alike to a token, rounding chooses, and two ways to compute may differ by all of one."""
    for logits in router_logits:
        ordered = logits.sort(dim=-1, descending=True).values
        assert k == ordered.shape[-1] or (ordered[..., k - 1] - ordered[..., k]).min() > 1e-4, "take other pixels"


@pytest.fixture(scope="module")
def two_classes(tokenizer, tmp_path_factory) -> tuple[Pretrained, Path, export.Export]:
    """The defaults, for two classes, and 8 bits; shared by the tests that only read it."""
    pretrained = tiny_pretrained(tokenizer, **FEW_BLOCKS)
    folder = tmp_path_factory.mktemp("export") / "two"
    return pretrained, folder, export_onnx(pretrained, TWO_CLASSES, folder, int8=True)


def test_a_graph_of_two_classes_equals_the_model_at_any_size_and_in_any_batch(two_classes):
    pretrained, folder, exported = two_classes
    assert exported.largest_difference < 1e-5
    assert_equal_results(pretrained, folder, TWO_CLASSES)


def test_a_batch_may_mix_classes(two_classes):
    pretrained, folder, _ = two_classes
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    pixels = random_pixels(3)
    inputs = {"pixel_values": pixels.numpy(), "class_index": np.array([1, 0, 1])}
    maps, scores = session.run(["anomaly_map", "score"], inputs)
    for index, name in enumerate(["gear", "bolt", "gear"]):
        grids, alone = pretrained.patch_maps(pixels[index : index + 1], pretrained.encode_class(name))
        assert np.allclose(maps[index], grids[0], atol=1e-4)
        assert scores[index] == pytest.approx(alone.item(), abs=1e-4)


def test_a_graph_tells_what_it_is_and_not_where_it_was_made(two_classes):
    pretrained, folder, exported = two_classes
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    facts = json.loads(session.get_modelmeta().custom_metadata_map["moeclip"])
    assert facts["class_names"] == TWO_CLASSES
    assert (facts["domain"], facts["pixel_threshold"]) == ("industrial", 0.4)
    assert facts["size"] == {"height": 20, "width": 20}
    assert session.get_inputs()[0].shape == ["batch", 3, "4*grid_height", "4*grid_width"]
    assert [output.shape for output in session.get_outputs()] == [["batch", "grid_height", "grid_width"], ["batch"]]
    graph = (folder / "model.onnx").read_bytes()
    assert b".py" not in graph
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    assert exported.sizes["model.onnx"] == len(graph)
    # The text tower stays behind: the graph holds no more than the rest.
    kept = [p.numel() for name, p in pretrained.model.named_parameters() if not name.startswith("text_")]
    assert len(graph) < 4 * sum(kept) + 300_000


def test_eight_bits_are_smaller_and_order_pixels_nearly_alike(two_classes):
    from scipy.stats import spearmanr

    pretrained, folder, exported = two_classes
    assert 0 < exported.int8_difference < 0.2
    quantised = load_onnx(folder / "model_int8.onnx", "cpu")
    weights = onnx.load(folder / "model_int8.onnx").graph.initializer
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights if len(tensor.dims) == 2) >= 12
    pixels = random_pixels(8, seed=5)
    grids, _ = pretrained.patch_maps(pixels, pretrained.encode_class("bolt"))
    others, _ = quantised.patch_maps(pixels, quantised.encode_class("bolt"))
    assert spearmanr(grids.flatten(), others.flatten()).statistic > 0.99


ALL_BLOCKS = {
    "all blocks": {},
    "one expert": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 4},
    "trained A": {"use_fofs": False},
    "own projections": {"shared_projections": False},
    "no PAA": {"aggregation_sizes": [1], "image_feature_layer": 4},
    "QuickGELU": {"quick_gelu": True},
    "no experts": {"moe_layers": []},
}


def test_other_settings_equal_the_model_too(tokenizer, tmp_path):
    settings = {
        "aggregation_sizes": [1, 3],
        "shared_projections": False,
        "projection_activation": "leaky_relu",
        "use_fofs": False,
        "num_experts_per_tok": 1,
    }
    pretrained = tiny_pretrained(tokenizer, quick_gelu=True, **FEW_BLOCKS, **settings)
    export_onnx(pretrained, ["screw"], tmp_path / "one")
    assert_equal_results(pretrained, tmp_path / "one", ["screw"])
    session = onnxruntime.InferenceSession(tmp_path / "one" / "model.onnx")
    assert [graph_input.name for graph_input in session.get_inputs()] == ["pixel_values"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", ALL_BLOCKS.values(), ids=ALL_BLOCKS)
def test_every_setting_equals_the_model(settings, tokenizer, tmp_path):
    pretrained = tiny_pretrained(tokenizer, **settings)
    export_onnx(pretrained, TWO_CLASSES, tmp_path / "two")
    assert_equal_results(pretrained, tmp_path / "two", TWO_CLASSES)


@pytest.fixture(scope="module")
def faultless(tokenizer, tmp_path_factory) -> tuple[Pretrained, Path, export.Export]:
    """In two files, as a graph is whose weights are too large for one."""
    settings = {"aggregation_sizes": [1], "num_experts_per_tok": 4, "feature_layers": [1], "moe_layers": [0]}
    pretrained = FaultlessPretrained(*tiny_pretrained(tokenizer, domain="medical", **settings))
    with torch.no_grad():
        pretrained.model.vision_model.post_layernorm.bias.add_(3)
    folder = tmp_path_factory.mktemp("export") / "large"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_LARGEST_FILE", 0)
        return pretrained, folder, export_onnx(pretrained, ["screw"], folder, int8=True)


def test_faultless_pixels_keep_their_order(faultless):
    """Where a map is near 0, its order is told by digits far below what absolute differences show."""
    pretrained, folder, _ = faultless
    detector = load_onnx(folder, "cpu")
    pixels = random_pixels(8, seed=9)
    grids, _ = pretrained.patch_maps(pixels, pretrained.encode_class("screw"))
    others, _ = detector.patch_maps(pixels, detector.encode_class("screw"))
    assert 0 < grids.min() < grids.max() < 1e-10
    assert torch.allclose(grids.log(), others.log(), atol=1e-2)


def test_weights_too_large_for_one_file_lie_beside_it_and_nowhere_else(faultless, tmp_path):
    pretrained, folder, exported = faultless
    files = {path.name: path.stat().st_size for path in folder.glob("*.onnx*")}
    assert set(files) == {"model.onnx", "model.onnx.data", "model_int8.onnx", "model_int8.onnx.data"}
    assert exported.sizes["model.onnx"] == files["model.onnx"] + files["model.onnx.data"]
    assert_equal_results(pretrained, folder, ["screw"])

    shutil.copytree(folder, tmp_path / "large")
    (tmp_path / "large" / "model.onnx.data").unlink()
    with pytest.raises(CheckpointError, match=r"model.onnx: cannot be loaded as an exported graph"):
        load_onnx(tmp_path / "large")
    (tmp_path / "large" / "model.onnx.data").symlink_to(folder / "model.onnx.data")
    with pytest.raises(CheckpointError, match="escapes"):
        load_onnx(tmp_path / "large")
    for outside in ("../elsewhere.data", str(folder / "model.onnx.data")):
        graph = onnx.load(tmp_path / "large" / "model.onnx", load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = outside
        (tmp_path / "large" / "model.onnx").write_bytes(graph.SerializeToString())
        with pytest.raises(CheckpointError, match="External data path"):
            load_onnx(tmp_path / "large")


def test_a_graph_that_differs_from_the_model_is_not_kept(two_classes, tokenizer, tmp_path, monkeypatch):
    _, folder, _ = two_classes
    monkeypatch.setattr(
        export, "_write_graph", lambda graph, description, path: shutil.copy(folder / "model.onnx", path)
    )
    other = tiny_pretrained(tokenizer, seed=1, **FEW_BLOCKS)
    with pytest.raises(MoECLIPError, match=r"differs from the model by .* not kept"):
        export_onnx(other, TWO_CLASSES, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_exported_is_refused_before_the_work(two_classes, tmp_path):
    pretrained, folder, _ = two_classes
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_onnx(pretrained, ["screw"], folder)
    half = Pretrained(tiny_model(**FEW_BLOCKS).half(), pretrained.processor)
    with pytest.raises(MoECLIPError, match="float32 on the CPU"):
        export_onnx(half, ["screw"], tmp_path / "half")
    with pytest.raises(MoECLIPError, match="no class name to export for"):
        export_onnx(pretrained, [], tmp_path / "nameless")
    with pytest.raises(MoECLIPError, match="A class name is empty"):
        export_onnx(Pretrained(*pretrained), [" "], tmp_path / "nameless")


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_remedy(two_classes, tmp_path, monkeypatch, package):
    pretrained, folder, _ = two_classes
    imported = builtins.__import__

    def import_or_fail(name, *arguments, **keywords):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", import_or_fail)
    with pytest.raises(MoECLIPError, match=rf"{package}: pip install 'moeclip-hf\[onnx\]'"):
        export_onnx(pretrained, ["screw"], tmp_path / "one")
    if package == "onnxruntime":
        with pytest.raises(MoECLIPError, match=r"onnxruntime: pip install 'moeclip-hf\[onnx\]'"):
            load_onnx(folder)


def test_files_that_are_no_exported_graphs_are_refused_with_the_reason(two_classes, tmp_path):
    _, folder, _ = two_classes
    with pytest.raises(CheckpointError, match=r"nowhere: no such file"):
        load_onnx(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"model.onnx: no such file: `moeclip export`"):
        load_onnx(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model.onnx: cannot be loaded as an exported graph: .*[Pp]rotobuf"):
        load_onnx(tmp_path)
    cut = (folder / "model.onnx").read_bytes()[:-1000]
    (tmp_path / "model.onnx").write_bytes(cut)
    with pytest.raises(CheckpointError, match=r"model.onnx: cannot be loaded"):
        load_onnx(tmp_path)
    foreign = onnx.load(folder / "model.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="was not written by `moeclip export`"):
        load_onnx(tmp_path)
    shutil.copy(folder / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="processor"):
        load_onnx(tmp_path)
    with pytest.raises(MoECLIPError, match="device 'cuda' cannot be used here"):
        load_onnx(folder, "cuda")
