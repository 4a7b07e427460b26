"""Rendered textures, with or without a defect, and whole benchmarks of them in MVTec AD's tree."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from moeclip_hf.data.textures import cloth, manufactured, natural
from moeclip_hf.data.textures.canvas import Array, Canvas, rgb
from moeclip_hf.data.textures.defects import DEFECTS, add_defect
from moeclip_hf.errors import DatasetError
from moeclip_hf.threads import read_ahead

FAMILIES = dict(sorted({**cloth.FAMILIES, **manufactured.FAMILIES, **natural.FAMILIES}.items()))
"""Functions that draw a sample of a family of textures, by the family's name."""

Seed = int | Sequence[int]


def render(family: str, defect: str | None = None, size: int = 256, seed: Seed = 0) -> tuple[Array, Array]:
    """Render a photograph-like picture of a texture.

    The same arguments give the same picture, whatever else is rendered. With and without a defect the texture under it
    is the same, and outside the mask the two pictures differ by no more than `TOLERANCE`.

    Args:
        family: one of `FAMILIES`.
        defect: one of `DEFECTS`, or None for a faultless sample.
        size: side in pixels.
        seed: a number, or numbers such as (seed, index).

    Returns:
        the picture (S x S x 3, uint8 RGB) and its mask (S x S, boolean, True where anomalous).

    Raises:
        DatasetError: no such family or defect; a defect on less than 32 pixels a side.
    """
    _refuse_unknown("texture", [family], FAMILIES)
    canvas = Canvas(_generator(seed, family), size)
    image = _photograph(canvas, canvas.light(FAMILIES[family](canvas)))
    if defect is None:
        return image, np.zeros((size, size), dtype=bool)
    return add_defect(image, defect, _generator(seed, f"{family} {defect}"))


def write_texture_benchmark(
    root: str | Path,
    families: Collection[str] | None = None,
    defects: Collection[str] | None = None,
    *,
    normal: int = 20,
    anomalous: int = 20,
    train: int = 0,
    size: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a benchmark of textures in MVTec AD's tree; `moeclip_hf.data.load_folder` reads it, classes are families.

    Args:
        root: a folder that does not exist or is empty.
        families: the classes, all of `FAMILIES` by default.
        defects: the kinds of defect, taken in turn, all of `DEFECTS` by default.
        normal: normal test images a class.
        anomalous: anomalous test images a class.
        train: normal training images a class.
        size: side of the images in pixels.
        seed: decides everything random; a class's images do not depend on what other classes are written.
        progress: called after each image with the number written so far and their total.

    Raises:
        DatasetError: the folder holds something; no such family or defect.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise DatasetError(f"{root} is not empty: name a new folder")
    families = list(FAMILIES if families is None else families)
    kinds = list(DEFECTS if defects is None else defects)
    _refuse_unknown("texture", families, FAMILIES)
    _refuse_unknown("defect", kinds, DEFECTS)
    images = [
        (family, part, index, kind)
        for family in families
        for part, kind, indices in _parts(kinds, train, normal, anomalous)
        for index in indices
    ]

    def write(wanted: tuple[str, str, int, str | None]) -> None:
        family, part, index, kind = wanted
        image, mask = render(family, kind, size, (seed, zlib.crc32(part.encode()), index))
        _save(image, root / family / part / f"{index:03d}.png")
        if kind is not None:
            _save(mask, root / family / "ground_truth" / kind / f"{index:03d}_mask.png")

    workers = os.cpu_count() or 1
    for done, _ in enumerate(read_ahead(write, images, 2 * workers, workers), start=1):
        if progress is not None:
            progress(done, len(images))


def _parts(kinds: list[str], train: int, normal: int, anomalous: int) -> Iterator[tuple[str, str | None, range]]:
    yield "train/good", None, range(train)
    yield "test/good", None, range(normal)
    for first, kind in enumerate(kinds):
        yield f"test/{kind}", kind, range(first, anomalous, len(kinds))


def _refuse_unknown(what: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise DatasetError(f"no {what} '{name}'; there is {', '.join(known)}")


def _generator(seed: Seed, purpose: str) -> np.random.Generator:
    numbers = [seed] if isinstance(seed, int) else list(seed)
    return np.random.default_rng([*numbers, zlib.crc32(purpose.encode())])


def _save(image: Array, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


def _photograph(canvas: Canvas, image: Array) -> Array:
    """What a camera makes of it: uneven light, exposure, blur, noise, at times no colour; uint8."""
    tilt, shade = canvas.angle(), canvas.uniform(0.0, 0.35)
    light = 1.0 + shade * ((canvas.x - 0.5) * np.cos(tilt) + (canvas.y - 0.5) * np.sin(tilt)).astype(np.float32)
    vignette = canvas.uniform(0.0, 0.5) if canvas.chance(0.5) else 0.0
    light = light - vignette * ((canvas.x - 0.5) ** 2 + (canvas.y - 0.5) ** 2)
    image = image * (light * canvas.uniform(0.8, 1.15))[..., None]
    if canvas.chance(0.15):
        image = np.repeat(np.sum(image * rgb(0.299, 0.587, 0.114), axis=2, keepdims=True), 3, axis=2)
    if canvas.chance(0.6):
        sigma = canvas.uniform(0.3, 0.9) * canvas.size / 256
        image = ndimage.gaussian_filter(image, (sigma, sigma, 0), truncate=2.5)
    noise = canvas.uniform(0.0, 0.03)
    coloured = canvas.rng.standard_normal(image.shape, dtype=np.float32)
    return np.round(np.clip(image + noise * coloured, 0, 1) * 255).astype(np.uint8)
