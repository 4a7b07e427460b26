"""Where data sets keep images and masks on disk: most of them are one description of folders, VisA is a table."""

import csv
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moeclip_hf.errors import DatasetError, MoECLIPWarning

IsClass = Callable[[str], bool]
"""Tells from the name of a class folder whether it is wanted."""

IMAGE_SUFFIXES = frozenset(
    {".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
    | {".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"}
    | {".pbm", ".pfm", ".pgm", ".pnm", ".ppm"}
)
# Pictures of kinds that are not read: people are told of them, who would take them for scored.
_UNREAD_SUFFIXES = frozenset(
    {".avif", ".dcm", ".dds", ".dib", ".eps", ".exr", ".heic", ".heif", ".ico", ".jxl", ".pcx", ".psd", ".svg", ".tga"}
    | {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}
)


@dataclass(frozen=True, slots=True)
class Sample:
    """An image of a tree with its label and mask, before a benchmark gives it a class and a prompt.

    Attributes:
        folder: name of the class folder, empty where the root itself holds the only class.
        image: the image file.
        label: 0 normal, 1 anomalous.
        mask: the mask file; None for a normal image, and for an anomalous one whose mask is not there.
    """

    folder: str
    image: Path
    label: int
    mask: Path | None


class Layout(Protocol):
    """A way to keep a data set on disk."""

    def matches(self, root: Path, is_class: IsClass) -> bool:
        """Whether `root` is the root of a data set kept this way that has one of the wanted classes."""
        ...

    def read(self, root: Path, split: str, is_class: IsClass) -> list[Sample]:
        """The images of a split whose class folder is wanted, sorted by class folder and path."""
        ...

    def describe(self) -> str:
        """What `matches` looks for, for messages."""
        ...


@dataclass(frozen=True)
class FolderLayout:
    """Normal images, anomalous images and masks in folders of their own, beneath each class's folder.

    Paths are relative to the class's folder. `{defect}` in `anomalous` stands for every folder but `normal`, and for
    the same folder in `masks`. The mask of `{stem}.*` is `{stem}.*` or `{stem}_mask.*`, whatever the suffixes.

    Attributes:
        normal: folder of the normal test images, None where a data set has none.
        anomalous: folder, or folders, of the anomalous test images.
        masks: folder of the masks, None where a data set has none.
        train: folder of the normal training images, None where a data set has none.
        class_folders: whether the root holds one folder a class, or is itself the only class.
    """

    normal: str | None
    anomalous: str
    masks: str | None
    train: str | None = None
    class_folders: bool = True

    def matches(self, root: Path, is_class: IsClass) -> bool:
        """Whether the root, or a wanted class's folder in it, holds the folder that tells this layout."""
        return bool(self._class_folders(root, is_class))

    def read(self, root: Path, split: str, is_class: IsClass) -> list[Sample]:
        """The images of a split whose class folder is wanted, sorted by class folder and path.

        Raises:
            DatasetError: the split has no images here, or one image has two masks.
        """
        readers = {"test": self._read_test, "train": self._read_train}
        if split not in readers:
            raise DatasetError(f"no split '{split}': a tree of folders has 'test' and 'train'")
        read_class = readers[split]
        samples = [
            sample for name, folder in self._class_folders(root, is_class) for sample in read_class(name, folder)
        ]
        if not samples:
            looked_for = self.describe() if split == "test" else self.train
            remedy = f"looked for {looked_for}" if looked_for else "this kind of tree has only split 'test'"
            raise DatasetError(f"{root} has no images for split '{split}': {remedy}")
        return samples

    def describe(self) -> str:
        """The folder that tells this layout, such as `<class>/test/good`."""
        prefix = "<class>/" if self.class_folders else ""
        return f"{prefix}{self.normal or self.anomalous}"

    def is_class_folder(self, folder: Path) -> bool:
        """Whether a folder is meant to be a class of this layout, if perhaps one that lacks its normal images."""
        anomalous = self.anomalous.partition("/{defect}")[0]
        return self.class_folders and any((folder / part).is_dir() for part in (self.normal, anomalous) if part)

    def _class_folders(self, root: Path, is_class: IsClass) -> list[tuple[str, Path]]:
        if self.class_folders:
            folders = [(folder.name, folder) for folder in subfolders(root) if is_class(folder.name)]
        else:
            folders = [("", root)]
        return [(name, folder) for name, folder in folders if (folder / (self.normal or self.anomalous)).is_dir()]

    def _read_train(self, name: str, folder: Path) -> Iterator[Sample]:
        if self.train is not None:
            yield from (Sample(name, image, 0, None) for image in list_images(folder / self.train, labelled=True))

    def _read_test(self, name: str, folder: Path) -> Iterator[Sample]:
        labelled = [(folder / self.normal, 0)] if self.normal else []
        labelled += [(images, 1) for images in self._anomalous_folders(folder)]
        for images, label in sorted(labelled):
            masks = self._masks_by_stem(folder, images.name) if label else {}
            others: Collection[str] = self._part_names() if images == folder else ()
            for image in list_images(images, others, labelled=True):
                found = [masks[stem] for stem in (image.stem, f"{image.stem}_mask") if stem in masks]
                if len(found) > 1:
                    raise _two_masks(*found)
                yield Sample(name, image, label, found[0] if found else None)

    def _anomalous_folders(self, folder: Path) -> list[Path]:
        if "{defect}" not in self.anomalous:
            return [folder / self.anomalous]
        normal = folder / self.normal if self.normal else None
        return [images for images in subfolders(folder / Path(self.anomalous).parent) if images != normal]

    def _part_names(self) -> set[str]:
        """Names of the folders in a class's folder that hold its parts."""
        return {Path(part).parts[0] for part in (self.anomalous, self.masks, self.train) if part}

    def _masks_by_stem(self, folder: Path, defect: str) -> dict[str, Path]:
        if self.masks is None:
            return {}
        masks: dict[str, Path] = {}
        for mask in list_images(folder / self.masks.format(defect=defect)):
            if mask.stem in masks:
                raise _two_masks(masks[mask.stem], mask)
            masks[mask.stem] = mask
        return masks


def _two_masks(first: Path, second: Path) -> DatasetError:
    return DatasetError(f"two masks for one image, remove one: {first} and {second}")


@dataclass(frozen=True)
class VisaTable:
    """VisA as released: the table `split_csv/1cls.csv` (object, split, label, image, mask) names every file."""

    table: str = "split_csv/1cls.csv"

    def matches(self, root: Path, is_class: IsClass) -> bool:
        """Whether the table is there."""
        return (root / self.table).is_file()

    def read(self, root: Path, split: str, is_class: IsClass) -> list[Sample]:
        """The images whose row has this split and a wanted object, sorted by class folder and path.

        Raises:
            DatasetError: the table cannot be read, lacks a column or knows no such split; a label or path is none.
        """
        path = root / self.table
        with path.open(newline="", encoding="utf-8-sig") as file:
            try:
                table = csv.DictReader(file, restval="")
                samples = [
                    self._sample(root, row, f"{path}, line {table.line_num}")
                    for row in table
                    if row["split"] == split and is_class(row["object"])
                ]
            except KeyError as error:
                raise DatasetError(
                    f"{path} has no column {error}; expected object, split, label, image, mask"
                ) from None
            except (UnicodeDecodeError, csv.Error) as error:
                raise DatasetError(f"{path} cannot be read as a table: {error}") from None
        if not samples:
            raise DatasetError(f"{path} has no row with split '{split}'")
        return sorted(samples, key=lambda sample: (sample.folder, sample.image))

    def describe(self) -> str:
        """The table's path."""
        return self.table

    @staticmethod
    def _sample(root: Path, row: dict[str, str], where: str) -> Sample:
        if row["label"] not in ("normal", "anomaly"):
            raise DatasetError(f"{where}: label {row['label']!r} is neither 'normal' nor 'anomaly'")
        image, mask = (path_within(root, row[column], where) if row[column] else None for column in ("image", "mask"))
        if image is None:
            raise DatasetError(f"{where}: names no image")
        present = mask if mask and os.path.isfile(mask) else None
        return Sample(row["object"], image, int(row["label"] == "anomaly"), present)


def list_images(folder: Path, others: Collection[str] = (), labelled: bool = False) -> list[Path]:
    """The files of a folder with an image suffix, sorted by name, without hidden ones; none if there is no folder.

    Images of other kinds, and those in folders within it, are passed over, which a warning tells.

    Args:
        folder: what to list.
        others: names of folders within it that are no part of it.
        labelled: whether its images are those of a label, and not masks.

    Raises:
        DatasetError: all images of a label lie in folders within the folder.
    """
    if not folder.is_dir():
        return []
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    images = [folder / name for name in names if _is_image(name)]
    passed_over = [name for name in names if not _is_image(name) and name not in others]
    if nested := [name for name in passed_over if _holds_images(folder / name)]:
        text = f"{folder}: images in folders within it are not read, as in {nested[0]}: move them up into it"
        if labelled and not images:
            raise DatasetError(text)
        warnings.warn(text, MoECLIPWarning, stacklevel=2)
    tell_passed_over(folder, passed_over)
    return images


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _holds_images(folder: Path) -> bool:
    """Whether there are images anywhere below a folder, hidden ones left out; none below what is a file."""
    return any(_is_image(name) and not name.startswith(".") for _, _, names in os.walk(folder) for name in names)


def tell_passed_over(folder: Path, names: Iterable[str]) -> None:
    """Warn of images of kinds that are not read; notes and tables beside images are nobody's worry.

    Args:
        folder: where they lie.
        names: of files, or their paths below the folder, of which the first is named.
    """
    images = [name for name in names if os.path.splitext(name)[1].lower() in _UNREAD_SUFFIXES]
    if images:
        text = f"{folder}: passes over {len(images)} files, of which the first is {images[0]}: convert them to PNG"
        warnings.warn(text, MoECLIPWarning, stacklevel=3)


def path_within(root: Path, name: str, where: str) -> Path:
    """A file that a table or an index names, below the folder that its paths are relative to.

    Raises:
        DatasetError: the path is absolute or leads out of the folder; `where` says where it stands.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise DatasetError(f"{where}: path {name!r} must be relative to {root} and not lead out of it")
    return root / path


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name, hidden ones left out; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


MVTEC = FolderLayout("test/good", "test/{defect}", "ground_truth/{defect}", train="train/good")
BTAD = FolderLayout("test/ok", "test/ko", "ground_truth/ko", train="train/ok")
BMAD = FolderLayout("test/good/img", "test/Ungood/img", "test/Ungood/label", train="train/good", class_folders=False)
HEADCT = FolderLayout("test/good", "test/defect", None, train="train/good", class_folders=False)
POLYPS = FolderLayout(None, "images", "masks", class_folders=False)
ENDO = FolderLayout(None, "test dataset/images", "test dataset/masks", class_folders=False)
