"""`moeclip predict` on many images beside the forward passes alone, and its memory as their number grows.

    python -m benchmarks.prediction [--images 200] [--edge 1024] [--image-size 224] [--rounds 5] [--memory 20 2000]

Time: the command on so many JPEG files less the command on a tenth of them, so that starting and loading cancel out,
in turn with the forward passes of the difference, on batches as large. The model has ViT-L/14's sizes and random
weights; overlays are written. Memory: the peak of the resident set of the command with the embedded checkpoint.
"""

import tempfile
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from benchmarks.alternating import alternate
from benchmarks.commands import run_python
from benchmarks.forward import random_model
from benchmarks.report import Goal, Report, argument_parser, publish
from moeclip_hf import MoECLIPConfig, MoECLIPImageProcessor, MoECLIPModel, MoECLIPProcessor
from moeclip_hf.data.textures import render
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT

FORWARDS, MANY, FEW = "forward passes", "all images", "a tenth of them"
PREDICT = ("-m", "moeclip_hf.cli", "predict")
PEAK = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def write_images(folder: Path, count: int, edge: int) -> Path:
    """JPEG files that all show the same texture; decoding each costs what decoding others would."""
    folder.mkdir()
    picture = Image.fromarray(render("leather", "stain", size=edge)[0])
    for index in range(count):
        picture.save(folder / f"{index:05d}.jpg", quality=92)
    return folder


def write_large_checkpoint(folder: Path, image_size: int) -> MoECLIPModel:
    """A random model of ViT-L/14's sizes, saved with a processor; a small vocabulary serves."""
    tokenizer = MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT).tokenizer
    config = MoECLIPConfig().to_dict()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_config = config["text_config"] | {"vocab_size": len(tokenizer), **ends}
    model = random_model(text_config=text_config, vision_config=config["vision_config"])
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    MoECLIPProcessor(MoECLIPImageProcessor(size), tokenizer).save_pretrained(folder)
    return model


def time_prediction(root: Path, images: int, edge: int, image_size: int, batch_size: int, rounds: int) -> Report:
    """Time an image of the command beside that of the model."""
    few = images // 10
    model = write_large_checkpoint(root / "large", image_size)
    anchors = torch.nn.functional.normalize(torch.randn(1, 2, model.config.projection_dim), dim=-1)
    pixel_values = torch.randn(batch_size, 3, image_size, image_size)

    def forwards() -> None:
        with torch.inference_mode():
            for start in range(0, images - few, batch_size):
                model(pixel_values[: images - few - start], text_embeds=anchors)

    def command(count: int) -> None:
        options = ("--model", root / "large", "--output-dir", root / "results", "--batch-size", batch_size)
        run_python(*PREDICT, root / str(count), *options)

    for count in (few, images):
        write_images(root / str(count), count, edge)
    sides = {FORWARDS: forwards, MANY: lambda: command(images), FEW: lambda: command(few)}
    seconds = alternate(sides, rounds, uncounted=0)
    pairs = zip(seconds[FORWARDS], seconds[MANY], seconds[FEW], strict=True)
    relative = median((many - few) / forward for forward, many, few in pairs)
    rows = [["", "median s"], *([name, f"{median(values):.1f}"] for name, values in seconds.items())]
    rows.append([f"an image of the {images - few} in between, over its forward pass", f"{relative:.3f}"])
    title = f"moeclip predict, {images} images of {edge} px at {image_size} px, {batch_size} at once, float32"
    return Report(title, rows, [Goal("moeclip predict, an image over its forward pass", relative, 1.15)])


def measure_memory(root: Path, counts: list[int]) -> Report:
    """Peak of the resident set on few images and on many."""
    rows, peaks = [["images", "peak MB"]], []
    for count in counts:
        images = write_images(root / f"memory-{count}", count, 256)
        peaks.append(int(run_python("-c", PEAK, *PREDICT, images, "--output-dir", root / f"results-{count}")) / 1024)
        rows.append([str(count), f"{peaks[-1]:.0f}"])
    told = f"peak memory of moeclip predict, {counts[-1]} images over {counts[0]}"
    return Report("Memory of moeclip predict, embedded checkpoint", rows, [Goal(told, peaks[-1] / peaks[0], 1.05)])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--edge", type=int, default=1024)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs=2, default=[20, 2000], metavar="IMAGES")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        publish(
            [
                time_prediction(root, args.images, args.edge, args.image_size, args.batch_size, args.rounds),
                measure_memory(root, args.memory),
            ],
            args.output,
        )


if __name__ == "__main__":
    main()
