"""Data sets that are a tree of folders: the benchmarks, and folders of one's own."""

from collections.abc import Collection
from pathlib import Path

from moeclip_hf.data.layouts import MVTEC, FolderLayout, IsClass, Layout, Sample, subfolders
from moeclip_hf.data.records import Record
from moeclip_hf.data.registry import Benchmark, Domain, plain_columns
from moeclip_hf.errors import DatasetError

OWN_LAYOUTS: tuple[FolderLayout, ...] = (
    FolderLayout("normal", "abnormal", "masks", class_folders=False),
    FolderLayout(MVTEC.normal, MVTEC.anomalous, MVTEC.masks, MVTEC.train, class_folders=False),
    FolderLayout("normal", "abnormal", "masks"),
    MVTEC,
    FolderLayout(".", "abnormal", "masks", class_folders=False),
)
"""How a folder of one's own may be kept: one class or a folder a class, plain or as MVTec AD; at last, just images."""


def locate_benchmark(benchmark: Benchmark, data_dir: Path, is_class: IsClass) -> tuple[Path, Layout]:
    """Find a benchmark's root, and the layout it is kept in, in or beneath a folder.

    Args:
        benchmark: what to look for.
        data_dir: its root, or a folder that holds it under its name or an alias, directly or once more nested.
        is_class: tells the class folders that are wanted.

    Raises:
        DatasetError: the folder is not there or holds no such tree; the message says what was looked for.
    """
    if not data_dir.is_dir():
        raise DatasetError(f"no such folder: {data_dir}")
    named = [child for child in subfolders(data_dir) if benchmark.is_name(child.name)]
    nested = [child for folder in named for child in subfolders(folder) if benchmark.is_name(child.name)]
    for root in (data_dir, *named, *nested):
        for layout in benchmark.layouts:
            if layout.matches(root, is_class):
                return root, layout
    trees = " or ".join(layout.describe() for layout in benchmark.layouts)
    names = ", ".join(dict.fromkeys((benchmark.name, *benchmark.aliases)))
    raise DatasetError(f"no {benchmark.name} in {data_dir}: looked for {trees} there and in its folders named {names}")


def read_benchmark(
    benchmark: Benchmark, data_dir: Path, split: str = "test", classes: Collection[str] | None = None
) -> list[Record]:
    """The images of a benchmark's split that are there, sorted by class folder and path.

    Args:
        benchmark: what to read.
        data_dir: its root, or a folder that holds it under its name or an alias.
        split: "test", or "train" for the normal training images where a tree has them.
        classes: the classes to read, all by default.

    Raises:
        DatasetError: no such tree, class or split; an image with two masks.
    """
    wanted = set(benchmark.classes if classes is None else classes)
    if unknown := sorted(wanted - set(benchmark.classes)):
        known = ", ".join(benchmark.classes)
        raise DatasetError(f"{benchmark.name} has no class {', '.join(unknown)}; it has {known}")

    def is_class(folder: str) -> bool:
        return benchmark.class_name(folder) in wanted

    root, layout = locate_benchmark(benchmark, data_dir, is_class)
    samples = layout.read(root, split, is_class)
    return [_record(root, sample, benchmark.columns(sample.folder, sample.folder)) for sample in samples]


def missing_classes(classes: Collection[str], records: list[Record]) -> list[str]:
    """The classes that no record is of, sorted."""
    return sorted(set(classes) - {record.class_name for record in records})


def folder_records(
    root: Path, split: str, class_name: str, domain: Domain, classes: Collection[str] | None = None
) -> list[Record]:
    """The images of a folder of one's own, sorted by class folder and path.

    Args:
        root: a folder in one of `OWN_LAYOUTS`.
        split: "test", or "train" for `train/good` of a tree as MVTec AD's.
        class_name: class of the images where there is no folder a class.
        domain: "industrial" or "medical".
        classes: those that must have images, all by default.

    Raises:
        DatasetError: the folder is not there, holds no images in any of these layouts, a class without any, or one of
            whose images those of a label lie in folders of their own.
    """
    if not root.is_dir():
        raise DatasetError(f"no such folder: {root}")
    layout = next(layout for layout in OWN_LAYOUTS if layout.matches(root, lambda folder: True))
    try:
        samples = layout.read(root, split, lambda folder: True)
    except DatasetError:
        if layout is not OWN_LAYOUTS[-1] or split != "test" or (root / layout.anomalous).is_dir():
            raise
        looked_for = ", ".join(layout.describe() for layout in OWN_LAYOUTS[:-1])
        raise DatasetError(f"no images in {root}: looked for {looked_for}, and for images in it") from None
    folders = {folder.name for folder in subfolders(root) if layout.is_class_folder(folder)}
    if empty := sorted(folders.intersection(classes or folders) - {sample.folder for sample in samples}):
        raise DatasetError(
            f"{root} has no images of {', '.join(empty)} for split '{split}', for which {layout.describe()} must hold "
            "some: add them, remove the class's folder, or name the classes to read without it"
        )
    dataset = root.resolve().name
    return [_record(root, sample, plain_columns(dataset, sample.folder or class_name, domain)) for sample in samples]


def _record(root: Path, sample: Sample, columns: dict[str, str]) -> Record:
    return Record(
        image=str(sample.image),
        mask=str(sample.mask) if sample.mask else None,
        label=sample.label,
        image_path=sample.image.relative_to(root).as_posix(),
        **columns,
    )
