"""Textures of things built, machined or printed: walls, floors, metal, board, circuits."""

import math

import numpy as np
from PIL import Image, ImageDraw

from moeclip_hf.data.textures.canvas import (
    BROWN,
    Array,
    Canvas,
    Surface,
    blend,
    dome,
    fraction,
    grey,
    pick,
    rgb,
    smoothstep,
)
from moeclip_hf.data.textures.cloth import weave


def _tiled(
    canvas: Canvas, inset: Array, tone: Array, joint: float, pixel: float, tile: Array, grout: Array, relief: float
) -> Surface:
    """Tiles, each of its own tone, and sunken joints; `inset` is the distance from a tile's border, in periods."""
    face = smoothstep(joint - pixel, joint + pixel, inset)
    rough = canvas.noise(40, 3)
    tiles = tile * (0.8 + 0.3 * tone + 0.2 * (rough - 0.5))[..., None]
    bevel = smoothstep(joint * 0.6, joint * 2.2, inset)
    albedo = blend(grout * (0.85 + 0.3 * rough)[..., None], tiles, face)
    return Surface(albedo, bevel * relief + rough * relief * 0.35)


def brick_wall(canvas: Canvas) -> Surface:
    """Courses of bricks, each shifted by half a brick, in mortar."""
    frame = canvas.frame(canvas.uniform(3, 6), canvas.angle(0.12), aspect=canvas.uniform(2.2, 3.0))
    row = np.floor(frame.y)
    x = frame.x + 0.5 * (row % 2)
    fx, fy = fraction(x), fraction(frame.y)
    aspect = 2.6
    inset = np.minimum((0.5 - np.abs(fx)) * aspect, 0.5 - np.abs(fy)) + 0.06 * (canvas.noise(30, 2) - 0.5)
    tone = canvas.per_tile(row, np.floor(x))
    brick = canvas.colour((0.0, 0.06), (0.4, 0.75), (0.4, 0.75))
    mortar = canvas.colour((0.05, 0.12), (0.0, 0.2), (0.5, 0.85))
    return _tiled(canvas, inset, tone, canvas.uniform(0.06, 0.1), frame.pixel * 2.6, brick, mortar, 5.0)


def square_tiles(canvas: Canvas) -> Surface:
    """Glazed tiles in a square grid."""
    frame = canvas.frame(canvas.uniform(4, 10), canvas.angle(0.6))
    fx, fy = fraction(frame.x), fraction(frame.y)
    inset = 0.5 - np.maximum(np.abs(fx), np.abs(fy))
    column, row = np.floor(frame.x), np.floor(frame.y)
    tile = canvas.colour(saturation=(0.05, 0.7), value=(0.35, 0.95))
    if canvas.chance(0.4):
        tile = blend(tile, canvas.colour(), ((column + row) % 2).astype(np.float32))
    grout = canvas.colour(saturation=(0, 0.1), value=(0.35, 0.9))
    surface = _tiled(canvas, inset, canvas.per_tile(row, column), 0.03, frame.pixel, tile, grout, 3.0)
    return Surface(surface.albedo, surface.height, gloss=canvas.uniform(0.05, 0.25))


def hexagonal_tiles(canvas: Canvas) -> Surface:
    """Hexagons in a honeycomb."""
    frame = canvas.frame(canvas.uniform(5, 11), canvas.angle(0.6), aspect=1 / math.sqrt(3))
    x, y = frame.x, frame.y
    first = (fraction(x), fraction(y) * math.sqrt(3))
    second = (fraction(x + 0.5), fraction(y + 0.5) * math.sqrt(3))
    nearer = np.hypot(*first) < np.hypot(*second)
    fx, fy = np.where(nearer, first[0], second[0]), np.where(nearer, first[1], second[1])
    inset = 0.5 - np.maximum(np.abs(fx), np.abs(fx) * 0.5 + np.abs(fy) * (math.sqrt(3) / 2))
    column = np.where(nearer, np.floor(x), np.floor(x + 0.5) + 32)
    tone = canvas.per_tile(np.where(nearer, np.floor(y), np.floor(y + 0.5)), column)
    tiles = [canvas.colour(saturation=(0.0, 0.6), value=(0.3, 0.95))] * 3 + [canvas.colour()]
    tile = pick(tone, tiles) if canvas.chance(0.5) else tiles[0]
    grout = canvas.colour(saturation=(0, 0.1), value=(0.2, 0.85))
    surface = _tiled(canvas, inset, tone, 0.035, frame.pixel, tile, grout, 2.5)
    return Surface(surface.albedo, surface.height, gloss=canvas.uniform(0, 0.2))


