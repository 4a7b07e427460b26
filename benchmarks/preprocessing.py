"""Images a second from files to a model's inputs, beside what decoding and resizing them with PIL alone would give.

    python -m benchmarks.preprocessing [--images 24] [--edge 1024] [--image-size 518] [--rounds 5]

Photograph-like textures, half of them with a defect, as PNG and as JPEG files. Prediction decodes, resizes and
normalises; a training sample also reads a mask and is rotated, shifted and flipped with it. All on one core: a second
worker of a data loader doubles each rate, as long as there is a core for it.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from benchmarks.alternating import alternate, ratio
from benchmarks.report import Goal, Report, argument_parser, publish
from moeclip_hf import MoECLIPProcessor
from moeclip_hf.data import load_folder
from moeclip_hf.data.textures import write_texture_benchmark
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT
from moeclip_hf.training import TrainingSamples
from moeclip_hf.training.samples import Draw

PIL_ALONE, PREDICTION = "PIL, decode and resize", "prediction"


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

    return {PIL_ALONE: decode_and_resize, PREDICTION: prepare, "training sample": draw_samples}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--edge", type=int, default=1024)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(1)
    rows, goals = [["files", "side", "images a second", "rate over PIL's"]], []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".png", ".jpg"):
            root, kind = Path(folder) / suffix[1:], suffix[1:].upper()
            sides = sides_of(root, write_images(root, args.images, args.edge, suffix), args.image_size)
            seconds = alternate(sides, args.rounds)
            for side in sides:
                rate = args.images / median(seconds[side])
                rows.append([kind, side, f"{rate:.1f}", f"{ratio(seconds, PIL_ALONE, side):.3f}"])
            over_pil = ratio(seconds, PIL_ALONE, PREDICTION)
            goals.append(Goal(f"preprocessing of {kind} files, rate over PIL's", over_pil, 0.9, at_least=True))
    publish([Report(f"{args.edge} px to {args.image_size} px on one core", rows, goals)], args.output)


if __name__ == "__main__":
    main()
