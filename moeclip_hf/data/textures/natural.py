"""Textures of stone, earth, wood, plants and hide."""

import math

import numpy as np
from PIL import Image, ImageDraw

from moeclip_hf.data.textures.canvas import (
    BROWN,
    Canvas,
    Surface,
    blend,
    dome,
    fraction,
    grey,
    pick,
    ramp,
    rgb,
    smoothstep,
)


def wood_grain(canvas: Canvas) -> Surface:
    """A sawn board: year rings drawn out along it, pores, perhaps a knot."""
    frame = canvas.frame(1.0, canvas.angle())
    along, across = frame.x, frame.y
    bend = canvas.noise_at(along * 1.5, across * 2.0) * 0.25 + canvas.noise_at(along * 4, across * 5) * 0.05
    rings = (across + bend) * canvas.uniform(8, 18)
    if canvas.chance(0.4):
        dx, dy = along - along.mean() + canvas.uniform(-0.3, 0.3), across - across.mean() + canvas.uniform(-0.3, 0.3)
        rings = rings + canvas.uniform(2, 4) * np.exp(-(dx * dx * 18 + dy * dy * 60))
    late = smoothstep(0.1, 0.95, fraction(rings) + 0.5) ** 1.5
    pores = canvas.noise_at(along * 12, across * 150)
    early = canvas.colour(BROWN, (0.3, 0.6), (0.5, 0.9))
    albedo = blend(early, early * canvas.uniform(0.55, 0.85), late) * (0.82 + 0.3 * pores)[..., None]
    return Surface(albedo, pores * 0.3, gloss=canvas.uniform(0, 0.08))


def tree_bark(canvas: Canvas) -> Surface:
    """Deep ridges along the trunk, broken across."""
    frame = canvas.frame(canvas.uniform(7, 12), canvas.angle(0.3), warp=1.6, aspect=0.35)
    plates = canvas.cells(frame, jitter=1.0)
    ridge = smoothstep(0.0, 0.32, plates.edge)
    rough = canvas.noise(30, 3, stretch=0.4)
    colour = canvas.colour((0.05, 0.1), (0.15, 0.45), (0.55, 0.85))
    moss = smoothstep(0.6, 0.85, canvas.noise(4, 3)) * canvas.uniform(0, 0.6)
    tone = (0.4 + 0.6 * ridge) * (0.7 + 0.5 * rough)
    return Surface(blend(colour, rgb(0.35, 0.4, 0.2), moss) * tone[..., None], ridge * 6 + rough * 4)


def granite(canvas: Canvas) -> Surface:
    """Grains of a few minerals."""
    grains = canvas.cells(canvas.frame(canvas.uniform(40, 75), canvas.angle(), warp=2.0), jitter=1.0)
    hue = canvas.uniform(0, 1)
    feldspar = canvas.colour((hue, hue + 0.05), (0.05, 0.4), (0.5, 0.85))
    minerals = [feldspar, feldspar * 0.75, grey(canvas.uniform(0.55, 0.8)), feldspar * 1.12]
    minerals += [grey(canvas.uniform(0.08, 0.25))]
    albedo = pick(canvas.per_cell(grains), minerals)
    specks = canvas.per_cell(canvas.cells(canvas.frame(canvas.uniform(70, 110), canvas.angle()), jitter=1.0))
    albedo = blend(albedo, grey(0.1), smoothstep(0.9, 0.92, specks))
    return Surface(albedo * (0.9 + 0.2 * canvas.noise(30, 2))[..., None])


def marble(canvas: Canvas) -> Surface:
    """Veins along the creases of folded noise."""
    frame = canvas.frame(canvas.uniform(2.0, 3.5), canvas.angle(), aspect=canvas.uniform(0.4, 1.0))
    fold = canvas.noise(5, 3)
    veins = np.zeros_like(fold)
    for scale, strength in ((1.0, 1.0), (2.1, 0.5), (4.3, 0.25)):
        crease = np.abs(canvas.noise_at(frame.x * scale + 1.6 * fold, frame.y * scale + 1.3 * fold) - 0.5) * 2
        veins += strength * (1 - smoothstep(0.0, canvas.uniform(0.08, 0.25), crease))
    ground = canvas.colour(saturation=(0.0, 0.25), value=(0.75, 0.97))
    vein = canvas.colour(saturation=(0.0, 0.5), value=(0.2, 0.55))
    if canvas.chance(0.3):
        ground, vein = vein * 0.6, ground
    clouds = canvas.noise(3, 4)
    return Surface(blend(ground * (0.82 + 0.3 * clouds)[..., None], vein, np.clip(veins * 0.7, 0, 1)))


def gravel(canvas: Canvas) -> Surface:
    """Rounded stones with dark gaps."""
    stones = canvas.cells(canvas.frame(canvas.uniform(10, 22), canvas.angle(), warp=0.6), jitter=0.85)
    round_ = smoothstep(0.0, 0.2, stones.edge)
    hue = canvas.uniform(0.03, 0.12)
    tones = [canvas.colour((hue - 0.04, hue + 0.06), (0.02, 0.35), (0.3, 0.85)) for _ in range(6)]
    albedo = pick(canvas.per_cell(stones), tones) * (0.85 + 0.3 * canvas.noise(50, 2))[..., None]
    return Surface(albedo * (0.25 + 0.75 * round_)[..., None], dome(1 - round_) * 6 + 0.3 * canvas.grain(0.8))