def _planks(canvas: Canvas, along: Array, across: Array, tone: Array, inset: Array, pixel: float) -> Surface:
    wood = canvas.colour(BROWN, (0.35, 0.65), (0.45, 0.85))
    grain = canvas.noise_at(along * 0.9 + tone * 40, across * 9 + tone * 17)
    fine = canvas.noise_at(along * 2 + tone * 23, across * 40)
    albedo = wood * (0.6 + 0.45 * tone + 0.25 * (grain - 0.5) + 0.2 * (fine - 0.5))[..., None]
    gap = smoothstep(1.6 * pixel, 0.3 * pixel, inset)
    return Surface(blend(albedo, wood * 0.2, gap), -2.0 * gap + 0.4 * fine, gloss=canvas.uniform(0, 0.1))


def herringbone_parquet(canvas: Canvas) -> Surface:
    """Blocks of wood in zigzag."""
    length = int(canvas.rng.integers(3, 6))
    frame = canvas.frame(canvas.uniform(9, 16), math.pi / 4 + canvas.angle(0.3))
    column, row = np.floor(frame.x), np.floor(frame.y)
    fx, fy = frame.x - column, frame.y - row
    step = (column - row) % (2 * length)
    level = step < length
    along = np.where(level, step + fx, (2 * length - 1 - step) + fy)
    across = np.where(level, fy, fx)
    i, j = np.where(level, row, row - (2 * length - 1 - step)), np.where(level, column - step, column)
    inset = np.minimum(np.minimum(across, 1 - across), np.minimum(along, length - along))
    tone = canvas.per_tile(i + 17 * level, j)
    return _planks(canvas, along, across, tone, inset, frame.pixel)


def plank_floor(canvas: Canvas) -> Surface:
    """Boards side by side, their ends staggered."""
    frame = canvas.frame(canvas.uniform(5, 10), canvas.angle())
    row = np.floor(frame.y)
    length = canvas.uniform(3, 6)
    x = frame.x / length + canvas.per_tile(row, row * 0)
    across, along = frame.y - row, (fraction(x) + 0.5) * length
    inset = np.minimum(np.minimum(across, 1 - across), np.minimum(along, length - along))
    return _planks(canvas, along, across, canvas.per_tile(row, np.floor(x)), inset, frame.pixel)


def chipboard(canvas: Canvas) -> Surface:
    """Flakes of wood pressed in all directions."""
    scale = 2 * canvas.size
    image = Image.new("RGB", (scale, scale), (120, 85, 45))
    draw = ImageDraw.Draw(image)
    hue = canvas.uniform(0.08, 0.11)
    for _ in range(int(canvas.uniform(240, 340))):
        angle, centre = canvas.angle(), canvas.rng.uniform(-0.1, 1.1, 2) * scale
        half = np.array([math.cos(angle), math.sin(angle)]) * canvas.uniform(0.03, 0.12) * scale
        side = np.array([-math.sin(angle), math.cos(angle)]) * canvas.uniform(0.012, 0.035) * scale
        corners = np.stack([-half + side, half + side * 0.6, half * 1.1 - side, -half * 0.9 - side * 0.8]) + centre
        colour = canvas.colour((hue - 0.015, hue + 0.015), (0.35, 0.55), (0.6, 0.92))
        draw.polygon([tuple(corner) for corner in corners], fill=tuple((colour * 255).astype(int).tolist()))
        for shift in canvas.rng.uniform(-0.8, 0.8, 2):
            line = [tuple(centre - half * 0.9 + side * shift), tuple(centre + half * 0.9 + side * shift * 0.8)]
            draw.line(line, fill=tuple((colour * 225).astype(int).tolist()), width=2)
        draw.line([tuple(corners[2]), tuple(corners[3])], fill=tuple((colour * 130).astype(int).tolist()), width=2)
    return Surface(np.asarray(image.reduce(2), dtype=np.float32) / 255)


