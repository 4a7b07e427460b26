"""Pictures of what a model sees."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# Colours of an anomaly map at 0, 1/4, ... 1: from deep blue over violet and orange to light yellow.
_HEAT = np.array([[10, 10, 70], [110, 20, 140], [220, 50, 70], [255, 150, 20], [255, 250, 150]], dtype=float)
_REGION_COLOUR = (0, 255, 255)
_BAND = 256  # rows


def heat_colours(anomaly_map: np.ndarray) -> np.ndarray:
    """Colour a map (H, W) of 0 to 1: (H, W, 3), 0 to 255, float32."""
    stops = np.linspace(0, 1, len(_HEAT))
    table = np.stack([np.interp(np.arange(256) / 255, stops, channel) for channel in _HEAT.T], axis=1)
    return table.astype(np.float32)[np.rint(anomaly_map * 255).astype(np.uint8)]


def draw_overlay(
    image: Image.Image,
    anomaly_map: np.ndarray,
    regions: Sequence[dict[str, Any]] = (),
    pixel_threshold: float = 0.5,
    opacity: float = 0.7,
) -> Image.Image:
    """
    Lay an anomaly map over its image, the more opaque the more anomalous, and frame its regions.

    The threshold takes the middle of the colours, and twice the threshold the last: checkpoints differ in how high
    their maps rise, and pictures of one checkpoint stay comparable.

    Args:
        image (`PIL.Image.Image`): RGB, W x H.
        anomaly_map (`np.ndarray`): (H, W), 0 to 1.
        regions (*optional*): as [`MoECLIPProcessor.post_process_anomaly_detection`] returns them.
        pixel_threshold (`float`): the map's value from which on a pixel is anomalous, over 0.
        opacity (`float`): of the last colour, 0 to 1.

    Returns:
        `PIL.Image.Image`: RGB, as large as the image.
    """
    pixels = np.array(image)
    # In bands, so that memory holds no floating-point copies of a large image.
    for top in range(0, len(pixels), _BAND):
        band = slice(top, top + _BAND)
        heat = np.clip(anomaly_map[band] / (2 * max(pixel_threshold, 1e-6)), 0, 1).astype(np.float32)
        alpha = opacity * heat[..., np.newaxis]
        pixels[band] = np.rint(pixels[band] * (1 - alpha) + heat_colours(heat) * alpha)
    overlay = Image.fromarray(pixels)
    draw = ImageDraw.Draw(overlay)
    width = max(1, round(min(image.size) / 200))
    for region in regions:
        left, top, right, bottom = region["box"]
        draw.rectangle((left - width, top - width, right - 1 + width, bottom - 1 + width), None, _REGION_COLOUR, width)
    return overlay


def tile_pictures(rows: Sequence[Sequence[Image.Image]], edge: int = 256, gap: int = 4) -> Image.Image:
    """
    Lay pictures out on a sheet.

    Args:
        rows: pictures, row by row.
        edge (`int`): pixels of a tile's edges; a picture is fitted into its tile.
        gap (`int`): pixels between tiles.
    """
    columns = max(len(row) for row in rows)
    step = edge + gap
    sheet = Image.new("RGB", (columns * step - gap, len(rows) * step - gap), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            scale = edge / max(picture.size)
            fitted = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
            offset = [(edge - side) // 2 for side in fitted.size]
            sheet.paste(fitted, (column * step + offset[0], row * step + offset[1]))
    return sheet
