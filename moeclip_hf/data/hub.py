"""Data sets of the `datasets` library: on the Hub, in a folder that it can load, or saved by `save_to_disk`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeclip_hf.data.records import COLUMNS, as_label, features
from moeclip_hf.data.registry import FALLBACK_PROMPT_NAME, Domain, columns_of
from moeclip_hf.errors import DatasetError

if TYPE_CHECKING:
    import datasets

NORMAL_LABELS = frozenset({"0", "good", "normal", "ok"})
"""Label names that mean normal; any other name beside one of these means anomalous."""


def is_datasets_folder(folder: Path) -> bool:
    """Whether `datasets` wrote this folder or can load it: saved to disk, parquet files, or an image folder."""
    markers = ("dataset_dict.json", "state.json", "metadata.jsonl", "metadata.csv")
    patterns = ("*.parquet", "*/*.parquet")
    return any((folder / marker).is_file() for marker in markers) or any(any(folder.glob(one)) for one in patterns)


def load_hub(
    source: str, split: str = "test", *, domain: Domain = "industrial", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """A data set with the columns `image`, `label` and, where there are any, `mask` and `class_name`.

    Labels are 0 and 1, or names of which one is in `NORMAL_LABELS`. A data set named as a benchmark takes that
    benchmark's prompts and domain. Without `class_name` all images are of class "object". `image_path` is
    `<split>/<row number>`. Images stay as they are stored until their row is read.

    Args:
        source: a Hub id, or a folder.
        split: any split of the data set, also a slice such as "test[:100]".
        domain: "industrial" or "medical", for a data set that is not a benchmark.
        streaming: read it while iterating instead of downloading it; gives an `IterableDataset`.

    Raises:
        DatasetError: it cannot be loaded, has no such split, or lacks a column.
    """
    import datasets

    loaded = _load(source, split, streaming)
    missing = sorted({"image", "label"} - set(loaded.features))
    if missing:
        raise DatasetError(f"{source} has no column {', '.join(missing)}; it has {', '.join(loaded.features)}")
    describe = _row_reader(source, split, loaded.features, domain)
    optional = [name for name in ("mask", "class_name") if name in loaded.features]
    loaded = loaded.select_columns(["image", "label", *optional])
    if isinstance(loaded, datasets.Dataset):
        return _assemble(loaded, describe)
    return loaded.map(
        lambda row, number: {"image": row["image"], "mask": row.get("mask"), **describe(row, number)},
        with_indices=True,
        features=features(),
    )


def _load(source: str, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    import datasets

    folder = Path(source)
    try:
        if (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(source)
            if split not in saved:
                raise DatasetError(f"{source} has no split '{split}'; it has {', '.join(saved)}")
            loaded = saved[split]
        elif (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source, split=split, streaming=streaming)
    except DatasetError:
        raise
    except Exception as error:  # whatever damaged files lead their readers to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"cannot load data set '{source}', split '{split}': {reason}") from error
    if streaming and isinstance(loaded, datasets.Dataset):
        return loaded.to_iterable_dataset()
    return loaded._resolve_features() if loaded.features is None else loaded


def _row_reader(
    source: str, split: str, kinds: datasets.Features, domain: Domain
) -> Callable[[Mapping[str, Any], int], dict[str, Any]]:
    """A function from a row and its number to all columns but `image` and `mask`."""
    label_names = getattr(kinds["label"], "names", None)
    class_names = getattr(kinds.get("class_name"), "names", None)
    if label_names is not None and not NORMAL_LABELS.intersection(map(str.lower, label_names)):
        expected = ", ".join(sorted(NORMAL_LABELS))
        raise DatasetError(f"{source}: none of the labels {', '.join(label_names)} is one of {expected}")
    folder = Path(source)
    dataset = (folder.resolve() if folder.is_dir() else folder).name

    def describe(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        where = f"{source}, {split}, row {number}"
        value = _name_of(row["label"], label_names, where)
        label = int(value.lower() not in NORMAL_LABELS) if isinstance(value, str) else as_label(value, where)
        class_name = str(_name_of(row.get("class_name", FALLBACK_PROMPT_NAME), class_names, where))
        image_path = f"{split}/{number:06d}"
        return {"label": label, "image_path": image_path, **columns_of(dataset, class_name, class_name, domain)}

    return describe


def _name_of(value: Any, names: list[str] | None, where: str) -> Any:
    """A label or class by its name where it has one; -1 and nothing stand for what is not known."""
    if value is None or (names is not None and value < 0):
        raise DatasetError(f"{where}: its label or class is not known: leave such rows out")
    return value if names is None else names[value]


def _assemble(
    loaded: datasets.Dataset, describe: Callable[[Mapping[str, Any], int], dict[str, Any]]
) -> datasets.Dataset:
    """Put the described columns beside the image columns, which stay where they are stored."""
    import datasets

    images = [name for name in ("image", "mask") if name in loaded.features]
    rows = loaded.remove_columns(images)
    described = [describe(row, number) for number, row in enumerate(rows)]
    columns = {name: [row.get(name) for row in described] for name in COLUMNS if name not in images}
    kept = features()
    beside = datasets.Dataset.from_dict(columns, features=datasets.Features({name: kept[name] for name in columns}))
    whole = datasets.concatenate_datasets([loaded.select_columns(images), beside], axis=1)
    for name in images:
        whole = whole.cast_column(name, datasets.Image())
    return whole.select_columns(list(COLUMNS))
