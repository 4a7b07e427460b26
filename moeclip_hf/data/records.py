"""One row an image, whatever the source: the record, the features of the `Dataset`, and how masks are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from moeclip_hf.errors import DatasetError

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from PIL import Image

LABELS = ("normal", "anomalous")
"""Names of the labels 0 and 1."""

_JPEG_MASK_THRESHOLD = 127
# Rows that hold their images are copied when they were picked from others.
_ROWS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a data set; the columns of `to_dataset`.

    Attributes:
        image: path of the image file.
        mask: path of the mask file, non-zero where anomalous; None where there is none, as for all normal images.
        label: 0 normal, 1 anomalous.
        class_name: class as the data set names it.
        prompt_name: what fills the prompts for that class.
        group: what results are averaged over: the class, or the texture folder in DTD-Synthetic.
        dataset: name of the benchmark or data set.
        domain: "industrial" or "medical".
        image_path: path of the image relative to the data set's root, with forward slashes; tells images apart.
    """

    image: str
    mask: str | None
    label: int
    class_name: str
    prompt_name: str
    group: str
    dataset: str
    domain: str
    image_path: str


COLUMNS = tuple(field.name for field in fields(Record))


def features() -> datasets.Features:
    """The features shared by all sources: images and masks decode lazily, labels are `ClassLabel(LABELS)`."""
    import datasets

    text = datasets.Value("string")
    return datasets.Features(
        {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "label": datasets.ClassLabel(names=list(LABELS)),
            **dict.fromkeys(COLUMNS[3:], text),
        }
    )


def to_dataset(records: Sequence[Record]) -> datasets.Dataset:
    """A `datasets.Dataset` with one row a record; it stores paths, and reads an image when its row is read.

    Raises:
        DatasetError: naming the first name that is not UTF-8, which Arrow takes alone.
    """
    import datasets

    columns = {name: [getattr(record, name) for record in records] for name in COLUMNS}
    try:
        return datasets.Dataset.from_dict(columns, features=features())
    except UnicodeEncodeError as error:
        raise DatasetError(f"{error.object!a}: a name that is not UTF-8: rename it") from None


def digest_rows(rows: datasets.Dataset, with_times: bool = False) -> str:
    """Tells sets of images apart: a digest of paths, labels and prompt names, and of how large images and masks are.

    It is taken row by row, in order, and nothing is decoded: of a file the system is asked for its size.

    Args:
        rows: with the columns of `Record`.
        with_times: take in when each file was last written, too, so that what was written anew is told although it is
            as large. A copy of the files is then another set, unless it keeps their times.
    """
    import pyarrow.compute as pc

    from moeclip_hf.reading import leave_undecoded

    digest = hashlib.blake2b(digest_size=16)
    names = ["image_path", "label", "prompt_name"]
    stored = leave_undecoded(rows).select_columns([*names, "image", "mask"]).with_format("arrow")
    for table in stored.iter(batch_size=_ROWS_AT_ONCE):
        flat = table.flatten()
        columns = [flat[name].to_pylist() for name in names]
        for name in ("image", "mask"):
            paths, sizes = flat[f"{name}.path"].to_pylist(), pc.binary_length(flat[f"{name}.bytes"]).to_pylist()
            columns.append([_facts(path, size, with_times) for path, size in zip(paths, sizes, strict=True)])
        digest.update("".join(f"{row}\n" for row in zip(*columns, strict=True)).encode())
    return digest.hexdigest()


def _facts(path: str | None, size: int | None, with_time: bool) -> tuple[int, ...] | None:
    """The size in bytes of what a row holds, or of the file that it names; None where there is none."""
    if size is not None:
        return (size,)
    if path is None:
        return None
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # reading it says so
        return None
    return (found.st_size, found.st_mtime_ns) if with_time else (found.st_size,)


def read_mask(row: Mapping[str, Any]) -> np.ndarray | None:
    """The mask of a decoded row (`image`, `mask`, `label`): boolean H x W of the image's size, True where anomalous.

    A pixel is anomalous where any channel is not zero; in a JPEG, where compression leaves noise, where any is above
    127. Opacity does not count. A mask of another size than its image is brought to the image's by nearest neighbour,
    as the benchmark protocol does; `check_benchmark` names such masks.

    Returns:
        all False for a normal image; None for an anomalous image without a mask: what is anomalous is not known.
    """
    import numpy as np

    width, height = row["image"].size
    if not row["label"]:
        return np.zeros((height, width), dtype=bool)
    if row["mask"] is None:
        return None
    mask = binarize_mask(row["mask"])
    if mask.shape != (height, width):
        rows = (2 * np.arange(height) + 1) * mask.shape[0] // (2 * height)
        columns = (2 * np.arange(width) + 1) * mask.shape[1] // (2 * width)
        mask = mask[rows][:, columns]
    return mask


def binarize_mask(mask: Image.Image) -> np.ndarray:
    """The anomalous pixels of a mask image at its own size, boolean H x W; `read_mask` states the rule."""
    import numpy as np

    one_channel = mask.mode in ("1", "L", "I", "F") or mask.mode.startswith("I;16")
    values = np.atleast_3d(np.asarray(mask if one_channel else mask.convert("RGB")))
    return np.any(values > (_JPEG_MASK_THRESHOLD if mask.format in ("JPEG", "MPO") else 0), axis=2)


def as_label(value: Any, where: str) -> int:
    """A label 0 or 1 from an index file, which may be an integer, a float or a boolean.

    Raises:
        DatasetError: it is neither; `where` says where it stands.
    """
    if value not in (0, 1):
        raise DatasetError(f"{where}: label {value!r} is neither 0 (normal) nor 1 (anomalous)")
    return int(value)
