"""The evaluation itself: batches to processes, scores to metrics, and on from where it was interrupted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from moeclip_hf._version import __version__
from moeclip_hf.data.records import digest_rows
from moeclip_hf.errors import DatasetError, MoECLIPError
from moeclip_hf.evaluation.checkpointing import ScoredBatches, list_differences
from moeclip_hf.evaluation.results import EvaluationResult, GroupResult
from moeclip_hf.evaluation.scoring import Batch, ScoredBatch, Size, plan_batches, score_batches
from moeclip_hf.evaluation.tally import Tally
from moeclip_hf.pretrained import Pretrained, describe_computation, load_pretrained
from moeclip_hf.processes import process_rank
from moeclip_hf.stored_weights import digest_weights

if TYPE_CHECKING:
    from datasets import Dataset

_DEFAULT_BATCH_SIZE = 8

Item = TypeVar("Item")
Progress = Callable[[int, int], None]


def evaluate(
    pretrained: Pretrained,
    rows: Dataset,
    *,
    batch_size: int = _DEFAULT_BATCH_SIZE,
    image_size: int | None = None,
    resume_dir: Path | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """
    Evaluate a checkpoint on a data set by the benchmark protocol.

    Images are scored in fixed batches, each of one group and each by one process, whatever their number: so every
    image is scored exactly once, and one process or several come to the same figures. The figures are those of
    [`moeclip_hf.metrics.AnomalyMetrics`], a group at a time.

    Args:
        pretrained ([`Pretrained`]): from [`load_pretrained`].
        rows: the images of one data set with their masks, from [`moeclip_hf.data.load_data`].
        batch_size: images computed at once.
        image_size: edge in pixels of the square that images and masks fill; by default the processor's size.
        resume_dir: where scored batches are kept, so that an interrupted evaluation goes on when it is called again;
            the caller deletes it in the end. Without it nothing is written.
        progress: told the number of images scored so far, and their total, in the main process.

    Returns:
        [`EvaluationResult`], the same in every process.

    Raises:
        DatasetError: if there are no images, or images of several data sets.
        UnreadableImageError: naming the first image that cannot be read.
        MoECLIPError: if `resume_dir` holds an evaluation of other settings, or images are smaller than a patch.
    """
    rank, num_processes = process_rank()
    is_main = rank == 0
    dataset, domain = (_only(rows, column) for column in ("dataset", "domain"))
    size = _image_size(pretrained, image_size)
    plan = plan_batches(list(rows["group"]), batch_size)
    settings = {
        "image_size": list(size),
        "domain": domain,
        "batch_size": batch_size,
        "dtype": str(pretrained.model.dtype).removeprefix("torch."),
        "device": pretrained.model.device.type,
        **describe_model(pretrained),
        "images": digest_rows(rows, with_times=True),
        "moeclip-hf": __version__,
        "torch": torch.__version__,
    }
    kept = ScoredBatches(resume_dir, settings) if resume_dir and is_main else None
    done: set[int] = _all_gather(kept.numbers() if kept else set())[0]
    pending = [batch for batch in plan if batch.number not in done]
    mine = score_batches(pretrained, rows, pending[rank::num_processes], size, domain)
    scored = _gathered(mine, rounds=-(-len(pending) // num_processes))
    groups: tuple[GroupResult, ...] = ()
    if is_main:
        tally = Tally(list(rows["label"]), size, domain)
        groups = _count(tally, plan, scored, done, kept, progress)
    else:
        deque(scored, maxlen=0)
    prompt_names = tuple(sorted(set(rows["prompt_name"])))
    return EvaluationResult(dataset, domain, _all_gather(groups)[0], settings, prompt_names)


def _count(
    tally: Tally,
    plan: Sequence[Batch],
    scored: Iterator[ScoredBatch],
    done: set[int],
    kept: ScoredBatches | None,
    progress: Progress | None,
) -> tuple[GroupResult, ...]:
    """Take every batch of the plan from where it is, keep the new ones, and count all in order."""
    images = 0
    total = sum(len(batch.indices) for batch in plan)
    with ExitStack() as stack:
        writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="writer"))
        stack.enter_context(tally)
        writes: deque[Future[None]] = deque()
        for batch in plan:
            while writes and writes[0].done():  # a full disk is known now, not after hours
                writes.popleft().result()
            if kept is not None and batch.number in done:
                found = kept.load(batch.number)
            else:
                found = next(scored)
                if kept is not None:
                    writes.append(writer.submit(kept.save, batch.number, found))
            tally.add(batch, found)
            images += len(batch.indices)
            if progress is not None:
                progress(images, total)
        for write in writes:
            write.result()
        return tally.results()


def _gathered(mine: Iterator[ScoredBatch], rounds: int) -> Iterator[ScoredBatch]:
    """All processes' batches in the plan's order: in each round every process gives one, or none at the end."""
    for _ in range(rounds):
        yield from (batch for batch in _all_gather(next(mine, None)) if batch is not None)


def _all_gather(item: Item) -> list[Item]:
    """Every process's item, by rank."""
    _, num_processes = process_rank()
    if num_processes == 1:
        return [item]
    items: list[Any] = [None] * num_processes
    distributed.all_gather_object(items, item)
    return items


def describe_model(pretrained: Pretrained) -> dict[str, Any]:
    """Tells checkpoints apart, as they are computed with: a digest of all weights, and settings."""
    digest = digest_weights(pretrained.model.state_dict())
    return {"weights": digest, **describe_computation(pretrained.model, pretrained.processor)}


def find_differences(folder: Path, document: Mapping[str, Any]) -> str:
    """
    What of a checkpoint is not as it was when it was evaluated.

    Args:
        folder: of the checkpoint.
        document: the `results.json` of an evaluation, read.

    Returns:
        The settings that differ with both values, in words; empty if the figures are of this checkpoint.
    """
    evaluated = [result["settings"] for result in document["datasets"]]
    there = {
        dtype: describe_model(load_pretrained(folder, device="cpu", dtype=dtype))
        for dtype in {settings["dtype"] for settings in evaluated}
    }
    differences = (list_differences(settings, there[settings["dtype"]]) for settings in evaluated)
    return next(filter(None, differences), "")


def provenance(pretrained: Pretrained) -> dict[str, Any]:
    """The model with its revision, the versions of what computed, and the date: what a result belongs to."""
    from importlib.metadata import version

    config = pretrained.model.config
    packages = ("moeclip-hf", "torch", "transformers")
    return {
        "model": {"name": config.name_or_path, "revision": getattr(config, "_commit_hash", None)},
        "versions": {name: version(name) for name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _image_size(pretrained: Pretrained, image_size: int | None) -> Size:
    images = pretrained.processor.image_processor
    edge = image_size or images.size.get("shortest_edge")
    if edge is not None and edge < images.patch_size:
        raise MoECLIPError(f"images of {edge} pixels hold no patch of {images.patch_size}: name a larger size")
    return (edge, edge) if edge else (images.size["height"], images.size["width"])


def _only(rows: Dataset, column: str) -> Any:
    values = set(rows[column])
    if len(values) != 1:
        what = "no images" if not values else f"images of several kinds of {column}: {', '.join(sorted(values))}"
        raise DatasetError(f"an evaluation takes the images of one data set; there are {what}")
    return values.pop()