def asphalt(canvas: Canvas) -> Surface:
    """Small stones bound in tar."""
    stones = canvas.cells(canvas.frame(canvas.uniform(34, 60), canvas.angle()), jitter=1.0)
    tone = canvas.per_cell(stones)
    bare = smoothstep(0.35, 0.15, stones.nearest) * smoothstep(0.3, 0.8, tone)
    tar = grey(canvas.uniform(0.15, 0.35))
    stone = canvas.colour((0.05, 0.6), (0.0, 0.12), (0.4, 0.75))
    albedo = blend(tar * (0.8 + 0.4 * canvas.noise(40, 2))[..., None], stone, bare)
    return Surface(albedo, smoothstep(0.5, 0.1, stones.nearest) * (1.0 + tone) * 1.3 + 0.5 * canvas.grain(0.6))


def cork(canvas: Canvas) -> Surface:
    """Pressed granules with dark flecks."""
    granules = canvas.cells(canvas.frame(canvas.uniform(18, 32), canvas.angle(), warp=1.2), jitter=1.0)
    tone = canvas.per_cell(granules)
    colour = canvas.colour((0.065, 0.095), (0.4, 0.6), (0.6, 0.85))
    seams = smoothstep(0.07, 0.0, granules.edge)
    flecks = smoothstep(0.72, 0.8, canvas.noise(34, 2)) * (canvas.noise(9) > 0.4)
    albedo = colour * (0.8 + 0.3 * tone + 0.2 * (canvas.noise(60, 2) - 0.5))[..., None]
    albedo = blend(albedo, colour * 0.45, np.clip(0.45 * seams + 0.85 * flecks, 0, 1))
    return Surface(albedo, -1.5 * flecks - 0.6 * seams + 0.25 * canvas.grain(0.7))


def terrazzo(canvas: Canvas) -> Surface:
    """Angular chips of several colours and sizes in polished cement."""
    cement = canvas.colour(saturation=(0.0, 0.25), value=(0.55, 0.95))
    albedo = cement * (0.95 + 0.08 * canvas.noise(70))[..., None]
    tones = [canvas.colour(saturation=(0.05, 0.6), value=(0.2, 0.95)) for _ in range(5)]
    for periods in (canvas.uniform(28, 40), canvas.uniform(9, 15)):
        frame = canvas.frame(periods, canvas.angle())
        chips = canvas.cells(frame, jitter=1.0)
        tone = canvas.per_cell(chips)
        inset = 0.06 + 0.25 * canvas.per_cell(chips)
        chip = smoothstep(-frame.pixel, frame.pixel, chips.edge - inset) * (tone > 0.25)
        albedo = blend(albedo, pick(tone, tones), chip)
    return Surface(albedo, canvas.noise(3) * 4, gloss=canvas.uniform(0, 0.1))


def sand_ripples(canvas: Canvas) -> Surface:
    """Ripples that the wind draws, with one steep side."""
    frame = canvas.frame(canvas.uniform(6, 12), canvas.angle(), warp=1.8)
    phase = fraction(frame.x + 0.7 * canvas.noise(4, 2)) + 0.5
    ripple = np.where(phase < 0.7, smoothstep(0, 0.7, phase), smoothstep(1.0, 0.7, phase))
    sand = canvas.colour((0.07, 0.13), (0.2, 0.5), (0.65, 0.95))
    grains = canvas.grain()
    return Surface(sand * (0.85 + 0.12 * ripple + 0.05 * grains)[..., None], ripple * 6 + 0.35 * canvas.grain(0.6))


def sandstone(canvas: Canvas) -> Surface:
    """Layers of sand in bands of several tones."""
    frame = canvas.frame(1.0, canvas.angle(0.4))
    depth = (
        frame.y + 0.12 * canvas.noise_at(frame.x * 2, frame.y * 3) + 0.02 * canvas.noise_at(frame.x * 9, frame.y * 30)
    )
    flat = np.zeros_like(depth)
    bands = canvas.noise_at(flat, depth * canvas.uniform(9, 16)) * 0.6 + canvas.noise_at(flat, depth * 45) * 0.4
    hue = canvas.uniform(0.02, 0.1)
    tones = [canvas.colour((hue, hue + 0.04), (0.25, 0.6), (0.4, 0.95)) for _ in range(4)]
    grains = canvas.grain(0.5)
    return Surface(ramp(bands, tones) * (1 + 0.05 * grains)[..., None], bands * 5 + 0.5 * grains)


