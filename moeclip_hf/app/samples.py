"""Images to try the page on: rendered textures, or those of a folder."""

from __future__ import annotations

import atexit
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from PIL import Image

from moeclip_hf.app.inspector import read_upload, shrink
from moeclip_hf.data.textures import render
from moeclip_hf.prediction import find_images

# Family, defect and seed.
_TEXTURES = (
    ("wire_mesh", "hole", 4),
    ("wire_mesh", None, 0),
    ("herringbone_parquet", "missing_patch", 4),
    ("knitted_fabric", "hole", 3),
    ("hexagonal_tiles", "stain", 5),
    ("sand_ripples", "missing_patch", 0),
)
_THUMBNAIL_EDGE = 256


@dataclass(frozen=True)
class Sample:
    """A file, what it shows, and a small picture of it."""

    path: Path
    class_name: str
    thumbnail: Image.Image


def render_samples() -> list[Sample]:
    """Render a few textures, one of them faultless, into a folder that goes with the process."""
    folder = Path(mkdtemp(prefix="moeclip-samples-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    samples = []
    for family, defect, seed in _TEXTURES:
        path = folder / f"{family}_{defect or 'good'}.png"
        picture = Image.fromarray(render(family, defect, 256, seed)[0])
        picture.save(path)
        samples.append(Sample(path, family.replace("_", " "), picture))
    return samples


def samples_of_folder(folder: Path, max_megapixels: float) -> list[Sample]:
    """
    Take the images of a folder: those in a folder within it are of the class it is named after, others are objects.

    Raises:
        MoECLIPError: if there are none.
        UnreadableImageError: naming the first one that cannot be used.
    """
    samples = []
    for path in find_images([folder]):
        inner = path.relative_to(folder).parts[:-1]
        class_name = inner[0].replace("_", " ") if inner else "object"
        samples.append(Sample(path, class_name, shrink(read_upload(path, max_megapixels), _THUMBNAIL_EDGE)))
    return samples


__all__ = ["Sample", "render_samples", "samples_of_folder"]
