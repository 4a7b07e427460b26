"""`moeclip predict`: scores, verdicts and heat maps for images."""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeclip_hf.cli.messages import one_line
from moeclip_hf.cli.progress import progress_bar
from moeclip_hf.cli.usage import LARGEST_EDGE, refuse_nan

if TYPE_CHECKING:
    from moeclip_hf.prediction import Prediction
    from moeclip_hf.pretrained import Detector

# Of the images whose overlays wait to be written, beside the one that is: so that memory grows neither with their
# number nor with their size.
_PIXELS_AHEAD = 1 << 23
# In bytes, so that file systems, which take 255, take it with an ending as well.
_LONGEST_NAME = 235
_ANY_WIDTH = 1 << 15
_THRESHOLDS_IN_TILES = (
    "the checkpoint's thresholds are for whole images, and scores rise with the number of tiles: set --threshold and "
    "--pixel-threshold from normal images in the same tiles (docs/large_images.md)."
)
_THRESHOLDS_AT_ANOTHER_SIZE = (
    "the checkpoint's thresholds are for its own input size, and scores are others at this one: set --threshold and "
    "--pixel-threshold from normal images at the same size."
)


class MapFormat(StrEnum):
    """How raw maps are written: 16-bit grey PNG (0 to 65535 for 0 to 1) or NumPy's float32."""

    png = "png"
    npy = "npy"


class Backend(StrEnum):
    """What computes maps and scores: torch's model, or onnxruntime an exported graph."""

    torch = "torch"
    onnx = "onnx"


