"""Data sets that are a list in a file: the released `full-shot.jsonl`, and AnomalyCLIP's `meta.json`."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeclip_hf.data.records import Record, as_label
from moeclip_hf.data.registry import Domain, columns_of, find_benchmark
from moeclip_hf.errors import DatasetError


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
        DatasetError: the file cannot be read as an index, or files that it names are missing.
    """
    if not index.is_file():
        raise DatasetError(f"no such index file: {index}")
    rows = list(_read_jsonl(index, split) if index.suffix == ".jsonl" else _read_meta(index, split))
    if not rows:
        raise DatasetError(f"{index} lists no images for split '{split}'")
    _warn_of_duplicates(index, rows)
    _refuse_missing_files(index, data_dir, rows)
    records = [_record(row, data_dir, index.suffix == ".jsonl", domain) for row in rows]
    return sorted(records, key=lambda record: record.image_path)


def _read_jsonl(index: Path, split: str) -> Iterator[_Row]:
    if split != "test":
        raise DatasetError(f"{index} has no split '{split}': a .jsonl index is one list, its split is 'test'")
    for number, line in enumerate(index.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            where = f"{index}, line {number}"
            row = _parse(line, where)
            yield _row(row, where, image_key="image_path", label_key="label", class_key="class_name")


def _read_meta(index: Path, split: str) -> Iterator[_Row]:
    meta = _parse(index.read_text(encoding="utf-8-sig"), str(index))
    if split not in meta:
        raise DatasetError(f"{index} has no split '{split}'; it has {', '.join(map(str, meta))}")
    for class_name, rows in meta[split].items():
        for number, row in enumerate(rows):
            where = f"{index}, {split}, {class_name}, entry {number}"
            yield _row(row, where, image_key="img_path", label_key="anomaly", class_key="cls_name")


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
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
    return _Row(where, str(image), row.get("mask_path") or None, as_label(label, where), str(class_name))


def _warn_of_duplicates(index: Path, rows: list[_Row]) -> None:
    repeated = [path for path, times in Counter(row.image_path for row in rows).items() if times > 1]
    if repeated:
        warnings.warn(f"{index} lists {len(repeated)} images more than once, the first is {repeated[0]}", stacklevel=4)


def _refuse_missing_files(index: Path, data_dir: Path, rows: list[_Row]) -> None:
    paths = (path for row in rows for path in (row.image_path, row.mask_path) if path)
    missing = [path for path in paths if not (data_dir / path).is_file()]
    if missing:
        raise DatasetError(
            f"{index} names {len(missing)} files that are not in {data_dir}, the first is {missing[0]}; "
            "paths are relative to the data folder"
        )


def _record(row: _Row, data_dir: Path, named_in_path: bool, domain: Domain) -> Record:
    root_name = data_dir.resolve().name
    dataset, *folders = Path(row.image_path).parts
    if not named_in_path or (find_benchmark(dataset) is None and find_benchmark(root_name) is not None):
        dataset, folders = root_name, [dataset, *folders]
    return Record(
        image=str(data_dir / row.image_path),
        mask=str(data_dir / row.mask_path) if row.mask_path and row.label else None,
        label=row.label,
        image_path=Path(row.image_path).as_posix(),
        **columns_of(dataset, row.class_name, folders[0], domain),
    )
