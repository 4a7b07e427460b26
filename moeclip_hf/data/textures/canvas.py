"""What textures are made of: coordinates, noise, cells and colours, and the light that falls on them.

Lengths are in sides of the image, or in periods of a pattern, so that a texture looks alike at every size in pixels.
All arrays are float32 of shape S x S (S the size in pixels) unless said otherwise; colours are RGB in [0, 1].
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

Array = np.ndarray
Colour = Array
Range = tuple[float, float]

_TABLE = 64  # a power of two: coordinates wrap around by a bit mask
ANY_HUE: Range = (0.0, 1.0)
BROWN: Range = (0.04, 0.11)


@dataclass(frozen=True)
class Surface:
    """A material before light falls on it.

    Attributes:
        albedo: S x S x 3, colour.
        height: S x S, height above the plane in 1/256 of the side; None for a flat print.
        gloss: share of light that is reflected as by a mirror, 0 dull.
    """

    albedo: Array
    height: Array | None = None
    gloss: float = 0.0


@dataclass(frozen=True)
class Frame:
    """Coordinates of a pattern, in its periods, and the size of a pixel in them."""

    x: Array
    y: Array
    pixel: float


@dataclass(frozen=True)
class Cells:
    """Irregular cells: distances to the nearest and second nearest centre, in periods, and a number a cell."""

    nearest: Array
    second: Array
    number: Array

    @property
    def edge(self) -> Array:
        """Distance from the border to the neighbour, 0 on it, in periods."""
        return (self.second - self.nearest) / 2


class Canvas:
    """A square of pixels and a source of randomness, with which a family of textures draws one sample.

    Args:
        rng: decides everything random.
        size: side in pixels.
    """

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.size = size
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))

    def uniform(self, low: float, high: float) -> float:
        """A random number in a range."""
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return bool(self.rng.random() < probability)

    def angle(self, spread: float = math.pi) -> float:
        """A random angle in radians, up to `spread` either way."""
        return self.uniform(-spread, spread)

    def colour(self, hue: Range = ANY_HUE, saturation: Range = (0.1, 0.7), value: Range = (0.25, 0.9)) -> Colour:
        """A random colour (3,) within ranges of hue, saturation and value, each in [0, 1]."""
        hsv = (self.uniform(*hue) % 1.0, self.uniform(*saturation), self.uniform(*value))
        return np.array(colorsys.hsv_to_rgb(*hsv), dtype=np.float32)

    def metal(self) -> Colour:
        """A random colour (3,) of bare metal: a cold grey, or at times a warm one."""
        hue = (0.07, 0.12) if self.chance(0.25) else (0.54, 0.66)
        return self.colour(hue, (0.0, 0.16), (0.5, 0.85))

    def frame(self, periods: float, angle: float = 0.0, warp: float = 0.0, aspect: float = 1.0) -> Frame:
        """Coordinates that run through `periods` periods over the image's side.

        Args:
            periods: periods of x over the side.
            angle: rotation in radians.
            warp: how far, in periods, the coordinates waver.
            aspect: periods of y for one of x.
        """
        cos, sin = math.cos(angle), math.sin(angle)
        x = (self.x - 0.5) * cos + (self.y - 0.5) * sin
        y = (self.y - 0.5) * cos - (self.x - 0.5) * sin
        if warp:
            x = x + (self.noise(3) - 0.5) * (warp / periods)
            y = y + (self.noise(3) - 0.5) * (warp / periods)
        offset_x, offset_y = self.rng.uniform(0, _TABLE, 2).tolist()
        return Frame(x * periods + offset_x, y * (periods * aspect) + offset_y, periods / self.size)

    def noise(self, periods: float, octaves: int = 1, gain: float = 0.5, stretch: float = 1.0) -> Array:
        """Smooth noise in [0, 1] of about `periods` hills over the side; `stretch` > 1 draws them out along x."""
        total = np.zeros((self.size, self.size), dtype=np.float32)
        weight, weights = 1.0, 0.0
        for _ in range(octaves):
            if periods > self.size:
                break
            total += weight * self._hills(periods, max(periods / stretch, 1.0))
            weights += weight
            weight *= gain
            periods *= 2
        return total / weights if weights else total + 0.5

    def _hills(self, rows: float, columns: float) -> Array:
        grid = self.rng.random((math.ceil(rows) + 2, math.ceil(columns) + 2), dtype=np.float32)
        along = _interpolate(grid, rows, self.uniform(0, 1), self.size)
        return _interpolate(along.T, columns, self.uniform(0, 1), self.size).T

    def noise_at(self, x: Array, y: Array) -> Array:
        """Smooth noise in [0, 1] at given coordinates, one hill a period; repeats after 64."""
        table = self.rng.random(_TABLE * _TABLE, dtype=np.float32)
        column, row = np.floor(x), np.floor(y)
        s, t = smoothstep(0, 1, x - column), smoothstep(0, 1, y - row)
        i, j = row.astype(np.int32), column.astype(np.int32)
        corners = (table.take(_tile(i + di, j + dj)) for di in (0, 1) for dj in (0, 1))
        upper_left, upper_right, lower_left, lower_right = corners
        return mix(mix(upper_left, upper_right, s), mix(lower_left, lower_right, s), t)

    def grain(self, sigma: float | Sequence[float] = 0.0) -> Array:
        """Noise of mean 0 and deviation 1, blurred by `sigma` in 1/256 of the side (a pair: rows, columns)."""
        noise = self.rng.standard_normal((self.size, self.size), dtype=np.float32)
        scaled = np.asarray(sigma, dtype=float) * self.size / 256
        if not scaled.any():
            return noise
        noise = ndimage.gaussian_filter(noise, scaled, mode="wrap", truncate=2.5)
        return noise / max(float(noise.std()), 1e-6)

    def per_tile(self, i: Array, j: Array) -> Array:
        """A random number in [0, 1] for each tile of integer coordinates; repeats after 64."""
        return self.rng.random(_TABLE * _TABLE, dtype=np.float32).take(_tile(i.astype(np.int32), j.astype(np.int32)))

    def cells(self, frame: Frame, jitter: float = 0.9) -> Cells:
        """Irregular cells (Worley noise), one a period; `jitter` 0 gives a square grid, 1 the most irregular."""
        centres = 0.5 + (self.rng.random((2, _TABLE * _TABLE), dtype=np.float32) - 0.5) * np.float32(jitter)
        column, row = np.floor(frame.x), np.floor(frame.y)
        fx, fy = frame.x - column, frame.y - row
        i, j = row.astype(np.int32), column.astype(np.int32)
        nearest = np.full(fx.shape, 9.0, dtype=np.float32)
        second = nearest.copy()
        number = np.zeros(fx.shape, dtype=np.int32)
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                cell = _tile(i + di, j + dj)
                dx = centres[0].take(cell) + (dj - fx)
                dy = centres[1].take(cell) + (di - fy)
                distance = dx * dx + dy * dy
                second = np.minimum(second, np.maximum(nearest, distance))
                number = np.where(distance < nearest, cell, number)
                nearest = np.minimum(nearest, distance)
        return Cells(np.sqrt(nearest), np.sqrt(second), number)

    def per_cell(self, cells: Cells) -> Array:
        """A random number in [0, 1] for each cell."""
        return self.rng.random(_TABLE * _TABLE, dtype=np.float32).take(cells.number)

    def light(self, surface: Surface) -> Array:
        """The surface under a light from one side: S x S x 3 in [0, 1] and a little beyond (Lambert and Blinn)."""
        if surface.height is None:
            return surface.albedo
        azimuth, elevation = self.angle(), math.radians(self.uniform(40, 65))
        flat, up = math.cos(elevation), math.sin(elevation)
        slope_y, slope_x = _slopes(surface.height * (self.size / 256))
        towards = math.cos(azimuth) * flat * slope_x + math.sin(azimuth) * flat * slope_y
        norm = 1.0 / np.sqrt(slope_x * slope_x + slope_y * slope_y + 1.0)
        lambert = np.maximum(up - towards, 0.0) * norm
        image = surface.albedo * (0.25 + 0.75 * lambert / up)[..., None]
        if surface.gloss:
            half_length = math.sqrt(2 + 2 * up)
            mirrored = np.maximum(1 + up - towards, 0.0) * norm / half_length
            image = image + (surface.gloss * mirrored**24)[..., None]
        return image


def _tile(i: Array, j: Array) -> Array:
    """Index of a tile in a table that repeats over the plane."""
    return (i & (_TABLE - 1)) * _TABLE + (j & (_TABLE - 1))


def smoothstep(low: float, high: float, value: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between; falls instead of rises if `low` > `high`."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def mix(first: Array, second: Array, share: Array | float) -> Array:
    """`first` where `share` is 0, `second` where it is 1."""
    return first + (second - first) * share


def blend(first: Array, second: Array, share: Array) -> Array:
    """Colours, (3,) or S x S x 3, mixed by an S x S share: S x S x 3."""
    return mix(first, second, share[..., None])


def brightness(pixels: Array) -> Array:
    """Mean of an image's channels: H x W. The bits of numpy's own mean, which is slow over so short an axis."""
    return (pixels[..., 0] + pixels[..., 1] + pixels[..., 2]) / np.float32(3)


def rgb(red: float, green: float, blue: float) -> Colour:
    """A colour (3,) of given parts in [0, 1]."""
    return np.array([red, green, blue], dtype=np.float32)


def grey(value: float) -> Colour:
    """A colour (3,) without hue."""
    return rgb(value, value, value)


def ramp(value: Array, colours: Sequence[Colour]) -> Array:
    """Colours along a line of colours, the first at 0, the last at 1: S x S x 3."""
    table = np.stack(colours)
    position = np.clip(value, 0.0, 1.0) * (len(colours) - 1)
    steps = np.linspace(0, len(colours) - 1, 256)
    fine = np.stack([np.interp(steps, np.arange(len(colours)), table[:, k]) for k in range(3)], axis=1)
    return fine.astype(np.float32)[np.round(position * (255 / (len(colours) - 1))).astype(np.int32)]


def pick(value: Array, colours: Sequence[Colour]) -> Array:
    """One of the colours, by a value in [0, 1): S x S x 3."""
    index = np.minimum((value * len(colours)).astype(np.int32), len(colours) - 1)
    return np.stack(colours)[index]


def fraction(value: Array) -> Array:
    """Position within the period, from -0.5 to 0.5 with 0 in its middle."""
    return value - np.floor(value) - 0.5


def dome(value: Array) -> Array:
    """A half circle's height over -1 to 1, 0 outside."""
    return np.sqrt(np.maximum(1.0 - value * value, 0.0))


def _interpolate(grid: Array, periods: float, offset: float, size: int) -> Array:
    position = (np.arange(size, dtype=np.float32) + 0.5) * (periods / size) + offset
    start = position.astype(np.int32)
    t = smoothstep(0, 1, position - start).astype(np.float32)[:, None]
    return mix(grid[start], grid[start + 1], t)


def _slopes(height: Array) -> tuple[Array, Array]:
    slope_y, slope_x = np.empty_like(height), np.empty_like(height)
    slope_y[1:-1] = (height[2:] - height[:-2]) * 0.5
    slope_x[:, 1:-1] = (height[:, 2:] - height[:, :-2]) * 0.5
    slope_y[0], slope_y[-1] = slope_y[1], slope_y[-2]
    slope_x[:, 0], slope_x[:, -1] = slope_x[:, 1], slope_x[:, -2]
    return slope_y, slope_x
