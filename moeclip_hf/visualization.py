"""Pictures of what a model sees."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from moeclip_hf.explanation import Explanation

# Colours of an anomaly map at 0, 1/4, ... 1: from deep blue over violet and orange to light yellow.
_HEAT = np.array([[10, 10, 70], [110, 20, 140], [220, 50, 70], [255, 150, 20], [255, 250, 150]], dtype=float)
_REGION_COLOUR = (0, 255, 255)
_BAND = 256  # rows
_RAISES, _LOWERS = (220, 40, 40), (40, 90, 220)
_CAPTION_HEIGHT = 20


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


def draw_routing(explanation: Explanation, pixel_threshold: float = 0.5, edge: int = 256) -> Image.Image:
    """
    Draw the routing of every layer, a row each: the image with its anomaly map; for each expert its load, and its
    weight at every patch, the hotter the larger and bare where it is not chosen; the top expert of every patch.

    Args:
        explanation ([`Explanation`])
        pixel_threshold (`float`): the middle of the anomaly map's colours, as in [`draw_overlay`].
        edge (`int`): pixels of a picture's longer side, its caption included.
    """
    small = _shrink(explanation.image, edge)
    heat = np.asarray(Image.fromarray(explanation.anomaly_map).resize(small.size))
    overlay = draw_overlay(small, heat, pixel_threshold=pixel_threshold)
    dark, light = _grey(small, "black"), _grey(small, "white")
    rows = []
    for layer in explanation.layers:
        colours = expert_colours(len(layer.weights))
        row = [_caption(overlay, f"block {layer.block}", edge)]
        for expert, (weights, load) in enumerate(zip(layer.weights, layer.load, strict=True)):
            picture = draw_overlay(dark, _enlarge_patches(weights, small.size), opacity=0.9)
            row.append(_caption(picture, f"expert {expert + 1}: load {load:.0%}", edge, colours[expert]))
        chosen = np.array(colours)[_enlarge_patches(layer.top_1, small.size)]
        picture = Image.blend(light, Image.fromarray(chosen.astype(np.uint8)), 0.6)
        rows.append([*row, _caption(picture, "top-1 expert", edge)])
    return tile_pictures(rows, edge)


def draw_attributions(explanation: Explanation, edge: int = 256) -> Image.Image:
    """
    Draw what each expert adds to the anomaly map, a row a layer: red where it raises it, blue where it lowers it.

    The largest amount of a layer takes the full colour; it is said beside the row.

    Args:
        explanation ([`Explanation`])
        edge (`int`): pixels of a picture's longer side, its caption included.
    """
    small = _shrink(explanation.image, edge)
    light = np.asarray(_grey(small, "white"), dtype=np.float32)
    rows = []
    for layer in explanation.layers:
        largest = float(np.abs(layer.attributions).max())
        row = [_caption(small, f"block {layer.block}: up to {largest:.1e}", edge)]
        for expert, attributions in enumerate(layer.attributions):
            amount = _enlarge_patches(attributions / max(largest, 1e-30), small.size)[..., np.newaxis]
            alpha = np.abs(amount)
            pixels = light * (1 - alpha) + np.where(amount > 0, _RAISES, _LOWERS) * alpha
            picture = Image.fromarray(np.rint(pixels).astype(np.uint8))
            total = f"expert {expert + 1}: {attributions.sum():+.1e}"
            row.append(_caption(picture, total, edge, expert_colours(len(layer.weights))[expert]))
        rows.append(row)
    return tile_pictures(rows, edge)


def expert_colours(num_experts: int) -> list[tuple[int, int, int]]:
    """A colour an expert, evenly around the circle of hues."""
    hues = np.linspace(0.06, 1.06, num_experts, endpoint=False)
    colours = (colorsys.hsv_to_rgb(hue % 1, 0.85, 0.95) for hue in hues)
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colours]


def _enlarge_patches(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) to (height, width) of a size in pixels (width, height), each patch of one value."""
    rows, columns = (np.arange(pixels) * cells // pixels for pixels, cells in zip(size[::-1], grid.shape, strict=True))
    return grid[rows[:, np.newaxis], columns]


def _shrink(image: Image.Image, edge: int) -> Image.Image:
    """Fit an image with a caption into a square of `edge` pixels."""
    scale = min(edge / image.width, (edge - _CAPTION_HEIGHT) / image.height)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def _grey(image: Image.Image, shade: str) -> Image.Image:
    """Take an image's colour and half its contrast, towards black or white, so that colours over it are seen."""
    return Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, shade), 0.5)


def _caption(picture: Image.Image, text: str, edge: int, colour: tuple[int, int, int] | None = None) -> Image.Image:
    """Write a line over a picture, with a square of a colour before it; a square of `edge` pixels."""
    captioned = Image.new("RGB", (edge, edge), "white")
    left = (edge - picture.width) // 2
    top = (edge - _CAPTION_HEIGHT - picture.height) // 2
    captioned.paste(picture, (left, top + _CAPTION_HEIGHT))
    draw = ImageDraw.Draw(captioned)
    if colour is not None:
        draw.rectangle((left, top + 4, left + 11, top + 15), colour)
        left += 17
    draw.text((left, top + 3), text, "black", ImageFont.load_default(12))
    return captioned
