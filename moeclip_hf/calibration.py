"""Thresholds of verdicts and regions: by a false-alarm rate from normal images, or by best F1 from labelled ones."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from moeclip_hf.data import LABELS, Record, read_mask
from moeclip_hf.data.records import to_dataset
from moeclip_hf.errors import CheckpointError, MoECLIPError, UnreadableImageError
from moeclip_hf.histogram import ScoreHistogram
from moeclip_hf.model_card import renew_thresholds
from moeclip_hf.modeling.processing_moeclip import patch_maps, upsample
from moeclip_hf.pretrained import ADAPTER_CONFIG, CONFIG, PUBLISHED_FILES, Pretrained
from moeclip_hf.reading import leave_undecoded, read_row
from moeclip_hf.threads import read_ahead
from moeclip_hf.writing import telling_what_cannot_be_written, whole_file, write_whole

if TYPE_CHECKING:
    from datasets import Dataset

_PROCESSOR_FILE = "processor_config.json"
_CARD = "README.md"
_COPIED = (*PUBLISHED_FILES, "*.py")
_NAMED = 10


@dataclass(frozen=True)
class Thresholds:
    """From where on an image's score (`image`) and a map's pixels (`pixel`) are anomalous."""

    image: float
    pixel: float


@dataclass
class CalibrationScores:
    """
    What thresholds are chosen from: n images as a checkpoint scores them one by one.

    Args:
        scores: (n,) of the images, 0 to 1.
        map_maxima: (n,) of their maps on the patch grid, which no map of another size exceeds.
        labels: (n,) 0 normal, 1 anomalous.
        normal_pixels, anomalous_pixels: of the maps at the images' own sizes, where masks tell them apart.
    """

    scores: list[float] = field(default_factory=list)
    map_maxima: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    normal_pixels: ScoreHistogram = field(default_factory=ScoreHistogram)
    anomalous_pixels: ScoreHistogram = field(default_factory=ScoreHistogram)


class _Sample(NamedTuple):
    """What is kept of an image until it is scored: pixels as prepared, (1, 3, h, w), its size (H, W) and mask."""

    label: int
    prompt_name: str
    pixel_values: torch.Tensor
    size: tuple[int, int]
    mask: NDArray[np.bool_] | None


def conformal_threshold(scores: ArrayLike, false_alarm_rate: float) -> float:
    """
    The threshold that a new normal score reaches with a probability of at most `false_alarm_rate`: split conformal.

    Let s_(1) <= ... <= s_(n) be the normal scores, S a new one exchangeable with them, k = ceil((n + 1)(1 - rate)).
    Without ties the rank of S among all n + 1 is uniform, so P(S <= s_(k)) = k / (n + 1) >= 1 - rate; ties only add
    to it. A score that *equals* its threshold is anomalous here, so the threshold is the next float32 above s_(k).
    Float32 scores, as checkpoints give, reach it just if S > s_(k), scores of more digits only if, and
    P(S > s_(k)) <= rate. Without ties P(S > s_(k)) > rate - 1 / (n + 1) besides: no more is given away.

    That is the probability over the draw of all n + 1 scores. What a single calibration holds scatters around it, the
    less the more images there are.

    Args:
        scores: (n,) of normal images that were *not* trained on.
        false_alarm_rate: over 0 and below 1.

    Raises:
        MoECLIPError: if the rate is out of range, or if n < 1 / rate - 1: then s_(k) does not exist.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    rank = conformal_rank(len(ordered), false_alarm_rate)
    return float(np.nextafter(np.float32(ordered[rank - 1]), np.float32(np.inf)))


def conformal_rank(number: int, false_alarm_rate: float) -> int:
    """
    Which of so many normal scores a threshold stands on: k of [`conformal_threshold`], from 1 for the lowest.

    Args:
        number: n, of the normal images.
        false_alarm_rate: over 0 and below 1.

    Raises:
        MoECLIPError: if the rate is out of range, or if n < 1 / rate - 1.
    """
    if not 0 < false_alarm_rate < 1:
        raise MoECLIPError(f"the false-alarm rate must lie between 0 and 1, both excluded, not {false_alarm_rate}")
    # As written in decimals: 0.29 stands for 29/100, though its float, times 100, is below 29.
    rate = Fraction(str(float(false_alarm_rate)))
    rank = math.ceil((number + 1) * (1 - rate))
    if rank > number:
        needed = math.ceil(1 / rate) - 1
        raise MoECLIPError(
            f"a false-alarm rate of {false_alarm_rate:g} takes at least {needed} normal images, and there are "
            f"{number}: add images, or allow a rate of at least {1 / (number + 1):.3g}"
        )
    return rank


