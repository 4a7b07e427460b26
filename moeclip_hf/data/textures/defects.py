"""Defects cut into a picture, with their exact masks.

A defect takes a picture (H x W x 3, float32 RGB in [0, 1]) and returns the changed picture with the defect's support
(H x W in [0, 1], how far it covers each pixel). Lengths are in units, 1/256 of the picture's shorter side.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from moeclip_hf.data.textures.canvas import Array, Colour, blend, brightness, grey, mix, smoothstep
from moeclip_hf.errors import DatasetError

TOLERANCE = 8
"""Outside a mask no channel differs from the picture without the defect by more than this, of 255."""

_MIN_CONTRAST = 14 / 255
_MIN_AREA = 3e-4
_MIN_SIDE = 32
_TRIES = 16
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Picture:
    """A picture that gets a defect, and what its defects are drawn with.

    Attributes:
        pixels: H x W x 3.
        rng: decides everything random.
        unit: what lengths are counted in, in pixels.
    """

    pixels: Array
    rng: np.random.Generator
    unit: float

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def uniform(self, low: float, high: float) -> float:
        """A random number in a range."""
        return float(self.rng.uniform(low, high))

    def size(self, low: float, high: float) -> float:
        """A random length in pixels from a range in units, evenly spread on a log scale."""
        return math.exp(self.uniform(math.log(low), math.log(high))) * self.unit

    def place(self, margin: float = 0.1) -> Array:
        """A random point (x, y) in pixels, at least a share `margin` of the sides away from the border."""
        height, width = self.shape
        return self.rng.uniform(margin, 1 - margin, 2) * (width, height)

    def tone(self, point: Array, low: float, high: float) -> Colour:
        """A grey that stands out from the picture around a point (x, y): darker on light ground, lighter on dark."""
        height, width = self.shape
        x, y = np.clip(point, 0, (width - 1, height - 1)).astype(int)
        reach = max(int(8 * self.unit), 1)
        around = float(self.pixels[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach].mean())
        darker = self.uniform(0.15, 0.6) < around
        value = around - self.uniform(low, high) if darker else around + self.uniform(low, high)
        return grey(min(max(value, 0.02), 0.98))

    def hue(self, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
        """A random colour (3,) of any hue."""
        rgb = colorsys.hsv_to_rgb(self.uniform(0, 1), self.uniform(*saturation), self.uniform(*value))
        return np.array(rgb, dtype=np.float32)

    def fill(self, colour: Colour | Array) -> Array:
        """A colour, (3,) or H x W x 3, with the picture's own fine grain over it, as one camera would take both."""
        bright = brightness(self.pixels)
        grain = np.clip(bright - ndimage.uniform_filter(bright, 3), -0.06, 0.06)
        return colour + 0.4 * grain[..., None]


Defect = Callable[[Picture], tuple[Array, Array]]