class Dtype(StrEnum):
    """Types that a model can compute in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def predict(
    images: Annotated[list[str], typer.Argument(help="Files, folders and glob patterns.", show_default=False)],
    class_name: Annotated[str, typer.Option(help='What the images show, such as "metal nut".')] = "object",
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder or Hub id, or what `moeclip export` wrote.",
            show_default="the embedded demonstration",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a checkpoint on the Hub.", show_default="main")] = None,
    backend: Annotated[
        Backend | None, typer.Option(help="onnx for an exported graph.", show_default="as --model holds one or not")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Where overlays and maps are written.")] = Path("moeclip-output"),
    overlays: Annotated[bool, typer.Option(help="Write a picture with the heat map over each image.")] = True,
    maps: Annotated[
        MapFormat | None, typer.Option(help="Also write raw maps, as 16-bit PNG or NumPy file.", show_default="none")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=refuse_nan,
            help="Score from which on an image is anomalous.",
            show_default="the checkpoint's",
        ),
    ] = None,
    pixel_threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            callback=refuse_nan,
            help="Map value from which on pixels make regions.",
            show_default="the checkpoint's",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=LARGEST_EDGE, help="Pixels a side that the model sees.", show_default="the checkpoint's"
        ),
    ] = None,
    keep_aspect: Annotated[
        bool, typer.Option("--keep-aspect", help="Keep aspect ratios; --image-size is then the shorter side.")
    ] = False,
    tile: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS|auto",
            help="Cut large images into tiles of so many pixels a side; auto: what the model sees, pixel by pixel.",
            show_default="whole images",
        ),
    ] = None,
    tile_overlap: Annotated[
        float | None,
        typer.Option(min=0, max=0.9, help="Share of a tile's side in common with the next one.", show_default="0.25"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images or tiles at once; moves the last digits of a score at most.")
    ] = 8,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.", show_default="the best there is")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type to compute in.", show_default="float16 on CUDA, else float32")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON an image, not a table.")] = False,
) -> None:
    """Score images, tell which are anomalous, and draw where.

    Each score lies in 0 to 1 and depends on its image and the checkpoint alone. What cannot be read or written is
    named, the rest is done, and the exit status is 1.
    """
    tile_size = _tile_size(tile, tile_overlap)

    from transformers.utils import logging

    from moeclip_hf.prediction import find_images, input_size
    from moeclip_hf.prediction import predict as predict_files
    from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT
    from moeclip_hf.tiling import Tiling

    logging.disable_progress_bar()
    paths = find_images(images)
    endings = {"overlay": "_overlay.png" if overlays else None, "map": f"_map.{maps.value}" if maps else None}
    targets = _targets(paths, output_dir, {kind: ending for kind, ending in endings.items() if ending})
    if overlays or maps:
        output_dir.mkdir(parents=True, exist_ok=True)  # now rather than after an hour
    detector = _load_detector(model, revision, backend, device, dtype)
    processor = detector.processor
    size = input_size(processor, image_size, keep_aspect)
    if None in (threshold, pixel_threshold):
        if tile:
            typer.echo(f"moeclip: {_THRESHOLDS_IN_TILES}", err=True)
        elif size != processor.image_processor.size:
            typer.echo(f"moeclip: {_THRESHOLDS_AT_ANOTHER_SIZE}", err=True)
    threshold = processor.image_threshold if threshold is None else threshold
    pixel_threshold = processor.pixel_threshold if pixel_threshold is None else pixel_threshold
    tiling = (Tiling(tile_size) if tile_overlap is None else Tiling(tile_size, tile_overlap)) if tile else None
    predictions = predict_files(
        detector, paths, class_name, batch_size, threshold, pixel_threshold, size=size, tiling=tiling
    )

    rows: list[dict[str, Any]] = []
    pending: list[tuple[Future[list[str]], int]] = []
    unreadable = unwritten = 0

    def finish_write() -> None:
        nonlocal unwritten
        failures = pending.pop(0)[0].result()
        unwritten += bool(failures)
        for failure in failures:
            typer.echo(f"moeclip: {one_line(failure)}", err=True)

    try:
        # No bar beside JSON: on a terminal it takes over what is printed, which may be meant for a file.
        with (
            progress_bar("scoring", quiet=as_json) as progress,
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as writer,
        ):
            for done, prediction in enumerate(predictions, start=1):
                row = _describe(prediction, class_name, str(model or EMBEDDED_CHECKPOINT), threshold, pixel_threshold)
                if prediction.error is None:
                    files = targets(prediction.path)
                    row |= {kind: str(file) for kind, file in files.items()}
                    write = writer.submit(_write, prediction, pixel_threshold, **files)
                    pending.append((write, row["width"] * row["height"]))
                    while len(pending) > 1 and sum(pixels for _, pixels in pending) > _PIXELS_AHEAD:
                        finish_write()
                else:
                    unreadable += 1
                    typer.echo(f"moeclip: {one_line(prediction.error)}", err=True)
                if as_json:
                    print(json.dumps(row), flush=True)
                else:
                    rows.append({key: row.get(key) for key in ("image", "score", "is_anomalous")})
                progress(done, len(paths))
            while pending:
                finish_write()
    finally:  # whatever ends the run: what was scored is worth having
        if rows:
            _print_table(rows, threshold, class_name)
    if not as_json and (overlays or maps) and unreadable + unwritten < len(paths):
        where = "" if output_dir.is_absolute() else " (in this folder)"
        typer.echo(f"Written to {one_line(str(output_dir))}{where}")
    if unreadable or unwritten:
        raise typer.Exit(1)


def _load_detector(
    model: str | None, revision: str | None, backend: Backend | None, device: str | None, dtype: Dtype | None
) -> "Detector":
    from moeclip_hf.onnx_detector import is_onnx, load_onnx
    from moeclip_hf.pretrained import load_pretrained

    if backend is None:
        backend = Backend.onnx if model and is_onnx(model) else Backend.torch
    if backend is Backend.torch:
        return load_pretrained(model, device, dtype.value if dtype else None, revision)
    if model is None:
        raise typer.BadParameter("--backend onnx takes as --model a folder that `moeclip export` wrote")
    if dtype is not None:
        raise typer.BadParameter("an exported graph has the type that it was exported in", param_hint="--dtype")
    return load_onnx(model, device)


def _tile_size(tile: str | None, overlap: float | None) -> int | None:
    if tile is None and overlap is not None:
        raise typer.BadParameter("tiles overlap, and there are none without --tile", param_hint="--tile-overlap")
    if tile is None or tile == "auto":
        return None
    if not tile.isdecimal() or int(tile) < 1:
        raise typer.BadParameter(f"{tile!r} is neither a number of pixels nor auto.", param_hint="--tile")
    return int(tile)


def _targets(paths: list[Path], output_dir: Path, endings: dict[str, str]) -> Callable[[Path], dict[str, Path]]:
    """
    Where each image's results go, by kind.

    Raises:
        MoECLIPError: if a picture that is no result would be overwritten by one.
    """
    from moeclip_hf.errors import MoECLIPError
    from moeclip_hf.writing import is_result

    names = _output_names(paths)

    def targets(path: Path) -> dict[str, Path]:
        return {kind: output_dir / f"{names[path]}{ending}" for kind, ending in endings.items()}

    images: dict[tuple[int, int], Path] = {}
    for path in paths:
        for target in targets(path).values():
            if (there := _identity(target)) is None:
                continue
            images = images or {identity: image for image in paths if (identity := _identity(image))}
            if image := images.get(there):
                raise MoECLIPError(f"{image}: the results of {path} would overwrite it: name another --output-dir.")
            if target.suffix == ".png" and target.is_file() and not is_result(target):
                raise MoECLIPError(
                    f"{target}: is no result of moeclip's, and those of {path} would overwrite it: name another "
                    "--output-dir."
                )
    return targets


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells files apart, whatever path leads to them; nothing of one that is not there."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _output_names(paths: list[Path]) -> dict[Path, str]:
    """
    Name each image's results: by its stem where that is unique, else by its whole path below the common folder.

    Names that some disks take for one, as they differ in case or in how an accent is written, are not unique; where
    whole paths are such names, a digest tells them apart.
    """
    names = [path.stem for path in paths]
    if len({_folded(name) for name in names}) < len(names):
        names = _below_common_folder([os.path.abspath(path) for path in paths])  # without .., which could lead out
        times = Counter(map(_folded, names))
        names = [f"{name}-{_digest(os.fsencode(name))}" if times[_folded(name)] > 1 else name for name in names]
    return {path: shortened(name) for path, name in zip(paths, names, strict=True)}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _below_common_folder(paths: list[str]) -> list[str]:
    """Absolute paths as seen from the folder that holds them all or, where they lie on several drives, from these."""
    try:
        common = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # drives, which only Windows has
        parts = [os.path.splitdrive(path) for path in paths]
        return [os.path.join(re.sub(r"\W+", "_", drive).strip("_"), rest.lstrip("\\/")) for drive, rest in parts]
    return [os.path.relpath(path, common) for path in paths]


def shortened(path: str) -> str:
    """The path; where no file could bear its last name with an ending, that name's beginning and a digest of it."""
    folder, name = os.path.split(os.fsencode(path))
    if len(name) > _LONGEST_NAME:
        digest = _digest(name).encode()
        name = name[: _LONGEST_NAME - len(digest) - 1] + b"-" + digest
    return os.fsdecode(os.path.join(folder, name))


