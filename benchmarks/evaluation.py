"""A whole evaluation beside the forward passes that it cannot do without.

    python -m benchmarks.evaluation [--images 12] [--image-size 518] [--batch-size 2] [--rounds 5]

Both sides run MoECLIP at ViT-L/14's sizes on the same batches (random weights, float32), in turn. The evaluation also
reads rendered textures of 1024 pixels and their masks, resizes them, and computes all figures and curves. What it
does once, however many images there are, stands apart: the class's sentences through the text tower, and a digest of
the weights.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.alternating import alternate, ratio
from benchmarks.forward import random_model
from benchmarks.report import Goal, Report, argument_parser, publish, timing_rows
from moeclip_hf import MoECLIPImageProcessor, MoECLIPProcessor
from moeclip_hf.data import load_data
from moeclip_hf.data.textures import write_texture_benchmark
from moeclip_hf.evaluation import evaluate
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, Pretrained


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
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

    title = f"Evaluation of {args.images} images of 1024 px at {args.image_size} px, float32"
    goal = Goal("evaluation over its forward passes alone", ratio(seconds, "evaluation", "forward passes"), 1.10)
    publish([Report(title, timing_rows(seconds, "forward passes"), [goal])], args.output)


if __name__ == "__main__":
    main()
