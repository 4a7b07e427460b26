"""A training step of MoECLIP beside a plain one, and beside the forward pass of the tower that neither can do without.

    python -m benchmarks.training_step [--images 1] [--image-size 518] [--rounds 3] [--memory]

All sides have ViT-L/14's sizes, random weights (speed does not depend on them) and float32, and run in turn. A step is
the objective's forward pass, its backward pass and Adam. Seconds are those of the clock; on a machine with other work
to do, run with OMP_NUM_THREADS=1 and read the seconds of the processor, of which waiting is no part. `--memory`
measures, in a process for each side, how far a step's peak lies over what is held before the first one.
"""

import argparse
import multiprocessing
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.alternating import alternate, ratio
from benchmarks.forward import bare_tower, random_model
from benchmarks.plain_training import PlainMoECLIP
from moeclip_hf import MoECLIPModel

TOWER, PLAIN, FAST = "bare CLIP tower, forward", "plain MoECLIP, step", "MoECLIP, step"


def training_side(model: MoECLIPModel, plain: bool, images: int, image_size: int) -> Callable[[], None]:
    """One training step on random images, half of each anomalous."""
    model.freeze_backbone().train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A rate of 0 costs as much, and leaves the sides, which share their weights, as they were drawn.
    optimizer = torch.optim.Adam(trained, lr=0.0, betas=(0.5, 0.999))
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(images, 3, image_size, image_size, generator=generator)
    masks = torch.zeros(images, image_size, image_size)
    masks[:, : image_size // 2] = 1
    labels = torch.ones(images, dtype=torch.long)
    input_ids = torch.randint(1, 49_000, (16, 77), generator=generator)
    input_ids[:, 20:] = model.config.text_config.eos_token_id
    prompt_groups = torch.tensor([0] * 6 + [1] * 10)
    targets = {"prompt_groups": prompt_groups, "labels": labels, "masks": masks}
    if plain:
        side = PlainMoECLIP(model).train()

        def loss() -> torch.Tensor:
            return side(pixel_values, input_ids=input_ids, **targets)
    else:
        with torch.no_grad():
            prompt_features = model.get_prompt_features(input_ids)

        def loss() -> torch.Tensor:
            return model(pixel_values, prompt_features=prompt_features, **targets).loss

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def on_the_processor(run: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    """`run`, which adds the processor seconds of all its threads to a list."""

    def timed() -> None:
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)

    return timed


def resident_bytes() -> int:
    """Memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_over_weights(plain: bool, images: int, image_size: int, result: "multiprocessing.Queue[int]") -> None:
    """Put the bytes by which two steps rise over what is held before them."""
    step = training_side(random_model(), plain, images, image_size)
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    step()
    done.set()
    watcher.join()
    result.put(peak[0] - before)


def measure_memory(plain: bool, images: int, image_size: int) -> int:
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=peak_over_weights, args=(plain, images, image_size, result))
    process.start()
    peak = result.get()
    process.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()

    model = random_model()
    tower, pixel_values = bare_tower(model), torch.randn(args.images, 3, args.image_size, args.image_size)

    def forward() -> None:
        with torch.inference_mode():
            tower(pixel_values, interpolate_pos_encoding=True)

    sides = {
        TOWER: forward,
        PLAIN: training_side(model, True, args.images, args.image_size),
        FAST: training_side(model, False, args.images, args.image_size),
    }
    processor: dict[str, list[float]] = {name: [] for name in sides}
    seconds = alternate({name: on_the_processor(run, processor[name]) for name, run in sides.items()}, args.rounds)
    processor = {name: values[1:] for name, values in processor.items()}
    memory = {
        name: measure_memory(name == PLAIN, args.images, args.image_size) for name in (PLAIN, FAST) if args.memory
    }

    table = Table(
        "side", "median s", "min s", "max s", "ratio", "processor s", "ratio", "GB over the weights",
        title=f"Training, {args.images} x {args.image_size} px, ViT-L/14, float32, {torch.get_num_threads()} threads",
        caption=f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}",
    )  # fmt: skip
    for name, values in seconds.items():
        relative = (f"{ratio(kind, name, TOWER):.2f}" for kind in (seconds, processor))
        peak = f"{memory[name] / 1e9:.2f}" if name in memory else ""
        clock = (f"{f(values):.2f}" for f in (median, min, max))
        table.add_row(name, *clock, next(relative), f"{median(processor[name]):.2f}", next(relative), peak)
    Console().print(table)


if __name__ == "__main__":
    main()
