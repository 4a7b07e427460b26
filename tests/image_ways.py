"""The ways of an image file into a model: each scores files, or says why one of them is refused."""

import base64
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from moeclip_hf import MoECLIPConfig, MoECLIPModel, MoECLIPProcessor
from moeclip_hf.app.inspector import Inspector
from moeclip_hf.cli import app
from moeclip_hf.data import check_rows
from moeclip_hf.data.records import Record, to_dataset
from moeclip_hf.modeling import handler
from moeclip_hf.modeling.pipeline_moeclip import ZeroShotAnomalyDetectionPipeline
from moeclip_hf.prediction import detect
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, Pretrained, load_pretrained
from moeclip_hf.reading import leave_undecoded, read_row

CLASS_NAME = "wood"
# Of the model's input, in patches; what is tried is how files are read.
GRID = 6
_FOLDER = TemporaryDirectory()

Outcomes = dict[str, float | str]
"""By name of a file: its score, or why it was refused."""


@cache
def small_checkpoint() -> Path:
    """The embedded checkpoint's first blocks, with a small input: some hundred times as quick, and as particular."""
    folder = Path(_FOLDER.name)
    config = MoECLIPConfig.from_pretrained(EMBEDDED_CHECKPOINT)
    first = config.feature_layers[0]
    shorter = {"feature_layers": [first], "moe_layers": config.moe_layers[:1], "image_feature_layer": first}
    MoECLIPModel.from_pretrained(EMBEDDED_CHECKPOINT, **shorter).save_pretrained(folder)
    processor = MoECLIPProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    edge = GRID * processor.image_processor.patch_size
    processor.image_processor.size = {"height": edge, "width": edge}
    processor.save_pretrained(folder)
    return folder


@cache
def pretrained() -> Pretrained:
    return load_pretrained(small_checkpoint(), device="cpu")


@cache
def detecting() -> ZeroShotAnomalyDetectionPipeline:
    return pipeline("zero-shot-anomaly-detection", model=str(small_checkpoint()), device="cpu", dtype=torch.float32)


@cache
def endpoint() -> handler.EndpointHandler:
    return handler.EndpointHandler(str(small_checkpoint()))


@cache
def inspector() -> Inspector:
    return Inspector(str(small_checkpoint()), device="cpu")


def score_or_reason(score: Callable[[], float]) -> float | str:
    try:
        return score()
    except ValueError as error:
        return str(error)


@cache
def anchors() -> torch.Tensor:
    return pretrained().encode_class(CLASS_NAME)


@cache
def score_of_bytes(content: bytes, width: int) -> float:
    picture = np.frombuffer(content, dtype=np.uint8).reshape(-1, width, 3)
    return detect(pretrained(), Image.fromarray(picture), anchors()).score


def score_of_picture(picture: np.ndarray) -> float:
    return score_of_bytes(picture.astype(np.uint8).tobytes(), picture.shape[1])


def by_command(files: list[Path]) -> Outcomes:
    options = ["--class-name", CLASS_NAME, "--model", str(small_checkpoint()), "--json", "--no-overlays"]
    done = CliRunner().invoke(app, ["predict", *map(str, files), *options, "--device", "cpu"])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    outcomes = {Path(row["image"]).name: row.get("error", row["score"]) for row in rows}
    refused = [reason for reason in outcomes.values() if isinstance(reason, str)]
    assert done.exit_code == bool(refused), done.exception
    said = [line for line in done.stderr.splitlines() if line.startswith("moeclip: ")]
    assert len(said) == len(refused)
    return outcomes


def by_pipeline(files: list[Path]) -> Outcomes:
    return {
        file.name: score_or_reason(lambda file=file: detecting()(str(file), class_name=CLASS_NAME)["score"])
        for file in files
    }


def by_handler(files: list[Path]) -> Outcomes:
    parameters = {"class_name": CLASS_NAME}

    def answer(file: Path) -> float:
        encoded = base64.b64encode(file.read_bytes()).decode()
        return endpoint()({"inputs": encoded, "parameters": parameters})["score"]

    return {file.name: score_or_reason(lambda file=file: answer(file)) for file in files}


def by_page(files: list[Path]) -> Outcomes:
    rows = inspector().score(files, CLASS_NAME, inspector().model)
    return {row.file: row.error if row.score is None else row.score for row in rows}


def by_data_set(files: list[Path]) -> Outcomes:
    """As evaluation, calibration and training read their rows; of every second one the data set holds the bytes."""
    names = {"class_name": CLASS_NAME, "prompt_name": CLASS_NAME, "group": CLASS_NAME, "dataset": "d"}
    records = [Record(str(file), None, 0, domain="industrial", image_path=file.name, **names) for file in files]
    by_path = to_dataset(records)
    stored = [
        {**row, "image": {"path": None, "bytes": file.read_bytes()} if number % 2 else row["image"]}
        for number, (file, row) in enumerate(zip(files, leave_undecoded(by_path), strict=True))
    ]
    rows = leave_undecoded(by_path.from_list(stored, features=by_path.features))
    outcomes = {
        file.name: score_or_reason(
            lambda index=index: detect(pretrained(), read_row(rows, index)["image"], anchors()).score
        )
        for index, file in enumerate(files)
    }
    refused = {name for name, outcome in outcomes.items() if isinstance(outcome, str)}
    assert {problem.path for _, problem in check_rows(rows, range(len(rows)))} == refused
    return outcomes


WAYS = {
    "command": by_command,
    "pipeline": by_pipeline,
    "handler": by_handler,
    "page": by_page,
    "data set": by_data_set,
}


def write(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]
