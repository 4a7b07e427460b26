"""Data sets of the `datasets` library: on the Hub, in a folder that it can load, or saved by `save_to_disk`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeclip_hf.data.records import COLUMNS, as_label, features
from moeclip_hf.data.registry import FALLBACK_PROMPT_NAME, Domain, columns_of
from moeclip_hf.errors import DatasetError, MoECLIPWarning

if TYPE_CHECKING:
    import datasets

NORMAL_LABELS = frozenset({"0", "good", "normal", "ok"})
"""Label names that mean normal; any other name beside one of these means anomalous."""

_MAX_LISTED = 8


def is_datasets_folder(folder: Path) -> bool:
    """Whether `datasets` wrote this folder or can load it: saved to disk, parquet files, or an image folder."""
    markers = ("dataset_dict.json", "state.json", "metadata.jsonl", "metadata.csv")
    patterns = ("*.parquet", "*/*.parquet")
    return any((folder / marker).is_file() for marker in markers) or any(any(folder.glob(one)) for one in patterns)


def load_hub(
    source: str,
    split: str = "test",
    classes: Collection[str] | None = None,
    *,
    domain: Domain = "industrial",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """A data set with the columns `image`, `label` and, where there are any, `mask` and `class_name`.

    Labels are 0 and 1, or names of which one is in `NORMAL_LABELS`. A data set named as a benchmark takes that
    benchmark's prompts and domain. Without `class_name` all images are of class "object". `image_path` is
    `<split>/<row number>`. Images stay as they are stored until their row is read.

    Args:
        source: a Hub id, or a folder.
        split: any split of the data set, also a slice such as "test[:100]".
        classes: the classes to read, all by default.
        domain: "industrial" or "medical", for a data set that is not a benchmark.
        streaming: read it while iterating instead of downloading it; gives an `IterableDataset`. Labels and classes
            that are plain strings are then not known beforehand: a warning tells of a first label that is not in
            `NORMAL_LABELS`, and a class that does not occur gives no rows.

    Raises:
        DatasetError: it cannot be loaded, has no such split or class, or lacks a column; none of its labels' names is
            in `NORMAL_LABELS`.
    """
    import datasets

    loaded = _load(source, split, streaming)
    missing = sorted({"image", "label"} - set(loaded.features))
    if missing:
        raise DatasetError(f"{source} has no column {', '.join(missing)}; it has {', '.join(loaded.features)}")
    folder = Path(source)
    dataset = (folder.resolve() if folder.is_dir() else folder).name

    def text_columns(class_name: str) -> dict[str, str]:
        return columns_of(dataset, class_name, class_name, domain)

    describe = _row_reader(source, split, loaded, text_columns)
    optional = [name for name in ("mask", "class_name") if name in loaded.features]
    loaded = loaded.select_columns(["image", "label", *optional])
    if isinstance(loaded, datasets.Dataset):
        rows: datasets.Dataset | datasets.IterableDataset = _assemble(loaded, describe)
        known = set(rows.unique("class_name"))
    else:
        known = {text_columns(name)["class_name"] for name in _streamed_classes(loaded.features)}
        rows = loaded.map(
            lambda row, number: {"image": row["image"], "mask": row.get("mask"), **describe(row, number)},
            with_indices=True,
            features=features(),
        )
    if classes is None:
        return rows
    if known:
        refuse_unknown(classes, known)
    return rows.filter(lambda class_name: class_name in classes, input_columns=["class_name"])


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
    source: str,
    split: str,
    loaded: datasets.Dataset | datasets.IterableDataset,
    text_columns: Callable[[str], dict[str, str]],
) -> Callable[[Mapping[str, Any], int], dict[str, Any]]:
    """A function from a row and its number to all columns but `image` and `mask`."""
    kinds = loaded.features
    label_names = getattr(kinds["label"], "names", None)
    class_names = getattr(kinds.get("class_name"), "names", None)
    known = _label_names(loaded)
    expected = ", ".join(sorted(NORMAL_LABELS))
    if known and not NORMAL_LABELS.intersection(map(str.lower, known)):
        listed = ", ".join([*known[:_MAX_LISTED], *["..."] * (len(known) > _MAX_LISTED)])
        raise DatasetError(
            f"{source}, {split}: none of the labels {listed} is one of {expected}, which mean normal: call normal "
            "images so, or make the labels 0 and 1"
        )
    is_checked = known is not None

    def describe(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        nonlocal is_checked
        where = f"{source}, {split}, row {number}"
        value = _name_of(row["label"], label_names, where)
        label = int(value.lower() not in NORMAL_LABELS) if isinstance(value, str) else as_label(value, where)
        if not is_checked and label and isinstance(value, str):
            text = f"{where}: label '{value}' is taken for anomalous, as it is none of {expected}, which mean normal"
            warnings.warn(text, MoECLIPWarning, stacklevel=2)
        is_checked = True
        class_name = str(_name_of(row.get("class_name", FALLBACK_PROMPT_NAME), class_names, where))
        image_path = f"{split}/{number:06d}"
        return {"label": label, "image_path": image_path, **text_columns(class_name)}

    return describe


def _label_names(loaded: datasets.Dataset | datasets.IterableDataset) -> list[str] | None:
    """The names of labels, by their type or, where they are plain strings, as they occur; None where neither tells."""
    import datasets

    kind = loaded.features["label"]
    if isinstance(kind, datasets.ClassLabel):
        return list(kind.names)
    if isinstance(loaded, datasets.Dataset) and "string" in getattr(kind, "dtype", ""):
        return [name for name in loaded.unique("label") if name is not None]
    return None


def _streamed_classes(kinds: datasets.Features) -> list[str]:
    """The classes that a stream may hold by its type; none where they are plain strings, known as they are read."""
    return getattr(kinds["class_name"], "names", []) if "class_name" in kinds else [FALLBACK_PROMPT_NAME]


def refuse_unknown(classes: Collection[str], known: set[str]) -> None:
    """Refuse wanted classes that are not known, by name."""
    if unknown := sorted(set(classes) - known):
        raise DatasetError(f"no class {', '.join(unknown)}; there is {', '.join(sorted(known))}")


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
