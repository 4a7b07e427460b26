"""Image processor of MoECLIP: any image in, normalised pixels out. PIL and torch alone."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

logger = logging.get_logger(__name__)

ImageLike = Image.Image | np.ndarray | torch.Tensor | str | Path

# What PIL decodes by itself, told by a file's contents. Others reach for programs, such as EPS for Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Where aspect ratios are kept, a strip a pixel wide would become an input of millions of patches.
LARGEST_ASPECT_RATIO = 8

# The method feeds OpenAI's ViT-L/14 of 336 pixels with 518, a grid of 37 x 37 patches.
_METHOD_SIZE = 518
_MIN_GRID = 3
# Tags of TIFFs that PIL heeds in images of 8 bits alone.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_ORIENTATION = 274  # of EXIF
# Cameras of 10 or 12 bits fill 16 from below with them.
_DIM = 1 << 12
# How far resampling leads floats beyond their range of 0 to 1.
_OVERSHOOT = 0.25


class MoECLIPImageProcessor(BaseImageProcessor):
    """
    Resizes (bicubic, no crop) and normalises images for [`MoECLIPModel`].

    Args:
        size (`dict[str, int]`, *optional*, defaults to 518 x 518):
            `{"height": h, "width": w}` resizes to just that, whatever the aspect ratio, as the benchmarks do.
            `{"shortest_edge": n}` keeps the aspect ratio; both edges are rounded to whole patches.
        patch_size (`int`, *optional*, defaults to 14): the vision tower's patch, which sizes are rounded to.
        image_mean, image_std (`list[float]`, *optional*): per channel; CLIP's by default.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: dict[str, int] | None = None,
        patch_size: int = 14,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        **kwargs: Any,
    ):
        if self._auto_class is None:  # the class is not a repository's own: its code is not used, nor saved
            kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.size = _checked_size(_METHOD_SIZE if size is None else size, patch_size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @classmethod
    def for_clip(cls, image_size: int, patch_size: int, **kwargs: Any) -> "MoECLIPImageProcessor":
        """
        Make the processor for a CLIP: 518 pixels for ViT-L/14 of 336, as the method does, any other CLIP's own size.

        Args:
            image_size (`int`), patch_size (`int`): of the CLIP's vision tower, in pixels.
        """
        edge = _METHOD_SIZE if (image_size, patch_size) == (336, 14) else image_size
        return cls(size={"height": edge, "width": edge}, patch_size=patch_size, **kwargs)

    def preprocess(
        self,
        images: ImageLike | Sequence[ImageLike],
        size: dict[str, int] | int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """
        Prepare images for the model.

        Args:
            images: one image or several: PIL images of any mode, paths, arrays or tensors (H x W, H x W x C or
                C x H x W; uint16 spans 16 bits, other integers 8, floats 0 to 1).
            size (`dict[str, int]`, *optional*): instead of the processor's own; a number is that of both edges.
            return_tensors (`str`, *optional*): `"pt"`, `"np"` or `None` (a list of arrays).

        Returns:
            `BatchFeature` with `pixel_values`: (B, 3, H, W), float32.

        Raises:
            ValueError: for what cannot be read as an image; where aspect ratios are kept, for images of unlike shapes
                and for strips whose one side is more than 8 times the other.
        """
        size = self.size if size is None else _checked_size(size, self.patch_size)
        pixels = [self._normalise(self._resize(to_rgb(image), size)) for image in _as_list(images)]
        if return_tensors is None:
            return BatchFeature({"pixel_values": [image.numpy() for image in pixels]})
        shapes = sorted({tuple(image.shape[1:]) for image in pixels})
        if len(shapes) != 1:
            raise ValueError(
                f"Images of unlike aspect ratios make no batch under size={size}: they become {shapes[0]} and "
                f"{shapes[-1]} pixels. Pass them one by one, or a size with height and width."
            )
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)

    def _resize(self, image: Image.Image, size: dict[str, int]) -> Image.Image:
        if "shortest_edge" in size:
            if max(image.size) > LARGEST_ASPECT_RATIO * min(image.size):
                raise ValueError(
                    f"An image of {image.width} x {image.height} pixels is too long a strip to keep its aspect ratio: "
                    f"a side may be {LARGEST_ASPECT_RATIO} times the other. Pass a size with height and width, or cut "
                    "it into tiles."
                )
            scale = size["shortest_edge"] / min(image.size)
            edges = [max(_MIN_GRID, round(edge * scale / self.patch_size)) * self.patch_size for edge in image.size]
            return image.resize((edges[0], edges[1]), Image.Resampling.BICUBIC)
        return image.resize((size["width"], size["height"]), Image.Resampling.BICUBIC)

    def _normalise(self, image: Image.Image) -> torch.Tensor:
        values = np.asarray(image)
        pixels = np.empty((3, *values.shape[:2]), dtype=np.float32)
        # One channel at a time stays in the processor's cache.
        for channel, (mean, std) in enumerate(zip(self.image_mean, self.image_std, strict=True)):
            np.multiply(values[..., channel], np.float32(1 / (255 * std)), out=pixels[channel])
            pixels[channel] -= np.float32(mean / std)
        return torch.from_numpy(pixels)


def open_image(file: str | Path | IO[bytes], name: str | None = None) -> Image.Image:
    """
    Open an image file upright, as its EXIF orientation tells.

    Args:
        file: a path, or an open file, of one of the `FORMATS`.
        name (`str`, *optional*): what errors call it; by default the path.

    Raises:
        ValueError: if the file is missing, is not an image that can be read to its end, or holds several: frames of an
            animation, or pages. Of a camera's multi-picture file the photograph is read, not its previews.
    """
    with _opened(file, name) as image:
        if image.format == "PNG":
            image.verify()  # else pixels would be decoded in spite of wrong checksums; what was verified is used up
    with _opened(file, name) as image:
        # Which of several is meant is not known, and a defect on the others would be missed in silence.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise ValueError("it holds several images: save the one that is meant as a file of its own")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    return image


def image_size(file: str | Path | IO[bytes], name: str | None = None) -> tuple[int, int]:
    """
    Width and height that an image file's header tells, before it is turned upright. No pixel is decoded.

    Raises:
        ValueError: as [`open_image`], as far as the header tells.
    """
    with _opened(file, name) as image:
        return image.size


@contextmanager
def _opened(file: str | Path | IO[bytes], name: str | None) -> Iterator[Image.Image]:
    """Open a file for what is done with it; whatever that leads decoders to raise becomes one line with its name."""
    name = name or str(file)
    try:
        # A pipe or a device would be waited for without end.
        if isinstance(file, (str, Path)) and not stat.S_ISREG(os.stat(file).st_mode):
            raise ValueError("it is a folder or a device, no file")
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file.") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name}: {error} If you trust it, cut it into parts or raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError:
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise ValueError(f"{name}: cannot be read as an image ({kinds}).") from None
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as an image ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    """What an error says, without the path that those of the system repeat, on one line."""
    said = error.strerror if isinstance(error, OSError) else None
    return " ".join(str(said or error).split()) or type(error).__name__


def to_rgb(image: ImageLike, name: str | None = None, upright: bool = False) -> Image.Image:
    """
    Make an 8-bit RGB image of anything that is an image.

    Transparent pixels are laid over white, 16-bit and floating-point ones are brought to 8 bits, grey, palette and
    CMYK ones are converted. A path is opened by [`open_image`], which turns it upright; a PIL image is taken as it is.
    Values of 16 bits that are all below 4096 are taken as they are as well, with a warning.

    Args:
        image: a PIL image, a path, an array or a tensor.
        name (`str`, *optional*): what errors and warnings call it; by default the path.
        upright (`bool`): turn a PIL image as well, as its EXIF orientation tells.

    Raises:
        ValueError: for what is no image, or holds values outside its range.
    """
    if isinstance(image, (str, Path)):
        return to_rgb(open_image(image, name), name or str(image))
    try:
        return _converted(image, name or "An image", upright)
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from error
    except MemoryError as error:
        raise ValueError(f"{name or 'An image'}: too large for the memory of this machine.") from error


def _converted(image: Any, name: str, upright: bool) -> Image.Image:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        image = _from_array(image, name)
    if not isinstance(image, Image.Image):
        raise ValueError(f"A {type(image).__name__} is no image: pass a PIL image, a path, an array or a tensor.")
    tags = getattr(image, "tag_v2", {})  # a TIFF's; what is made of it has them no more
    try:
        image.load()  # it may have been opened, and no more
        if upright and image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise ValueError(f"An image cannot be decoded ({_reason(error)}).") from error
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        image = _from_deep(image, tags, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_deep(image: Image.Image, tags: Mapping[int, Any], name: str) -> Image.Image:
    """Make a grey image of one with more than 8 bits, which PIL hands out as stored: 12 bits in 16, white as 0."""
    values = np.array(image)
    if image.mode == "F":
        grey = _to_eight_bits(values, name)
    else:
        bits = min(16, *tags.get(_BITS_PER_SAMPLE, (16,)))
        grey = _to_eight_bits(_as_sixteen_bits(values), name, bits)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], 255, grey).astype(np.uint8)
    return Image.fromarray(grey)