def grass(canvas: Canvas) -> Surface:
    """Blades in all greens, the later over the earlier."""
    scale = 2 * canvas.size
    image = Image.new("RGB", (scale, scale), (24, 40, 16))
    draw = ImageDraw.Draw(image)
    blades = int(canvas.uniform(900, 1300))
    hue, dry = canvas.uniform(0.2, 0.33), canvas.uniform(0, 0.25)
    lean = canvas.angle()
    start = canvas.rng.uniform(-0.05, 1.05, (blades, 2)) * scale
    angle = lean + canvas.rng.normal(0, canvas.uniform(0.3, 0.9), blades)
    length = canvas.rng.uniform(0.05, 0.16, blades) * scale
    tip = start + length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    order = np.linspace(0.35, 1.0, blades)
    for i in range(blades):
        blade_hue = (0.11, 0.15) if canvas.rng.random() < dry else (hue - 0.04, hue + 0.03)
        colour = canvas.colour(blade_hue, (0.4, 0.75), (0.35, 0.85)) * order[i] * 255
        side = np.array([-np.sin(angle[i]), np.cos(angle[i])]) * (0.0045 * scale)
        points = [tuple(start[i] + side), tuple(start[i] - side), tuple(tip[i])]
        draw.polygon(points, fill=tuple(colour.astype(int).tolist()))
    return Surface(np.asarray(image.reduce(2), dtype=np.float32) / 255)


def leather(canvas: Canvas) -> Surface:
    """Grained hide: fine pebbles between creases."""
    pebbles = canvas.cells(canvas.frame(canvas.uniform(26, 46), canvas.angle(), warp=2.5), jitter=1.0)
    pebble = smoothstep(0.0, 0.22, pebbles.edge)
    hide = canvas.colour(BROWN if canvas.chance(0.7) else (0.0, 1.0), (0.25, 0.75), (0.2, 0.7))
    wear = canvas.noise(4, 3)
    albedo = hide * ((0.55 + 0.45 * pebble) * (0.8 + 0.4 * wear))[..., None]
    return Surface(albedo, pebble * 2.0 + wear * 6, gloss=canvas.uniform(0.05, 0.2))


def stucco(canvas: Canvas) -> Surface:
    """Rough plaster, thrown or combed on."""
    lumps = smoothstep(0.35, 0.75, canvas.noise(canvas.uniform(16, 30), 3, stretch=canvas.uniform(0.7, 1.6)))
    fine = canvas.noise(70, 2)
    colour = canvas.colour((0.0, 0.7), (0.0, 0.2), (0.65, 0.97))
    return Surface(colour * (0.92 + 0.1 * fine)[..., None], lumps * 6 + fine * 1.6)


def sponge(canvas: Canvas) -> Surface:
    """Foam with open pores of two sizes."""
    large = canvas.cells(canvas.frame(canvas.uniform(9, 15), canvas.angle(), warp=0.6), jitter=1.0)
    small = canvas.cells(canvas.frame(canvas.uniform(26, 40), canvas.angle(), warp=0.6), jitter=1.0)
    wide = smoothstep(0.42, 0.25, large.nearest / (0.5 + canvas.per_cell(large)))
    narrow = smoothstep(0.42, 0.2, small.nearest / (0.5 + 0.9 * canvas.per_cell(small)))
    pores = np.maximum(wide, 0.8 * narrow)
    colour = canvas.colour(saturation=(0.3, 0.8), value=(0.6, 0.95))
    albedo = colour * ((1 - 0.7 * pores) * (0.9 + 0.15 * canvas.noise(60)))[..., None]
    return Surface(albedo, -6 * pores + 0.3 * canvas.grain(0.8))


def straw(canvas: Canvas) -> Surface:
    """Stalks laid loosely across each other."""
    scale = 2 * canvas.size
    image = Image.new("RGB", (scale, scale), (60, 40, 15))
    draw = ImageDraw.Draw(image)
    stalks = int(canvas.uniform(280, 420))
    lean, spread = canvas.angle(), canvas.uniform(0.25, 0.9)
    hue = canvas.uniform(0.1, 0.14)
    for shade in np.linspace(0.45, 1.0, stalks):
        angle = lean + canvas.rng.normal(0, spread)
        centre = canvas.rng.uniform(-0.1, 1.1, 2) * scale
        half = np.array([math.cos(angle), math.sin(angle)]) * canvas.uniform(0.08, 0.3) * scale
        side = np.array([-math.sin(angle), math.cos(angle)]) * canvas.uniform(0.004, 0.009) * scale
        colour = canvas.colour((hue - 0.015, hue + 0.02), (0.3, 0.6), (0.7, 1.0)) * shade * 255
        for offset, tone in ((0.0, 0.75), (0.35, 1.0)):
            shifted, narrow = centre + side * offset, side * (1 - offset)
            corners = (
                shifted - half + narrow,
                shifted + half + narrow,
                shifted + half - narrow,
                shifted - half - narrow,
            )
            draw.polygon([tuple(corner) for corner in corners], fill=tuple((colour * tone).astype(int).tolist()))
    return Surface(np.asarray(image.reduce(2), dtype=np.float32) / 255)


FAMILIES = {
    family.__name__: family
    for family in (
        asphalt,
        cork,
        granite,
        grass,
        gravel,
        leather,
        marble,
        sand_ripples,
        sandstone,
        sponge,
        straw,
        stucco,
        terrazzo,
        tree_bark,
        wood_grain,
    )
}
