"""Rendered textures with captions, as many as one wants: what `examples.pretrain_tiny_clip` learns from.

Each family is rendered a few dozen times, once; a sample is a crop of one of these pictures, at some scale, in other
colours, at times laid over a crop of another family, with a defect cut in, and seen through lens, sensor and JPEG.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from torch.utils.data import Dataset

from moeclip_hf.data.textures import FAMILIES, add_defect, render
from moeclip_hf.data.textures.canvas import brightness
from moeclip_hf.data.textures.splits import AUXILIARY_FAMILIES, SEEN_DEFECTS
from moeclip_hf.errors import DatasetError
from moeclip_hf.threads import read_ahead

OTHER_FAMILIES = tuple(name for name in FAMILIES if name not in AUXILIARY_FAMILIES)
IMAGE_SIZE, PATCH_SIZE = 112, 8
PICTURE_SIZE, PICTURES_A_FAMILY = 256, 64
SCALES = (0.44, 1.0)  # of a crop, over the picture that it is taken from
SUBJECTS = (*(name.replace("_", " ") for name in FAMILIES), "object", "surface", "texture")  # the last three fit all
NORMAL, DAMAGED = 0, 1  # states that a caption tells; from 2 on, the kinds of `SEEN_DEFECTS`
NORMAL_PHRASES = ("{}", "a {}", "the {}")
DAMAGED_PHRASES = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
SENTENCES = ("{}.", "a photo of {}.", "{}", "a close-up of {}.")
COLOURS = {
    "black": (25, 25, 25), "dark grey": (75, 75, 75), "grey": (128, 128, 128), "light grey": (180, 180, 180),
    "white": (235, 235, 235), "red": (170, 50, 45), "orange": (205, 125, 55), "brown": (115, 80, 50),
    "beige": (200, 180, 145), "yellow": (210, 195, 75), "green": (75, 125, 65), "blue": (60, 95, 160),
    "purple": (120, 70, 140), "pink": (215, 150, 165), "teal": (65, 140, 140),
}  # fmt: skip
AUXILIARY_SHARE, COMPOSITE_SHARE, DAMAGED_SHARE = 0.85, 0.35, 0.6


@dataclass(frozen=True)
class Caption:
    """What a text says: of which of `SUBJECTS`, in which state, and a colour of `COLOURS` if it names one."""

    subject: int
    state: int
    colour: int | None
    text: str


def write_caption(subject: int, state: int, colour: int | None, rng: np.random.Generator) -> Caption:
    """Put into words what an image shows."""
    name = SUBJECTS[subject]
    if colour is not None:
        name = f"{list(COLOURS)[colour]} {name}"
    if state == NORMAL:
        phrase = rng.choice(NORMAL_PHRASES).format(name)
    elif state == DAMAGED:
        phrase = rng.choice(DAMAGED_PHRASES).format(name)
    else:
        phrase = f"a {name} with {SEEN_DEFECTS[state - 2].replace('_', ' ')}"
    return Caption(subject, state, colour, str(rng.choice(SENTENCES)).format(phrase))


def is_true(caption: Caption, subject: int, state: int, colour: int) -> bool:
    """Whether a caption is true of an image of a subject, state and colour."""
    if caption.subject != subject and caption.subject < len(FAMILIES):
        return False
    if caption.colour not in (None, colour):
        return False
    return caption.state == state or (caption.state == DAMAGED and state != NORMAL)


def render_pictures(path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """
    Render `PICTURES_A_FAMILY` faultless pictures of each family, 0.6 GB, into an array for [`CaptionedTextures`].

    Args:
        path: of the .npy file, which appears once it is whole; one that is there is left as it is.
        progress: told of families rendered and all there are.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    shape = (len(FAMILIES), PICTURES_A_FAMILY, PICTURE_SIZE, PICTURE_SIZE, 3)
    pictures = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)

    def render_family(numbered: tuple[int, str]) -> None:
        number, family = numbered
        for index in range(PICTURES_A_FAMILY):
            pictures[number, index], _ = render(family, size=PICTURE_SIZE, seed=(991, index))

    workers = os.cpu_count() or 1
    for done, _ in enumerate(read_ahead(render_family, enumerate(FAMILIES), 2 * workers, workers), start=1):
        if progress:
            progress(done, len(FAMILIES))
    pictures.flush()
    unfinished.rename(path)