def _as_sixteen_bits(values: np.ndarray) -> np.ndarray:
    """The values of PIL's integer modes, which span 16 bits whatever the type that holds them."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise ValueError(f"An image of integers spans {low} to {high}: more than 16 bits cannot be read; scale it.")
    return values.astype(np.uint16)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """Make a PIL image of H x W, H x W x C or C x H x W values with 1, 3 or 4 channels."""
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ValueError(f"An array of shape {array.shape} is no image: it must be H x W or hold 1, 3 or 4 channels.")
    return Image.fromarray(_to_eight_bits(array, name))


def _to_eight_bits(array: np.ndarray, name: str, bits: int = 16) -> np.ndarray:
    """
    Bring an array's values to 0 to 255.

    The type tells the range, not the values: uint16 spans 16 bits, or those that a header tells, other integers 8.
    Floats span 0 to 1, over which resampling may shoot by a little, or 0 to 255 where they go beyond that.
    """
    if array.dtype.kind not in "buif":
        raise ValueError(f"An array of {array.dtype} is no image: it must hold numbers.")
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("An image holds NaN or infinite values.")
    if array.dtype.newbyteorder("=") == np.uint16:
        if bits == 16 and 0 < high < _DIM:
            logger.warning_once(f"{name}: looks like 10 or 12 bits in 16 (it reaches {high:g}): scale it to 65535.")
        return np.rint(array / ((2**bits - 1) / 255)).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating) and low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    if low < 0 or high > 255:
        raise ValueError(
            f"An image of {array.dtype} values spans {low:g} to {high:g}: it must lie in 0 to 255, or in 0 to 1 if "
            "of floating-point numbers; 16 bits take uint16."
        )
    return np.rint(array).astype(np.uint8)


def _as_list(images: Any) -> list[ImageLike]:
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError("There are no images.")
        return list(images)
    return [images]


def _checked_size(size: Any, patch_size: int) -> dict[str, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if not isinstance(size, dict) or set(size) not in ({"height", "width"}, {"shortest_edge"}):
        raise ValueError(f'size must be {{"height": h, "width": w}} or {{"shortest_edge": n}} in pixels, not {size}.')
    if any(int(edge) < patch_size for edge in size.values()):
        raise ValueError(f"size {size} is smaller than a patch of {patch_size} pixels.")
    return {name: int(edge) for name, edge in size.items()}


__all__ = ["FORMATS", "LARGEST_ASPECT_RATIO", "MoECLIPImageProcessor", "image_size", "open_image", "to_rgb"]
