"""What an evaluation found, and its forms: JSON and CSV for machines, tables for people."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeclip_hf.data import BENCHMARKS, PUBLISHED_MEAN, REPRODUCED_MEAN, Results, find_benchmark
from moeclip_hf.writing import write_whole

if TYPE_CHECKING:
    from moeclip_hf.metrics import Curve

_DOCUMENT = "results.json"
METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "pixel_aupro": "pixel AUPRO",
}
"""The seven figures and their headings."""

MASK_FAULTS = {
    "missing": "have no mask: they count for the image figures only",
    "empty": "have a mask without an anomalous pixel at the size of the maps",
    "other_size": "have a mask of another size, which was stretched to theirs",
}
"""What may be wrong with anomalous images' masks, and is told with the figures."""

UNDEFINED = "—"

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Heat:
    """A row whose map is kept for pictures: (h, w) on the patch grid, 0 to 1 over its group's lowest and highest."""

    index: int
    label: int
    score: float
    grid: NDArray[np.float32]


@dataclass(frozen=True)
class GroupResult:
    """
    Figures of one group of a data set: a class, or a texture folder of DTD-Synthetic.

    Args:
        group: its name.
        normal, anomalous: numbers of images.
        metrics: the figures of `METRICS`, 0 to 1; `None` where undefined.
        error_bound: no figure is further than this from its exact value.
        curves: as `AnomalyMetrics.curves` gives them.
        scores: (row, label, the benchmark's image score) of every image, by row.
        heats: images with the highest and the lowest scores.
        mask_faults: number of anomalous images by what is wrong with their masks, as `MASK_FAULTS` names it.
    """

    group: str
    normal: int
    anomalous: int
    metrics: Metrics
    error_bound: float
    curves: Mapping[str, Curve | None] = field(repr=False)
    scores: tuple[tuple[int, int, float], ...] = field(repr=False)
    heats: tuple[Heat, ...] = field(repr=False)
    mask_faults: Mapping[str, int]


@dataclass(frozen=True)
class EvaluationResult:
    """
    Figures of one data set.

    Args:
        dataset: its name.
        domain: "industrial" or "medical".
        groups: what the means are over, in the data set's order.
        settings: all that scores depend on.
        prompt_names: what fills the prompts of its classes, sorted.
    """

    dataset: str
    domain: str
    groups: tuple[GroupResult, ...]
    settings: dict[str, Any]
    prompt_names: tuple[str, ...] = ()

    @property
    def metrics(self) -> Metrics:
        """Means over the groups; an undefined figure is left out, and a mean of none is `None`."""
        return mean_metrics([group.metrics for group in self.groups])

    @property
    def normal(self) -> int:
        """Number of normal images."""
        return sum(group.normal for group in self.groups)

    @property
    def anomalous(self) -> int:
        """Number of anomalous images."""
        return sum(group.anomalous for group in self.groups)

    @property
    def mask_faults(self) -> dict[str, int]:
        """Number of anomalous images by what is wrong with their masks, of those of `MASK_FAULTS` that there are."""
        return dict(sum((Counter(group.mask_faults) for group in self.groups), Counter()))

    @property
    def is_whole_benchmark(self) -> bool:
        """Whether these are all images of a benchmark, scored as its own are, so that published figures compare."""
        benchmark = find_benchmark(self.dataset)
        if benchmark is None or not benchmark.is_own(self.prompt_names, self.domain):
            return False
        return (self.normal, self.anomalous) == (benchmark.normal, benchmark.anomalous)

    @property
    def references(self) -> dict[str, Metrics]:
        """The benchmark's published and reproduced figures, 0 to 1; none for a data set that is no benchmark."""
        benchmark = find_benchmark(self.dataset)
        if benchmark is None:
            return {}
        return {"published": _fractions(benchmark.published), "reproduced": _fractions(benchmark.reproduced)}

    def to_dict(self) -> dict[str, Any]:
        """Everything but curves, maps and single scores, as JSON takes it."""
        return {
            "dataset": self.dataset,
            "domain": self.domain,
            "normal": self.normal,
            "anomalous": self.anomalous,
            "mask_faults": self.mask_faults,
            "is_whole_benchmark": self.is_whole_benchmark,
            "prompt_names": list(self.prompt_names),
            "metrics": self.metrics,
            **self.references,
            "groups": [
                {
                    "group": group.group,
                    "normal": group.normal,
                    "anomalous": group.anomalous,
                    "metrics": group.metrics,
                    "error_bound": group.error_bound,
                }
                for group in self.groups
            ],
            "settings": self.settings,
        }


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """The mean of every figure over the rows in which it is defined."""
    means: Metrics = {}
    for name in METRICS:
        defined = [value for row in rows if (value := row[name]) is not None]
        means[name] = sum(defined) / len(defined) if defined else None
    return means


