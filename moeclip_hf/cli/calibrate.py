"""`moeclip calibrate`: choose thresholds and store them with a checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeclip_hf.cli.predict import Dtype
from moeclip_hf.cli.progress import progress_bar
from moeclip_hf.cli.usage import check_folder

if TYPE_CHECKING:
    from datasets import Dataset

_DATA = "Data set instead of images"
_CHOICE = "How thresholds are chosen"
_OUTPUT = "Where they are stored"

_FALSE_ALARM_RATE = 0.05


def calibrate(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Normal images: files, folders and glob patterns.", show_default=False),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option(
            help='What images, or those of a --data-dir of one class, show, such as "metal nut".',
            show_default="object",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of one's own with a folder a class, or of a benchmark.", rich_help_panel=_DATA),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Benchmark in --data-dir, index file, folder or Hub id.", rich_help_panel=_DATA)
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="With commas between.", show_default="all", rich_help_panel=_DATA)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help='Its part; "train" for normal training images.', show_default="test", rich_help_panel=_DATA),
    ] = None,
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of normal images that may be called anomalous.",
            show_default="0.05",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    pixel_false_alarm_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of normal images that may show a region.",
            show_default="--false-alarm-rate",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    best_f1: Annotated[
        bool, typer.Option("--best-f1", help="By a data set's labels and masks instead.", rich_help_panel=_CHOICE)
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or Hub id.", show_default="the embedded demonstration")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a checkpoint on the Hub.", show_default="main")] = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder for a calibrated copy of the checkpoint.", rich_help_panel=_OUTPUT)
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Into the checkpoint folder itself.", rich_help_panel=_OUTPUT)
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed at once.")] = 8,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.", show_default="the best there is")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type to compute in.", show_default="float16 on CUDA, else float32")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Choose the thresholds of verdicts and regions, and store them with a checkpoint.

    By default from normal images, which need no labels: at most the given share of *new* normal images like them is
    then called anomalous. 5 % takes at least 19 images, 1 % takes 99. Of a data set, normal images of all classes
    serve, or with --best-f1 all labelled ones.
    """
    _refuse_wrong_usage(images, data_dir, dataset, best_f1, model, output, in_place)
    if images and (classes or split):
        raise typer.BadParameter("--classes and --split are of a data set (--data-dir, --dataset), not of images")
    if best_f1 and not (false_alarm_rate is None and pixel_false_alarm_rate is None):
        raise typer.BadParameter("--best-f1 chooses by labels, and holds no false-alarm rate: leave one of them out")
    check_folder(output or Path(str(model)), "--output" if output else "--model")
    false_alarm_rate = _FALSE_ALARM_RATE if false_alarm_rate is None else false_alarm_rate

    from transformers.utils import logging

    from moeclip_hf import calibration
    from moeclip_hf.errors import MoECLIPError
    from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, load_pretrained

    logging.disable_progress_bar()
    if output is not None:
        calibration.refuse_filled_folder(output)
    source = str(model or EMBEDDED_CHECKPOINT)
    folder = output or Path(source)
    rows = _read_rows(images, class_name, dataset, data_dir, split or "test", classes)
    if not best_f1:
        rows = rows.select([index for index, label in enumerate(rows["label"]) if label == 0])
        for rate in (false_alarm_rate, pixel_false_alarm_rate):
            if rate is not None:  # too few images are refused before they are scored
                calibration.conformal_rank(len(rows), rate)
    pretrained = load_pretrained(model, device, dtype.value if dtype else None, revision)
    with progress_bar("scoring", quiet=as_json) as progress:
        scored = calibration.score_for_calibration(pretrained, rows, batch_size, best_f1, progress)
    if best_f1:
        thresholds = calibration.calibrate_from_labels(scored)
    else:
        thresholds = calibration.calibrate_from_normal(
            scored.scores, scored.map_maxima, false_alarm_rate, pixel_false_alarm_rate
        )
    try:
        if output is not None:
            # Of a Hub repository the commit that was scored, whatever its branch has become.
            commit = getattr(pretrained.model.config, "_commit_hash", None)
            calibration.copy_checkpoint(source, output, commit, thresholds)
        else:
            calibration.store_thresholds(folder, thresholds)
    except (MoECLIPError, OSError) as error:
        found = f"the thresholds are {thresholds.image} for images and {thresholds.pixel} for pixels"
        raise MoECLIPError(f"{str(error).removesuffix('.')}; {found}.") from error

    before = {"image": pretrained.processor.image_threshold, "pixel": pretrained.processor.pixel_threshold}
    facts: dict[str, Any] = {
        "normal_images": scored.labels.count(0),
        "anomalous_images": scored.labels.count(1),
        "by": "best F1" if best_f1 else "false-alarm rate",
        **({} if best_f1 else {"false_alarm_rate": false_alarm_rate}),
        **({} if best_f1 else {"pixel_false_alarm_rate": pixel_false_alarm_rate or false_alarm_rate}),
        "thresholds": asdict(thresholds),
        "before": before,
        "checkpoint": str(folder),
    }
    if as_json:
        print(json.dumps(facts))
    else:
        _report(facts)


def _refuse_wrong_usage(
    images: list[str] | None,
    data_dir: Path | None,
    dataset: str | None,
    best_f1: bool,
    model: str | None,
    output: Path | None,
    in_place: bool,
) -> None:
    if bool(images) == bool(data_dir or dataset):
        raise typer.BadParameter("name either images or a data set (--data-dir, --dataset)")
    if best_f1 and images:
        raise typer.BadParameter("--best-f1 takes a data set with labels: --data-dir with normal/ and abnormal/")
    if in_place == (output is not None):
        raise typer.BadParameter("say either --output DIR or --in-place")
    if in_place and not (model and Path(model).is_dir()):
        raise typer.BadParameter("--in-place takes a checkpoint folder as --model; others are copied to --output DIR")


def _read_rows(
    images: list[str] | None,
    class_name: str | None,
    dataset: str | None,
    data_dir: Path | None,
    split: str,
    classes: str | None,
) -> Dataset:
    from moeclip_hf.calibration import normal_images
    from moeclip_hf.data import load_data
    from moeclip_hf.data.registry import FALLBACK_PROMPT_NAME
    from moeclip_hf.prediction import find_images

    if images:
        files = {os.path.realpath(path): path for path in find_images(images)}  # one image a file, whatever its names
        return normal_images(files.values(), class_name or FALLBACK_PROMPT_NAME)
    wanted = classes.split(",") if classes else None
    return load_data(dataset or data_dir or "", data_dir, split, wanted, class_name=class_name)


def _report(facts: dict[str, Any]) -> None:
    thresholds, before = facts["thresholds"], facts["before"]
    counted = f"{facts['normal_images']} normal images"
    if facts["by"] == "best F1":
        typer.echo(f"From {counted} and {facts['anomalous_images']} anomalous ones, by best F1:")
        image, pixel = "verdicts", "regions"
    else:
        typer.echo(f"From {counted}:")
        image = f"at most {facts['false_alarm_rate']:.1%} of normal images called anomalous"
        pixel = f"at most {facts['pixel_false_alarm_rate']:.1%} of normal images with a region"
    typer.echo(f"  image threshold {thresholds['image']:.4f} (was {before['image']:.4f}): {image}")
    typer.echo(f"  pixel threshold {thresholds['pixel']:.4f} (was {before['pixel']:.4f}): {pixel}")
    typer.echo(f"Stored in {facts['checkpoint']}")
