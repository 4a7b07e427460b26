"""Data sets that are a list in a file: the released `full-shot.jsonl`, and AnomalyCLIP's `meta.json`."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeclip_hf.data.layouts import path_within
from moeclip_hf.data.records import Record, as_label
from moeclip_hf.data.registry import Domain, columns_of, find_benchmark
from moeclip_hf.errors import DatasetError, MoECLIPWarning


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    image_path: str
    mask_path: str | None
    label: int
    class_name: str


def index_records(index: Path, data_dir: Path, split: str, domain: Domain) -> list[Record]:
    """The images of an index file, sorted by path.

    A `.jsonl` file has one object a line: `image_path`, `label` (0 or 1), `class_name`, and `mask_path` where there is
    a mask; the first folder of `image_path` names the data set (unless only `data_dir` bears a benchmark's name). A
    `.json` file is AnomalyCLIP's, `{"train" | "test": {class: [{"img_path", "mask_path", "cls_name", "specie_name",
    "anomaly"}]}}`; the folder `data_dir` names the data set. Paths are relative to `data_dir`.

    Args:
        index: the index file.
        data_dir: what its paths are relative to.
        split: the split of a `.json` file; a `.jsonl` file has only "test".
        domain: "industrial" or "medical", for data sets that are not benchmarks.

    Raises:
        DatasetError: the file cannot be read as an index, files that it names are missing or not below `data_dir`, or
            an image has two labels.
    """
    if not index.is_file():
        raise DatasetError(f"no such index file: {index}")
    rows = list(_read_jsonl(index, split) if index.suffix == ".jsonl" else _read_meta(index, split))
    if not rows:
        raise DatasetError(f"{index} lists no images for split '{split}'")
    _check_duplicates(index, rows)
    _refuse_missing_files(index, data_dir, rows)
    records = [_record(row, data_dir, index.suffix == ".jsonl", domain) for row in rows]
    return sorted(records, key=lambda record: record.image_path)


def _read_jsonl(index: Path, split: str) -> Iterator[_Row]:
    if split != "test":
        raise DatasetError(f"{index} has no split '{split}': a .jsonl index is one list, its split is 'test'")
    for number, line in enumerate(_read_text(index).split("\n"), start=1):
        if line.strip():
            where = f"{index}, line {number}"
            row = _parse(line, where)
            yield _row(row, where, image_key="image_path", label_key="label", class_key="class_name")


def _read_meta(index: Path, split: str) -> Iterator[_Row]:
    meta = _parse(_read_text(index), str(index))
    if split not in meta:
        raise DatasetError(f"{index} has no split '{split}'; it has {', '.join(map(str, meta))}")
    classes = meta[split]
    if not isinstance(classes, dict) or not all(isinstance(rows, list) for rows in classes.values()):
        raise DatasetError(f"{index}: split '{split}' must be an object of classes, each a list of images")
    for class_name, rows in classes.items():
        for number, row in enumerate(rows):
            where = f"{index}, {split}, {class_name}, entry {number}"
            yield _row(row, where, image_key="img_path", label_key="anomaly", class_key="cls_name")


def _read_text(index: Path) -> str:
    try:
        return index.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{index}: is not UTF-8 (byte {error.start})") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in brackets
        raise DatasetError(f"{where}: not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _row(row: Mapping[str, Any], where: str, image_key: str, label_key: str, class_key: str) -> _Row:
    try:
        image, label, class_name = row[image_key], row[label_key], row[class_key]
    except (KeyError, TypeError):
        raise DatasetError(
            f"{where}: an entry has '{image_key}', '{label_key}' and '{class_key}', not {row}"
        ) from None
    mask = row.get("mask_path") or None
    for name in (image, class_name, mask or ""):
        if not isinstance(name, str):
            raise DatasetError(f"{where}: paths and classes are text, not {name!r}")
    if not image:
        raise DatasetError(f"{where}: names no image")
    return _Row(where, image, mask, as_label(label, where), class_name)


def _check_duplicates(index: Path, rows: list[_Row]) -> None:
    labels = dict.fromkeys((row.image_path, row.label) for row in rows)
    if both := [path for path, count in Counter(path for path, _ in labels).items() if count > 1]:
        raise DatasetError(f"{index} lists {len(both)} images as normal and as anomalous, the first is {both[0]}")
    if repeated := [path for path, times in Counter(row.image_path for row in rows).items() if times > 1]:
        text = f"{index} lists {len(repeated)} images more than once, the first is {repeated[0]}"
        warnings.warn(text, MoECLIPWarning, stacklevel=4)


def _refuse_missing_files(index: Path, data_dir: Path, rows: list[_Row]) -> None:
    paths = ((path, row.where) for row in rows for path in (row.image_path, row.mask_path) if path)
    missing = [path for path, where in paths if not os.path.isfile(path_within(data_dir, path, where))]
    if missing:
        raise DatasetError(
            f"{index} names {len(missing)} files that are not in {data_dir}, the first is {missing[0]}; "
            "paths are relative to the data folder"
        )


def _record(row: _Row, data_dir: Path, named_in_path: bool, domain: Domain) -> Record:
    root_name = data_dir.resolve().name
    dataset, *folders = Path(row.image_path).parts
    in_path = named_in_path and folders and (find_benchmark(dataset) or not find_benchmark(root_name))
    if not in_path:
        dataset, folders = root_name, [dataset, *folders]
    return Record(
        image=str(data_dir / row.image_path),
        mask=str(data_dir / row.mask_path) if row.mask_path and row.label else None,
        label=row.label,
        image_path=Path(row.image_path).as_posix(),
        **columns_of(dataset, row.class_name, folders[0], domain),
    )
