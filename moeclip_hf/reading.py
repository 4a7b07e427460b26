"""Images and masks of data sets, read from what is stored."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from moeclip_hf.errors import UnreadableImageError
from moeclip_hf.modeling.image_processing_moeclip import open_image, to_rgb

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image


def leave_undecoded(rows: Dataset) -> Dataset:
    """
    The same data set, whose images and masks come as they are stored, for [`read_row`] to open.

    `datasets` would open a file of any kind, also those that PIL hands to programs of the system.
    """
    import datasets

    for column in ("image", "mask"):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def read_row(rows: Dataset, index: int) -> dict[str, Any]:
    """
    Read one row of a data set (`moeclip_hf.data.Record`), its image upright and in RGB, its mask as it is.

    Args:
        rows: from [`leave_undecoded`].
        index: of the row.

    Raises:
        UnreadableImageError: naming the image, where it or its mask cannot be read.
    """
    row = rows[index]
    name = row["image_path"]
    try:
        image = to_rgb(_open_stored(row["image"], name), name)
        mask = row["mask"] and _open_stored(row["mask"], f"{name}, its mask")
    except ValueError as error:
        raise UnreadableImageError(str(error)) from error
    return {**row, "image": image, "mask": mask}


def _open_stored(stored: dict[str, Any] | None, name: str) -> Image.Image:
    """Open an image of a data set, which holds the bytes of its file or a path."""
    if stored is None:
        raise ValueError(f"{name}: the data set holds no image here.")
    content = stored["bytes"]
    return open_image(stored["path"] if content is None else BytesIO(content), name)
