"""Scores, verdicts and maps for image files, read ahead and computed in batches."""

import glob
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from moeclip_hf.data.layouts import IMAGE_SUFFIXES, tell_passed_over
from moeclip_hf.errors import MoECLIPError, MoECLIPWarning, UnreadableImageError
from moeclip_hf.modeling.image_processing_moeclip import image_size, to_rgb
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor, find_regions, read_scores, upsample
from moeclip_hf.pretrained import Detector
from moeclip_hf.threads import read_ahead
from moeclip_hf.tiling import Tiling, detect_in_tiles
from moeclip_hf.writing import is_result

# Of a batch of images, which with their maps take seven bytes a pixel; two more batches are being read meanwhile.
_PIXELS_AT_ONCE = 1 << 25


@dataclass
class Prediction:
    """
    What was found in one file.

    Args:
        path: of the file.
        image: upright, RGB; `None` if the file cannot be read.
        score: 0 to 1, from this image and the checkpoint alone.
        is_anomalous: whether the score reaches the threshold.
        anomaly_map: (H, W) of the image, 0 to 1, float32.
        regions: dicts with `box` ([left, top, right, bottom]), `area` and `score`.
        error: why the file cannot be read, or the image not be scored.
    """

    path: Path
    image: Image.Image | None = None
    score: float | None = None
    is_anomalous: bool | None = None
    anomaly_map: np.ndarray | None = None
    regions: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Detection:
    """
    What a model finds in an image before any threshold, which can then be moved without running it again.

    It is small, whatever the size of the image: the map is kept on the patch grid, and enlarged where it is asked for.

    Args:
        score: 0 to 1.
        grid: (h, w), the smoothed anomaly map, 0 to 1, on the CPU.
        image_size: (H, W) in pixels.
    """

    score: float
    grid: torch.Tensor
    image_size: tuple[int, int]

    def anomaly_map(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """The map at a size (H, W), by default the image's own: 0 to 1, float32."""
        return self._enlarged(size or self.image_size).numpy()

    def regions(self, pixel_threshold: float) -> list[dict[str, Any]]:
        """Regions of the map from a value on, as in [`Prediction`], in pixels of the image."""
        return find_regions(self._enlarged(self.image_size), pixel_threshold)

    def _enlarged(self, size: tuple[int, int]) -> torch.Tensor:
        return upsample(self.grid.unsqueeze(0), size)[0]


def find_images(sources: Iterable[str | Path]) -> list[Path]:
    """
    List image files. Pictures that `moeclip predict` or `moeclip explain` wrote are left out, with a warning.

    Args:
        sources: files (taken whatever their suffix), folders (searched with all below them, but for linked
            folders) and glob patterns. A broken link is listed as well: whoever reads it is told.

    Raises:
        MoECLIPError: for a folder or a pattern without images, for a folder that may not be searched, and if there is
            nothing but what was left out.
    """
    found: dict[Path, None] = {}
    for source in map(str, sources):
        path = Path(source)
        if _is_folder(path):
            files = _images_below(path)
        elif glob.has_magic(source) and not Path(source).is_file():
            files = sorted(Path(file) for file in glob.glob(source, recursive=True) if not Path(file).is_dir())
        else:
            files = [path]
        if not files:
            raise MoECLIPError(f"{source}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        found.update(dict.fromkeys(files))
    results = {file: None for file in found if is_result(file)}
    if results:
        text = (
            f"{len(results)} results of predict or explain are no images of parts: the first is {next(iter(results))}"
        )
        if len(results) == len(found):
            raise MoECLIPError(f"{text}, and there are no others.")
        warnings.warn(f"{text}. They are left out.", MoECLIPWarning, stacklevel=2)
    return [file for file in found if file not in results]


def _images_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise MoECLIPError(f"{error.filename}: cannot be searched for images ({error.strerror}).")

    files = sorted(Path(found) / name for found, _, names in os.walk(folder, onerror=refuse) for name in names)
    tell_passed_over(folder, (str(file.relative_to(folder)) for file in files))
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system takes; reading it says so
        return False


def read_image(path: Path) -> Image.Image:
    """
    Read an image file upright and in RGB.

    Raises:
        UnreadableImageError: naming the file and the reason.
    """
    try:
        return to_rgb(path)
    except ValueError as error:
        raise UnreadableImageError(str(error)) from error


def predict(
    detector: Detector,
    paths: Iterable[Path],
    class_name: str = "object",
    batch_size: int = 8,
    threshold: float | None = None,
    pixel_threshold: float | None = None,
    size: dict[str, int] | None = None,
    tiling: Tiling | None = None,
) -> Iterator[Prediction]:
    """
    Score image files, one after the other and in order, while the next ones are being read and prepared.

    A file that cannot be read, or scored, or for which memory is too short, yields a prediction with its `error`; the
    rest goes on. What is held in memory does not grow with the number of files, nor, beyond one image, with their
    size.

    Args:
        detector ([`Detector`]): such as from [`load_pretrained`].
        paths: of the files.
        class_name (`str`): what the images show, such as "metal nut".
        batch_size (`int`): images, or tiles, computed at once; it moves the last digits of a score at most.
        threshold, pixel_threshold (`float`, *optional*): of verdicts and regions, instead of the processor's.
        size (`dict[str, int]`, *optional*): what images, or tiles, are resized to, instead of the processor's size;
            from [`input_size`].
        tiling ([`Tiling`], *optional*): cut images into tiles, for those far larger than the model's input.
    """
    encoded_class = detector.encode_class(class_name)

    def read(batch: list[Path]) -> list[_Read]:
        return [_read(path, None if tiling else detector.processor, size) for path in batch]

    for batch in read_ahead(read, _batches(paths, 1 if tiling else batch_size), depth=2):
        if tiling:
            for prediction, _ in batch:
                if prediction.image is None:
                    continue
                with _errors_told_by(prediction):
                    found = detect_in_tiles(
                        detector, prediction.image, encoded_class, tiling, batch_size, threshold, pixel_threshold, size
                    )
                    _complete(prediction, found)
        else:
            _detect(detector, batch, encoded_class, threshold, pixel_threshold)
        yield from (prediction for prediction, _ in batch)


def detect(detector: Detector, image: Image.Image, encoded_class: torch.Tensor) -> Detection:
    """
    Score one image, and keep what its verdict and regions are made from.

    Args:
        detector ([`Detector`]): such as from [`load_pretrained`].
        image: RGB, from [`read_image`].
        encoded_class (`torch.Tensor`): from [`Detector.encode_class`].

    Raises:
        MoECLIPError: where the model keeps aspect ratios and the image is too long a strip, or the score is NaN.
    """
    try:
        pixel_values = detector.processor(images=image, return_tensors="pt")["pixel_values"]
        grids, scores = detector.patch_maps(pixel_values, encoded_class)
        return Detection(read_scores(scores)[0], grids[0].float().cpu(), (image.height, image.width))
    except ValueError as error:
        raise MoECLIPError(str(error)) from error


def input_size(processor: MoECLIPProcessor, image_size: int | None, keep_aspect: bool) -> dict[str, int]:
    """
    The size that images are resized to, in whole patches.

    Args:
        processor ([`MoECLIPProcessor`])
        image_size (`int`, *optional*): of a side in pixels, or of the shorter one where the aspect ratio is kept; by
            default as the processor has it.
        keep_aspect (`bool`): whether the aspect ratio is kept, as it also is where the processor keeps it.

    Returns:
        `{"height": h, "width": w}` or `{"shortest_edge": n}`.
    """
    size, patch_size = processor.image_processor.size, processor.image_processor.patch_size
    if image_size is None:
        return {"shortest_edge": min(size.values())} if keep_aspect else size
    edge = max(1, round(image_size / patch_size)) * patch_size
    return {"shortest_edge": edge} if keep_aspect or "shortest_edge" in size else {"height": edge, "width": edge}


class _Read(NamedTuple):
    """A file that was read, and what the model is given of it: (3, h, w), or nothing."""

    prediction: Prediction
    pixels: np.ndarray | None


def _read(path: Path, processor: MoECLIPProcessor | None, size: dict[str, int] | None) -> _Read:
    """Read a file and, with a processor, prepare it; in a thread, where PIL and NumPy leave the others running."""
    prediction, pixels = Prediction(path), None
    with _errors_told_by(prediction):
        try:
            prediction.image = read_image(path)
        except UnreadableImageError as error:
            prediction.error = str(error)
        else:
            if processor is not None:
                pixels = processor(images=prediction.image, size=size)["pixel_values"][0]
    return _Read(prediction, pixels)


def _detect(
    detector: Detector,
    batch: list[_Read],
    encoded_class: torch.Tensor,
    threshold: float | None,
    pixel_threshold: float | None,
) -> None:
    """Complete the predictions of whole images; those that keep unlike aspect ratios are computed apart."""
    by_shape: dict[tuple[int, ...], list[_Read]] = {}
    for read in batch:
        if read.pixels is not None:
            by_shape.setdefault(read.pixels.shape, []).append(read)
    waiting = list(by_shape.values())
    while waiting:
        alike = waiting.pop()
        with _errors_told_by(*(read.prediction for read in alike)):
            pixel_values = torch.from_numpy(np.stack([read.pixels for read in alike if read.pixels is not None]))
            grids, scores = detector.patch_maps(pixel_values, encoded_class)
        if alike[0].prediction.error is not None:
            if len(alike) > 1:  # memory may do for one at a time
                for read in alike:
                    read.prediction.error = None
                    waiting.append([read])
            continue
        for place, (prediction, _) in enumerate(alike):
            assert prediction.image is not None  # since it was prepared
            own, sizes = slice(place, place + 1), [(prediction.image.height, prediction.image.width)]
            with _errors_told_by(prediction):
                found = detector.processor.read_patch_maps(grids[own], scores[own], sizes, threshold, pixel_threshold)
                _complete(prediction, found[0])


@contextmanager
def _errors_told_by(*predictions: Prediction) -> Iterator[None]:
    """Have predictions say why they cannot be made: what does not fit the model, and what does not fit into memory."""
    try:
        yield
    except MoECLIPError:  # of the detector, and so of every image
        raise
    except (ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, ValueError):
            reason = str(error)
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            reason = "memory is too short for it: lower --batch-size or --image-size, or cut it into tiles (--tile)"
        else:
            raise
        for prediction in predictions:
            prediction.error = f"{prediction.path}: {reason}"


def _complete(prediction: Prediction, found: dict[str, Any]) -> None:
    prediction.score = found["score"]
    prediction.is_anomalous = found["is_anomalous"]
    prediction.anomaly_map = found["map"].cpu().numpy()
    prediction.regions = found["regions"]


def _batches(paths: Iterable[Path], size: int) -> Iterator[list[Path]]:
    """Paths in order, `size` at once, or fewer where their images are large."""
    batch: list[Path] = []
    pixels = 0
    for path in paths:
        more = _count_pixels(path)
        if batch and (len(batch) == size or pixels + more > _PIXELS_AT_ONCE):
            yield batch
            batch, pixels = [], 0
        batch.append(path)
        pixels += more
    if batch:
        yield batch


def _count_pixels(path: Path) -> int:
    try:
        return math.prod(image_size(path))
    except ValueError:  # reading it says why
        return 0
