"""Find defects cut into photographs and textures with the embedded checkpoint, and lay the results out on a sheet.

    python -m examples.demo [--output-dir outputs/demo] [--model DIR_OR_ID]

The photographs (brick, grass, gravel) come with scikit-image, the textures are rendered. The checkpoint was adapted on
procedural textures of the classes in `ADAPTED_ON`; whether a picture's class is among them is said beside each. The
pictures were chosen among many to show what so small a checkpoint can find; its card says how often it does.
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
from moeclip_hf.data.textures.splits import AUXILIARY_FAMILIES
from moeclip_hf.prediction import Prediction, predict
from moeclip_hf.pretrained import load_pretrained
from moeclip_hf.visualization import draw_overlay, tile_pictures

ADAPTED_ON = frozenset(name.replace("_", " ") for name in AUXILIARY_FAMILIES)
# Class, scikit-image's photograph, top left corner of the crop, defect (None: as it is) and the seed that draws it.
PHOTOGRAPHS = (
    ("brick wall", "brick", (64, 64), None, 0),
    ("brick wall", "brick", (0, 256), "missing_patch", 2),
    ("brick wall", "brick", (256, 0), "hole", 3),
    ("grass", "grass", (256, 0), None, 0),
    ("grass", "grass", (0, 256), "stain", 2),
    ("gravel", "gravel", (256, 256), "hole", 3),
)
# Family, defect and seed.
TEXTURES = (
    ("burlap", "distortion", 1),
    ("denim", "misplaced_patch", 3),
    ("plank floor", None, 1),
    ("rattan", "hole", 3),
    ("houndstooth", "distortion", 3),
    ("sandstone", "stain", 3),
    ("hexagonal tiles", "color_spot", 3),
    ("straw", "hole", 3),
)
SIZE = 256


class Sample(NamedTuple):
    """A picture of a class (H x W x 3, uint8), the mask of what was cut into it (H x W, boolean), and their story."""

    class_name: str
    kind: str
    defect: str | None
    image: np.ndarray
    mask: np.ndarray


def photograph(class_name: str, name: str, corner: tuple[int, int], defect: str | None, seed: int) -> Sample:
    """Crop one of scikit-image's grey photographs and cut a defect into it."""
    top, left = corner
    grey = getattr(data, name)()[top : top + SIZE, left : left + SIZE]
    image = np.repeat(grey[..., np.newaxis], 3, axis=2)
    mask = np.zeros(grey.shape, dtype=bool)
    if defect:
        image, mask = add_defect(image, defect, np.random.default_rng(seed))
    return Sample(class_name, "photograph", defect, image, mask)


def texture(class_name: str, defect: str | None, seed: int) -> Sample:
    """Render a texture, with a defect or without."""
    return Sample(class_name, "texture", defect, *render(class_name.replace(" ", "_"), defect, SIZE, seed))


def points_at_defect(prediction: Prediction, mask: np.ndarray) -> bool:
    """Whether the map's highest value lies on the defect."""
    return bool(mask.flat[prediction.anomaly_map.argmax()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--model", help="checkpoint folder or Hub id; the embedded one by default")
    args = parser.parse_args()

    logging.disable_progress_bar()
    pretrained = load_pretrained(args.model)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    columns = ("class", "adapted on it", "defect", "score", "verdict", "map's maximum")
    table = Table(*columns, title="moeclip demo")
    rows, hits = [], []
    samples = [*(photograph(*item) for item in PHOTOGRAPHS), *(texture(*item) for item in TEXTURES)]
    for index, sample in enumerate(samples):
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
        if sample.defect:
            hits.append(points_at_defect(prediction, sample.mask))
        place = ("on defect" if hits[-1] else "elsewhere") if sample.defect else "-"
        adapted = "yes" if sample.class_name in ADAPTED_ON else "never"
        verdict = "anomalous" if prediction.is_anomalous else "normal"
        score = f"{prediction.score:.3f}"
        picture = f"{sample.class_name} ({sample.kind})"
        table.add_row(picture, adapted, sample.defect or "none", score, verdict, place)

    # Two samples a row of the sheet: picture, where the defect is, heat map.
    sheet = tile_pictures([left + right for left, right in zip(rows[::2], rows[1::2], strict=True)], edge=192)
    sheet.save(args.output_dir / "sheet.png")
    console = Console()
    console.print(table)
    console.print(f"The map's maximum lies on the defect in {sum(hits)} of {len(hits)} pictures.")
    console.print(f"All in one picture (image, defect, heat map): {args.output_dir / 'sheet.png'}")


if __name__ == "__main__":
    main()
