"""Large images in overlapping tiles, each seen at its own resolution, and their maps blended without seams."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image

from moeclip_hf.errors import MoECLIPError
from moeclip_hf.modeling.processing_moeclip import find_regions, read_scores, upsample
from moeclip_hf.pretrained import Detector

_MAX_OVERLAP = 0.9


@dataclass(frozen=True)
class Tiling:
    """
    How images are cut into tiles.

    Args:
        size (`int`, *optional*): side of a tile in pixels of the image. By default what the model sees at once, so
            that tiles are seen pixel by pixel.
        overlap (`float`): share of a tile's side that it has in common with the next one, at least; 0 to 0.9. Without
            an overlap there is nothing to blend, and seams show.

    Raises:
        MoECLIPError: for a size below 1 or an overlap outside its range.
    """

    size: int | None = None
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise MoECLIPError(f"The size of a tile is {self.size} pixels: it must be at least 1.")
        if not 0 <= self.overlap <= _MAX_OVERLAP:
            raise MoECLIPError(f"The overlap of tiles is {self.overlap}: it must lie in 0 to {_MAX_OVERLAP}.")


def detect_in_tiles(
    detector: Detector,
    image: Image.Image,
    encoded_class: torch.Tensor,
    tiling: Tiling,
    batch_size: int = 8,
    threshold: float | None = None,
    pixel_threshold: float | None = None,
    size: dict[str, int] | None = None,
) -> dict[str, Any]:
    """
    Read a verdict for an image of any size, tile by tile.

    The score is that of the most anomalous tile, which the tile would have as an image of its own. The more tiles, the
    higher it rises even where nothing is wrong, so that thresholds belong to a tiling and a size of images. Of an
    image no larger than a tile, all is as [`MoECLIPProcessor.post_process_anomaly_detection`] reads it.

    Beside the image, memory holds its map, what finds regions in it, and one batch of tiles.

    Args:
        detector ([`Detector`]): such as from [`load_pretrained`].
        image (`PIL.Image.Image`): RGB, W x H.
        encoded_class (`torch.Tensor`): from [`Detector.encode_class`].
        tiling ([`Tiling`])
        batch_size (`int`): tiles computed at once; no result depends on it.
        threshold, pixel_threshold (`float`, *optional*): of the verdict and of regions, instead of the processor's.
        size (`dict[str, int]`, *optional*): what tiles are resized to, instead of the processor's size.

    Returns:
        A dict as for a whole image: `score` (`float`, 0 to 1), `map` (`torch.Tensor` of shape (H, W), float32, on the
        CPU, 0 to 1), `is_anomalous` (`bool`) and `regions`.

    Raises:
        ValueError: where aspect ratios are kept and the tiles are too long a strip, or a score is NaN.
    """
    processor = detector.processor
    input_size = size or processor.image_processor.size
    height, width = _tile_shape(tiling, input_size, image)
    rows = _blending_weights(image.height, height, tiling.overlap)
    columns = _blending_weights(image.width, width, tiling.overlap)

    blended, score = np.zeros((image.height, image.width), dtype=np.float32), 0.0
    places = list(product(rows, columns))
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        tiles = [image.crop((left, top, left + width, top + height)) for (top, _), (left, _) in batch]
        pixel_values = processor(images=tiles, size=input_size, return_tensors="pt")["pixel_values"]
        grids, scores = detector.patch_maps(pixel_values, encoded_class)
        score = max(score, *read_scores(scores))
        for ((top, row_weights), (left, column_weights)), grid in zip(batch, grids.cpu(), strict=True):
            tile = upsample(grid.unsqueeze(0), (height, width))[0].numpy()
            tile *= row_weights[:, np.newaxis]
            tile *= column_weights
            blended[top : top + height, left : left + width] += tile

    anomaly_map = torch.from_numpy(blended.clip(0, 1, out=blended))
    threshold = processor.image_threshold if threshold is None else threshold
    pixel_threshold = processor.pixel_threshold if pixel_threshold is None else pixel_threshold
    return {
        "score": score,
        "map": anomaly_map,
        "is_anomalous": score >= threshold,
        "regions": find_regions(anomaly_map, pixel_threshold),
    }


def _tile_shape(tiling: Tiling, input_size: dict[str, int], image: Image.Image) -> tuple[int, int]:
    """Height and width of all tiles of an image, no larger than it."""
    seen = [input_size.get(edge, input_size.get("shortest_edge", 0)) for edge in ("height", "width")]
    height, width = seen if tiling.size is None else (tiling.size, tiling.size)
    return min(height, image.height), min(width, image.width)


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along an edge: evenly spread, the first and the last flush with the image."""
    step = max(tile * (1 - overlap), 1)
    count = math.ceil((length - tile) / step) + 1
    return [round(start) for start in np.linspace(0, length - tile, count)]


def _blending_weights(length: int, tile: int, overlap: float) -> list[tuple[int, np.ndarray]]:
    """
    Where tiles begin along an edge, and the weights of their pixels, (tile,) each.

    A weight falls off from the middle of a tile as a raised cosine, and those of all tiles over a pixel sum to 1. A
    pixel's weight in a map is the product of those along both edges; these sum to 1 as well.
    """
    window = np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** 2
    starts = tile_starts(length, tile, overlap)
    total = np.zeros(length)
    for start in starts:
        total[start : start + tile] += window
    return [(start, (window / total[start : start + tile]).astype(np.float32)) for start in starts]


__all__ = ["Tiling", "detect_in_tiles", "tile_starts"]
