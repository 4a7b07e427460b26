"""Textures of cloth: what is woven, knitted, tufted, felted or printed on cloth."""

import math

import numpy as np

from moeclip_hf.data.textures.canvas import (
    ANY_HUE,
    BROWN,
    Array,
    Canvas,
    Colour,
    Frame,
    Surface,
    blend,
    dome,
    fraction,
    rgb,
    smoothstep,
)


def weave(
    canvas: Canvas,
    frame: Frame,
    over: Array,
    warp: Array | Colour,
    weft: Array | Colour,
    width: float = 0.95,
    relief: float = 2.0,
    backing: float = 0.25,
) -> Surface:
    """Threads along y (warp) and along x (weft), one a period, that pass over and under each other.

    Args:
        canvas: draws the threads' irregularities.
        frame: a period is a thread.
        over: S x S, True in the squares where the warp thread passes over.
        warp: colour of the warp threads, (3,) or S x S x 3.
        weft: colour of the weft threads.
        width: a thread's width, in periods; between threads of less than 1 the dark backing shows.
        relief: height of a thread in 1/256 of the side.
        backing: brightness of what lies behind, as a share of the weft's.
    """
    fx, fy = fraction(frame.x), fraction(frame.y)
    crimp = np.where(over, np.float32(0.7), np.float32(-0.7))
    across_x, across_y = fx * (2 / width), fy * (2 / width)
    warp_height = np.where(np.abs(across_x) < 1, dome(across_x) + crimp * np.cos(math.pi * fy), -2.0)
    weft_height = np.where(np.abs(across_y) < 1, dome(across_y) - crimp * np.cos(math.pi * fx), -2.0)
    warp_on_top = warp_height > weft_height
    column, row = np.floor(frame.x), np.floor(frame.y)
    threads = np.where(warp_on_top, canvas.per_tile(column * 0, column), canvas.per_tile(row, row * 0))
    fibres = np.where(
        warp_on_top,
        canvas.noise_at(frame.x * 5, frame.y * 0.9 + frame.x),
        canvas.noise_at(frame.x * 0.9 + frame.y, frame.y * 5),
    )
    height = np.maximum(np.maximum(warp_height, weft_height), -1.2)
    albedo = blend(np.asarray(weft), np.asarray(warp), warp_on_top.astype(np.float32))
    albedo = albedo * (0.72 + 0.2 * threads + 0.25 * fibres)[..., None]
    gap = height <= -1.2
    return Surface(np.where(gap[..., None], albedo * backing, albedo), height * relief)


def woven_fabric(canvas: Canvas) -> Surface:
    """Plain weave in two near colours."""
    frame = canvas.frame(canvas.uniform(16, 34), canvas.angle(0.8), warp=0.8)
    over = (np.floor(frame.x) + np.floor(frame.y)) % 2 == 0
    warp = canvas.colour(saturation=(0.05, 0.6), value=(0.4, 0.95))
    weft = warp * canvas.uniform(0.7, 1.0) + canvas.uniform(0, 0.08)
    return weave(canvas, frame, over, warp, weft, relief=canvas.uniform(1.2, 2.2))


def burlap(canvas: Canvas) -> Surface:
    """Coarse, loose plain weave of uneven brown threads."""
    frame = canvas.frame(canvas.uniform(13, 22), canvas.angle(0.5), warp=1.6)
    waver = Frame(frame.x + 0.3 * (canvas.noise(9) - 0.5), frame.y + 0.3 * (canvas.noise(9) - 0.5), frame.pixel)
    over = (np.floor(waver.x) + np.floor(waver.y)) % 2 == 0
    colour = canvas.colour((0.08, 0.12), (0.25, 0.5), (0.55, 0.8))
    return weave(canvas, waver, over, colour, colour * 0.9, width=canvas.uniform(0.66, 0.82), relief=2.2)


def denim(canvas: Canvas) -> Surface:
    """Twill of dyed warp and pale weft, worn in places."""
    frame = canvas.frame(canvas.uniform(30, 50), canvas.angle(0.4), warp=0.6)
    over = (np.floor(frame.x) + np.floor(frame.y)) % 4 < 3
    dye = canvas.colour((0.56, 0.66), (0.45, 0.75), (0.25, 0.6))
    worn = smoothstep(0.35, 0.9, canvas.noise(4, 2)) * canvas.uniform(0.1, 0.5)
    return weave(canvas, frame, over, blend(dye, rgb(0.75, 0.78, 0.82), worn), rgb(0.7, 0.72, 0.74))


def houndstooth(canvas: Canvas) -> Surface:
    """Two by two twill of four dark and four light threads in turn."""
    frame = canvas.frame(canvas.uniform(40, 72), canvas.angle(0.4), warp=0.8)
    column, row = np.floor(frame.x), np.floor(frame.y)
    over = (column - row) % 4 < 2
    dark, light = canvas.colour(value=(0.08, 0.3)), canvas.colour(saturation=(0.0, 0.25), value=(0.75, 0.95))
    warp = np.where((column % 8 < 4)[..., None], dark, light)
    weft = np.where((row % 8 < 4)[..., None], dark, light)
    return weave(canvas, frame, over, warp, weft, width=1.0, relief=0.7)


