"""A training step of MoECLIP beside a plain one, and beside the forward pass of the tower that neither can do without.

    python -m benchmarks.training_step [--images 1] [--image-size 518] [--rounds 5] [--memory] [--allocators NAME ...]

All sides have ViT-L/14's sizes, random weights (speed does not depend on them) and float32. A step is the objective's
forward pass, its backward pass and Adam. Each kind of step runs in turn with the tower, in a process of its own, as
the plain one's gigabytes would disturb the other's allocations. `--memory` measures, in further processes, how far the
peak of two steps lies over what is held before the first one.

Both depend on what glibc does with memory that is freed, and what helps the one may cost the other: each is measured
under every setting of `--allocators`, the plain step under one of them.

    as-it-is    some is kept, some goes back to the system, and holes stay between what is in use
    kept        all is kept: no page is fetched twice, and holes stay
    given-back  tensors over 1 MB have pages of their own, which go back at once: no holes, all pages fetched anew
    huge-pages  the same, in transparent huge pages: 2 MB are fetched at once; needs glibc 2.35 and "madvise" or
                "always" in /sys/kernel/mm/transparent_hugepage/enabled
"""

import ctypes
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from benchmarks.alternating import alternate, ratio
from benchmarks.forward import bare_tower, random_model
from benchmarks.plain_training import PlainMoECLIP
from benchmarks.report import Goal, Report, argument_parser, publish
from moeclip_hf import MoECLIPModel

Result = TypeVar("Result")

TOWER, PLAIN, FAST = "bare CLIP tower, forward", "plain MoECLIP, step", "MoECLIP, step"
CHECKPOINTED = "MoECLIP, step, activation checkpointing"

# The variables that tell glibc.
ALLOCATORS: dict[str, dict[str, str]] = {
    "as-it-is": {},
    "kept": {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"},
    "given-back": {"MALLOC_MMAP_THRESHOLD_": "1000000"},
    "huge-pages": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1000000"
        ":glibc.malloc.trim_threshold=8000000000"
    },
}
TIME_GOAL_UNDER, MEMORY_GOALS_UNDER = "kept", "given-back"
"""The allocators under which time and memory are held to their goals: those that add least to what torch does."""


def training_side(
    model: MoECLIPModel, images: int, image_size: int, plain: PlainMoECLIP | None = None
) -> Callable[[], None]:
    """One training step on random images, half of each anomalous; the plain one, if given, on the model's weights."""
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
        plain.train()

        def loss() -> torch.Tensor:
            return plain(pixel_values, input_ids=input_ids, **targets)
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

    step = training_side(model, images, image_size, PlainMoECLIP(model) if plain else None)
    return alternate({TOWER: forward, PLAIN if plain else FAST: step}, rounds)


def peak_over_weights(side: str, images: int, image_size: int) -> int:
    """Bytes by which two steps rise over what is held before them."""
    model = random_model()
    if side == CHECKPOINTED:
        model.activation_checkpointing_enable({"use_reentrant": False})
    step = training_side(model, images, image_size, PlainMoECLIP(model) if side == PLAIN else None)

    def two_steps() -> None:
        step()
        step()

    return peak_over_start(two_steps)[1]


def peak_over_start(run: Callable[[], Result]) -> tuple[Result, int]:
    """What a function returns, and the most bytes that this process held over what it held before."""
    ctypes.CDLL(None).malloc_trim(0)  # what was left free would hide a part of the peak
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()
    finally:
        done.set()
        watcher.join()
    return result, max(0, peak - before)


def apart(function: Callable[..., Any], *arguments: Any, allocator: str | None = None) -> Any:
    """What a function returns in a fresh process, if told so under one of `ALLOCATORS` and no other setting."""
    before = dict(os.environ)
    if allocator:
        for name in [name for variables in ALLOCATORS.values() for name in variables]:
            os.environ.pop(name, None)
        os.environ.update(ALLOCATORS[allocator])
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def report_time(allocators: Sequence[str], images: int, image_size: int, rounds: int) -> Report:
    """Seconds of a step under each allocator, those of the plain one under the first."""
    rows = [["step", "freed memory", "tower, median s", "step, median s", "min s", "max s", "over the tower"]]
    goals = []
    for side, allocator in [(FAST, name) for name in allocators] + [(PLAIN, allocators[0])]:
        seconds = apart(time_step, side == PLAIN, images, image_size, rounds, allocator=allocator)
        relative, taken = ratio(seconds, side, TOWER), seconds[side]
        times = (median(seconds[TOWER]), median(taken), min(taken), max(taken))
        rows.append([side, allocator, *(f"{value:.2f}" for value in times), f"{relative:.3f}"])
        if side == FAST and allocator == TIME_GOAL_UNDER:
            goals.append(
                Goal(f"training step over the bare tower's forward, freed memory {allocator}", relative, 1.85)
            )
    return Report(f"Training step, {images} x {image_size} px, float32", rows, goals)


def report_memory(allocators: Sequence[str], images: int, image_size: int) -> Report:
    """Peaks of steps under each allocator, that of the plain one under the first."""
    rows = [["step", "freed memory", "peak GB over the weights"]]
    of = "training memory over the weights"
    goals, held = [], {FAST: (of, 1.3), CHECKPOINTED: (f"{of}, activation checkpointing", 0.4)}
    for side, allocator in [(side, name) for side in held for name in allocators] + [(PLAIN, allocators[0])]:
        peak = apart(peak_over_weights, side, images, image_size, allocator=allocator) / 1e9
        rows.append([side, allocator, f"{peak:.2f}"])
        if side in held and allocator == MEMORY_GOALS_UNDER:
            figure, limit = held[side]
            goals.append(Goal(f"{figure}, freed memory {allocator}", peak, limit, unit=" GB"))
    return Report(f"Memory of training, {images} x {image_size} px, float32", rows, goals)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=518)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, metavar="NAME",
                        default=[TIME_GOAL_UNDER, MEMORY_GOALS_UNDER, "as-it-is"],
                        help=f"of {', '.join(ALLOCATORS)}; the first also for the plain step")  # fmt: skip
    args = parser.parse_args()

    sizes = (args.images, args.image_size)
    reports = [report_time(args.allocators, *sizes, args.rounds)]
    if args.memory:
        reports.append(report_memory(args.allocators, *sizes))
    publish(reports, args.output)


if __name__ == "__main__":
    main()
