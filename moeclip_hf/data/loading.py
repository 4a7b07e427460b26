"""The way in: `load_data` reads a benchmark, folder, index file or Hub data set into one kind of `Dataset`.

Its rows are described by `moeclip_hf.data.records.Record`; `read_mask(row)` gives a row's mask.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moeclip_hf.data.hub import is_datasets_folder, load_hub, refuse_unknown
from moeclip_hf.data.indexes import index_records
from moeclip_hf.data.records import Record, to_dataset
from moeclip_hf.data.registry import FALLBACK_PROMPT_NAME, Domain, find_benchmark, get_benchmark
from moeclip_hf.data.trees import folder_records, missing_classes, read_benchmark
from moeclip_hf.errors import DatasetError

if TYPE_CHECKING:
    import datasets


def load_data(
    source: str | Path,
    data_dir: str | Path | None = None,
    split: str = "test",
    classes: Collection[str] | None = None,
    *,
    class_name: str | None = None,
    domain: Domain = "industrial",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Read images, masks, labels and class names from whatever `source` is.

    Args:
        source: in this order: the name or an alias of a benchmark (needs `data_dir`); an index file, `.jsonl` or
            `.json`; a folder, as `load_folder` describes or of the `datasets` library; the id of a Hub data set.
        data_dir: a benchmark's root or the folder above it; what an index file's paths are relative to (its own folder
            by default).
        split: "test"; "train" for the normal training images of a tree; any split of a Hub data set.
        classes: the classes to read, all by default.
        class_name: what the images of a folder of one class show, and the prompts say; "object" by default. Other data
            name their classes.
        domain: "industrial" or "medical", for data that is not a benchmark's.
        streaming: read a Hub data set while iterating; gives an `IterableDataset`.

    Returns:
        rows with `image`, `mask`, `label`, `class_name`, `prompt_name`, `group`, `dataset`, `domain`, `image_path`, in
        sorted order (in its own order from a Hub data set).

    Raises:
        DatasetError: there is nothing to read there, or not as it should be.
    """
    name, path = str(source), Path(source)
    if class_name is not None:
        return _load_class(path, split, classes, class_name, domain)
    if not isinstance(source, Path) and find_benchmark(name) is not None:
        if data_dir is None:
            raise DatasetError(
                f"benchmark '{name}' needs the folder that holds it (for a folder of that name: ./{name})"
            )
        return load_benchmark(name, data_dir, split, classes)
    if path.suffix in (".json", ".jsonl") and not path.is_dir():
        return load_index(path, data_dir, split, classes, domain=domain)
    if path.is_dir() and not is_datasets_folder(path):
        return load_folder(path, split, classes, domain=domain)
    if path.is_dir() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return load_hub(name, split, classes, domain=domain, streaming=streaming)
    if "/" in name:
        raise DatasetError(f"no such folder: {name}")
    return load_benchmark(name, data_dir or "", split, classes)


def _load_class(
    root: Path, split: str, classes: Collection[str] | None, class_name: str, domain: Domain
) -> datasets.Dataset:
    """Read a folder of one class, which has no name of its own; the given one fills the prompts as it is."""
    if not root.is_dir():
        raise DatasetError(f"{root}: is no folder of one class, which alone is given a class name ({class_name!r})")
    records = _records_of(folder_records(root, split, class_name, domain, classes), classes)
    if named := sorted({record.class_name for record in records} - {class_name}):
        raise DatasetError(
            f"{root}: its classes go by the names of their folders ({', '.join(named)}), and not by {class_name!r}: "
            "leave the class name out, or rename the folders"
        )
    return _present([replace(record, prompt_name=class_name) for record in records])


def load_benchmark(
    name: str, data_dir: str | Path, split: str = "test", classes: Collection[str] | None = None
) -> datasets.Dataset:
    """Read a benchmark from its own tree.

    Args:
        name: its name or an alias.
        data_dir: its root, or a folder that holds it under its name or an alias.
        split: "test", or "train" for the normal training images where the tree has them.
        classes: the classes to read, all by default.

    Raises:
        DatasetError: no such benchmark, tree, class or split; classes or files that are missing on disk; an image with
            two masks.
    """
    benchmark = get_benchmark(name)
    records = read_benchmark(benchmark, Path(data_dir), split, classes)
    if missing := missing_classes(benchmark.classes if classes is None else classes, records):
        raise DatasetError(
            f"{data_dir} lacks {benchmark.name}'s {', '.join(missing)}; name the classes to read without them"
        )
    return _present(records)


def load_folder(
    root: str | Path,
    split: str = "test",
    classes: Collection[str] | None = None,
    *,
    class_name: str = FALLBACK_PROMPT_NAME,
    domain: Domain = "industrial",
) -> datasets.Dataset:
    """Read a folder of one's own.

    One class is `normal/`, `abnormal/` and `masks/{stem}.*`, of which the last two may be absent, or a tree as MVTec
    AD's (`test/good/`, `test/<defect>/`, `ground_truth/<defect>/{stem}_mask.*`, `train/good/`). Several classes are
    one such folder each. A folder with nothing but images is one class of normal images.

    Args:
        root: the folder.
        split: "test", or "train" for the normal training images of a tree as MVTec AD's.
        classes: the classes to read, all by default.
        class_name: the class where there is no folder a class; it fills the prompts.
        domain: "industrial" or "medical".

    Raises:
        DatasetError: no such folder, images, class or split; a class without images; files that are missing; an image
            with two masks.
    """
    records = folder_records(Path(root), split, class_name, domain, classes)
    return _present(_records_of(records, classes))


def load_index(
    index: str | Path,
    data_dir: str | Path | None = None,
    split: str = "test",
    classes: Collection[str] | None = None,
    *,
    domain: Domain = "industrial",
) -> datasets.Dataset:
    """Read the released index file (`full-shot.jsonl`) or AnomalyCLIP's (`meta.json`).

    Args:
        index: the file; `moeclip_hf.data.indexes.index_records` describes both forms.
        data_dir: what its paths are relative to, by default the file's own folder.
        split: "test", or "train" of a `meta.json`.
        classes: the classes to read, all by default.
        domain: "industrial" or "medical", for data sets that are not benchmarks.

    Raises:
        DatasetError: the file cannot be read as an index, or names files that are missing; no such class or split.
    """
    index = Path(index)
    records = index_records(index, Path(data_dir or index.parent), split, domain)
    return to_dataset(_records_of(records, classes))


def _present(records: list[Record]) -> datasets.Dataset:
    """Rows of files that are there: whatever else has a name, a broken link or a pipe, cannot be read."""
    names = [name for record in records for name in (record.image, record.mask) if name]
    if lost := [name for name in names if not os.path.isfile(name)]:
        raise DatasetError(f"{len(lost)} files are missing, or are none, the first is {lost[0]}")
    return to_dataset(records)


def _records_of(records: list[Record], classes: Collection[str] | None) -> list[Record]:
    if classes is None:
        return records
    refuse_unknown(classes, {record.class_name for record in records})
    return [record for record in records if record.class_name in classes]
