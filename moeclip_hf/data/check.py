"""Whether a copy of a benchmark is complete, and whether images and masks are fit to be used: every file is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeclip_hf.data.records import Record, binarize_mask, to_dataset
from moeclip_hf.data.registry import Benchmark
from moeclip_hf.data.trees import missing_classes, read_benchmark
from moeclip_hf.errors import DatasetError, UnreadableImageError

if TYPE_CHECKING:
    import datasets

Progress = Callable[[int, int], None]
"""Called with the number of images read so far and their total."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be: the path it concerns, empty for the whole tree, and what is wrong."""

    path: str
    what: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a copy of a benchmark holds beside what it should hold.

    Attributes:
        benchmark: what was checked.
        normal: number of normal test images found.
        anomalous: number of anomalous test images found.
        masks: number of mask files found.
        problems: everything that is not as it should be; empty for a good copy.
    """

    benchmark: Benchmark
    normal: int
    anomalous: int
    masks: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check_benchmark(benchmark: Benchmark, data_dir: Path, progress: Progress | None = None) -> CheckReport:
    """Compare a copy of a benchmark with what the registry expects, and read every image and mask of it.

    Named as problems: no such tree; missing classes; other numbers of images or groups than expected; files that
    cannot be read; anomalous images without a mask; masks of another size than the image, or without an anomalous
    pixel; images of one name in two formats.

    Args:
        benchmark: what to check.
        data_dir: its root, or a folder that holds it under its name or an alias.
        progress: told after every image.
    """
    try:
        records = read_benchmark(benchmark, data_dir)
    except DatasetError as error:
        return CheckReport(benchmark, 0, 0, 0, (Problem("", str(error)),))
    counts = Counter(record.label for record in records)
    problems = [*_wrong_counts(benchmark, records, counts), *_twins(records)]
    found = check_rows(to_dataset(records), range(len(records)), benchmark.has_masks, progress)
    problems += [problem for _, problem in found]
    masks = sum(record.mask is not None for record in records)
    return CheckReport(benchmark, counts[0], counts[1], masks, tuple(problems))


def check_rows(
    rows: datasets.Dataset, indices: Sequence[int], needs_masks: bool = True, progress: Progress | None = None
) -> list[tuple[int, Problem]]:
    """Read images and masks, and name those that are not fit to be trained on, with their rows, in order.

    These are files that cannot be read, and anomalous images without a mask, with one of another size, or with one
    that has no anomalous pixel.

    Args:
        rows: from `load_data`.
        indices: of the rows to check.
        needs_masks: whether an anomalous image without a mask is a problem.
        progress: told after every image.
    """
    from moeclip_hf.reading import leave_undecoded

    stored = leave_undecoded(rows)
    problems = []
    with ThreadPoolExecutor() as pool:
        checked = pool.map(lambda index: _check_row(stored, index, needs_masks), indices)
        for done, (index, found) in enumerate(zip(indices, checked, strict=True), start=1):
            problems += [(index, Problem(stored[index]["image_path"], what)) for what in found]
            if progress is not None:
                progress(done, len(indices))
    return problems


def _wrong_counts(benchmark: Benchmark, records: list[Record], counts: Counter[int]) -> Iterator[Problem]:
    if missing := missing_classes(benchmark.classes, records):
        yield Problem("", f"no class {', '.join(missing)}")
    groups = len({record.group for record in records})
    for what, found, expected in (
        ("normal images", counts[0], benchmark.normal),
        ("anomalous images", counts[1], benchmark.anomalous),
        ("class folders", groups, benchmark.groups),
    ):
        if found != expected:
            yield Problem("", f"{found} {what} instead of {expected}")


def _twins(records: list[Record]) -> Iterator[Problem]:
    seen: dict[str, Record] = {}
    for record in records:
        twin = seen.setdefault(str(Path(record.image_path).with_suffix("")), record)
        if twin is not record:
            yield Problem(record.image_path, f"the same image as {twin.image_path}, in another format")


def _check_row(stored: datasets.Dataset, index: int, needs_masks: bool) -> list[str]:
    from moeclip_hf.reading import read_row

    try:
        row = read_row(stored, index)
    except UnreadableImageError as error:
        return [str(error).removeprefix(stored[index]["image_path"]).lstrip(":, ")]
    if not row["label"]:
        return []
    if row["mask"] is None:
        return ["is anomalous and has no mask"] if needs_masks else []
    anomalous = binarize_mask(row["mask"])
    (width, height), (mask_height, mask_width) = row["image"].size, anomalous.shape
    what = []
    if (width, height) != (mask_width, mask_height):
        what.append(f"is {width} x {height}, its mask {mask_width} x {mask_height}")
    if not anomalous.any():
        path = stored[index]["mask"]["path"]
        what.append(f"is anomalous, and its mask {path + ' ' if path else ''}is empty")
    return what
