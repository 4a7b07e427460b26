"""A whole evaluation beside the forward passes that it cannot do without.

    python -m benchmarks.evaluation [--images 4] [--image-size 518] [--batch-size 2] [--rounds 3]

Both sides run MoECLIP at ViT-L/14's sizes on the same batches (random weights, float32), in turn. The evaluation also
reads rendered textures of 1024 pixels and their masks, resizes them, and computes all figures and curves.
"""

import argparse
import platform
import tempfile
from pathlib import Path
from statistics import median

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.alternating import alternate, ratio
from benchmarks.forward import random_model
from moeclip_hf import MoECLIPImageProcessor, MoECLIPProcessor
from moeclip_hf.data import load_data
from moeclip_hf.data.textures import write_texture_benchmark
from moeclip_hf.evaluation import evaluate
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, Pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    tokenizer = MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT).tokenizer
    size = {"height": args.image_size, "width": args.image_size}
    pretrained = Pretrained(random_model(), MoECLIPProcessor(MoECLIPImageProcessor(size), tokenizer))
    pixel_values = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    anchors = pretrained.encode_class("wood grain")

    def forwards() -> None:
        with torch.inference_mode():
            for start in range(0, args.images, args.batch_size):
                pretrained.model(pixel_values[: args.images - start], text_embeds=anchors)

    with tempfile.TemporaryDirectory() as folder:
        half = args.images // 2
        root = Path(folder) / "textures"
        write_texture_benchmark(root, ["wood_grain"], normal=args.images - half, anomalous=half, size=1024)
        rows = load_data(root)
        sides = {
            "forward passes": forwards,
            "evaluation": lambda: evaluate(pretrained, rows, batch_size=args.batch_size),
        }
        seconds = alternate(sides, args.rounds)

    table = Table(
        "side", "median s", "min s", "max s", "over the forward passes",
        title=f"{args.images} images, {args.image_size} px, ViT-L/14, float32, {torch.get_num_threads()} threads",
        caption=f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}",
    )  # fmt: skip
    for name, values in seconds.items():
        relative = ratio(seconds, name, "forward passes")
        table.add_row(name, *(f"{f(values):.2f}" for f in (median, min, max)), f"{relative:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
