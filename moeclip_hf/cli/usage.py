"""Wrong usage, told before anything heavy is loaded and any work is done."""

import math
import tempfile
from pathlib import Path

import typer

# Of an image as a model sees it, in pixels: the most that a processor may ask for, too.
LARGEST_EDGE = 8192


def refuse_nan(value: float | None) -> float | None:
    """Refuse NaN, which no range leaves out."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is no number")
    return value


def check_folder(folder: Path, option: str = "--output") -> None:
    """Refuse a folder that nothing can be written to, whether it is there or is to be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        told = f"{there} is not a folder that can be written to ({error.strerror or error})"
        raise typer.BadParameter(told, param_hint=option) from error
