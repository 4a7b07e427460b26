"""A training step of MoECLIP beside a plain one, and beside the forward pass of the tower that neither can do without.

    python -m benchmarks.training_step [--images 1] [--image-size 518] [--rounds 5] [--memory]

All sides have ViT-L/14's sizes, random weights (speed does not depend on them) and float32. A step is the objective's
forward pass, its backward pass and Adam. Each kind of step runs in turn with the tower, in a process of its own, as
the plain one's gigabytes would disturb the other's allocations; glibc is told to keep memory that is freed, as it
otherwise hands tens of megabytes back and forth at every layer. `--memory` measures, in further processes, how far the
peak of two steps lies over what is held before the first one: what the tensors take, glibc told to give back every
large one that is freed, and beside it what glibc makes of it when it is told nothing, holes included.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.alternating import alternate, ratio
from benchmarks.forward import bare_tower, random_model
from benchmarks.plain_training import PlainMoECLIP
from benchmarks.report import Goal, Report, argument_parser, publish, timing_rows
from moeclip_hf import MoECLIPModel

TOWER, PLAIN, FAST = "bare CLIP tower, forward", "plain MoECLIP, step", "MoECLIP, step"
CHECKPOINTED = "MoECLIP, step, activation checkpointing"
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
GIVE_BACK_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


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


def resident_bytes() -> int:
    """Memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def time_step(plain: bool, images: int, image_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the bare tower's forward pass and of one kind of step, in turn."""
    model = random_model()
    tower, pixel_values = bare_tower(model), torch.randn(images, 3, image_size, image_size)

    def forward() -> None:
        with torch.inference_mode():
            tower(pixel_values, interpolate_pos_encoding=True)

    step = training_side(model, plain, images, image_size)
    return alternate({TOWER: forward, PLAIN if plain else FAST: step}, rounds)


def peak_over_weights(side: str, images: int, image_size: int) -> int:
    """Bytes by which two steps rise over what is held before them."""
    model = random_model()
    if side == CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step = training_side(model, side == PLAIN, images, image_size)
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    step()
    done.set()
    watcher.join()
    return peak - before


def apart(function: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """What a function returns in a fresh process, with more variables in its environment."""
    before = dict(os.environ)
    os.environ.update(environment or {})
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()

    sizes = (args.images, args.image_size)
    told = f"{args.images} x {args.image_size} px, float32"
    reports = []
    for plain in (False, True):
        seconds = apart(time_step, plain, *sizes, args.rounds, environment=KEEP_FREED_MEMORY)
        goals = (
            [] if plain else [Goal("training step over the bare tower's forward", ratio(seconds, FAST, TOWER), 1.85)]
        )
        reports.append(Report(f"{PLAIN if plain else FAST}, {told}", timing_rows(seconds, TOWER), goals))
    if args.memory:
        allocators = {"": GIVE_BACK_FREED_MEMORY, ", glibc as it is": None}
        peaks = {
            side + allocator: apart(peak_over_weights, side, *sizes, environment=environment) / 1e9
            for allocator, environment in allocators.items()
            for side in (PLAIN, FAST, CHECKPOINTED)
        }
        rows = [["side", "peak GB over the weights"], *([side, f"{peak:.2f}"] for side, peak in peaks.items())]
        goals = [
            Goal("training memory over the weights", peaks[FAST], 1.3, unit=" GB"),
            Goal("the same, activation checkpointing", peaks[CHECKPOINTED], 0.4, unit=" GB"),
        ]
        reports.append(Report(f"Memory of training, {told}", rows, goals))
    publish(reports, args.output)


if __name__ == "__main__":
    main()
