"""What a training step sees: images and masks, drawn and augmented by seed, epoch and row alone.

No order, augmentation or dropout depends on the number of processes, on which of them computes a sample, or on what
was computed before: so several processes train what one does, and a resumed run repeats an unbroken one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from moeclip_hf.data.augmentation import apply_transforms, draw_transforms
from moeclip_hf.data.records import read_mask
from moeclip_hf.errors import DatasetError
from moeclip_hf.modeling.moe_lora import MoELora
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor
from moeclip_hf.reading import leave_undecoded, read_row

if TYPE_CHECKING:
    import datasets


class Draw(NamedTuple):
    """One row of the data in one epoch."""

    epoch: int
    row: int


class EpochSampler(Sampler[Draw]):
    """
    Every row once an epoch, in an order that follows from seed and epoch; but for the last ones of the order, which
    would make an incomplete step. So an epoch has as many steps however a step is split.

    Args:
        num_rows (`int`)
        seed (`int`)
        step_size (`int`): rows of one step of all processes, accumulated batches together.
    """

    def __init__(self, num_rows: int, seed: int, step_size: int = 1):
        self.num_rows = num_rows
        self.seed = seed
        self.steps_per_epoch = num_rows // step_size
        self.epoch = 0
        self._length = self.steps_per_epoch * step_size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        for row in torch.randperm(self.num_rows, generator=generator)[: self._length].tolist():
            yield Draw(self.epoch, row)


class TrainingSamples(Dataset[dict[str, Any]]):
    """
    Rows of a data set as the model's inputs.

    Args:
        rows (`datasets.Dataset`): with the columns that `moeclip_hf.data.load_data` gives.
        processor ([`MoECLIPProcessor`]): decides on size and normalisation.
        augment (`bool`): rotate, shift and flip images with their masks.
        seed (`int`)

    Raises:
        DatasetError: there are no rows, no anomalous ones, or an anomalous one without a mask.
    """

    def __init__(self, rows: "datasets.Dataset", processor: MoECLIPProcessor, augment: bool = True, seed: int = 0):
        _check_rows(rows)
        self.rows = rows
        self._stored = leave_undecoded(rows)
        self.image_processor = processor.image_processor
        self.augment = augment
        self.seed = seed
        self.dataset_names = sorted(set(rows["dataset"]))
        self.prompt_names = sorted(set(rows["prompt_name"]))
        self._class_index = {name: index for index, name in enumerate(self.prompt_names)}
        # A normalised black pixel: what comes into view in augmentation is black.
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (
            self.image_processor.image_mean, self.image_processor.image_std
        ))  # fmt: skip
        self._black = -mean / std

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """
        Read, resize, augment and normalise an image with its mask.

        Returns:
            `pixel_values` (3, H, W) float32, `masks` (H, W) uint8 of 0 and 1, and the integers `labels`, `class_index`
            and `sample_seeds`.

        Raises:
            UnreadableImageError: naming the image, where it or its mask cannot be read.
        """
        row = read_row(self._stored, draw.row)
        mask = read_mask(row)
        assert mask is not None  # checked by the constructor
        pixels = self.image_processor(row["image"], return_tensors="pt")["pixel_values"]
        masks = torch.from_numpy(mask)[None].to(torch.uint8)
        masks = F.interpolate(masks[None], size=pixels.shape[-2:], mode="nearest-exact")[0]
        seed = derive_seed(self.seed, *draw)
        if self.augment:
            generator = torch.Generator().manual_seed(seed)
            transforms = draw_transforms(1, pixels.shape[-2], pixels.shape[-1], generator)
            pixels, masks = apply_transforms(pixels - self._black, masks, transforms)
            pixels = pixels + self._black
        return {
            "pixel_values": pixels[0],
            "masks": masks[0],
            "labels": row["label"],
            "class_index": self._class_index[row["prompt_name"]],
            "sample_seeds": seed,
        }


class SampleDropout(nn.Module):
    """
    Dropout whose mask follows the sample: the same whichever process computes it, and in whatever batch.

    Args:
        p (`float`): share of features that are dropped.
        layer (`int`): tells apart the masks of several layers.
    """

    def __init__(self, p: float, layer: int):
        super().__init__()
        self.p = p
        self.layer = layer
        self.sample_seeds: list[int] = []

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, tokens, d), with one of `sample_seeds` an image."""
        if not self.training or self.p == 0:
            return hidden_states
        kept = torch.empty_like(hidden_states)
        for image, seed in zip(kept, self.sample_seeds, strict=True):
            generator = torch.Generator(image.device).manual_seed(derive_seed(seed, self.layer))
            image.bernoulli_(1 - self.p, generator=generator)
        return hidden_states * kept.div_(1 - self.p)


@contextmanager
def sample_dropout(layers: Sequence[MoELora]) -> Iterator[list[SampleDropout]]:
    """Have layers drop features by the sample within the context, and by a dropout of their own again behind it."""
    own = [layer.dropout for layer in layers]
    by_sample = [SampleDropout(dropout.p, number) for number, dropout in enumerate(own)]
    try:
        for layer, dropout in zip(layers, by_sample, strict=True):
            layer.dropout = dropout
        yield by_sample
    finally:
        for layer, dropout in zip(layers, own, strict=True):
            layer.dropout = dropout.train(layer.training)


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits from some numbers; it is the same in every process and version of Python."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def refuse_streamed(rows: Any) -> None:
    """
    Refuse what has no rows to be drawn in any order.

    Raises:
        DatasetError: naming what it is instead.
    """
    import datasets

    if not isinstance(rows, datasets.Dataset):
        raise DatasetError(f"training needs a datasets.Dataset that is not streamed, not {type(rows).__name__}.")


def _check_rows(rows: "datasets.Dataset") -> None:
    import datasets

    refuse_streamed(rows)
    labels = rows["label"]
    if not sum(labels):
        raise DatasetError(f"there is no anomalous image among the {len(rows)} to train on.")
    undecoded = rows.cast_column("mask", datasets.Image(decode=False))["mask"]
    lacking = [path for path, label, mask in zip(rows["image_path"], labels, undecoded, strict=True)
               if label and mask is None]  # fmt: skip
    if lacking:
        raise DatasetError(
            f"{lacking[0]} is anomalous and has no mask, as {len(lacking) - 1} others: training needs the masks; "
            f"leave such images out."
        )
