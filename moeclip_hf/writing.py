"""Files that are there whole or not at all, and pictures that can be told from those of parts."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moeclip_hf.errors import MoECLIPError

# What is added to an image's name, and stands in the file itself.
_PICTURES = ("_overlay.png", "_map.png", "_routing.png", "_attributions.png")
_SOFTWARE = "moeclip-hf"


@contextmanager
def telling_what_cannot_be_written(path: Path) -> Iterator[None]:
    """
    Raises:
        MoECLIPError: naming the file, and why it cannot be written.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        reason = "memory is short" if isinstance(error, MemoryError) else getattr(error, "strerror", None) or error
        raise MoECLIPError(f"{path}: cannot be written ({reason})") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """
    Where to write a file, which takes its name once it is whole; one that was there stays until then.

    Raises:
        MoECLIPError: naming what cannot be written, and why.
    """
    # No name of anybody's, short, and the same each time, so that what a crash has left is written over.
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=16).hexdigest()
    partial = path.with_name(f".{digest}.partial")
    try:
        with telling_what_cannot_be_written(path):
            yield partial
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """
    Write a file; a crash leaves it as it was, or whole.

    Raises:
        MoECLIPError: naming what cannot be written, and why.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content)


def save_picture(picture: Image.Image, path: Path) -> None:
    """
    Save a result as a PNG that [`is_result`] knows again.

    Raises:
        MoECLIPError: naming what cannot be written, and why: also where a picture is that is no result.
    """
    if path.is_file() and not is_result(path):
        raise MoECLIPError(f"{path}: is no result of moeclip's, and is not written over: name another folder.")
    info = PngInfo()
    info.add_text("Software", _SOFTWARE)
    with whole_file(path) as partial:
        picture.save(partial, "PNG", compress_level=1, pnginfo=info)


def is_result(path: Path) -> bool:
    """Whether a file is a picture that `moeclip predict` or `moeclip explain` wrote: told from name and contents."""
    if not path.name.endswith(_PICTURES):
        return False
    try:
        if not path.is_file():
            return False
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == _SOFTWARE
    except Exception:  # whatever a damaged file leads to; reading it says so
        return False
