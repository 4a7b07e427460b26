"""The work of the page without the page: reading what people drop on it, scoring it, drawing what was found."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image

from moeclip_hf.errors import MoECLIPError, UnreadableImageError
from moeclip_hf.explanation import explain
from moeclip_hf.modeling.image_processing_moeclip import FORMATS, LARGEST_ASPECT_RATIO
from moeclip_hf.prediction import Detection, detect, read_image
from moeclip_hf.pretrained import Pretrained, load_pretrained
from moeclip_hf.threads import read_ahead
from moeclip_hf.visualization import draw_attributions, draw_overlay, draw_routing

# Pixels of the longer side of pictures that are shown, not of what is scored.
SHOWN_EDGE = 1024
LONGEST_CLASS_NAME = 100  # characters; it takes time to cut a longer one down to what the text tower reads
# Thresholds are shown, and moved, in steps of this many digits.
_DIGITS = 3
EMBEDDED = "embedded demonstration"


@dataclass(frozen=True)
class ModelChoice:
    """A model by folder or Hub id, and its own thresholds, 0 to 1."""

    name: str
    image_threshold: float
    pixel_threshold: float

    @property
    def title(self) -> str:
        """What to call it; where a folder stands on the server is nobody's business."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name


@dataclass(frozen=True)
class Inspection:
    """
    An image and what was found in it.

    Args:
        path: of the file.
        picture: RGB, its longer side `SHOWN_EDGE` pixels at most.
        class_name, model: it was scored with; a name too long for the model is cut to what was read of it.
        detection: of the image at its full size.
    """

    path: Path
    picture: Image.Image
    class_name: str
    model: ModelChoice
    detection: Detection

    def is_anomalous(self, threshold: float) -> bool:
        """Whether the score reaches a threshold."""
        return self.detection.score >= threshold

    def overlay(self, regions: list[dict[str, Any]], pixel_threshold: float) -> Image.Image:
        """The picture with its map, and with frames around regions of the image."""
        width, height = self.picture.size
        scale = width / self.detection.image_size[1], height / self.detection.image_size[0]
        frames = [
            {"box": [round(edge * scale[axis % 2]) for axis, edge in enumerate(region["box"])]} for region in regions
        ]
        return draw_overlay(self.picture, self.detection.anomaly_map((height, width)), frames, pixel_threshold)


@dataclass(frozen=True)
class BatchRow:
    """A file of a batch, and the model's title: its score, 0 to 1, or why it could not be read."""

    file: str
    class_name: str
    model: str
    score: float | None = None
    error: str | None = None

    def verdict(self, threshold: float) -> str:
        """In a word."""
        if self.score is None:
            return "unreadable"
        return "anomalous" if self.score >= threshold else "normal"


