"""Exported graphs beside the model that they were exported from: time, size on disk, and what 8 bits cost.

    python -m benchmarks.export [--model embedded|large] [--images 1] [--rounds 20] [--auroc [IMAGES]]

All sides compute the same images on as many threads, in turn: torch's model, and onnxruntime the graph in float32 and
the one quantised to 8 bits. `large` has ViT-L/14's sizes, random weights and images of 518 pixels: speed does not
depend on weights, but it takes minutes and 10 GB of memory.

`--auroc` scores rendered textures of all families on all three sides, as `moeclip predict` scores images: AUROC of
images and of pixels, each the mean over the families.
"""

import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from rich.progress import track
from sklearn.metrics import roc_auc_score

from benchmarks.alternating import alternate
from benchmarks.forward import random_model
from benchmarks.report import Report, argument_parser, publish, timing_rows
from moeclip_hf import MoECLIPImageProcessor, MoECLIPProcessor
from moeclip_hf.data import load_data, read_mask
from moeclip_hf.data.textures import FAMILIES, write_texture_benchmark
from moeclip_hf.export import export_onnx
from moeclip_hf.modeling.processing_moeclip import upsample
from moeclip_hf.onnx_detector import GRAPH, INT8_GRAPH, load_onnx
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, Detector, Pretrained, load_pretrained

TORCH, ONNX, INT8 = "torch", "onnxruntime", "onnxruntime, int8"
CLASS_NAMES = [family.replace("_", " ") for family in FAMILIES]


def large_model() -> Pretrained:
    """A random model of the paper's sizes; a small vocabulary serves, since the graph holds no text tower."""
    tokenizer = MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT).tokenizer
    return Pretrained(random_model(), MoECLIPProcessor(MoECLIPImageProcessor(), tokenizer))


def time_sides(sides: dict[str, Detector], sizes: dict[str, int], images: int, rounds: int) -> Report:
    """Seconds and megabytes."""
    edge = min(sides[TORCH].processor.image_processor.size.values())
    pixel_values = torch.randn(images, 3, edge, edge)
    encoded = {name: side.encode_class(CLASS_NAMES[0]) for name, side in sides.items()}
    seconds = alternate(
        {name: lambda name=name: sides[name].patch_maps(pixel_values, encoded[name]) for name in sides}, rounds
    )
    rows = timing_rows(seconds, TORCH, digits=4)
    for row in rows:
        row.append("MB" if row is rows[0] else f"{sizes[row[0]] / 1e6:.1f}" if row[0] in sizes else "-")
    return Report(f"Forward, {images} x {edge} px, exported", rows)


def score_textures(sides: dict[str, Detector], root: Path) -> Report:
    """AUROC over a benchmark of textures: half of a family's images are normal."""
    rows = load_data(root)
    by_class = defaultdict(list)
    for index, class_name in enumerate(rows["prompt_name"]):
        by_class[class_name].append(index)
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for class_name, indices in track(by_class.items(), "families", transient=True):
        samples = [rows[index] for index in indices]
        labels = [sample["label"] for sample in samples]
        masks = np.stack([read_mask(sample) for sample in samples])
        images = [sample["image"] for sample in samples]
        for name, side in sides.items():
            pixel_values = side.processor(images=images, return_tensors="pt")["pixel_values"]
            grids, scores = side.patch_maps(pixel_values, side.encode_class(class_name))
            maps = upsample(grids, masks.shape[1:]).numpy()
            figures[name].append((roc_auc_score(labels, scores), roc_auc_score(masks.ravel(), maps.ravel())))
    table = [["side", "image AUROC", "pixel AUROC"]]
    for name, pairs in figures.items():
        table.append([name, *(f"{100 * mean(values):.2f}" for values in zip(*pairs, strict=True))])
    return Report(f"{len(rows)} rendered textures of {len(by_class)} families, exported", table)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", choices=["embedded", "large"], default="embedded")
    parser.add_argument("--images", type=int, default=1, help="in a batch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--auroc", type=int, nargs="?", const=20, metavar="IMAGES", help="of each family")
    args = parser.parse_args()
    if args.auroc and args.model == "large":
        parser.error("--auroc takes the embedded checkpoint: random weights find nothing")

    pretrained = large_model() if args.model == "large" else load_pretrained(device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        exported = export_onnx(pretrained, CLASS_NAMES, Path(folder) / "exported", int8=True)
        differences = [
            ["", "largest difference from torch on random images"],
            [ONNX, f"{exported.largest_difference:.1e}"],
            [INT8, f"{exported.int8_difference:.1e}"],
        ]
        sides: dict[str, Detector] = {
            TORCH: pretrained,
            ONNX: load_onnx(exported.folder, "cpu"),
            INT8: load_onnx(exported.folder / INT8_GRAPH, "cpu"),
        }
        sizes = {ONNX: exported.sizes[GRAPH], INT8: exported.sizes[INT8_GRAPH]}
        reports = [
            Report("Exported graphs", differences),
            time_sides(sides, sizes, args.images, args.rounds),
        ]
        if args.auroc:
            root = Path(folder) / "textures"
            half = args.auroc // 2
            write_texture_benchmark(root, normal=args.auroc - half, anomalous=half)
            reports.append(score_textures(sides, root))
        publish(reports, args.output)


if __name__ == "__main__":
    main()
