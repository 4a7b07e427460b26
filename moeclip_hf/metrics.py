"""The figures of anomaly detection over a test set, in one pass and constant memory.

Image level: AUROC, AP and F1-max of the benchmark's image scores. Pixel level: the same, and AUPRO. `docs/metrics.md`
defines them and proves how near they are to the exact values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from moeclip_hf.errors import DatasetError, MoECLIPError
from moeclip_hf.histogram import ScoreHistogram

Domain = Literal["industrial", "medical"]
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

FPR_LIMIT = 0.3
"""AUPRO is the area under the PRO curve up to this false-positive rate, divided by it."""

CURVE_POINTS = 1000
"""The most points a curve is drawn with."""


class AnomalyMetrics:
    """Image- and pixel-level figures of one class over its whole test set.

    Memory does not grow with the number of pixels: pixel scores go into histograms, and an image leaves four numbers.
    Parts of a test set can be scored apart, in any order, on any number of processes, and merged.

    Args:
        domain: how the benchmark makes an image score of a map and the model's own image score, both min-max scaled
            over the test set if any value leaves [0, 1]: "industrial" takes (map maximum + image score) / 2,
            "medical" the map maximum.

    Raises:
        MoECLIPError: the domain is neither.
    """

    def __init__(self, domain: Domain) -> None:
        if domain not in get_args(Domain):
            raise MoECLIPError(f"domain must be one of {', '.join(get_args(Domain))}, not {domain!r}")
        self.domain = domain
        self.num_regions = 0
        self._normal = ScoreHistogram()
        self._anomalous = ScoreHistogram(weighted=True)
        self._images: list[NDArray[np.float64]] = []  # rows of (map minimum, map maximum, image score, label)

    def update(self, pixel_scores: Any, image_scores: Any, masks: Any | None, labels: Any) -> None:
        """Add a batch of B images. Torch tensors (any device) and arrays are taken alike.

        Args:
            pixel_scores: (B, H, W) anomaly maps, higher is more anomalous, any finite range.
            image_scores: (B,) the model's image scores, any finite range.
            masks: (B, H, W) or (B, 1, H, W), 1 where anomalous and 0 elsewhere; None if the data set has none. Pixel
                figures cover the images that came with a mask.
            labels: (B,), 1 for an anomalous image and 0 for a normal one.

        Raises:
            MoECLIPError: scores of a wrong shape or type, or not finite; nothing of the batch is added.
            DatasetError: masks or labels of a wrong shape, or not binary; nothing of the batch is added.
        """
        maps = _scores(pixel_scores, "pixel_scores", dimensions=3)
        batch = len(maps)
        scores = _scores(image_scores, "image_scores", dimensions=1)
        if scores.shape != (batch,):
            raise MoECLIPError(f"image_scores has {len(scores)} values for the {batch} maps of pixel_scores")
        truth = _binary(labels, "labels", (batch,))
        regions = None if masks is None else _binary(_without_channel(masks), "masks", maps.shape)

        lows, highs = maps.min(axis=(1, 2)), maps.max(axis=(1, 2))
        _require_finite(np.stack([lows, highs]), "pixel_scores")
        _require_finite(scores, "image_scores")
        self._images.append(np.stack([lows, highs, scores, truth], axis=1).astype(np.float64))
        if regions is not None:
            for anomaly_map, mask in zip(maps, regions, strict=True):
                self._add_pixels(anomaly_map, mask)

    def _add_pixels(self, anomaly_map: NDArray[np.floating], mask: NDArray[np.bool_]) -> None:
        self._normal.add(anomaly_map[~mask])
        if mask.any():
            weights, count = _region_weights(mask)
            self._anomalous.add(anomaly_map[mask], weights)
            self.num_regions += count

    @property
    def num_images(self) -> int:
        """The number of images added."""
        return sum(len(images) for images in self._images)

    @property
    def error_bound(self) -> float:
        """No figure is further than this from its exact value; 0 while nothing had to be coarsened."""
        return 2.25 * max(self._normal.relative_error, self._anomalous.relative_error)

    def compute(self) -> dict[str, float | None]:
        """The figures, each in [0, 1], of all that was added; None where one is undefined.

        Returns:
            `image_auroc`, `image_ap`, `image_f1_max`, `pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `pixel_aupro`.
            Undefined: image figures with images of one kind only; pixel figures with pixels of one kind only or none.
        """
        image, pixel = self._image_ranking(), self._pixel_ranking()
        return {
            "image_auroc": image.auroc() if image else None,
            "image_ap": image.average_precision() if image else None,
            "image_f1_max": image.f1_max() if image else None,
            "pixel_auroc": pixel.auroc() if pixel else None,
            "pixel_ap": pixel.average_precision() if pixel else None,
            "pixel_f1_max": pixel.f1_max() if pixel else None,
            "pixel_aupro": pixel.aupro() if pixel else None,
        }

    def curves(self) -> dict[str, Curve | None]:
        """The curves behind the figures, thinned to `CURVE_POINTS` for plotting; None where undefined.

        Returns:
            `image_roc`, `pixel_roc`: (false-positive rate, true-positive rate). `image_pr`, `pixel_pr`: (recall,
            precision). `pixel_pro`: (false-positive rate, mean overlap of the regions), up to a rate of 1.
        """
        image, pixel = self._image_ranking(), self._pixel_ranking()
        return {
            "image_roc": _thinned(image.roc()) if image else None,
            "image_pr": _thinned(image.precision_recall()) if image else None,
            "pixel_roc": _thinned(pixel.roc()) if pixel else None,
            "pixel_pr": _thinned(pixel.precision_recall()) if pixel else None,
            "pixel_pro": _thinned(pixel.pro()) if pixel else None,
        }

    def image_scores(self) -> NDArray[np.float64]:
        """The benchmark's image scores, (n,), fused over all that was added and in the order it was added or merged.

        Map maxima, and separately the model's image scores, are min-max scaled over the test set if any value leaves
        [0, 1]; "industrial" takes the mean of both, "medical" the map maxima.
        """
        lows, highs, scores, _ = np.concatenate([np.empty((0, 4)), *self._images]).T
        if not len(scores):
            return scores
        fused = _min_max_scaled(highs, lows.min(), highs.max())
        if self.domain == "industrial":
            fused = (fused + _min_max_scaled(scores, scores.min(), scores.max())) / 2
        return fused

    def merge(self, other: "AnomalyMetrics") -> None:
        """Add all that `other` has seen, which keeps what it holds. Raises MoECLIPError if the domains differ."""
        if other.domain != self.domain:
            raise MoECLIPError(f"cannot merge {other.domain} metrics into {self.domain} ones")
        self._normal.merge(other._normal)
        self._anomalous.merge(other._anomalous)
        self._images = self._images + other._images
        self.num_regions += other.num_regions

    def all_reduce(self) -> None:
        """Give every process of the default group what all of them have seen; call it once, after the last update.

        Every process must call it, also one that has seen nothing; all end with the same bits. Without a process group
        nothing happens. Images that a sampler repeats to even out the processes count twice.
        """
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return
        total = AnomalyMetrics(self.domain)
        for rank in range(distributed.get_world_size()):
            package = [self.state_dict() if rank == distributed.get_rank() else {}]
            distributed.broadcast_object_list(package, src=rank)
            part = AnomalyMetrics(self.domain)
            part.load_state_dict(package[0])
            total.merge(part)
        vars(self).update(vars(total))

    def state_dict(self) -> dict[str, NDArray]:
        """Everything seen, as plain arrays: to save and go on later."""
        return {
            "images": np.concatenate([np.empty((0, 4)), *self._images]),
            "regions": np.array(self.num_regions),
            "is_medical": np.array(self.domain == "medical"),
            **self._normal.state_dict("normal."),
            **self._anomalous.state_dict("anomalous."),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Replace the contents by those of `state_dict` (arrays or tensors).

        Raises:
            MoECLIPError: if one is missing, or they are of the other domain.
        """
        arrays = {key: _as_array(values) for key, values in state.items()}
        restored = AnomalyMetrics(self.domain)
        try:
            if bool(arrays["is_medical"]) != (self.domain == "medical"):
                raise MoECLIPError(f"not a state of {self.domain} metrics but of the other domain's")
            restored._images, restored.num_regions = [arrays["images"]], int(arrays["regions"])
            restored._normal.load_state_dict(arrays, "normal.")
            restored._anomalous.load_state_dict(arrays, "anomalous.")
        except KeyError as missing:
            raise MoECLIPError(f"not a state of AnomalyMetrics: {missing} is missing") from None
        vars(self).update(vars(restored))

    def _image_ranking(self) -> "_Ranking | None":
        if not self.num_images:
            return None
        fused, labels = self.image_scores(), np.concatenate(self._images)[:, 3]
        normal, anomalous = ScoreHistogram(), ScoreHistogram()
        normal.add(fused[labels == 0])
        anomalous.add(fused[labels == 1])
        return _rank(normal, anomalous)

    def _pixel_ranking(self) -> "_Ranking | None":
        return _rank(self._normal, self._anomalous, self.num_regions)


@dataclass(frozen=True)
class _Ranking:
    """All that the figures depend on: one row for each distinct score of a positive, from the highest down.

    Between two such scores only false positives are added: recall stays, precision and F1 fall, so no figure needs the
    thresholds there.
    """

    true_positives: NDArray[np.int64]  # (n,) positives that score as much or more
    false_positives: NDArray[np.int64]  # (n,) negatives that score as much or more
    false_positives_above: NDArray[np.int64]  # (n,) negatives that score more
    negatives: int
    overlap: NDArray[np.float64] | None  # (n,) mean share of a region that scores as much or more; pixel level only

    @property
    def positives(self) -> int:
        return int(self.true_positives[-1])

    def auroc(self) -> float:
        return area_under(self.roc())

    def aupro(self) -> float:
        return area_under(self.pro(), FPR_LIMIT) / FPR_LIMIT

    def average_precision(self) -> float:
        """sum_n (R_n - R_{n-1}) P_n, scikit-learn's definition: no interpolation."""
        gained = np.diff(self.true_positives, prepend=0)
        return float(np.sum(gained * self._precision()) / self.positives)

    def f1_max(self) -> float:
        predicted = self.true_positives + self.false_positives
        return float(np.max(2 * self.true_positives / (self.positives + predicted)))

    def roc(self) -> Curve:
        """False-positive rate and true-positive rate at every threshold."""
        return self._over_false_positive_rate(self.true_positives / self.positives)

    def pro(self) -> Curve:
        """False-positive rate over all normal pixels and mean overlap of the regions (PRO) at every threshold."""
        assert self.overlap is not None
        return self._over_false_positive_rate(self.overlap)

    def precision_recall(self) -> Curve:
        """Recall and precision at the scores of positives, behind scikit-learn's conventional (0, 1)."""
        recall = self.true_positives / self.positives
        return np.concatenate([[0.0], recall]), np.concatenate([[1.0], self._precision()])

    def _precision(self) -> NDArray[np.float64]:
        return self.true_positives / (self.true_positives + self.false_positives)

    def _over_false_positive_rate(self, gain: NDArray[np.float64]) -> Curve:
        """A curve that runs level up to each score of a positive, and straight through the ties at it."""
        rate = np.stack([self.false_positives_above, self.false_positives], axis=1).ravel() / self.negatives
        before = np.concatenate([[0.0], gain[:-1]])
        reached = np.stack([before, gain], axis=1).ravel()
        return np.concatenate([[0.0], rate, [1.0]]), np.concatenate([[0.0], reached, [1.0]])


def _rank(negatives: ScoreHistogram, positives: ScoreHistogram, num_regions: int = 0) -> _Ranking | None:
    """The ranking of two histograms, or None if one of them is empty."""
    table, num_negatives = positives.table(), negatives.pixels
    if table is None or not num_negatives:
        return None
    above, at_or_above = negatives.count_from(table.scores)
    overlap = None
    if table.weights is not None:
        overlap = np.minimum(np.cumsum(table.weights) / num_regions, 1)  # thirds need not add up to 1
    return _Ranking(
        true_positives=np.cumsum(table.pixels),
        false_positives=at_or_above,
        false_positives_above=above,
        negatives=num_negatives,
        overlap=overlap,
    )


def area_under(curve: Curve, limit: float = 1.0) -> float:
    """Area under a curve of ascending x from x = 0 to `limit`, with linear interpolation at the limit."""
    x, y = curve
    end = int(np.searchsorted(x, limit))  # of several points at the limit, the first: the others add no area
    share = (limit - x[end - 1]) / (x[end] - x[end - 1])
    at_limit = y[end - 1] + share * (y[end] - y[end - 1])
    x, y = np.append(x[:end], limit), np.append(y[:end], at_limit)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def _thinned(curve: Curve) -> Curve:
    """At most `CURVE_POINTS` of a curve's points, evenly spaced along it, the first and the last among them."""
    x, y = curve
    travelled = np.cumsum(np.abs(np.diff(x, prepend=x[0])) + np.abs(np.diff(y, prepend=y[0])))
    kept = np.unique(np.searchsorted(travelled, np.linspace(0, travelled[-1], CURVE_POINTS)))
    return x[kept], y[kept]


def _region_weights(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], int]:
    """1 / area of the 8-connected region that each anomalous pixel lies in (row-major), and the number of regions."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    regions, count = ndimage.label(box, structure=np.ones((3, 3)))
    region = regions[box]
    return 1 / np.bincount(region)[region], count


def _min_max_scaled(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """`values` scaled from [low, high] to [0, 1] unless they lie there; all 0 where low equals high."""
    if low >= 0 and high <= 1:
        return values
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _as_array(values: Any) -> NDArray:
    if hasattr(values, "detach"):  # a torch tensor, told without importing torch
        values = values.detach().cpu()
        return (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    return np.asarray(values)


def _scores(values: Any, name: str, dimensions: int) -> NDArray[np.floating]:
    """`values` as float32, or float64 where that is needed to keep them apart."""
    array = _as_array(values)
    if array.ndim != dimensions or 0 in array.shape[1:]:
        axes = "(B, H, W)" if dimensions == 3 else "(B,)"
        raise MoECLIPError(f"{name} must be of shape {axes}, not {array.shape}")
    if array.dtype.kind not in "biuf":
        raise MoECLIPError(f"{name} must be real numbers, not {array.dtype}")
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def _require_finite(values: NDArray[np.floating], name: str) -> None:
    if not np.isfinite(values).all():
        raise MoECLIPError(f"{name} holds NaN or infinite values")


def _without_channel(masks: Any) -> NDArray:
    array = _as_array(masks)
    return array[:, 0] if array.ndim == 4 and array.shape[1] == 1 else array


def _binary(values: Any, name: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    array = _as_array(values)
    if array.shape != shape:
        raise DatasetError(f"{name} must be of shape {shape}, to match pixel_scores, not {array.shape}")
    binary = array.astype(bool)
    if array.dtype != bool and not np.array_equal(array, binary):
        raise DatasetError(f"{name} must hold 0 and 1 only; threshold them first")
    return binary
