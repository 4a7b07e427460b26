"""Images a second from files to a model's inputs, beside what decoding and resizing them with PIL alone would give.

    python -m benchmarks.preprocessing [--images 24] [--edge 1024] [--image-size 518] [--rounds 5]

Photograph-like textures, half of them with a defect, as PNG and as JPEG files. Prediction decodes, resizes and
normalises; a training sample also reads a mask and is rotated, shifted and flipped with it. All on one core: a second
worker of a data loader doubles each rate, as long as there is a core for it.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.alternating import alternate, ratio
from moeclip_hf import MoECLIPProcessor
from moeclip_hf.data import load_folder
from moeclip_hf.data.textures import write_texture_benchmark
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT
from moeclip_hf.training import TrainingSamples
from moeclip_hf.training.samples import Draw

PIL_ALONE = "PIL, decode and resize"


def write_images(root: Path, count: int, edge: int, suffix: str) -> list[Path]:
    """Half normal, half anomalous; their paths."""
    write_texture_benchmark(root, ["leather"], normal=count // 2, anomalous=count - count // 2, size=edge)
    paths = sorted((root / "leather" / "test").rglob("*.png"))
    if suffix == ".png":
        return paths
    for path in paths:
        Image.open(path).save(path.with_suffix(suffix), quality=92)
        path.unlink()
    return [path.with_suffix(suffix) for path in paths]


def sides_of(root: Path, paths: list[Path], image_size: int) -> dict[str, Callable[[], None]]:
    """What is timed, each over all images."""
    processor = MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    processor.image_processor.size = {"height": image_size, "width": image_size}
    samples = TrainingSamples(load_folder(root), processor)

    def decode_and_resize() -> None:
        for path in paths:
            Image.open(path).convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)

    def prepare() -> None:
        for path in paths:
            processor(images=path, return_tensors="pt")

    def draw_samples() -> None:
        for row in range(len(samples)):
            samples[Draw(0, row)]

    return {PIL_ALONE: decode_and_resize, "prediction": prepare, "training sample": draw_samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--edge", type=int, default=1024)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(1)
    table = Table(
        "files", "side", "images/s", "rate / PIL's",
        title=f"{args.edge} px to {args.image_size} px, one core of {os.cpu_count()}",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".png", ".jpg"):
            root = Path(folder) / suffix[1:]
            sides = sides_of(root, write_images(root, args.images, args.edge, suffix), args.image_size)
            seconds = alternate(sides, args.rounds)
            for side in sides:
                rate = args.images / median(seconds[side])
                table.add_row(suffix[1:], side, f"{rate:.1f}", f"{ratio(seconds, PIL_ALONE, side):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