def brushed_metal(canvas: Canvas) -> Surface:
    """Fine parallel grooves that streak the light."""
    frame = canvas.frame(1.0, canvas.angle())
    streaks = 0.5 * canvas.noise_at(frame.x * 3, frame.y * 180) + 0.5 * canvas.noise_at(frame.x * 8, frame.y * 90)
    metal = canvas.metal()
    sheen = 0.75 + 0.5 * smoothstep(0.0, 1.0, canvas.noise_at(frame.x * 1.5, frame.y * 1.5))
    return Surface(metal * (sheen * (0.75 + 0.45 * streaks))[..., None], streaks * 0.5)


def turned_metal(canvas: Canvas) -> Surface:
    """A face turned on a lathe: concentric grooves and the fans of light that they throw."""
    cx, cy = canvas.uniform(-0.2, 1.2), canvas.uniform(-0.2, 1.2)
    dx, dy = canvas.x - cx, canvas.y - cy
    radius, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    grooves = canvas.noise_at(radius * canvas.uniform(90, 140), angle * 2)
    fans = np.cos(2 * (angle - canvas.angle())) ** 2
    metal = canvas.metal()
    tone = 0.55 + 0.45 * fans + 0.35 * (grooves - 0.5) + 0.1 * (np.sin(radius * canvas.uniform(150, 300)) - 0.5)
    return Surface(metal * (1.1 * tone)[..., None])


def perforated_plate(canvas: Canvas) -> Surface:
    """Sheet metal with rows of round or square holes."""
    frame = canvas.frame(canvas.uniform(7, 15), canvas.angle())
    row = np.floor(frame.y)
    x = frame.x + (0.5 * (row % 2) if canvas.chance(0.6) else 0.0)
    fx, fy = fraction(x), fraction(frame.y)
    distance = np.hypot(fx, fy) if canvas.chance(0.7) else np.maximum(np.abs(fx), np.abs(fy))
    radius = canvas.uniform(0.22, 0.36)
    hole = smoothstep(frame.pixel, -frame.pixel, distance - radius)
    rim = smoothstep(radius + 0.12, radius, distance)
    metal = canvas.metal()
    brushed = canvas.noise_at(frame.x * 0.6, frame.y * 14)
    albedo = blend(metal * (0.85 + 0.25 * brushed)[..., None], metal * canvas.uniform(0.05, 0.2), hole)
    return Surface(albedo, (1 - hole) * 2.0 - rim * 2.0, gloss=0.2)


def diamond_plate(canvas: Canvas) -> Surface:
    """Tread plate: raised lozenges in two directions in turn."""
    frame = canvas.frame(canvas.uniform(7, 12), math.pi / 4 + canvas.angle(0.5))
    column, row = np.floor(frame.x), np.floor(frame.y)
    fx, fy = fraction(frame.x), fraction(frame.y)
    turned = (column + row) % 2 == 0
    along, across = np.where(turned, fx, fy), np.where(turned, fy, fx)
    lozenge = np.maximum(1 - (along / 0.46) ** 2 - np.abs(across / 0.17) ** 1.6, 0.0)
    metal = canvas.metal()
    wear = canvas.noise(4, 4)
    return Surface(metal * (0.8 + 0.4 * wear)[..., None], np.sqrt(lozenge) * 4 + 0.1 * canvas.grain(1.2), gloss=0.25)