def add_defect(image: Array, kind: str, rng: np.random.Generator, unit: float | None = None) -> tuple[Array, Array]:
    """Cut a defect of a kind into a picture.

    The mask holds every pixel that the defect covers, and every pixel where any channel changed by more than
    `TOLERANCE` of 255. A defect that would hardly be seen is drawn anew; the clearest of a few is kept.

    Args:
        image: H x W x 3, uint8 RGB, at least 32 pixels a side; it stays as it is.
        kind: one of `DEFECTS`.
        rng: decides everything random.
        unit: what lengths are counted in, in pixels; 1/256 of the shorter side by default. A crop of a larger picture
            takes that of the picture.

    Returns:
        the picture with the defect (H x W x 3, uint8) and its mask (H x W, boolean).

    Raises:
        DatasetError: no such kind; another shape or type of array; the defect cannot be seen on this picture, as a
            distortion of a plain ground cannot.
    """
    if kind not in DEFECTS:
        raise DatasetError(f"no defect '{kind}'; there is {', '.join(DEFECTS)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < _MIN_SIDE:
        raise DatasetError(
            f"a defect needs an uint8 array H x W x 3 of at least {_MIN_SIDE} pixels a side, not {image.dtype} "
            f"of shape {image.shape}"
        )
    picture = Picture(image.astype(np.float32) / 255, rng, unit or min(image.shape[:2]) / 256)
    best: tuple[float, Array, Array] | None = None
    for _ in range(_TRIES):
        pixels, support = DEFECTS[kind](picture)
        changed = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
        channels = np.moveaxis(np.abs(changed.astype(np.int16) - image), 2, 0)
        difference = np.maximum.reduce([*channels])  # quicker than max over so short an axis
        mask = (support > 0.5) | (difference > TOLERANCE)
        contrast = float(difference[mask].mean()) / 255 if mask.mean() >= _MIN_AREA else 0.0
        if contrast > (best[0] if best else TOLERANCE / 255):
            best = (contrast, changed, mask)
        if contrast >= _MIN_CONTRAST:
            break
    if best is None:
        raise DatasetError(f"a defect of kind '{kind}' cannot be seen on this picture: it is too plain")
    return best[1], best[2]


def scratch(picture: Picture) -> tuple[Array, Array]:
    """A thin, slightly bent line with a lit edge, at times several side by side."""
    start, angle = picture.place(), picture.uniform(-math.pi, math.pi)
    length, bend = picture.size(40, 220), picture.uniform(-0.6, 0.6)
    paths, width = [], picture.size(0.8, 3.2)
    for _ in range(1 if picture.rng.random() < 0.7 else int(picture.rng.integers(2, 5))):
        steps = np.linspace(0, 1, 24)
        heading = angle + bend * steps + picture.uniform(-0.04, 0.04)
        points = start + np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1), axis=0) * (length / 24)
        paths.append((points, width * np.sin(math.pi * np.clip(steps, 0.08, 0.92)) ** 0.5))
        start = start + picture.rng.normal(0, 6 * picture.unit, 2)
    line = _strokes(picture.shape, paths)
    edge = np.clip(_strokes(picture.shape, [(points + width * 0.8, widths) for points, widths in paths]) - line, 0, 1)
    colour = picture.tone(paths[0][0][12], 0.25, 0.7)
    pixels = blend(picture.pixels, picture.fill(colour), line * picture.uniform(0.6, 1.0))
    return blend(pixels, 1.0 - colour, 0.25 * edge), line


def crack(picture: Picture) -> tuple[Array, Array]:
    """A dark, jagged line that tapers off and may branch."""
    angle, width = picture.uniform(-math.pi, math.pi), picture.size(1.2, 4.5)
    trunk = _walk(picture, picture.place(), angle, picture.size(50, 200))
    paths = [(trunk, width * np.linspace(1, 0.35, len(trunk)))]
    for _ in range(int(picture.rng.integers(0, 5))):
        fork = int(picture.rng.integers(2, len(trunk) - 2))
        side = picture.uniform(0.4, 1.2) * picture.rng.choice([-1, 1])
        branch = _walk(picture, trunk[fork], angle + side, picture.size(15, 70))
        paths.append((branch, width * np.linspace(0.7, 0.25, len(branch))))
    line = _strokes(picture.shape, paths)
    deep = picture.pixels * picture.uniform(0.05, 0.35)
    if picture.pixels.mean() < 0.2:
        deep = picture.fill(picture.tone(trunk[0], 0.2, 0.5))
    return blend(picture.pixels, deep, line * picture.uniform(0.75, 1.0)), line


def stain(picture: Picture) -> tuple[Array, Array]:
    """A soft-edged patch that tints what lies under it, with a darker rim where it dried."""
    blob = _blob(picture, picture.place(), picture.size(14, 60), rough=0.35, soft=picture.uniform(0.1, 0.45))
    patches = _smooth_noise(picture, 24)
    rim = blob * (1 - blob) * 4 * picture.uniform(0.0, 0.5)
    strength = blob * (0.65 + 0.5 * (patches - 0.5)) + 0.35 * rim
    tint = mix(grey(1.0), picture.hue((0.1, 0.8), (0.2, 0.9)), picture.uniform(0.5, 1.0))
    if picture.pixels.mean() < 0.25:
        stained = picture.pixels + tint * picture.uniform(0.25, 0.5)
    else:
        stained = picture.pixels * tint * picture.uniform(0.35, 0.9)
    return blend(picture.pixels, stained, np.clip(strength, 0, 1)), blob


def hole(picture: Picture) -> tuple[Array, Array]:
    """An opening with a dark inside, a wall that catches light on one side, and a bright edge on the other."""
    centre, radius = picture.place(), picture.size(7, 30)
    light = picture.uniform(-math.pi, math.pi)
    opening = _blob(picture, centre, radius, rough=0.12, soft=0.06)
    deep = opening * _shift(opening, radius * picture.uniform(0.15, 0.5), light)
    rim = np.clip(_shift(opening, radius * 0.12, light) - opening, 0, 1)
    around = picture.pixels[opening > 0.5].mean(axis=0) if (opening > 0.5).any() else picture.pixels.mean(axis=(0, 1))
    bottom = around * picture.uniform(0.0, 0.2)
    if around.mean() < 0.18:
        bottom = picture.tone(centre, 0.35, 0.8)
    pixels = blend(picture.pixels, picture.fill(around * picture.uniform(0.3, 0.6)), opening)
    pixels = blend(pixels, picture.fill(bottom), deep)
    return blend(pixels, grey(1.0), rim * picture.uniform(0.1, 0.4)), opening


