"""All seven figures over 3715 maps of 518 x 518, the 1.0 G pixels of `brain`, beside scikit-learn and torchmetrics.

    python -m benchmarks.metrics [--images 3715] [--compared-images 128]

Each contender runs in a process of its own, on the same simulated images. Seconds are those spent in the contender,
behind a warm-up, not in simulating images. Peak memory is the process's largest resident set. The other two keep every
pixel, so they get `--compared-images`, and so do we, once more. Neither has AUPRO: scikit-learn's is made of its
weighted ROC curve, where a pixel of a region weighs 1 / area; torchmetrics goes without.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import islice
from typing import Any, Protocol

import numpy as np

from benchmarks.report import Goal, Report, argument_parser, publish

SIZE = 518


class Contender(Protocol):
    """Takes one image after another, then computes."""

    def update(self, anomaly_map: np.ndarray, image_score: float, mask: np.ndarray, label: int) -> None: ...

    def compute(self) -> dict[str, float | None]: ...


def simulated_images() -> Iterator[tuple[np.ndarray, float, np.ndarray, int]]:
    """Endless (map, image score, mask, label): float32 noise of another spread in each, on the scale of raw maps.

    As in `brain`, five images of six are anomalous, a few percent of their pixels, in one to three regions.
    """
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((16, SIZE, SIZE), dtype=np.float32)
    while True:
        anomaly_map = noise[rng.integers(len(noise))] * np.float32(rng.uniform(6, 10)) - 50
        mask = np.zeros((SIZE, SIZE), np.uint8)
        label = int(rng.random() < 5 / 6)
        for _ in range(label * rng.integers(1, 4)):
            height, width = rng.integers(10, 120, 2)
            top, left = rng.integers(0, SIZE - 120, 2)
            mask[top : top + height, left : left + width] = 1
        anomaly_map[mask == 1] += np.float32(rng.uniform(8, 20))
        yield anomaly_map, float(rng.normal(0.5 + 0.1 * label, 0.1)), mask, label


class Ours:
    def __init__(self) -> None:
        from moeclip_hf.metrics import AnomalyMetrics

        self._metrics = AnomalyMetrics("medical")

    def update(self, anomaly_map: np.ndarray, image_score: float, mask: np.ndarray, label: int) -> None:
        self._metrics.update(anomaly_map[None], np.array([image_score]), mask[None], np.array([label]))

    def compute(self) -> dict[str, float | None]:
        return self._metrics.compute()


class KeepsEverything:
    """What the contenders that want all scores at once share. An image's score is its map's maximum, as in `brain`."""

    def __init__(self) -> None:
        self._maps: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []

    def update(self, anomaly_map: np.ndarray, image_score: float, mask: np.ndarray, label: int) -> None:
        self._maps.append(anomaly_map)
        self._masks.append(mask)

    def levels(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(scores, labels) of images and of pixels."""
        maps, masks = np.stack(self._maps), np.stack(self._masks)
        self._maps.clear()
        return {"image": (maps.max(axis=(1, 2)), masks.max(axis=(1, 2))), "pixel": (maps.ravel(), masks.ravel())}


class ScikitLearn(KeepsEverything):
    def compute(self) -> dict[str, float | None]:
        from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

        figures: dict[str, float | None] = {}
        for level, (scores, labels) in self.levels().items():
            figures[f"{level}_auroc"] = float(roc_auc_score(labels, scores))
            figures[f"{level}_ap"] = float(average_precision_score(labels, scores))
            precision, recall, _ = precision_recall_curve(labels, scores)
            figures[f"{level}_f1_max"] = best_f1(precision, recall)
            if level == "pixel":
                figures["pixel_aupro"] = self._aupro(scores, labels)
        return figures

    def _aupro(self, scores: np.ndarray, labels: np.ndarray) -> float:
        from scipy.ndimage import label
        from sklearn.metrics import auc, roc_curve

        weights = np.ones(np.shape(self._masks), np.float32)
        for weight, mask in zip(weights, self._masks, strict=True):
            regions, _ = label(mask, np.ones((3, 3)))
            weight[mask == 1] = 1 / np.bincount(regions.ravel())[regions[mask == 1]]
        rate, overlap, _ = roc_curve(labels, scores, sample_weight=weights.ravel(), drop_intermediate=False)
        end = int(np.searchsorted(rate, 0.3))
        at_limit = np.interp(0.3, rate[end - 1 : end + 1], overlap[end - 1 : end + 1])
        return float(auc(np.append(rate[:end], 0.3), np.append(overlap[:end], at_limit)) / 0.3)