class Inspector:
    """
    Scores images with one model of its own, and with others that are asked for by name.

    Args:
        model (`str`, *optional*): folder or Hub id of its own model; the embedded checkpoint by default.
        device (`str`, *optional*): such as `"cuda"`.
        max_megapixels (`float`): of an image; larger ones are refused before they are decoded.
        revision (`str`, *optional*): of its own model on the Hub.

    Raises:
        CheckpointError: if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | None = None,
        device: str | None = None,
        max_megapixels: float = 64,
        revision: str | None = None,
    ):
        self.device = device
        self.max_megapixels = max_megapixels
        # A batch that is stopped leaves its last step running while the next event begins, and to explain is to
        # listen in on the model.
        self._model_in_use = Lock()
        self._own = self._load(model or EMBEDDED, revision)
        self._last = self._own
        self.model = _describe(*self._own)

    def choose(self, name: str) -> ModelChoice:
        """
        Load a model, in place of the last one that was asked for.

        Args:
            name (`str`): folder or Hub id; empty for the embedded checkpoint.

        Raises:
            CheckpointError: if it cannot be loaded.
        """
        name = name.strip() or EMBEDDED
        return _describe(name, self._pretrained(name))

    def inspect(self, path: Path, class_name: str, model: ModelChoice) -> Inspection:
        """
        Score an image file.

        Raises:
            UnreadableImageError: as [`read_upload`].
            MoECLIPError: for a class name that is none, or too long.
        """
        pretrained = self._pretrained(model.name)
        class_name, anchors = self._encode_class(pretrained, class_name)
        image = read_upload(path, self.max_megapixels)
        with self._model_in_use:
            detection = detect(pretrained, image, anchors)
        return Inspection(path, shrink(image, SHOWN_EDGE), class_name, model, detection)

    def explain(self, inspection: Inspection) -> tuple[Image.Image, Image.Image]:
        """
        Draw what the experts do with an image: the routing, and what each adds to the map.

        Raises:
            UnreadableImageError: if the file is gone.
            CheckpointError: if the model has no experts of its own.
        """
        pretrained = self._pretrained(inspection.model.name)
        image = read_upload(inspection.path, self.max_megapixels)
        with self._model_in_use:
            explanation = explain(pretrained, image, inspection.class_name)
        return draw_routing(explanation, pretrained.processor.pixel_threshold), draw_attributions(explanation)

    def score(self, paths: Iterable[Path], class_name: str, model: ModelChoice) -> Iterator[BatchRow]:
        """
        Score image files one after the other, the next ones being read meanwhile.

        A file that cannot be read yields a row with the reason.

        Raises:
            MoECLIPError: for a class name that is none, or too long.
        """
        pretrained = self._pretrained(model.name)
        class_name, anchors = self._encode_class(pretrained, class_name)

        def read(path: Path) -> tuple[Path, Image.Image | UnreadableImageError]:
            try:
                return path, read_upload(path, self.max_megapixels)
            except UnreadableImageError as error:
                return path, error

        for path, image in read_ahead(read, paths, depth=2):
            if isinstance(image, UnreadableImageError):
                yield BatchRow(path.name, class_name, model.title, error=str(image))
            else:
                with self._model_in_use:
                    score = detect(pretrained, image, anchors).score
                yield BatchRow(path.name, class_name, model.title, score)

    def _pretrained(self, name: str) -> Pretrained:
        if name == self._own[0]:
            return self._own[1]
        if name != self._last[0]:
            self._last = self._load(name)
        return self._last[1]

    def _encode_class(self, pretrained: Pretrained, class_name: str) -> tuple[str, torch.Tensor]:
        """The name as it is read, which may be cut, for people to see, and its anchors."""
        if len(class_name) > LONGEST_CLASS_NAME:
            raise MoECLIPError(f"a class name has {LONGEST_CLASS_NAME} characters at most, not {len(class_name)}")
        with self._model_in_use:  # the tokenizer, too, does one thing at a time, or raises "Already borrowed"
            anchors = pretrained.encode_class(class_name)
            return pretrained.processor.fit_class_name(class_name), anchors

    def _load(self, name: str, revision: str | None = None) -> tuple[str, Pretrained]:
        return name, load_pretrained(None if name == EMBEDDED else name, self.device, revision=revision)


def _describe(name: str, pretrained: Pretrained) -> ModelChoice:
    return ModelChoice(name, pretrained.processor.image_threshold, pretrained.processor.pixel_threshold)


def read_upload(path: Path, max_megapixels: float) -> Image.Image:
    """
    Read an image file that a stranger may have sent, upright and in RGB; its size is checked before it is decoded.

    Raises:
        UnreadableImageError: naming the file, without its folder, and the reason.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except FileNotFoundError:
        raise UnreadableImageError(f"{path.name}: is no longer here: upload it again") from None
    except Image.DecompressionBombError:
        raise UnreadableImageError(f"{path.name}: has more pixels than are taken here") from None
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UnreadableImageError(f"{path.name}: cannot be read as an image ({kinds})") from error
    if width * height > max_megapixels * 1e6:
        raise UnreadableImageError(
            f"{path.name}: has {width} x {height} pixels, and {max_megapixels:g} megapixels are taken here at most"
        )
    if max(width, height) > LARGEST_ASPECT_RATIO * min(width, height):
        raise UnreadableImageError(
            f"{path.name}: has {width} x {height} pixels: a side may be {LARGEST_ASPECT_RATIO} times the other at most"
        )
    try:
        return read_image(path)
    except UnreadableImageError as error:
        raise UnreadableImageError(str(error).replace(str(path), path.name)) from error


def shrink(image: Image.Image, edge: int) -> Image.Image:
    """A copy whose longer side has `edge` pixels at most."""
    small = image.copy()
    small.thumbnail((edge, edge))
    return small


def shown_threshold(own: float) -> float:
    """A checkpoint's threshold as a slider shows it."""
    return round(own, _DIGITS)


def threshold_meant(shown: float, own: float) -> float:
    """The threshold that a slider stands for: the checkpoint's own, digit by digit, until it is moved."""
    return own if shown == shown_threshold(own) else shown


def batch_csv(rows: Iterable[BatchRow], threshold: float) -> str:
    """
    A table of a batch for spreadsheets: file, class, model, score, verdict, threshold, error.

    A cell that a spreadsheet would take for a formula is preceded by an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("file", "class_name", "model", "score", "verdict", "threshold", "error"))
    for row in rows:
        score = "" if row.score is None else f"{row.score:.6f}"
        verdict = row.verdict(threshold)
        cells = (row.file, row.class_name, row.model, score, verdict, f"{threshold:.6f}", row.error or "")
        writer.writerow(
            [f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell for cell in cells]
        )
    return text.getvalue()


__all__ = [
    "EMBEDDED",
    "LONGEST_CLASS_NAME",
    "BatchRow",
    "Inspection",
    "Inspector",
    "ModelChoice",
    "batch_csv",
    "read_upload",
    "shown_threshold",
    "shrink",
    "threshold_meant",
]