def calibrate_from_normal(
    scores: ArrayLike, map_maxima: ArrayLike, false_alarm_rate: float, pixel_false_alarm_rate: float | None = None
) -> Thresholds:
    """
    Thresholds that hold false-alarm rates on normal images like the given ones; see [`conformal_threshold`].

    What is exchangeable is an image, not a pixel: pixels of one image are alike. So the pixel threshold holds the
    share of normal images that show any region at all, that is, whose map's maximum reaches it.

    Args:
        scores: (n,) of normal images.
        map_maxima: (n,) of their maps.
        false_alarm_rate: share of normal images that may be called anomalous.
        pixel_false_alarm_rate: share of normal images that may show a region; `false_alarm_rate` by default.

    Raises:
        MoECLIPError: if a rate is out of range, or there are too few images for it.
    """
    pixel_rate = false_alarm_rate if pixel_false_alarm_rate is None else pixel_false_alarm_rate
    return Thresholds(
        conformal_threshold(scores, false_alarm_rate),
        conformal_threshold(map_maxima, pixel_rate),
    )


def calibrate_from_labels(scored: CalibrationScores) -> Thresholds:
    """
    Thresholds of best F1 on labelled images: of the verdicts, and of the pixels where there are masks.

    Without masks, the pixel threshold is the one at which showing a region tells anomalous images best.

    Raises:
        MoECLIPError: if there are images of one kind only.
    """
    labels = np.asarray(scored.labels)
    if len(set(scored.labels)) < 2:
        present = LABELS[scored.labels[0]] if scored.labels else "no"
        raise MoECLIPError(f"best F1 takes normal and anomalous images, and there are only {present} ones")
    normal_pixels, anomalous_pixels = scored.normal_pixels, scored.anomalous_pixels
    if not anomalous_pixels.pixels:
        normal_pixels, anomalous_pixels = _split_by_label(scored.map_maxima, labels)
    return Thresholds(
        best_f1_threshold(*_split_by_label(scored.scores, labels)),
        best_f1_threshold(normal_pixels, anomalous_pixels),
    )


def best_f1_threshold(normal: ScoreHistogram, anomalous: ScoreHistogram) -> float:
    """
    The score of an anomalous item from which on F1 = 2 TP / (2 TP + FP + FN) is best; the highest of several.

    Lowering a threshold between two such scores adds false positives alone, so no other threshold does better.

    Raises:
        MoECLIPError: if there is no anomalous item.
    """
    table = anomalous.table()
    if table is None:
        raise MoECLIPError("best F1 takes anomalous images")
    _, false_positives = normal.count_from(table.scores)
    true_positives = np.cumsum(table.pixels)
    f1 = 2 * true_positives / (true_positives[-1] + true_positives + false_positives)
    return float(table.scores[np.argmax(f1)])


def normal_images(paths: Iterable[Path], class_name: str) -> Dataset:
    """Image files as a data set of one class of normal images; `class_name` fills the prompts as it is."""
    columns = {"class_name": class_name, "prompt_name": class_name, "group": class_name, "dataset": "images"}
    return to_dataset(
        [Record(str(path), None, 0, domain="industrial", image_path=str(path), **columns) for path in paths]
    )