def wire_mesh(canvas: Canvas) -> Surface:
    """Woven wire with open squares."""
    frame = canvas.frame(canvas.uniform(8, 17), canvas.angle())
    over = (np.floor(frame.x) + np.floor(frame.y)) % 2 == 0
    wire = canvas.metal()
    woven = weave(canvas, frame, over, wire, wire, width=canvas.uniform(0.28, 0.5), relief=2.0, backing=0.12)
    return Surface(woven.albedo, woven.height, gloss=0.35)


def grating(canvas: Canvas) -> Surface:
    """Bars of steel with round cross bars."""
    frame = canvas.frame(canvas.uniform(7, 13), canvas.angle(), aspect=canvas.uniform(0.3, 0.5))
    fx, fy = fraction(frame.x), fraction(frame.y)
    bar = smoothstep(0.17 + frame.pixel, 0.17 - frame.pixel, np.abs(fx))
    cross = dome(fy * 6) * (np.abs(fy) < 1 / 6)
    steel = canvas.metal()
    rust = smoothstep(0.55, 0.8, canvas.noise(5, 4)) * canvas.uniform(0, 0.7)
    metal = blend(steel, rgb(0.45, 0.25, 0.12), rust) * (0.85 + 0.3 * canvas.noise(50, 2))[..., None]
    solid = np.maximum(bar, cross > 0)
    return Surface(blend(metal * 0.1, metal, solid), np.maximum(bar * 5, cross * 4), gloss=0.1)


def corrugated_cardboard(canvas: Canvas) -> Surface:
    """Board whose flutes show through the paper."""
    frame = canvas.frame(canvas.uniform(11, 22), canvas.angle(), warp=0.2)
    wave = 0.5 + 0.5 * np.cos(2 * math.pi * frame.x)
    paper = canvas.colour((0.07, 0.1), (0.25, 0.45), (0.6, 0.85))
    fibres = canvas.noise(90, 1, stretch=4)
    specks = smoothstep(0.86, 0.95, canvas.noise(100))
    albedo = paper * (0.85 + 0.1 * wave + 0.12 * (fibres - 0.5) - 0.2 * specks)[..., None]
    return Surface(albedo, wave * canvas.uniform(2.0, 4.0) + 0.4 * fibres)


