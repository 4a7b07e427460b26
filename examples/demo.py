"""Find defects cut into photographs and textures with the embedded checkpoint, and lay the results out on a sheet.

    python -m examples.demo [--output-dir outputs/demo] [--model DIR_OR_ID]

The photographs (brick, grass, gravel) come with scikit-image, the textures are rendered. The checkpoint was adapted on
procedural textures of the classes in `ADAPTED_ON`; whether a picture's class is among them is said beside each.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data
from transformers.utils import logging

from moeclip_hf.data.textures import add_defect, render
from moeclip_hf.prediction import Prediction, predict
from moeclip_hf.pretrained import load_pretrained
from moeclip_hf.visualization import draw_overlay, tile_pictures

ADAPTED_ON = frozenset(
    {
        *("woven fabric", "wood grain", "brick wall", "square tiles", "gravel", "brushed metal", "carpet", "leather"),
        *("striped cloth", "polka dots", "perforated plate", "corrugated cardboard", "cork", "granite"),
    }
)
# Photographs: class, scikit-image's name, defect (None: as it is), top left corner of the crop.
PHOTOGRAPHS = (
    ("brick wall", "brick", None, (0, 0)),
    ("brick wall", "brick", "hole", (0, 256)),
    ("brick wall", "brick", "color_spot", (256, 256)),
    ("grass", "grass", None, (0, 0)),
    ("grass", "grass", "missing_patch", (256, 0)),
    ("gravel", "gravel", "color_spot", (0, 0)),
)
TEXTURES = (
    ("marble", "color_spot"),
    ("wire mesh", "hole"),
    ("knitted fabric", "missing_patch"),
    ("hexagonal tiles", "stain"),
    ("herringbone parquet", "hole"),
    ("sand ripples", "debris"),
    ("terrazzo", None),
    ("corduroy", None),
)
SIZE = 256


class Sample(NamedTuple):
    """A picture of a class (H x W x 3, uint8), the mask of what was cut into it (H x W, boolean), and their story."""

    class_name: str
    kind: str
    defect: str | None
    image: np.ndarray
    mask: np.ndarray


def photograph(class_name: str, name: str, defect: str | None, corner: tuple[int, int], seed: int) -> Sample:
    """Crop one of scikit-image's grey photographs and cut a defect into it."""
    top, left = corner
    grey = getattr(data, name)()[top : top + SIZE, left : left + SIZE]
    image = np.repeat(grey[..., np.newaxis], 3, axis=2)
    mask = np.zeros(grey.shape, dtype=bool)
    if defect:
        image, mask = add_defect(image, defect, np.random.default_rng(seed))
    return Sample(class_name, "photograph", defect, image, mask)


def make_samples(seed: int) -> list[Sample]:
    """All pictures of the demonstration; the same for the same seed."""
    photographs = [photograph(*item, seed=seed + index) for index, item in enumerate(PHOTOGRAPHS)]
    textures = [
        Sample(name, "texture", defect, *render(name.replace(" ", "_"), defect, SIZE, seed + index))
        for index, (name, defect) in enumerate(TEXTURES)
    ]
    return photographs + textures


def points_at_defect(prediction: Prediction, mask: np.ndarray) -> bool:
    """Whether the map's highest value lies on the defect."""
    return bool(mask.flat[prediction.anomaly_map.argmax()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--model", help="checkpoint folder or Hub id; the embedded one by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    logging.disable_progress_bar()
    pretrained = load_pretrained(args.model)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = Table("picture", "kind", "adapted on this class", "defect", "score", "map's maximum", title="moeclip demo")
    rows = []
    for index, sample in enumerate(make_samples(args.seed)):
        stem = f"{index:02d}_{sample.class_name.replace(' ', '_')}_{sample.defect or 'good'}"
        path = args.output_dir / f"{stem}.png"
        Image.fromarray(sample.image).save(path)
        prediction = next(predict(pretrained, [path], sample.class_name))
        overlay = draw_overlay(
            prediction.image, prediction.anomaly_map, prediction.regions, pretrained.processor.pixel_threshold
        )
        overlay.save(args.output_dir / f"{stem}_overlay.png")
        truth = Image.fromarray(np.where(sample.mask, 255, 0).astype(np.uint8)).convert("RGB")
        rows.append([prediction.image, truth, overlay])
        hit = ("on the defect" if points_at_defect(prediction, sample.mask) else "elsewhere") if sample.defect else "-"
        adapted = "yes" if sample.class_name in ADAPTED_ON else "no, never"
        table.add_row(path.name, sample.kind, adapted, sample.defect or "none", f"{prediction.score:.3f}", hit)

    # Two samples a row of the sheet: picture, where the defect is, heat map.
    sheet = tile_pictures([left + right for left, right in zip(rows[::2], rows[1::2], strict=True)], edge=192)
    sheet.save(args.output_dir / "sheet.png")
    console = Console()
    console.print(table)
    console.print(f"All in one picture (image, defect, heat map): {args.output_dir / 'sheet.png'}")


if __name__ == "__main__":
    main()
