"""How cost grows with resolution, batch, number of experts and rank, as tables and a picture a quantity.

    python -m benchmarks.growth [--rounds 3] [--only resolution batch experts rank images]

Forward pass beside the bare tower's, and training step beside the plain implementation's, ViT-L/14's sizes, random
weights, float32, in turn; seconds a batch. The plain step is left out where the attention weights that it keeps would
take 12 GB. `images` is the number that metrics take, up to a million simulated maps of 8 x 8, and their memory.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.alternating import alternate
from benchmarks.forward import bare_tower
from benchmarks.report import Report, argument_parser, publish
from benchmarks.training_step import KEEP_FREED_MEMORY, apart, resident_bytes, training_side
from moeclip_hf import MoECLIPConfig, MoECLIPModel
from moeclip_hf.metrics import AnomalyMetrics

PICTURES = Path("docs/images")
LARGEST_PLAIN_BYTES = 12e9


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
    "experts": Quantity("experts K, 224 px", (1, 2, 4, 8, 16), model="num_experts"),
    "rank": Quantity("rank r of an expert, 224 px", (1, 4, 8, 16, 64), model="lora_rank"),
}
BATCH = {"images": 1, "image_size": 224}
SIDES = ("bare tower, forward", "forward", "training step", "plain training step")


def attention_bytes(images: int, image_size: int) -> float:
    """What the plain side's attention weights take in a training step, ViT-L/14: 18 blocks of 16 heads, float32."""
    tokens = (image_size // 14) ** 2 + 1
    return 18 * 16 * 4.0 * images * tokens**2


def sides_of(config: dict[str, Any], images: int, image_size: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed at one value."""
    if config.get("num_experts", 4) == 1:
        config = config | {"num_experts_per_tok": 1}
    torch.manual_seed(0)
    model = MoECLIPModel(MoECLIPConfig(**config))
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.02)
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    tower = bare_tower(model)
    pixel_values = torch.randn(images, 3, image_size, image_size)
    anchors = torch.nn.functional.normalize(torch.randn(1, 2, model.config.projection_dim), dim=-1)

    @torch.inference_mode()
    def tower_forward() -> None:
        tower(pixel_values, interpolate_pos_encoding=True)

    @torch.inference_mode()
    def forward() -> None:
        model.eval()
        model(pixel_values, text_embeds=anchors)
        model.train()

    yield SIDES[0], tower_forward
    yield SIDES[1], forward
    yield SIDES[2], training_side(model, False, images, image_size)
    if attention_bytes(images, image_size) < LARGEST_PLAIN_BYTES:
        yield SIDES[3], training_side(model, True, images, image_size)


def time_value(config: dict[str, Any], images: int, image_size: int, rounds: int) -> dict[str, float]:
    """Median seconds of each side."""
    seconds = alternate(dict(sides_of(config, images, image_size)), rounds)
    return {name: median(values) for name, values in seconds.items()}


def vary(name: str, rounds: int) -> Report:
    """All values of a quantity, each in a fresh process."""
    quantity = QUANTITIES[name]
    measured = []
    for value in quantity.values:
        config = {quantity.model: value} if quantity.model else {}
        batch = BATCH | ({quantity.batch: value} if quantity.batch else {})
        measured.append(
            apart(time_value, config, batch["images"], batch["image_size"], rounds, environment=KEEP_FREED_MEMORY)
        )
    rows = [[name, *(f"{side}, s" for side in SIDES)]]
    for value, seconds in zip(quantity.values, measured, strict=True):
        rows.append([str(value), *(f"{seconds[side]:.2f}" if side in seconds else "-" for side in SIDES)])
    series = {side: [seconds.get(side) for seconds in measured] for side in SIDES}
    draw(name, quantity.title, "seconds", quantity.values, series)
    return Report(f"Cost over {quantity.title}", rows, pictures=[f"images/growth_{name}.png"])


def count_images(counts: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)) -> Report:
    """Seconds and memory of the seven metrics on ever more maps of 8 x 8."""
    rows = [["images", "seconds", "microseconds an image", "MB over the start"]]
    seconds, memory = [], []
    for count in counts:
        taken, held = apart(time_metrics, count)
        seconds.append(taken)
        memory.append(held / 1e6)
        rows.append([f"{count:,}", f"{taken:.2f}", f"{taken / count * 1e6:.1f}", f"{held / 1e6:.1f}"])
    draw("images", "images", "seconds", counts, {"seven metrics": seconds})
    return Report("Metrics over the number of images", rows, pictures=["images/growth_images.png"])


def time_metrics(count: int, at_once: int = 1_000) -> tuple[float, int]:
    """Seconds spent in the metrics, and bytes that the process then holds over its start."""
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((at_once, 8, 8), dtype=np.float32)
    labels = np.arange(at_once) % 2
    masks = (rng.random((at_once, 8, 8)) < 0.2) & (labels[:, None, None] == 1)
    masks[:, 0, 0] = labels
    scores = maps.max(axis=(1, 2))
    warm = AnomalyMetrics("industrial")
    warm.update(maps, scores, masks, labels)
    warm.compute()
    before, start = resident_bytes(), time.perf_counter()
    metrics = AnomalyMetrics("industrial")
    for _ in range(count // at_once):
        metrics.update(maps, scores, masks, labels)
    metrics.compute()
    return time.perf_counter() - start, max(0, resident_bytes() - before)


def draw(name: str, x_label: str, y_label: str, values: tuple[int, ...], series: dict[str, list[Any]]) -> None:
    """A picture with logarithmic axes under docs/images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for side, points in series.items():
        pairs = [(value, point) for value, point in zip(values, points, strict=True) if point is not None]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), marker="o", linestyle="--" if "plain" in side else "-", label=side)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"growth_{name}.png", dpi=120)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    names = [*QUANTITIES, "images"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    args = parser.parse_args()
    publish(
        [count_images() if name == "images" else vary(name, args.rounds) for name in args.only],
        args.output,
    )


if __name__ == "__main__":
    main()
