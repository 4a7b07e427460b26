"""Image files of every kind that is met, of kinds that are refused, and damaged ones, made from fixed seeds."""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

WIDTH, HEIGHT = 36, 24
# PIL's transpositions that undo what an EXIF orientation tells viewers to do.
_UNDOING = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageFile:
    """
    A file's name and content, and what it shows.

    Args:
        picture: (H, W, 3) uint8, what is to be seen; how far a lossy format may be off it.
    """

    name: str
    content: bytes
    picture: np.ndarray
    tolerance: int = 0


def scene(seed: int = 0) -> np.ndarray:
    """A smooth picture without any symmetry, (H, W, 3) uint8, which lossy formats keep well."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] / HEIGHT
    phases, slopes = rng.uniform(0, 6, 3), rng.uniform(1, 3, (2, 3))
    waves = np.sin(rows[..., None] * slopes[0] + columns[..., None] * slopes[1] + phases)
    return np.rint(127.5 + 100 * waves).astype(np.uint8)


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


@cache
def good_files() -> list[ImageFile]:
    """A picture, its grey, or its black and white, in every kind of file that holds it."""
    return [*_colour_files(), *_grey_files(), *_transparent_files(), *_turned_files()]


def _colour_files() -> Iterator[ImageFile]:
    picture = scene()
    image = Image.fromarray(picture)
    for file_format, suffix, options in (
        ("PNG", "png", {}),
        ("BMP", "bmp", {}),
        ("TIFF", "tif", {}),
        ("TIFF", "tiff", {"compression": "tiff_lzw"}),
        ("WEBP", "webp", {"lossless": True}),
        ("JPEG2000", "jp2", {}),
        ("PPM", "ppm", {}),
    ):
        yield ImageFile(f"plain.{suffix}", encode(image, file_format, **options), picture)
    jpeg = encode(image, "JPEG", quality=95, subsampling=0)
    yield ImageFile("plain.jpg", jpeg, picture, tolerance=6)
    yield ImageFile("progressive.jpg", encode(image, "JPEG", quality=95, progressive=True), picture, tolerance=16)
    yield ImageFile("a-jpeg-named.png", jpeg, picture, tolerance=6)
    yield ImageFile("a-png-named.jpg", encode(image, "PNG"), picture)
    yield ImageFile("cmyk.jpg", encode(image.convert("CMYK"), "JPEG", quality=95), picture, tolerance=12)
    yield ImageFile("cmyk.tif", encode(image.convert("CMYK"), "TIFF"), picture, tolerance=1)
    palette = image.quantize(64)
    yield ImageFile("palette.gif", encode(palette, "GIF"), np.asarray(palette.convert("RGB")))
    yield ImageFile("palette.png", encode(palette, "PNG"), np.asarray(palette.convert("RGB")))
    other = Image.fromarray(scene(1)).resize((12, 8))
    camera = encode(image, "MPO", save_all=True, append_images=[other], quality=95, subsampling=0)
    yield ImageFile("photograph-with-preview.mpo.jpg", camera, picture, tolerance=6)


def _grey_files() -> Iterator[ImageFile]:
    grey = scene()[..., 0]
    picture = np.repeat(grey[..., np.newaxis], 3, axis=2)
    sixteen = grey.astype(np.uint16) * 257
    for name, values, file_format in (
        ("grey.png", grey, "PNG"),
        ("sixteen-bits.png", sixteen, "PNG"),
        ("sixteen-bits.tif", sixteen, "TIFF"),
        ("thirty-two-bits.tif", sixteen.astype(np.int32), "TIFF"),
        ("float-to-1.tif", grey.astype(np.float32) / 255, "TIFF"),
        ("float-to-255.tif", grey.astype(np.float32), "TIFF"),
    ):
        yield ImageFile(name, encode(Image.fromarray(values), file_format), picture)
    yield ImageFile("twelve-bits.tif", _grey_tiff(np.rint(grey * (4095 / 255)).astype(np.uint16), 12), picture)
    yield ImageFile("white-is-zero.tif", _grey_tiff(65535 - sixteen, 16, white_is_zero=True), picture)
    header = b"P5\n%d %d\n65535\n" % (WIDTH, HEIGHT)
    yield ImageFile("sixteen-bits.pgm", header + sixteen.astype(">u2").tobytes(), picture)
    bits = np.where(grey > 127, 255, 0).astype(np.uint8)
    lines = np.repeat(bits[..., np.newaxis], 3, axis=2)
    yield ImageFile("one-bit.png", encode(Image.fromarray(bits).convert("1"), "PNG"), lines)
    yield ImageFile("fax.tif", encode(Image.fromarray(bits).convert("1"), "TIFF", compression="group4"), lines)


def _grey_tiff(values: np.ndarray, bits: int, white_is_zero: bool = False) -> bytes:
    """A TIFF as cameras write it, which PIL does not: of 12 bits, two values in three bytes, or with white as 0."""
    height, width = values.shape
    digits = (values[..., np.newaxis] >> np.arange(bits)[::-1]) & 1
    data = np.packbits(digits).tobytes() if bits == 12 else values.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: height}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def _transparent_files() -> Iterator[ImageFile]:
    picture = scene()
    opacity = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    opacity[:, WIDTH // 2 :] = 255
    over_white = np.where(opacity[..., np.newaxis] == 255, picture, 255)
    cut = np.dstack([picture, opacity])
    for name, file_format in (("transparent.png", "PNG"), ("transparent.tif", "TIFF")):
        yield ImageFile(name, encode(Image.fromarray(cut), file_format), over_white)
    yield ImageFile("transparent.webp", encode(Image.fromarray(cut), "WEBP", lossless=True, exact=True), over_white)
    grey = picture[..., 0]
    with_opacity = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(opacity)))
    shown = np.where(opacity == 255, grey, 255)[..., np.newaxis].repeat(3, axis=2)
    yield ImageFile("transparent-grey.png", encode(with_opacity, "PNG"), shown)
    sixteen = grey.astype(np.uint16) * 257
    content = encode(Image.fromarray(sixteen), "PNG", transparency=int(sixteen[3, 4]))
    shown = np.where(grey == grey[3, 4], 255, grey)[..., np.newaxis].repeat(3, axis=2)
    yield ImageFile("transparent-sixteen-bits.png", content, shown)
    palette = Image.fromarray(picture).quantize(16)
    indices, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    shown = np.where((indices == 3)[..., np.newaxis], 255, colours)
    yield ImageFile("transparent-palette.png", encode(palette, "PNG", transparency=3), shown)
    yield ImageFile("transparent-palette.gif", encode(palette, "GIF", transparency=3), shown)


def _turned_files() -> Iterator[ImageFile]:
    """Stored in each of the eight orientations that EXIF knows, and one picture to all who look at them."""
    upright = Image.fromarray(scene())
    for orientation, method in _UNDOING.items():
        stored = upright if method is None else upright.transpose(Image.Transpose(method))
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        for file_format, suffix, options, tolerance in (
            ("JPEG", "jpg", {"quality": 95, "subsampling": 0}, 8),
            ("PNG", "png", {}, 0),
            ("WEBP", "webp", {"lossless": True}, 0),
            ("TIFF", "tif", {}, 0),
        ):
            content = encode(stored, file_format, exif=exif, **options)
            yield ImageFile(f"turned-{orientation}.{suffix}", content, scene(), tolerance)


@cache
def refused_files() -> dict[str, tuple[bytes, str]]:
    """Files by name that are refused: their content, and a part of the reason."""
    frames = [Image.fromarray(scene(seed)) for seed in range(3)]
    several = {"save_all": True, "append_images": frames[1:]}
    values = np.full((HEIGHT, WIDTH), 0.5, dtype=np.float32)
    values[3, 4] = np.nan
    infinite = np.where(np.isnan(values), np.float32(np.inf), values)
    deep = np.full((HEIGHT, WIDTH), 1 << 20, dtype=np.int32)
    kinds = "BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF or WEBP"
    return {
        "empty.png": (b"", kinds),
        "zeros.png": (bytes(4000), kinds),
        "text.jpg": (b"no image at all\n" * 9, kinds),
        "page.png": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>", kinds),
        "document.png": (b"%PDF-1.4\n1 0 obj << /Type /Catalog >> endobj\n%%EOF\n", kinds),
        "program.png": (_postscript(), kinds),
        "targa.png": (encode(frames[0], "TGA"), kinds),
        "animation.gif": (encode(frames[0], "GIF", **several), "several images"),
        "animation.png": (encode(frames[0], "PNG", **several), "several images"),
        "animation.webp": (encode(frames[0], "WEBP", lossless=True, **several), "several images"),
        "pages.tif": (encode(frames[0], "TIFF", **several), "several images"),
        "nan.tif": (encode(Image.fromarray(values), "TIFF"), "NaN"),
        "infinite.tif": (encode(Image.fromarray(infinite), "TIFF"), "infinite"),
        "out-of-range.tif": (encode(Image.fromarray(values * 0 - 3), "TIFF"), "NaN"),
        "deep.tif": (encode(Image.fromarray(deep), "TIFF"), "more than 16 bits"),
        "negative.tif": (encode(Image.fromarray(-deep), "TIFF"), "more than 16 bits"),
        "bomb.png": (png_of_zeros(60_000, 60_000, rows=1), "exceeds limit"),
        "bomb.gif": (b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + encode(frames[0], "GIF")[10:], "exceeds limit"),
        "bomb.bmp": (_with_size(encode(frames[0], "BMP"), 18, "<ii", 100_000, 100_000), "exceeds limit"),
        "text-bomb.png": (_with_text_bomb(encode(frames[0], "PNG")), "cannot be read"),
        "no-columns.png": (_chunk_png(0, 24), "cannot be read"),
        "cut.png": (encode(frames[0], "PNG")[:200], "cannot be read"),
        "cut.jpg": (encode(frames[0], "JPEG")[:500], "cannot be read"),
        "cut.webp": (encode(frames[0], "WEBP")[:100], "cannot be read"),
        "cut.bmp": (encode(frames[0], "BMP")[:900], "cannot be read"),
    }


def _postscript() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 36 24\n%%EndComments\nshowpage\n%%EOF\n"


def png_of_zeros(width: int, height: int, rows: int | None = None) -> bytes:
    """A grey PNG of so many pixels, which takes a thousandth of them as bytes; `rows` of it are there."""
    compressor = zlib.compressobj(9)
    line = bytes(1 + width)
    parts = [compressor.compress(line) for _ in range(height if rows is None else rows)]
    return _chunk_png(width, height, b"".join(parts) + compressor.flush())


def _chunk_png(width: int, height: int, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _with_text_bomb(png: bytes) -> bytes:
    """A comment of 200 MB that is compressed to 200 KB, before the pixels."""
    compressor = zlib.compressobj(9)
    comment = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(200)) + compressor.flush()
    place = png.index(b"IDAT") - 4
    return png[:place] + _chunk(b"zTXt", b"Comment\0\0" + comment) + png[place:]


def _with_size(content: bytes, place: int, layout: str, *numbers: int) -> bytes:
    packed = struct.pack(layout, *numbers)
    return content[:place] + packed + content[place + len(packed) :]


# Damage


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(0, len(content)))]


def _blanked(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(content), 2).tolist())
    return content[:start] + bytes(end - start) + content[end:]


def _flipped(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(0, len(content), int(rng.integers(1, 20))):
        changed[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def _header_overwritten(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(0, min(64, len(content)), int(rng.integers(1, 6))):
        changed[place] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(0, 256))]))
    return bytes(changed)


def _spliced(content: bytes, rng: np.random.Generator) -> bytes:
    start, end, target = rng.integers(0, len(content), 3).tolist()
    return content[:target] + content[min(start, end) : max(start, end)] + content[target:]


def _lost(content: bytes, rng: np.random.Generator) -> bytes:
    start, length = int(rng.integers(0, len(content))), int(rng.integers(1, 40))
    return content[:start] + content[start + length :]


def _other_magic(content: bytes, rng: np.random.Generator) -> bytes:
    magics = (
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"II*\0",
        b"MM\0*",
        b"BM",
        b"RIFF",
        b"P6\n",
        b"\0" * 8,
    )
    magic = magics[int(rng.integers(0, len(magics)))]
    return magic + content[len(magic) :]


DAMAGE: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "cut": _cut,
    "blanked": _blanked,
    "bits flipped": _flipped,
    "header overwritten": _header_overwritten,
    "spliced": _spliced,
    "bytes lost": _lost,
    "magic of another format": _other_magic,
}


def damaged_files(kind: str, count: int) -> list[tuple[str, bytes]]:
    """Names and contents of files that were good ones before this kind of damage; the n-th is always the same."""
    sources = [file for file in good_files() if "turned" not in file.name or "turned-6" in file.name]
    damaged = []
    for number in range(count):
        rng = np.random.default_rng([list(DAMAGE).index(kind), number])
        source = sources[int(rng.integers(0, len(sources)))]
        damaged.append((f"{number:04d}-{source.name}", DAMAGE[kind](source.content, rng)))
    return damaged


def plainly_decoded(content: bytes) -> np.ndarray | None:
    """(H, W, 3) as PIL's own steps make it of a file's first image, over white; `None` where they raise."""
    try:
        image = Image.open(BytesIO(content))
        if image.format == "PNG":
            image.verify()
            image = Image.open(BytesIO(content))
        image.load()
        tags = getattr(image, "tag_v2", {})
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            values = np.array(image).astype(np.float64)
            cut = values == image.info.get("transparency", -1)
            if image.mode == "F":
                values *= 257 * (255 if values.min() >= 0 and values.max() <= 1 else 1)
            elif tags.get(258) == (12,):
                values *= 65535 / 4095
            values = 65535 - values if tags.get(262) == 0 else values
            image = Image.fromarray(np.where(cut, 255, np.rint(values / 257)).astype(np.uint8))
        flat = Image.new("RGB", image.size, "white")
        cut = image.convert("RGBA")
        flat.paste(cut, mask=cut)
        return np.asarray(flat)
    except Exception:  # whatever it is: the file cannot be read
        return None