def score_for_calibration(
    pretrained: Pretrained,
    rows: Dataset,
    batch_size: int = 8,
    with_pixels: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationScores:
    """
    Score a data set's images as `predict` does, each from itself and the checkpoint alone.

    Args:
        pretrained ([`Pretrained`]): from [`load_pretrained`].
        rows: with the columns of `moeclip_hf.data.Record`, from [`moeclip_hf.data.load_data`].
        batch_size: images computed at once.
        with_pixels: also collect the pixels of images whose mask is known.
        progress: told the number of images scored so far, and their total.

    Raises:
        UnreadableImageError: naming the images that cannot be read; from the first on, the others are only read.
        MoECLIPError: where the model gives NaN.
    """
    model, processor = pretrained
    if "shortest_edge" in processor.image_processor.size:
        batch_size = 1  # images keep their aspect ratios, and unlike ones make no batch
    scored = CalibrationScores()
    anchors = {name: pretrained.encode_class(name) for name in dict.fromkeys(rows["prompt_name"])}

    stored = leave_undecoded(rows)

    def read(index: int) -> _Sample | UnreadableImageError:
        try:
            row = read_row(stored, index)
        except UnreadableImageError as error:
            return error
        image = row["image"]
        try:
            pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
        except ValueError as error:  # a strip whose aspect ratio is to be kept
            return UnreadableImageError(f"{row['image_path']}: {error}")
        mask = read_mask(row) if with_pixels else None
        return _Sample(row["label"], row["prompt_name"], pixel_values, (image.height, image.width), mask)

    batch: list[_Sample] = []
    unreadable: list[str] = []
    for done, sample in enumerate(read_ahead(read, range(len(rows)), depth=2 * batch_size), start=1):
        if isinstance(sample, UnreadableImageError):
            unreadable.append(str(sample))
        else:
            batch.append(sample)
        if unreadable:
            batch.clear()  # nothing will come of scores
        if not batch or (len(batch) < batch_size and done < len(rows)):
            continue
        samples, batch = batch, []
        with torch.inference_mode():
            outputs = model(
                torch.cat([sample.pixel_values for sample in samples]).to(model.device, model.dtype),
                text_embeds=torch.cat([anchors[sample.prompt_name] for sample in samples]),
            )
        try:
            results = processor.post_process_anomaly_detection(outputs)
        except ValueError as error:  # NaN
            raise MoECLIPError(str(error)) from error
        scored.scores += [result["score"] for result in results]
        scored.map_maxima += [float(result["map"].max()) for result in results]
        scored.labels += [sample.label for sample in samples]
        if with_pixels:
            _collect_pixels(scored, pretrained, outputs, samples)
        if progress is not None:
            progress(done, len(rows))
    if unreadable:
        more = f" And {len(unreadable) - _NAMED} others." if len(unreadable) > _NAMED else ""
        raise UnreadableImageError(f"{' '.join(unreadable[:_NAMED])}{more}")
    return scored


def store_thresholds(folder: Path, thresholds: Thresholds) -> None:
    """
    Write thresholds into a checkpoint folder's processor, whole or not at all, and into its card where that tells
    them; nothing else of it changes.

    Raises:
        CheckpointError: if the folder holds no processor.
        MoECLIPError: if it cannot be written, as on a full disk.
    """
    path = folder / _PROCESSOR_FILE
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {_PROCESSOR_FILE}: save its processor there with MoECLIPProcessor.save_pretrained"
        ) from None
    settings |= {"image_threshold": thresholds.image, "pixel_threshold": thresholds.pixel}
    write_whole(path, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    card = folder / _CARD
    if card.is_file():
        told = card.read_bytes().decode("utf-8", "surrogateescape")
        renewed = renew_thresholds(told, thresholds.image, thresholds.pixel)
        if renewed != told:
            write_whole(card, renewed.encode("utf-8", "surrogateescape"))


def copy_checkpoint(
    source: str | Path, output: Path, revision: str | None = None, thresholds: Thresholds | None = None
) -> None:
    """
    Copy what makes a checkpoint, with its card, from a folder or a Hub repository. The copy is there whole or not at
    all.

    Pickles and folders stay behind, such as the checkpoints of a run that ended in the one that is copied. Code that a
    repository carries for those who have not this package is copied, and not run.

    Args:
        source: a folder, or a Hub id.
        output: the new folder.
        revision: of a Hub repository.
        thresholds (*optional*): for the copy's processor.

    Raises:
        CheckpointError: if the output folder is not empty.
        MoECLIPError: if it cannot be written, as on a full disk.
    """
    refuse_filled_folder(output)
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(str(source), revision=revision, allow_patterns=list(_COPIED), ignore_patterns="*/*")
    files = [file for file in sorted(Path(source).iterdir()) if file.is_file() and _is_copied(file.name)]
    # Last, when all else is there: without it the folder is no checkpoint.
    settings = [file for file in files if file.name in (CONFIG, ADAPTER_CONFIG)]
    is_new = not output.exists()
    try:
        with telling_what_cannot_be_written(output):
            output.mkdir(parents=True, exist_ok=True)
        _copy([file for file in files if file not in settings], output)
        if thresholds is not None:
            store_thresholds(output, thresholds)
        _copy(settings, output)
    except BaseException:
        for file in files:
            (output / file.name).unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):
                output.rmdir()
        raise


def _is_copied(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _COPIED)


def _copy(files: Iterable[Path], output: Path) -> None:
    for file in files:
        with whole_file(output / file.name) as partial:
            shutil.copy(file, partial)


def refuse_filled_folder(output: Path) -> None:
    """
    Refuse a folder that a checkpoint cannot be copied to.

    Raises:
        CheckpointError: if it is not empty, or a file.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: is not an empty folder: name another")


def _split_by_label(values: list[float], labels: np.ndarray) -> tuple[ScoreHistogram, ScoreHistogram]:
    normal, anomalous = ScoreHistogram(), ScoreHistogram()
    normal.add(np.asarray(values)[labels == 0])
    anomalous.add(np.asarray(values)[labels == 1])
    return normal, anomalous


def _collect_pixels(
    scored: CalibrationScores, pretrained: Pretrained, outputs: Any, samples: Sequence[_Sample]
) -> None:
    """Count the pixels of the images whose masks are known; one map at a time is as large as its image."""
    grids, _ = patch_maps(outputs, pretrained.processor.domain)
    for sample, grid in zip(samples, grids, strict=True):
        if sample.mask is not None:
            anomaly_map = upsample(grid.unsqueeze(0), sample.size)[0].cpu().numpy()
            scored.normal_pixels.add(anomaly_map[~sample.mask])
            scored.anomalous_pixels.add(anomaly_map[sample.mask])


__all__ = [
    "CalibrationScores",
    "Thresholds",
    "best_f1_threshold",
    "calibrate_from_labels",
    "calibrate_from_normal",
    "conformal_rank",
    "conformal_threshold",
    "copy_checkpoint",
    "normal_images",
    "refuse_filled_folder",
    "score_for_calibration",
    "store_thresholds",
]