def tartan(canvas: Canvas) -> Surface:
    """Twill of coloured stripes that cross themselves."""
    frame = canvas.frame(canvas.uniform(44, 64), canvas.angle(0.5), warp=0.8)
    over = (np.floor(frame.x) + np.floor(frame.y)) % 4 < 2
    widths = canvas.rng.integers(2, 9, 5)
    sett = np.repeat(np.arange(5), widths)
    sett = np.concatenate([sett, sett[::-1]])
    hue = canvas.uniform(0, 1)
    colours = np.stack([canvas.colour((hue - 0.5, hue + 0.5), (0.2, 0.8), (0.12, 0.75)) for _ in range(5)])
    warp = colours[sett[np.floor(frame.x).astype(int) % len(sett)]]
    weft = colours[sett[np.floor(frame.y).astype(int) % len(sett)]]
    return weave(canvas, frame, over, warp, weft, width=1.0, relief=0.6)


def knitted_fabric(canvas: Canvas) -> Surface:
    """Stockinette: columns of V-shaped stitches."""
    frame = canvas.frame(canvas.uniform(9, 18), canvas.angle(0.4), warp=0.5, aspect=canvas.uniform(1.1, 1.35))
    fx = fraction(frame.x)
    row = frame.y + 0.9 * np.abs(fx)
    across, along = (np.abs(fx) - 0.25) * 4.2, fraction(row)
    height = dome(across) * (0.35 + 0.65 * dome(along * 1.9))
    strands = 0.5 + 0.5 * np.sin(2 * math.pi * (np.abs(fx) * 7 - along * 3))
    colour = canvas.colour(saturation=(0.1, 0.75), value=(0.35, 0.95))
    stripes = canvas.per_tile(np.floor(row / canvas.rng.integers(3, 9)), np.zeros_like(row))
    second = canvas.colour(value=(0.3, 0.95)) if canvas.chance(0.35) else colour
    albedo = blend(colour, second, (stripes > 0.55).astype(np.float32))
    shade = (0.35 + 0.55 * height) * (0.85 + 0.15 * strands) * (0.9 + 0.2 * canvas.noise(60))
    return Surface(albedo * (1.15 * shade)[..., None], height * 3.0)


def corduroy(canvas: Canvas) -> Surface:
    """Rounded ridges of pile with narrow furrows."""
    frame = canvas.frame(canvas.uniform(9, 22), canvas.angle(), warp=0.5)
    ridge = dome(fraction(frame.x) * 2.05)
    pile = canvas.noise_at(frame.x * 7, frame.y * 2.2)
    colour = canvas.colour(saturation=(0.2, 0.7), value=(0.3, 0.8))
    shade = (0.35 + 0.65 * ridge**0.7) * (0.75 + 0.4 * pile) * (0.85 + 0.3 * canvas.noise(4))
    return Surface(colour * shade[..., None], (ridge + 0.15 * pile) * 3.0)


def carpet(canvas: Canvas) -> Surface:
    """Tufts of yarn, each of its own shade."""
    frame = canvas.frame(canvas.uniform(34, 58), canvas.angle())
    tufts = canvas.cells(frame, jitter=0.75)
    height = dome(np.minimum(tufts.nearest * 1.5, 1.0))
    base = canvas.colour(saturation=(0.05, 0.55), value=(0.3, 0.8))
    other = np.clip(base * canvas.uniform(0.55, 1.4), 0, 1) if canvas.chance(0.6) else canvas.colour()
    tone = canvas.per_cell(tufts)
    albedo = blend(base, other, smoothstep(0.5, 0.9, tone)) * (0.6 + 0.45 * height + 0.25 * (tone - 0.5))[..., None]
    return Surface(albedo * (0.9 + 0.2 * canvas.noise(5))[..., None] + 0.03 * canvas.grain()[..., None], height * 2.2)


def felt(canvas: Canvas) -> Surface:
    """Matted fibres in all directions."""
    fibres = np.zeros((canvas.size, canvas.size), dtype=np.float32)
    for _ in range(4):
        frame = canvas.frame(canvas.uniform(60, 90), canvas.angle(), aspect=canvas.uniform(0.1, 0.2), warp=6)
        fibres += np.abs(canvas.noise_at(frame.x, frame.y) - 0.5)
    colour = canvas.colour(saturation=(0.05, 0.8), value=(0.3, 0.9))
    melange = canvas.noise(canvas.uniform(5, 12), 3)
    return Surface(colour * (0.55 + 0.4 * fibres / 1.0 + 0.3 * (melange - 0.5))[..., None], fibres * 2.0)