def to_document(results: Sequence[EvaluationResult], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """All results with what they belong to, as JSON takes it; figures are 0 to 1, undefined ones null."""
    return {
        **provenance,
        "metrics": mean_metrics([result.metrics for result in results]),
        "datasets": [result.to_dict() for result in results],
    }


def dataset_table(result: EvaluationResult) -> list[list[str]]:
    """A row a group, then the mean and what was published; figures in percent. The first row is the heading."""
    rows = [["class", "images", *METRICS.values()]]
    rows += [
        [group.group, f"{group.normal}/{group.anomalous}", *_percentages(group.metrics)] for group in result.groups
    ]
    rows.append(["mean", f"{result.normal}/{result.anomalous}", *_percentages(result.metrics)])
    rows += [[name, "", *_percentages(figures)] for name, figures in result.references.items()]
    return rows


def summary_table(results: Sequence[EvaluationResult]) -> list[list[str]]:
    """A row a data set and, of several, their mean; all 14 benchmarks' mean stands beside the published one."""
    rows = [["data set", "images", *METRICS.values()]]
    rows += [
        [result.dataset, f"{result.normal}/{result.anomalous}", *_percentages(result.metrics)] for result in results
    ]
    if len(results) > 1:
        rows.append(["mean", "", *_percentages(mean_metrics([result.metrics for result in results]))])
    if {result.dataset for result in results} == set(BENCHMARKS):
        rows.append(["published", "", *_percentages(_fractions(PUBLISHED_MEAN))])
        rows.append(["reproduced", "", *_percentages(_fractions(REPRODUCED_MEAN))])
    return rows


def caveats(result: EvaluationResult) -> list[str]:
    """What has to be said of masks that are not as they should be, and of published figures that do not compare."""
    notes = [
        f"{result.mask_faults[name]} of {result.anomalous} anomalous images {what}."
        for name, what in MASK_FAULTS.items()
        if name in result.mask_faults
    ]
    benchmark = find_benchmark(result.dataset)
    if benchmark is None or result.is_whole_benchmark:
        return notes
    if not benchmark.is_own(result.prompt_names, result.domain):
        notes.append(
            f"Published figures are of {benchmark.name}'s own prompts and domain ({benchmark.domain}), these are not: "
            "they do not compare."
        )
    else:
        notes.append(
            f"Published figures are of {benchmark.normal}/{benchmark.anomalous} images, these of "
            f"{result.normal}/{result.anomalous}: they do not compare."
        )
    return notes


def set_aside(output_dir: Path) -> Path | None:
    """
    Move what an earlier evaluation wrote to a folder's subfolder, named after the time, before its place is taken.

    Returns:
        The subfolder, if there was anything.
    """
    document = output_dir / _DOCUMENT
    if not document.exists():
        return None
    written = datetime.fromtimestamp(document.stat().st_mtime).strftime("%Y-%m-%d-%H%M%S")
    names = chain([written], (f"{written}-{number}" for number in count(2)))
    # One without a document was being moved to when it was interrupted.
    kept = next(output_dir / name for name in names if not (output_dir / name / _DOCUMENT).exists())
    try:
        datasets = [str(result["dataset"]) for result in _figures_in(document)]
    except (ValueError, KeyError, TypeError):  # it is no document of ours, and has no pictures
        datasets = []
    pictures = [f"{dataset}_{kind}.png" for dataset in datasets for kind in ("curves", "images")]
    kept.mkdir(exist_ok=True)
    for name in ("results.csv", "results.md", *pictures, _DOCUMENT):
        with suppress(FileNotFoundError):
            os.replace(output_dir / name, kept / name)
    return kept


def drop_repetitions(output_dir: Path) -> None:
    """Delete what [`set_aside`] has kept and the folder now holds again: the same files, and every figure the same."""
    figures = _figures_in(output_dir / _DOCUMENT)
    for kept in output_dir.glob("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-*"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # it is none of ours
            files = sorted(kept.iterdir(), key=lambda file: file.name == _DOCUMENT)
            if all((output_dir / file.name).is_file() for file in files):
                if files and _figures_in(kept / _DOCUMENT) != figures:
                    continue
                for file in files:
                    file.unlink()
                kept.rmdir()


def _figures_in(document: Path) -> Any:
    return json.loads(document.read_text())["datasets"]


def write_reports(results: Sequence[EvaluationResult], provenance: Mapping[str, Any], output_dir: Path) -> None:
    """Write `results.json`, `results.csv` and `results.md`; a crash leaves each as it was, or as it is to be."""
    output_dir.mkdir(parents=True, exist_ok=True)
    reports = {
        _DOCUMENT: json.dumps(to_document(results, provenance), indent=2) + "\n",
        "results.csv": _csv(results),
        "results.md": _markdown(results, provenance),
    }
    for name, text in reports.items():
        write_whole(output_dir / name, text.encode())


def _csv(results: Sequence[EvaluationResult]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["dataset", "group", "normal", "anomalous", *METRICS])
    for result in results:
        for group in result.groups:
            figures = [group.metrics[name] for name in METRICS]
            writer.writerow([result.dataset, group.group, group.normal, group.anomalous, *figures])
    return file.getvalue()


def _markdown(results: Sequence[EvaluationResult], provenance: Mapping[str, Any]) -> str:
    model = provenance["model"]
    revision = f" at {model['revision']}" if model["revision"] else ""
    parts = [
        f"# Evaluation of {model['name']}{revision}",
        f"{provenance['date']}, moeclip-hf {provenance['versions']['moeclip-hf']}. Figures in percent; images as "
        f"normal/anomalous; {UNDEFINED} is undefined or not published.",
    ]
    if len(results) > 1:
        parts.append(markdown_table(summary_table(results)))
    for result in results:
        parts += [f"## {result.dataset} ({result.domain})", markdown_table(dataset_table(result))]
        parts += caveats(result)
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: list[list[str]]) -> str:
    """A table of Markdown; the first row is the heading."""
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fractions(results: Results) -> Metrics:
    """Percentages as published, 0 to 1."""
    return {
        name: None if (value := getattr(results, name, None)) is None else round(value / 100, 4) for name in METRICS
    }


def _percentages(metrics: Metrics) -> list[str]:
    return [UNDEFINED if (value := metrics[name]) is None else f"{100 * value:.1f}" for name in METRICS]
