"""How cost grows with resolution, batch, number of experts and rank, as tables and a picture a quantity.

    python -m benchmarks.growth [--rounds 1] [--only resolution batch experts rank metrics predictions] [--most IMAGES]

Forward pass beside the bare tower's, and forward pass and training step beside the plain implementation's, ViT-L/14's
sizes, random weights, float32, in turn behind a round that is not counted; seconds a batch. Each value is measured in
a fresh process, and its plain form in another. The plain step is left out where the attention weights that it keeps
would take 4 GB. glibc is left as it is: told to keep memory, the plain form took 24 GB on the largest images.

`metrics` and `predictions` grow in the number of images, each number in a fresh process: the seven metrics on
simulated maps of 8 x 8, and scoring files of 64 x 64 with a model that takes no time, both up to 1,000,000. A
prediction takes up to 2 ms, so that these take up to half an hour; `--most 100000` leaves out nine tenths of it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.alternating import alternate
from benchmarks.forward import bare_tower, random_model
from benchmarks.plain_training import PlainMoECLIP
from benchmarks.report import Report, argument_parser, publish
from benchmarks.training_step import apart, peak_over_start, training_side
from moeclip_hf import MoECLIPModel, MoECLIPProcessor
from moeclip_hf.data.textures import render
from moeclip_hf.metrics import AnomalyMetrics
from moeclip_hf.prediction import predict
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT

PICTURES = Path("docs/images")
LARGEST_PLAIN_BYTES = 4e9


@dataclass(frozen=True)
class Quantity:
    """What is varied: its values, and what a value changes of the model and of the batch."""

    title: str
    values: tuple[int, ...]
    model: str | None = None
    batch: str | None = None


QUANTITIES = {
    "resolution": Quantity("resolution (pixels of an edge)", (224, 336, 518, 700, 1036), batch="image_size"),
    "batch": Quantity("images in a batch, 224 px", (1, 2, 4, 8), batch="images"),
    "experts": Quantity("experts K, 224 px", (1, 4, 16), model="num_experts"),
    "rank": Quantity("rank r of an expert, 224 px", (1, 8, 64), model="lora_rank"),
}
BATCH = {"images": 1, "image_size": 224}
OWN_SIDES = ("bare tower, forward", "forward", "training step")
PLAIN_SIDES = ("plain forward", "plain training step")
SIDES = (*OWN_SIDES, *PLAIN_SIDES)


def tokens_of(image_size: int) -> int:
    """Of an image, the class token included."""
    return (image_size // 14) ** 2 + 1


def attention_bytes(images: int, image_size: int) -> float:
    """What the plain step keeps of attention weights, ViT-L/14: 18 blocks of 16 heads, float32."""
    return 18 * 16 * 4.0 * images * tokens_of(image_size) ** 2


def own_sides(model: MoECLIPModel, images: int, image_size: int) -> dict[str, Callable[[], object]]:
    """The bare tower and what is not plain, by name."""
    pixel_values, anchors = random_inputs(model, images, image_size)
    tower = bare_tower(model)

    @torch.inference_mode()
    def tower_forward() -> None:
        tower(pixel_values, interpolate_pos_encoding=True)

    @torch.inference_mode()
    def forward() -> None:
        model.eval()
        model(pixel_values, text_embeds=anchors)
        model.train()

    return dict(zip(OWN_SIDES, (tower_forward, forward, training_side(model, images, image_size)), strict=True))


def plain_sides(model: MoECLIPModel, images: int, image_size: int) -> dict[str, Callable[[], object]]:
    """The plain forms, by name."""
    pixel_values, anchors = random_inputs(model, images, image_size)
    plain = PlainMoECLIP(model)

    @torch.inference_mode()
    def forward() -> None:
        plain.eval()
        plain.score(pixel_values, anchors[0])
        plain.train()

    sides: list[Callable[[], object]] = [forward]
    if attention_bytes(images, image_size) < LARGEST_PLAIN_BYTES:
        sides.append(training_side(model, images, image_size, plain))
    return dict(zip(PLAIN_SIDES, sides, strict=False))


def random_inputs(model: MoECLIPModel, images: int, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and a pair of anchors."""
    anchors = torch.nn.functional.normalize(torch.randn(1, 2, model.config.projection_dim), dim=-1)
    return torch.randn(images, 3, image_size, image_size), anchors


def time_batch(is_plain: bool, config: dict[str, int], batch: dict[str, int], rounds: int) -> dict[str, float]:
    """Median seconds of each side on a batch of a model."""
    model = random_model(**config, num_experts_per_tok=min(2, config.get("num_experts", 2)))
    sides = (plain_sides if is_plain else own_sides)(model, **batch)
    return {name: median(values) for name, values in alternate(sides, rounds).items()}


