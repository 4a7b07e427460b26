"""Augmentation for training: image and mask are rotated, shifted and flipped together.

In this order and each with probability 0.5: a rotation by up to 30 degrees either way, a shift by up to 15 % of width
and height, a horizontal flip, a vertical flip; what comes into view is zero. The four are composed into one
resampling, so an image is interpolated once. The result is that of one step after the other, down to the corners that
a rotation cuts off and a shift brings back as zeros. This is plain torch because kornia's `AugmentationSequential`
resamples up to twice and draws from torch's global generator only.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MAX_DEGREES = 30.0
MAX_SHIFT = 0.15
PROBABILITY = 0.5


@dataclass(frozen=True)
class Transforms:
    """What is done to each of B images, in the order of the fields.

    Attributes:
        degrees: B, rotation about the image's centre, counter-clockwise.
        shift: B x 2, whole pixels to the right and down.
        flip_horizontal: B, boolean.
        flip_vertical: B, boolean.
    """

    degrees: torch.Tensor
    shift: torch.Tensor
    flip_horizontal: torch.Tensor
    flip_vertical: torch.Tensor


def draw_transforms(batch: int, height: int, width: int, generator: torch.Generator) -> Transforms:
    """Draw transforms for `batch` images of `height` x `width` pixels.

    Args:
        batch: number of images.
        height: in pixels.
        width: in pixels.
        generator: on the CPU, so that a seed means the same on every device.
    """
    happens = torch.rand(batch, 4, generator=generator) < PROBABILITY
    extent = torch.rand(batch, 3, generator=generator) * 2 - 1
    size = torch.tensor([width, height])
    return Transforms(
        degrees=torch.where(happens[:, 0], extent[:, 0] * MAX_DEGREES, 0.0),
        shift=torch.where(happens[:, 1:2], extent[:, 1:] * MAX_SHIFT * size, 0.0).trunc(),
        flip_horizontal=happens[:, 2],
        flip_vertical=happens[:, 3],
    )


def apply_transforms(
    images: torch.Tensor, masks: torch.Tensor, transforms: Transforms
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply transforms to images (B x C x H x W, floats) by bilinear and to masks (B x H x W) by nearest sampling.

    Zeros come into view: black, in images whose black is zero.

    Returns:
        images and masks of the same shapes, types and device; masks hold 0 and 1, 1 where they were not zero.

    Raises:
        ValueError: the shapes of images and masks do not fit.
    """
    if images.ndim != 4 or masks.shape != (len(images), *images.shape[-2:]):
        raise ValueError(f"images of shape {tuple(images.shape)} do not fit masks of shape {tuple(masks.shape)}")
    grid, inside = _sampling_grid(transforms, images.shape[-2], images.shape[-1], images.device)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=False)
    marked = F.grid_sample((masks != 0).float()[:, None], grid, mode="nearest", align_corners=False)[:, 0]
    return (sampled * inside[:, None]).to(images.dtype), (marked.bool() & inside).to(masks.dtype)


def _sampling_grid(
    transforms: Transforms, height: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where every pixel of the result comes from, and whether it was in view after the rotation.

    Coordinates are in pixels from the centre, and steps are undone from the last to the first.

    Returns:
        B x H x W x 2 in `grid_sample`'s units (x, y), and B x H x W boolean.
    """
    x = (torch.arange(width, device=device) - (width - 1) / 2).expand(len(transforms.degrees), width)
    y = (torch.arange(height, device=device) - (height - 1) / 2).expand(len(transforms.degrees), height)
    shift = transforms.shift.to(device)
    x = torch.where(transforms.flip_horizontal.to(device)[:, None], -x, x) - shift[:, :1]
    y = torch.where(transforms.flip_vertical.to(device)[:, None], -y, y) - shift[:, 1:]
    inside = (x.abs() <= (width - 1) / 2)[:, None, :] & (y.abs() <= (height - 1) / 2)[:, :, None]
    radians = transforms.degrees.to(device) * (math.pi / 180)
    cos, sin = radians.cos()[:, None, None], radians.sin()[:, None, None]
    x, y = x[:, None, :], y[:, :, None]
    grid = torch.stack(((cos * x - sin * y) * (2 / width), (sin * x + cos * y) * (2 / height)), dim=-1)
    return grid, inside
