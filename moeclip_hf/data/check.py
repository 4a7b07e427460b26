"""Whether a copy of a benchmark is complete and readable: counts, masks and every file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moeclip_hf.data.records import Record, binarize_mask
from moeclip_hf.data.registry import Benchmark
from moeclip_hf.data.trees import missing_classes, read_benchmark
from moeclip_hf.errors import DatasetError

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
    with ThreadPoolExecutor() as pool:
        for done, found in enumerate(pool.map(lambda record: _check_files(benchmark, record), records), start=1):
            problems.extend(found)
            if progress is not None:
                progress(done, len(records))
    masks = sum(record.mask is not None for record in records)
    return CheckReport(benchmark, counts[0], counts[1], masks, tuple(problems))


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


def _check_files(benchmark: Benchmark, record: Record) -> list[Problem]:
    from PIL import Image, ImageOps

    try:
        with Image.open(record.image) as image:
            size = ImageOps.exif_transpose(image).size
    except (OSError, SyntaxError, ValueError) as error:
        return [Problem(record.image_path, f"cannot be read: {error}")]
    if record.mask is None:
        missing = record.label == 1 and benchmark.has_masks
        return [Problem(record.image_path, "is anomalous and has no mask")] if missing else []
    try:
        with Image.open(record.mask) as mask:
            anomalous = binarize_mask(mask)
    except (OSError, SyntaxError, ValueError) as error:
        return [Problem(record.image_path, f"its mask {record.mask} cannot be read: {error}")]
    height, width = anomalous.shape
    problems = []
    if (width, height) != size:
        problems.append(Problem(record.image_path, f"is {size[0]} x {size[1]}, its mask {width} x {height}"))
    if not anomalous.any():
        problems.append(Problem(record.image_path, f"is anomalous, and its mask {record.mask} is empty"))
    return problems