def missing_patch(picture: Picture) -> tuple[Array, Array]:
    """A ragged piece of the surface is gone, and the plain ground under it shows."""
    piece = _blob(picture, picture.place(), picture.size(12, 50), rough=0.5, soft=0.05)
    shadow = np.clip(_shift(piece, 2.5 * picture.unit, picture.uniform(-math.pi, math.pi)), 0, 1)
    mean = picture.pixels.mean(axis=(0, 1))
    ground = mix(mean, picture.tone(np.array(picture.shape[::-1]) / 2, 0.15, 0.5), picture.uniform(0.5, 1.0))
    ground = picture.fill(ground * (0.9 + 0.2 * _smooth_noise(picture, 20))[..., None])
    ground = ground * (0.6 + 0.4 * shadow)[..., None]
    return blend(picture.pixels, ground, piece), piece


def fiber(picture: Picture) -> tuple[Array, Array]:
    """A curled thread or hair that lies on the surface and throws a faint shadow."""
    knots = picture.place() + np.cumsum(picture.rng.normal(0, picture.size(14, 40), (6, 2)), axis=0)
    t = np.linspace(0, 1, 60)[:, None]
    points = sum(math.comb(5, k) * t**k * (1 - t) ** (5 - k) * knots[k] for k in range(6))
    width = picture.size(1.0, 3.5)
    thread = _strokes(picture.shape, [(points, np.full(60, width))])
    shadow = _shift(thread, width * 1.2, picture.uniform(-math.pi, math.pi))
    dyed = picture.rng.random() < 0.5
    colour = picture.hue((0.2, 0.9), (0.2, 1.0)) if dyed else picture.tone(knots[0], 0.3, 0.8)
    pixels = picture.pixels * (1 - 0.35 * shadow)[..., None]
    return blend(pixels, picture.fill(colour), thread * picture.uniform(0.8, 1.0)), thread


def color_spot(picture: Picture) -> tuple[Array, Array]:
    """One or a few spots of paint, that cover or dye the surface."""
    colour, centre = picture.hue((0.4, 1.0), (0.2, 1.0)), picture.place()
    support = np.zeros(picture.shape, dtype=np.float32)
    for _ in range(int(picture.rng.integers(1, 6))):
        spot = _blob(picture, centre, picture.size(3, 18), rough=0.2, soft=0.12)
        support = np.maximum(support, spot)
        centre = np.clip(centre + picture.rng.normal(0, 22 * picture.unit, 2), 0, np.array(picture.shape[::-1]) - 1)
    dyed = colour * (0.35 + brightness(picture.pixels)[..., None])
    paint = mix(dyed, picture.fill(colour), picture.uniform(0.0, 1.0))
    return blend(picture.pixels, paint, support * picture.uniform(0.6, 1.0)), support


def distortion(picture: Picture) -> tuple[Array, Array]:
    """The pattern is swirled, bulged or sheared within a round region."""
    (height, width), (cx, cy) = picture.shape, picture.place(0.15)
    radius = picture.size(22, 60)
    dy, dx = np.mgrid[:height, :width].astype(np.float32) + 0.5
    dy, dx = dy - np.float32(cy), dx - np.float32(cx)
    envelope = np.clip(1 - (dx * dx + dy * dy) / np.float32(radius * radius), 0, 1) ** 2
    kind, strength = picture.rng.integers(0, 3), picture.uniform(0.5, 1.3) * picture.rng.choice([-1, 1])
    if kind == 0:
        turn = envelope * (1.6 * strength)
        move_x = dx * (np.cos(turn) - 1) - dy * np.sin(turn)
        move_y = dx * np.sin(turn) + dy * (np.cos(turn) - 1)
    elif kind == 1:
        move_x, move_y = -0.7 * strength * envelope * dx, -0.7 * strength * envelope * dy
    else:
        heading = picture.uniform(-math.pi, math.pi)
        reach = 0.45 * strength * radius * envelope
        move_x, move_y = reach * math.cos(heading), reach * math.sin(heading)
    moved = _resample(picture.pixels, dx + move_x + (cx - 0.5), dy + move_y + (cy - 0.5))
    support = ndimage.binary_fill_holes(np.hypot(move_x, move_y) > 0.75)
    return np.where((envelope > 0)[..., None], moved, picture.pixels), support