class CaptionedTextures(Dataset):
    """
    Textures with captions, each drawn from (seed, index) alone.

    A sample holds the image (S x S x 3, uint8), the share of each patch that is damaged (patches,), whether the mask
    counts, what the image shows (subject, state, colour), its caption, and for auxiliary families the caption of the
    opposite state.

    Args:
        pictures: the file of [`render_pictures`].
        length: number of samples; there is no end of them.
        seed: of everything random.
    """

    def __init__(self, pictures: Path, length: int, seed: int):
        self.path, self.length, self.seed = pictures, length, seed
        self.pictures = np.load(pictures, mmap_mode="r")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        auxiliary = bool(rng.random() < AUXILIARY_SHARE)
        scale = float(np.exp(rng.uniform(*np.log(SCALES))))
        image, subject = self.view(AUXILIARY_FAMILIES if auxiliary else OTHER_FAMILIES, scale, rng)
        if auxiliary and rng.random() < COMPOSITE_SHARE:
            image = combine(image, self.view(AUXILIARY_FAMILIES, scale, rng)[0], rng)
            subject = int(rng.integers(len(FAMILIES), len(SUBJECTS)))
        colour = name_colour(image)
        mask, state = np.zeros(image.shape[:2], dtype=bool), NORMAL
        if auxiliary and rng.random() < DAMAGED_SHARE:
            kind = int(rng.integers(len(SEEN_DEFECTS)))
            try:
                image, mask = add_defect(image, SEEN_DEFECTS[kind], rng, unit=scale)
                state = 2 + kind
            except DatasetError:  # it cannot be seen on so plain a ground
                pass
        image = photograph(image, rng)
        told = DAMAGED if state != NORMAL and rng.random() < 0.5 else state
        told_colour = colour if rng.random() < 0.3 else None
        opposite = DAMAGED if state == NORMAL else NORMAL
        return {
            "image": image,
            "damage": patch_shares(mask),
            "has_mask": auxiliary,
            "shows": (subject, state, colour),
            "caption": write_caption(subject, told, told_colour, rng),
            "opposite": write_caption(subject, opposite, told_colour, rng) if auxiliary else None,
        }

    def view(self, families: tuple[str, ...], scale: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """A crop of one of some families in any colours, turned and flipped, and the family's number."""
        family = list(FAMILIES).index(str(rng.choice(families)))
        picture = Image.fromarray(self.pictures[family, rng.integers(self.pictures.shape[1])])
        side = IMAGE_SIZE / scale
        left, top = rng.uniform(0, PICTURE_SIZE - side, 2)
        box = (left, top, left + side, top + side)
        crop = np.rot90(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box), int(rng.integers(4)))
        return vary(crop[:, ::-1] if rng.random() < 0.5 else crop, rng), family


def vary(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other colours and contrasts than the family's own; H x W x 3, uint8."""
    pixels = image.astype(np.float32) / 255
    if rng.random() < 0.3:
        pixels = pixels[..., rng.permutation(3)]
    if rng.random() < 0.1:
        pixels = 1 - pixels
    if rng.random() < 0.4:
        pixels = pixels ** np.float32(np.exp(rng.uniform(-0.6, 0.6)))
    if rng.random() < 0.4:
        pixels = np.clip((pixels - pixels.mean()) * rng.uniform(0.5, 1.6) + rng.uniform(0.25, 0.75), 0, 1)
    if rng.random() < 0.3:
        pixels = np.repeat(brightness(pixels)[..., None], 3, axis=2)
    return np.round(pixels * 255).astype(np.uint8)


def combine(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A texture of no family: two laid over each other."""
    a, b = first.astype(np.float32) / 255, second.astype(np.float32) / 255
    share = rng.uniform(0.3, 0.7)
    ways = (share * a + (1 - share) * b, a * b / max(float(b.mean()), 0.2), np.maximum(a, b), np.minimum(a, b))
    return np.round(np.clip(ways[int(rng.integers(len(ways)))], 0, 1) * 255).astype(np.uint8)


def photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What lens, sensor and file format do to a picture and its defect alike."""
    if rng.random() < 0.25:
        sigma = rng.uniform(0.3, 0.9)
        image = ndimage.gaussian_filter(image, (sigma, sigma, 0))
    if rng.random() < 0.3:
        channels = 1 if rng.random() < 0.5 else 3
        noise = rng.normal(0, 255 * rng.uniform(0.01, 0.06), (*image.shape[:2], channels))
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=int(rng.integers(35, 95)))
        image = np.array(Image.open(file))
    return image


def name_colour(image: np.ndarray) -> int:
    """Which of `COLOURS` comes nearest to the mean."""
    mean = np.array([image[..., channel].mean() for channel in range(3)])  # at once numpy takes longer
    distances = np.square(np.array(list(COLOURS.values())) - mean).sum(axis=1)
    return int(distances.argmin())


def patch_shares(mask: np.ndarray) -> np.ndarray:
    """The share of each patch that lies under a mask, row by row."""
    grid = IMAGE_SIZE // PATCH_SIZE
    return mask.reshape(grid, PATCH_SIZE, grid, PATCH_SIZE).mean(axis=(1, 3), dtype=np.float32).ravel()
