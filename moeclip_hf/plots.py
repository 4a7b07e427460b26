"""Figures drawn with matplotlib: curves, and sheets of captioned pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OUTLINE_COLOUR = (0, 255, 255)
# Names may hold dollar signs, which mean no formula.
_AS_IT_IS: dict[str, Any] = {"parse_math": False}

# Of `AnomalyMetrics.curves`: heading, horizontal and vertical axis.
_CURVES = {
    "image_roc": ("ROC, images", "false-positive rate", "true-positive rate"),
    "image_pr": ("precision-recall, images", "recall", "precision"),
    "pixel_roc": ("ROC, pixels", "false-positive rate", "true-positive rate"),
    "pixel_pr": ("precision-recall, pixels", "recall", "precision"),
    "pixel_pro": ("PRO", "false-positive rate", "mean overlap of regions"),
}


def draw_curves(curves: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """
    Draw ROC, precision-recall and PRO curves, a panel a kind and a line a class. Undefined ones are left out.

    Args:
        curves: by class, what [`moeclip_hf.metrics.AnomalyMetrics.curves`] returns.
        title (`str`): of the whole picture.

    Returns:
        `matplotlib.figure.Figure`, to be saved by its `savefig`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = [kind for kind in _CURVES if any(of_class[kind] is not None for of_class in curves.values())]
    figure = Figure(figsize=(3.4 * max(len(panels), 1) + 2, 3.9), layout="constrained")
    figure.suptitle(title, **_AS_IT_IS)
    lines: dict[str, Any] = {}
    colours = [colormaps["tab20"](number) for number in range(20)]
    for axes, kind in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        heading, horizontal, vertical = _CURVES[kind]
        axes.set(title=heading, xlabel=horizontal, ylabel=vertical, aspect="equal")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.grid(alpha=0.3)
        # Average precision takes each threshold's precision for all the recall that it gains.
        style = "steps-pre" if kind.endswith("_pr") else "default"
        for number, (name, of_class) in enumerate(curves.items()):
            if of_class[kind] is not None:
                colour = colours[number % len(colours)]
                (lines[name],) = axes.plot(*of_class[kind], color=colour, linewidth=1.3, drawstyle=style)
    if lines:
        # Named afterwards: a label that begins with an underscore is left out.
        legend = figure.legend(list(lines.values()), ["-"] * len(lines), loc="outside right center", fontsize="small")
        for text, name in zip(legend.get_texts(), lines, strict=True):
            text.set(text=name, **_AS_IT_IS)
    return figure


def draw_captioned(rows: Mapping[str, Sequence[tuple[str, Image.Image]]], title: str) -> Figure:
    """
    Lay captioned pictures out on a sheet, row by row under the rows' headings.

    Args:
        rows: by heading, (caption, picture) from left to right; rows without pictures are left out.
        title (`str`): of the whole sheet.

    Returns:
        `matplotlib.figure.Figure`, to be saved by its `savefig`.
    """
    from matplotlib.figure import Figure

    filled = {heading: pictures for heading, pictures in rows.items() if pictures}
    columns = max(len(pictures) for pictures in filled.values())
    figure = Figure(figsize=(3.6 * columns, 2.4 * len(filled) + 0.4), layout="constrained")
    figure.suptitle(title, **_AS_IT_IS)
    for strip, (heading, pictures) in zip(
        figure.subfigures(len(filled), squeeze=False)[:, 0], filled.items(), strict=True
    ):
        strip.suptitle(heading, fontsize="medium", x=0.01, ha="left", **_AS_IT_IS)
        for axes in strip.subplots(1, columns, squeeze=False)[0]:
            axes.axis("off")
        for axes, (caption, picture) in zip(strip.axes, pictures, strict=False):
            axes.imshow(np.asarray(picture))
            axes.set_title(caption, fontsize="x-small", **_AS_IT_IS)
    return figure


def outline_mask(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Draw the outline of a mask (H, W, boolean) around it, on an RGB image of its size."""
    from scipy import ndimage

    width = max(1, round(min(image.size) / 150))
    outline = ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=width) & ~mask
    pixels = np.array(image)
    pixels[outline] = _OUTLINE_COLOUR
    return Image.fromarray(pixels)