def _digest(name: bytes) -> str:
    return hashlib.blake2b(name, digest_size=8).hexdigest()


def _describe(
    prediction: "Prediction", class_name: str, model: str, threshold: float, pixel_threshold: float
) -> dict[str, Any]:
    row = {"image": str(prediction.path), "class_name": class_name, "model": model, "score": prediction.score}
    if prediction.error is not None:
        return row | {"error": prediction.error}
    size = {"width": prediction.image.width, "height": prediction.image.height} if prediction.image else {}
    return row | {
        "threshold": threshold,
        "pixel_threshold": pixel_threshold,
        "is_anomalous": prediction.is_anomalous,
        "regions": prediction.regions,
        **size,
    }


def _write(
    prediction: "Prediction", pixel_threshold: float, overlay: Path | None = None, map: Path | None = None
) -> list[str]:
    """Write what there is a file for, and tell what cannot be written, a line each."""
    import numpy as np
    from PIL import Image

    from moeclip_hf.errors import MoECLIPError
    from moeclip_hf.visualization import draw_overlay
    from moeclip_hf.writing import save_picture, telling_what_cannot_be_written, whole_file

    assert prediction.image is not None and prediction.anomaly_map is not None  # it could be read
    failures = []
    for target in filter(None, (overlay, map)):
        try:
            with telling_what_cannot_be_written(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                if target is overlay:
                    anomaly_map, regions = prediction.anomaly_map, prediction.regions
                    save_picture(draw_overlay(prediction.image, anomaly_map, regions, pixel_threshold), target)
                elif target.suffix == ".npy":
                    with whole_file(target) as partial, partial.open("wb") as file:
                        np.save(file, prediction.anomaly_map)
                else:
                    save_picture(Image.fromarray(np.rint(prediction.anomaly_map * 65535).astype(np.uint16)), target)
        except MoECLIPError as error:  # such as of a full disk
            failures.append(str(error))
    return failures


def _print_table(rows: list[dict[str, Any]], threshold: float, class_name: str) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    # With as many digits as the scores, lest one seem to be on the wrong side.
    title = Text(f"{class_name} (anomalous from {threshold:.4f})", "italic")
    table = Table(Column("image", overflow="fold"), "score", "verdict", title=title)
    for row in rows:
        if row["score"] is None:
            score, verdict = Text("-"), Text("not scored", "yellow")
        else:
            score = Text(f"{row['score']:.4f}")
            verdict = Text("anomalous", "bold red") if row["is_anomalous"] else Text("normal", "green")
        table.add_row(Text(one_line(row["image"])), score, verdict)
    console = Console()
    if not console.is_terminal:  # names stay whole, and a row a line
        console.width = _ANY_WIDTH
    console.print(table)