def vary(name: str, rounds: int) -> Report:
    """All values of a quantity, each in two fresh processes: what the plain forms leave of memory slows the others."""
    quantity = QUANTITIES[name]
    rows, measured = [[name, *(f"{side}, s" for side in SIDES)]], []
    for value in tqdm(quantity.values, desc=name):
        config = {quantity.model: value} if quantity.model else {}
        batch = BATCH | ({quantity.batch: value} if quantity.batch else {})
        seconds: dict[str, float] = {}
        for is_plain in (False, True):
            seconds |= apart(time_batch, is_plain, config, batch, rounds, allocator="as-it-is")
        measured.append(seconds)
        rows.append([str(value), *(f"{seconds[side]:.2f}" if side in seconds else "-" for side in SIDES)])
        tqdm.write(f"{name} {value}: " + ", ".join(f"{side} {taken:.2f} s" for side, taken in seconds.items()))
    series = {side: [seconds.get(side) for seconds in measured] for side in SIDES}
    draw(name, quantity.title, "seconds", quantity.values, series)
    return Report(f"Cost over {quantity.title}", rows, pictures=[f"images/growth_{name}.png"])


def counts_of(name: str, most: int | None) -> tuple[int, ...]:
    """Numbers of images, each ten times the one before, up to `most` or what is usual."""
    counted = COUNTED[name]
    most = most or counted.most
    return tuple(counted.least * 10**n for n in range(len(str(most))) if counted.least * 10**n <= most)


def count_images(name: str, most: int | None) -> Report:
    """Seconds and memory of ever more images."""
    counted, counts = COUNTED[name], counts_of(name, most)
    rows = [["images", "seconds", "microseconds an image", "peak MB over the start"]]
    seconds = []
    for count in counts:
        taken, peak = apart(counted.measure, count)
        seconds.append(taken)
        rows.append([f"{count:,}", f"{taken:.2f}", f"{taken / count * 1e6:.1f}", f"{peak / 1e6:.1f}"])
    draw(name, "images", "seconds", counts, {counted.title: seconds})
    return Report(f"{counted.title}, over the number of images", rows, pictures=[f"images/growth_{name}.png"])


def time_metrics(count: int, at_once: int = 1_000) -> tuple[float, int]:
    """Seconds spent in the metrics, and the most bytes that the process held over its start."""
    rng = np.random.default_rng(0)
    labels = np.arange(at_once) % 2
    masks = (rng.random((at_once, 8, 8)) < 0.2) & (labels[:, None, None] == 1)
    masks[:, 0, 0] = labels

    def run(updates: int) -> float:
        metrics, seconds = AnomalyMetrics("industrial"), 0.0
        for _ in range(updates):
            maps = rng.standard_normal((at_once, 8, 8), dtype=np.float32)
            scores = maps.max(axis=(1, 2))
            start = time.perf_counter()
            metrics.update(maps, scores, masks, labels)
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        metrics.compute()
        return seconds + time.perf_counter() - start

    run(1)
    return peak_over_start(lambda: run(count // at_once))


class SimulatedDetector:
    """Maps and scores of nothing, at once."""

    def __init__(self) -> None:
        self.processor = MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT)

    def encode_class(self, class_name: str) -> torch.Tensor:
        return torch.zeros(1, 2, 1)

    def patch_maps(self, pixel_values: torch.Tensor, encoded_class: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(pixel_values), 16, 16), torch.zeros(len(pixel_values))


def time_predictions(count: int) -> tuple[float, int]:
    """Seconds for reading, preparing and scoring files, and the most bytes that the process held over its start."""
    detector = SimulatedDetector()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "leather.png"
        Image.fromarray(render("leather", "stain", size=64)[0]).save(file)

        def run(images: int) -> float:
            start = time.perf_counter()
            for _ in predict(detector, repeat(file, images)):
                pass
            return time.perf_counter() - start

        run(100)
        return peak_over_start(lambda: run(count))


@dataclass(frozen=True)
class Counted:
    """What is measured on how many images."""

    title: str
    measure: Callable[[int], tuple[float, int]]
    least: int
    most: int


COUNTED = {
    "metrics": Counted("Seven metrics", time_metrics, 1_000, 1_000_000),
    "predictions": Counted("Prediction without a model", time_predictions, 100, 1_000_000),
}


def draw(name: str, x_label: str, y_label: str, values: tuple[int, ...], series: dict[str, list[Any]]) -> None:
    """A picture with logarithmic axes under docs/images."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for side, points in series.items():
        pairs = [(value, point) for value, point in zip(values, points, strict=True) if point is not None]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), marker="o", linestyle="--" if "plain" in side else "-", label=side)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=3)
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"growth_{name}.png", dpi=120)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    names = [*QUANTITIES, *COUNTED]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--most", type=int, metavar="IMAGES", help="for metrics and predictions, at least 1,000")
    args = parser.parse_args()
    if args.most is not None and args.most < 1_000:
        parser.error("--most must be at least 1,000")
    publish(
        [count_images(name, args.most) if name in COUNTED else vary(name, args.rounds) for name in args.only],
        args.output,
    )


if __name__ == "__main__":
    main()
