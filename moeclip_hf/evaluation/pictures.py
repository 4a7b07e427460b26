"""Pictures of an evaluation: curves, and the images it went best and worst on."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from moeclip_hf.data import read_mask
from moeclip_hf.errors import MoECLIPError
from moeclip_hf.evaluation.results import EvaluationResult, Heat
from moeclip_hf.modeling.processing_moeclip import upsample
from moeclip_hf.plots import draw_captioned, draw_curves, outline_mask
from moeclip_hf.reading import leave_undecoded, read_row
from moeclip_hf.visualization import draw_overlay, tile_pictures

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = 4
_EDGE = 256
_DPI = 110

_KINDS: dict[str, tuple[int, Callable[[Heat], float]]] = {
    "anomalous, lowest scores": (1, lambda heat: heat.score),
    "normal, highest scores": (0, lambda heat: -heat.score),
    "anomalous, highest scores": (1, lambda heat: -heat.score),
    "normal, lowest scores": (0, lambda heat: heat.score),
}


def require_matplotlib() -> None:
    """
    Make sure that pictures can be drawn, before hours of scoring.

    Raises:
        MoECLIPError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MoECLIPError("pictures need matplotlib: pip install 'moeclip-hf[train]', or evaluate without pictures")


def write_pictures(result: EvaluationResult, rows: Dataset, output_dir: Path) -> None:
    """
    Write `<dataset>_curves.png` and `<dataset>_images.png`.

    On the sheet each image, its mask outlined, stands beside its map, coloured over its group's range.

    Args:
        result ([`EvaluationResult`]): of these rows.
        rows: as given to [`evaluate`].
        output_dir: made if it is not there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    curves = {group.group: group.curves for group in result.groups}
    draw_curves(curves, result.dataset).savefig(output_dir / f"{result.dataset}_curves.png", dpi=_DPI)
    stored = leave_undecoded(rows)
    heats = [heat for group in result.groups for heat in group.heats]
    sheet = {
        heading: [
            _captioned(heat, stored)
            for heat in sorted((heat for heat in heats if heat.label == label), key=order)[:_COLUMNS]
        ]
        for heading, (label, order) in _KINDS.items()
    }
    figure = draw_captioned(sheet, f"{result.dataset}: image, mask outlined, and anomaly map; score")
    figure.savefig(output_dir / f"{result.dataset}_images.png", dpi=_DPI)


def _captioned(heat: Heat, rows: Dataset) -> tuple[str, Image.Image]:
    row = read_row(rows, heat.index)
    image = row["image"]
    mask = read_mask(row)
    anomaly_map = upsample(torch.from_numpy(heat.grid).unsqueeze(0), (image.height, image.width))[0].numpy()
    outlined = image if mask is None else outline_mask(image, mask)
    caption = f"{heat.score:.3f}  {row['image_path'][-44:]}"
    return caption, tile_pictures([[outlined, draw_overlay(image, anomaly_map)]], _EDGE)