def debris(picture: Picture) -> tuple[Array, Array]:
    """Crumbs that lie on the surface, lit from one side."""
    centre, light = picture.place(), picture.uniform(-math.pi, math.pi)
    spread, size = picture.size(4, 26), picture.size(2.5, 9)
    colour = picture.hue((0.0, 0.5), (0.15, 0.95)) if picture.rng.random() < 0.5 else picture.tone(centre, 0.25, 0.7)
    outlines = []
    for at in centre + picture.rng.normal(0, spread, (int(picture.rng.integers(1, 9)), 2)):
        angles = np.sort(picture.rng.uniform(0, 2 * math.pi, int(picture.rng.integers(5, 9))))
        radii = size * picture.uniform(0.5, 1.2) * picture.rng.uniform(0.7, 1.2, len(angles))
        outlines.append(at + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1))
    crumbs = _polygons(picture.shape, outlines)
    lit = np.clip(0.5 + 0.5 * (_shift(crumbs, size * 0.5, light) - _shift(crumbs, -size * 0.5, light)), 0, 1)
    shadow = _shift(crumbs, -size * 0.45, light)
    pixels = picture.pixels * (1 - 0.5 * shadow)[..., None]
    return blend(pixels, picture.fill(colour * (0.55 + 0.75 * lit)[..., None]), crumbs), crumbs


def misplaced_patch(picture: Picture) -> tuple[Array, Array]:
    """A piece of the picture, cut from elsewhere, turned and laid where it does not belong."""
    (height, width), (cx, cy) = picture.shape, picture.place(0.18)
    half, turn = np.array([picture.size(12, 45), picture.size(12, 45)]), picture.uniform(-0.4, 0.4)
    axes = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half @ axes + (cx, cy)
    piece = _polygons(picture.shape, [corners])
    source_x, source_y = picture.place(0.2)
    spin = picture.rng.integers(0, 4) * math.pi / 2 + picture.uniform(-0.5, 0.5)
    dy, dx = np.mgrid[:height, :width].astype(np.float32)
    dy, dx = dy - np.float32(cy), dx - np.float32(cx)
    from_x = source_x + math.cos(spin) * dx - math.sin(spin) * dy
    from_y = source_y + math.sin(spin) * dx + math.cos(spin) * dy
    tone = picture.uniform(0.7, 0.9) if picture.rng.random() < 0.6 else picture.uniform(1.1, 1.3)
    patch = _resample(picture.pixels, from_x, from_y) * tone
    shadow = _shift(piece, 2 * picture.unit, picture.uniform(-math.pi, math.pi))
    pixels = picture.pixels * (1 - picture.uniform(0.0, 0.5) * shadow)[..., None]
    return blend(pixels, patch, piece), piece


def abrasion(picture: Picture) -> tuple[Array, Array]:
    """The surface is rubbed off: its pattern fades into a dull tone, in the direction of the rubbing."""
    worn = _blob(picture, picture.place(), picture.size(16, 60), rough=0.4, soft=0.3)
    heading, reach = picture.uniform(-math.pi, math.pi), 6 * picture.unit
    steps = (reach * step for step in (-1, -0.5, 0, 0.5, 1))
    rubbed = np.mean([_shift(picture.pixels, step, heading) for step in steps], axis=0)
    dull = picture.tone(np.array(picture.shape[::-1]) / 2, 0.1, 0.4)
    faded = mix(rubbed, dull, picture.uniform(0.25, 0.7))
    return blend(picture.pixels, picture.fill(faded), worn * (0.6 + 0.4 * _smooth_noise(picture, 40))), worn


DEFECTS: dict[str, Defect] = {
    defect.__name__: defect
    for defect in (
        abrasion,
        color_spot,
        crack,
        debris,
        distortion,
        fiber,
        hole,
        misplaced_patch,
        missing_patch,
        scratch,
        stain,
    )
}