def circuit_board(canvas: Canvas) -> Surface:
    """Solder resist over copper tracks between pads, with vias and chips."""
    scale, cells = 2 * canvas.size, int(canvas.uniform(18, 28))
    step = scale / cells
    tracks = Image.new("L", (scale, scale))
    pads = Image.new("L", (scale, scale))
    bodies = Image.new("L", (scale, scale))
    track, pad, body = ImageDraw.Draw(tracks), ImageDraw.Draw(pads), ImageDraw.Draw(bodies)
    for _ in range(int(cells * cells * 0.22)):
        x, y = (canvas.rng.integers(0, cells, 2) + 0.5).tolist()
        run, rise = int(canvas.rng.integers(2, 8)), int(canvas.rng.integers(-2, 3))
        ends = [(x, y), (x + run, y), (x + run + abs(rise), y + rise)]
        if canvas.chance(0.5):
            ends = [(b - y + x, a - x + y) for a, b in ends]
        track.line([(a * step, b * step) for a, b in ends], fill=255, width=max(int(step * 0.22), 1), joint="curve")
        for a, b in (ends[0], ends[-1]):
            _disc(track, a * step, b * step, step * 0.32)
            _disc(pad, a * step, b * step, step * (0.3 if canvas.chance(0.5) else 0.0))
    for _ in range(int(canvas.rng.integers(2, 6))):
        x, y = (canvas.rng.integers(0, cells, 2) * step).tolist()
        w, h = (canvas.rng.integers(2, 5, 2) * step).tolist()
        for k in range(int(w // step) * 2):
            left = x + (k + 0.25) * step / 2
            pad.rectangle([left, y - step * 0.4, left + step * 0.25, y + h + step * 0.4], fill=255)
        body.rectangle([x, y, x + w, y + h], fill=255)
    copper, solder, chip = (np.asarray(layer.reduce(2), dtype=np.float32) / 255 for layer in (tracks, pads, bodies))
    resist = canvas.colour((0.3, 0.42) if canvas.chance(0.7) else (0.0, 0.65), (0.5, 0.9), (0.2, 0.45))
    albedo = blend(resist, np.clip(resist * 1.7 + 0.05, 0, 1), copper)
    metal = canvas.colour((0.09, 0.14), (0.05, 0.6), (0.7, 0.95))
    albedo = blend(blend(albedo, metal, solder * (1 - chip)), grey(0.12), chip)
    return Surface(albedo * (0.95 + 0.1 * canvas.noise(50))[..., None], copper * 0.8 + solder + chip * 3, gloss=0.15)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)


def bubble_wrap(canvas: Canvas) -> Surface:
    """Film with domes of air in staggered rows."""
    frame = canvas.frame(canvas.uniform(6, 11), canvas.angle(), aspect=2 / math.sqrt(3))
    row = np.floor(frame.y)
    fx, fy = fraction(frame.x + 0.5 * (row % 2)), fraction(frame.y) * (math.sqrt(3) / 2)
    bubble = dome(np.hypot(fx, fy) / canvas.uniform(0.4, 0.46))
    ground = canvas.colour(saturation=(0.0, 0.4), value=(0.35, 0.8))
    film = canvas.noise(8, 3)
    edge = smoothstep(0.0, 0.45, bubble) * smoothstep(0.95, 0.4, bubble)
    albedo = ground * (0.8 + 0.2 * film - 0.3 * edge)[..., None]
    return Surface(albedo, np.sqrt(bubble) * 3.5 + film * 5, gloss=0.4)


def roof_shingles(canvas: Canvas) -> Surface:
    """Rows of overlapping rounded or square shingles."""
    frame = canvas.frame(canvas.uniform(6, 11), canvas.angle(0.3), aspect=canvas.uniform(1.2, 1.6))
    rounded = canvas.chance(0.6)
    height = np.full_like(frame.x, -9.0)
    tone = np.zeros_like(frame.x)
    table = canvas.rng.random((64, 64), dtype=np.float32)
    for behind in (2, 1, 0):
        row = np.floor(frame.y) - behind
        x = frame.x + 0.5 * (row % 2)
        fx, drop = fraction(x), frame.y - row
        end = 1.0 + (0.85 * dome(fx * 2) if rounded else 0.75 + 0.1 * table[row.astype(int) % 64, 0])
        covers = (drop < end) & (np.abs(fx) < 0.485)
        height = np.where(covers, drop * 2, height)
        tone = np.where(covers, table[row.astype(int) % 64, np.floor(x).astype(int) % 64], tone)
    slate = canvas.colour((0.0, 0.7), (0.05, 0.5), (0.3, 0.7))
    albedo = slate * (0.65 + 0.5 * tone + 0.25 * (canvas.noise(40, 3) - 0.5))[..., None]
    return Surface(np.where((height < -8)[..., None], albedo * 0.2, albedo), np.maximum(height, -1) * 4)


FAMILIES = {
    family.__name__: family
    for family in (
        brick_wall,
        brushed_metal,
        bubble_wrap,
        chipboard,
        circuit_board,
        corrugated_cardboard,
        diamond_plate,
        grating,
        herringbone_parquet,
        hexagonal_tiles,
        perforated_plate,
        plank_floor,
        roof_shingles,
        square_tiles,
        turned_metal,
        wire_mesh,
    )
}
