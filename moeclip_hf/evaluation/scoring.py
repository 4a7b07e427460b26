"""The forward passes: fixed batches of images in, and out all that the protocol needs of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from moeclip_hf.data import read_mask
from moeclip_hf.reading import leave_undecoded, read_row
from moeclip_hf.threads import read_ahead

if TYPE_CHECKING:
    from datasets import Dataset

    from moeclip_hf.pretrained import Pretrained

_READERS = 4

Size = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Images that go through the model together, whichever process they fall to: only so are their scores the same."""

    number: int
    group: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class ScoredBatch:
    """
    What is kept of a batch of B images: some 10 KB an image, of which the masks, once compressed, take little.

    Args:
        grids: (B, h, w) the benchmark's maps on the patch grid, smoothed, float32. Upsampling, the last step, is
            linear and waits until the metrics are updated.
        image_scores: (B,) the model's own, (cos t_a + 1) / 2, float32.
        masks: (B, ceil(H W / 8)) at the maps' full size, a bit a pixel; empty ones where the mask is not known.
        has_mask: (B,) whether an image's mask is known.
        other_size: (B,) whether it has another size than the image, to which it was brought.
    """

    grids: NDArray[np.float32]
    image_scores: NDArray[np.float32]
    masks: NDArray[np.uint8]
    has_mask: NDArray[np.bool_]
    other_size: NDArray[np.bool_]

    def arrays(self) -> dict[str, NDArray]:
        """Its fields by name, to be saved."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def full_masks(self, size: Size) -> NDArray[np.bool_]:
        """(B, H, W)."""
        pixels = np.unpackbits(self.masks, axis=1, count=size[0] * size[1])
        return pixels.reshape(-1, *size).astype(bool)


def plan_batches(groups: Sequence[str], batch_size: int) -> list[Batch]:
    """Cut a data set into batches of one group each, given every row's group. The plan depends on nothing else."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    cut = [
        (group, tuple(indices[start : start + batch_size]))
        for group, indices in members.items()
        for start in range(0, len(indices), batch_size)
    ]
    return [Batch(number, group, indices) for number, (group, indices) in enumerate(cut)]


def score_batches(
    pretrained: Pretrained, rows: Dataset, batches: Sequence[Batch], size: Size, domain: str
) -> Iterator[ScoredBatch]:
    """
    Score batches in order, while the images of the next ones are read and prepared in threads.

    Args:
        pretrained ([`Pretrained`]): model and processor.
        rows: with the columns of `moeclip_hf.data.Record`.
        batches: of these rows.
        size: (H, W) that images are resized to, and that maps and masks have.
        domain: how strongly maps are smoothed.

    Raises:
        UnreadableImageError: naming the first image that cannot be read, or whose mask cannot.
    """
    model, processor = pretrained
    prompt_names = list(rows["prompt_name"])
    anchors = {
        name: pretrained.encode_class(name)
        for name in dict.fromkeys(prompt_names[index] for batch in batches for index in batch.indices)
    }

    stored = leave_undecoded(rows)

    def read(index: int) -> tuple[torch.Tensor, NDArray[np.bool_] | None, bool]:
        row = read_row(stored, index)
        other_size = bool(row["label"] and row["mask"] is not None and row["mask"].size != row["image"].size)
        edges = {"height": size[0], "width": size[1]}
        pixel_values = processor(images=row["image"], size=edges, return_tensors="pt")["pixel_values"]
        mask = read_mask(row)
        return pixel_values, None if mask is None else resize_mask(mask, size), other_size

    depth = 2 * max((len(batch.indices) for batch in batches), default=1)
    images = read_ahead(read, chain.from_iterable(batch.indices for batch in batches), depth, _READERS)
    # An accelerator is given the next batch before the results of the last one are waited for.
    behind = int(model.device.type != "cpu")
    launched: deque[tuple[Any, ...]] = deque()
    for batch in batches:
        pixel_values, masks, other_size = zip(*islice(images, len(batch.indices)), strict=True)
        with torch.inference_mode():
            outputs = model(
                torch.cat(pixel_values).to(model.device, model.dtype),
                text_embeds=torch.cat([anchors[prompt_names[index]] for index in batch.indices]),
            )
            grids = processor.post_process_anomaly_maps(outputs, outputs.anomaly_logits.shape[-2:], domain)
            launched.append((grids, (outputs.logits_per_image[:, 1] + 1) / 2, masks, other_size, size))
        if len(launched) > behind:
            yield _collect(*launched.popleft())
    while launched:
        yield _collect(*launched.popleft())


def _collect(
    grids: torch.Tensor,
    image_scores: torch.Tensor,
    masks: tuple[NDArray[np.bool_] | None, ...],
    other_size: tuple[bool, ...],
    size: Size,
) -> ScoredBatch:
    unknown = np.zeros(size, dtype=bool)
    full = np.stack([unknown if mask is None else mask for mask in masks])
    return ScoredBatch(
        grids=grids.float().cpu().numpy(),
        image_scores=image_scores.float().cpu().numpy(),
        masks=np.packbits(full.reshape(len(full), -1), axis=1),
        has_mask=np.array([mask is not None for mask in masks]),
        other_size=np.array(other_size),
    )


def resize_mask(mask: NDArray[np.bool_], size: Size) -> NDArray[np.bool_]:
    """Bring a mask to the size of the maps, (H, W), by nearest neighbour."""
    height, width = size
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)) != 0