def _strokes(shape: tuple[int, int], paths: list[tuple[Array, Array]]) -> Array:
    """Coverage (H x W) of lines through points (N x 2: x, y) with a width (N), all in pixels."""
    layer = Image.new("L", (shape[1] * _SUPERSAMPLING, shape[0] * _SUPERSAMPLING))
    draw = ImageDraw.Draw(layer)
    for points, widths in paths:
        corners, diameters = points * _SUPERSAMPLING, np.maximum(widths * _SUPERSAMPLING, 1.0)
        for start, end, diameter in zip(corners[:-1], corners[1:], diameters, strict=False):
            draw.line([tuple(start), tuple(end)], fill=255, width=round(diameter))
            if diameter > 2:
                draw.ellipse([*(end - diameter / 2), *(end + diameter / 2)], fill=255)
    return np.asarray(layer.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def _polygons(shape: tuple[int, int], outlines: Sequence[Array]) -> Array:
    """Coverage (H x W) of polygons with corners (N x 2: x, y) in pixels."""
    layer = Image.new("L", (shape[1] * _SUPERSAMPLING, shape[0] * _SUPERSAMPLING))
    draw = ImageDraw.Draw(layer)
    for corners in outlines:
        draw.polygon([tuple(corner) for corner in corners * _SUPERSAMPLING], fill=255)
    return np.asarray(layer.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def _walk(picture: Picture, start: Array, angle: float, length: float) -> Array:
    """A jagged path (N x 2: x, y) from a point in about one direction, in steps of about 6 units."""
    steps = max(int(length / (6 * picture.unit)), 6)
    headings = angle + np.cumsum(picture.rng.normal(0, 0.18, steps)) + picture.rng.normal(0, 0.5, steps)
    strides = np.stack([np.cos(headings), np.sin(headings)], 1) * (length / steps)
    return np.vstack([start, start + np.cumsum(strides, axis=0)])


def _blob(picture: Picture, centre: Array, radius: float, rough: float, soft: float) -> Array:
    """Coverage (H x W) of an irregular patch: a long or round one, whose edge wavers by `rough` and fades over `soft`.

    Args:
        picture: gives the shape and the randomness.
        centre: x, y in pixels.
        radius: mean radius in pixels.
        rough: how far the edge wavers, as a share of the radius.
        soft: width of the fading edge, as a share of the radius.
    """
    rng = picture.rng
    turn, stretch = picture.uniform(0, math.pi), math.exp(picture.uniform(0, 0.5))
    waves = np.arange(2, 9)
    heights, phases = rng.normal(0, 1, len(waves)) / waves, rng.uniform(0, 2 * math.pi, len(waves))
    theta = np.linspace(0, 2 * math.pi, 257)
    outline = 1 + rough * np.sum(heights[:, None] * np.cos(waves[:, None] * theta + phases[:, None]), axis=0)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]].astype(np.float32)
    x, y = (
        (x + 0.5 - np.float32(centre[0])) / np.float32(radius),
        (y + 0.5 - np.float32(centre[1])) / np.float32(radius),
    )
    along = (x * np.float32(math.cos(turn)) + y * np.float32(math.sin(turn))) / np.float32(stretch)
    across = (y * np.float32(math.cos(turn)) - x * np.float32(math.sin(turn))) * np.float32(stretch)
    edge = np.interp(np.arctan2(across, along) % np.float32(2 * math.pi), theta, np.maximum(outline, 0.25))
    fade = max(soft, 1.0 / radius)
    return smoothstep(fade, -fade, np.hypot(along, across) - edge.astype(np.float32))


def _smooth_noise(picture: Picture, length: float) -> Array:
    """Smooth noise (H x W) in [0, 1] with hills of about `length` units."""
    height, width = picture.shape
    rows, columns = (max(int(side / (length * picture.unit)), 2) + 1 for side in (height, width))
    grid = Image.fromarray(picture.rng.random((rows, columns), dtype=np.float32))
    return np.clip(np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)


def _shift(values: Array, distance: float, angle: float) -> Array:
    """H x W or H x W x 3 moved by whole pixels towards an angle; the border is repeated."""
    dx, dy = round(distance * math.cos(angle)), round(distance * math.sin(angle))
    rows = np.clip(np.arange(values.shape[0]) - dy, 0, values.shape[0] - 1)
    columns = np.clip(np.arange(values.shape[1]) - dx, 0, values.shape[1] - 1)
    return values[rows][:, columns]


def _resample(pixels: Array, x: Array, y: Array) -> Array:
    """The pixels at given positions (H x W each, in pixels), mirrored at the border."""
    channels = [ndimage.map_coordinates(pixels[..., k], [y, x], order=1, mode="mirror") for k in range(3)]
    return np.stack(channels, axis=2)