def striped_cloth(canvas: Canvas) -> Surface:
    """Fine plain weave with printed stripes of several widths."""
    angle = canvas.angle()
    frame = canvas.frame(canvas.uniform(48, 70), angle, warp=1.2)
    over = (np.floor(frame.x) + np.floor(frame.y)) % 2 == 0
    repeat = np.repeat(np.arange(4), canvas.rng.integers(2, 10, 4))
    colours = [canvas.colour(saturation=(0.0, 0.7), value=(0.2, 0.95)) for _ in range(4)]
    colours[2] = colours[0]
    stripes = np.stack(colours)[repeat[np.floor(frame.x).astype(int) % len(repeat)]]
    return weave(canvas, frame, over, stripes, stripes * 0.95, width=1.0, relief=0.5)


def polka_dots(canvas: Canvas) -> Surface:
    """Dots printed on cloth in staggered rows."""
    frame = canvas.frame(canvas.uniform(4, 11), canvas.angle(), warp=0.25)
    row = np.floor(frame.y)
    fx, fy = fraction(frame.x + 0.5 * (row % 2)), fraction(frame.y)
    radius = canvas.uniform(0.2, 0.36)
    dots = smoothstep(frame.pixel, -frame.pixel, np.hypot(fx, fy) - radius)
    ground, dot = canvas.colour(value=(0.2, 0.95)), canvas.colour(value=(0.2, 0.95))
    if np.abs(ground - dot).max() < 0.3:
        dot = 1.0 - ground
    threads = canvas.frame(canvas.uniform(60, 90), 0.0)
    cloth = np.sin(2 * math.pi * threads.x) * np.sin(2 * math.pi * threads.y)
    folds = canvas.noise(2.5, 2)
    return Surface(blend(ground, dot, dots) * (0.9 + 0.06 * cloth)[..., None], folds * 16 + cloth * 0.3)


def quilt(canvas: Canvas) -> Surface:
    """Padded diamonds between stitched seams."""
    frame = canvas.frame(canvas.uniform(4, 8), math.pi / 4 + canvas.angle(0.15), warp=0.2)
    fx, fy = fraction(frame.x), fraction(frame.y)
    pad = dome(fx * 2) ** 0.5 * dome(fy * 2) ** 0.5
    seam = np.minimum(0.5 - np.abs(fx), 0.5 - np.abs(fy))
    along = np.where(np.abs(fx) > np.abs(fy), frame.y, frame.x)
    stitches = smoothstep(2.5 * frame.pixel, frame.pixel, seam) * (np.sin(2 * math.pi * along * 9) > -0.2)
    colour, thread = canvas.colour(value=(0.25, 0.9)), canvas.colour(saturation=(0.0, 0.4), value=(0.6, 1.0))
    albedo = blend(colour * (0.9 + 0.12 * canvas.noise(90))[..., None], thread, 0.8 * stitches)
    wrinkles = canvas.noise(14, 2) * (1 - pad)
    return Surface(albedo, pad * 22 + wrinkles * 6, gloss=canvas.uniform(0.0, 0.2))


def rattan(canvas: Canvas) -> Surface:
    """Basket work: pairs of flat canes that pass over and under each other."""
    frame = canvas.frame(canvas.uniform(11, 20), canvas.angle(0.8), warp=0.3)
    over = (np.floor(frame.x / 2) + np.floor(frame.y / 2)) % 2 == 0
    cane = canvas.colour(BROWN, (0.35, 0.65), (0.5, 0.85))
    woven = weave(canvas, frame, over, cane, cane * canvas.uniform(0.8, 0.95), width=0.92, relief=2.6, backing=0.15)
    return Surface(woven.albedo, woven.height, gloss=0.15)


def lace(canvas: Canvas) -> Surface:
    """Net of thread with round holes in which a darker ground shows."""
    frame = canvas.frame(canvas.uniform(9, 16), canvas.angle(), warp=0.4)
    row = np.floor(frame.y)
    fx, fy = fraction(frame.x + 0.5 * (row % 2)), fraction(frame.y)
    distance = np.hypot(fx, fy)
    flower = canvas.uniform(0.3, 0.4) + 0.05 * np.cos(int(canvas.rng.integers(4, 7)) * np.arctan2(fy, fx))
    thread = smoothstep(-1.5 * frame.pixel, 1.5 * frame.pixel, distance - flower)
    ground = canvas.colour(ANY_HUE, (0.2, 0.7), (0.1, 0.35))
    yarn = canvas.colour(ANY_HUE, (0.0, 0.2), (0.8, 1.0))
    twist = 0.5 + 0.5 * np.sin(2 * math.pi * 5 * (frame.x + frame.y))
    albedo = blend(ground, yarn * (0.75 + 0.25 * twist)[..., None], thread)
    return Surface(albedo, thread * (1.5 + 0.4 * twist))


FAMILIES = {
    family.__name__: family
    for family in (
        burlap,
        carpet,
        corduroy,
        denim,
        felt,
        houndstooth,
        knitted_fabric,
        lace,
        polka_dots,
        quilt,
        rattan,
        striped_cloth,
        tartan,
        woven_fabric,
    )
}