class TorchMetrics(KeepsEverything):
    def compute(self) -> dict[str, float | None]:
        import torch
        from torchmetrics.functional.classification import (
            binary_auroc,
            binary_average_precision,
            binary_precision_recall_curve,
        )

        figures: dict[str, float | None] = {"pixel_aupro": None}
        for level, (scores, labels) in self.levels().items():
            # It puts scores outside [0, 1] through a sigmoid, which would tie most of them: scale them first.
            low, high = scores.min(), scores.max()
            predictions = torch.from_numpy((scores - low) / (high - low))
            targets = torch.from_numpy(labels.astype(np.int64))
            figures[f"{level}_auroc"] = float(binary_auroc(predictions, targets))
            figures[f"{level}_ap"] = float(binary_average_precision(predictions, targets))
            precision, recall, _ = binary_precision_recall_curve(predictions, targets)
            figures[f"{level}_f1_max"] = best_f1(precision.numpy(), recall.numpy())
        return figures


CONTENDERS: dict[str, type[Ours] | type[ScikitLearn] | type[TorchMetrics]] = {
    "moeclip-hf": Ours,
    "scikit-learn": ScikitLearn,
    "torchmetrics": TorchMetrics,
}


def best_f1(precision: np.ndarray, recall: np.ndarray) -> float:
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float32).tiny)))


def measure(name: str, images: int) -> dict[str, Any]:
    """Run one contender on so many images, in the process that calls this."""
    warm_up(CONTENDERS[name]())
    contender = CONTENDERS[name]()
    seconds = 0.0
    for image in islice(simulated_images(), images):
        start = time.perf_counter()
        contender.update(*image)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    figures = contender.compute()
    seconds += time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"name": name, "pixels": images * SIZE**2, "seconds": seconds, "peak_bytes": peak, "figures": figures}


def warm_up(contender: Contender) -> None:
    """Have it import what it needs, on a normal and an anomalous map of 4 x 4."""
    for label in (0, 1):
        mask = np.zeros((4, 4), np.uint8)
        mask[0, 0] = label
        contender.update(np.arange(16, dtype=np.float32).reshape(4, 4) + label, 0.5, mask, label)
    contender.compute()


def measure_apart(name: str, images: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, name, images).result()


def compose_reports(runs: list[dict[str, Any]], missing: list[str]) -> list[Report]:
    costs = [["", "M pixels", "seconds", "ns a pixel", "peak GB"]]
    for run in runs:
        pixels, seconds, peak = run["pixels"], run["seconds"], run["peak_bytes"]
        cells = (f"{pixels / 1e6:.0f}", f"{seconds:.1f}", f"{seconds / pixels * 1e9:.0f}", f"{peak / 1e9:.2f}")
        costs.append([run["name"], *cells])
    costs += [[f"{name}, not installed", "", "", "", ""] for name in missing]
    whole = runs[-1]
    of = f"seven figures on {whole['pixels'] / 1e9:.2g} G pixels"
    goals = [
        Goal(of, whole["seconds"], 60, unit=" s"),
        Goal(f"{of}, memory", whole["peak_bytes"] / 1e9, 1, unit=" GB"),
    ]

    reference = next(run for run in runs if run["name"] == "scikit-learn")
    others = [run for run in runs if run is not reference and run["pixels"] == reference["pixels"]]
    agreement = [["", "scikit-learn", *(f"{run['name']} off by" for run in others)]]
    for figure, exact in reference["figures"].items():
        values = [run["figures"][figure] for run in others]
        agreement.append([figure, f"{exact:.6f}", *("-" if v is None else f"{v - exact:+.1e}" for v in values)])
    return [
        Report("All seven figures (torchmetrics: six), each contender in a process of its own", costs, goals),
        Report(f"Agreement on the same {reference['pixels'] / 1e6:.0f} M pixels", agreement),
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=3715)
    parser.add_argument("--compared-images", type=int, default=128)
    args = parser.parse_args()

    missing = [name for name in ("torchmetrics",) if find_spec(name) is None]
    runs = [measure_apart(name, args.compared_images) for name in CONTENDERS if name not in missing]
    runs.append(measure_apart("moeclip-hf", args.images))
    publish(compose_reports(runs, missing), args.output)


if __name__ == "__main__":
    main()
