"""Metrics of every group, updated in threads while the next images are being scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from moeclip_hf.evaluation.results import GroupResult, Heat
from moeclip_hf.evaluation.scoring import Batch, ScoredBatch, Size
from moeclip_hf.metrics import AnomalyMetrics, Domain
from moeclip_hf.modeling.processing_moeclip import upsample

_LANES = 4
"""Batch n is counted in lane n modulo this, and lanes are merged in order, so that figures are always the same."""

_PICTURED = 4
"""Images of each label, with the highest and with the lowest scores, whose maps are kept for pictures."""


class Tally:
    """
    Takes scored batches group by group, in the plan's order, and gives a result a group.

    Args:
        labels: of every row of the data set.
        size: (H, W) of maps and masks.
        domain: of the data set.
    """

    def __init__(self, labels: Sequence[int], size: Size, domain: Domain) -> None:
        self._labels, self._size, self._domain = np.asarray(labels), size, domain
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="metrics") for _ in range(_LANES)]
        self._group: _Group | None = None
        self._results: list[Future[GroupResult]] = []

    def __enter__(self) -> Tally:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=error is not None)

    def add(self, batch: Batch, scored: ScoredBatch) -> None:
        """Count a batch; the first of another group closes the one before."""
        if self._group is None or self._group.name != batch.group:
            self._close()
            self._group = _Group(batch.group, self._domain)
        lane = self._group.lanes[batch.number % _LANES]
        labels = self._labels[list(batch.indices)]
        thread = self._threads[batch.number % _LANES]
        self._group.updates.append(thread.submit(lane.update, batch.indices, scored, labels, self._size))

    def results(self) -> tuple[GroupResult, ...]:
        """The groups' results, when all that was added is counted."""
        self._close()
        return tuple(result.result() for result in self._results)

    def _close(self) -> None:
        if self._group is not None:
            self._results.append(self._threads[0].submit(self._group.result, self._labels))
            self._group = None


class _Lane:
    """A share of a group's batches: their metrics, and the row and patch grid of each image in the order counted."""

    def __init__(self, domain: Domain) -> None:
        self.metrics = AnomalyMetrics(domain)
        self.indices: list[int] = []
        self.grids: list[NDArray[np.float32]] = []
        self.mask_faults: Counter[str] = Counter()

    def update(self, indices: tuple[int, ...], scored: ScoredBatch, labels: NDArray[np.int64], size: Size) -> None:
        maps = upsample(torch.from_numpy(scored.grids), size).numpy()
        masks = scored.full_masks(size)
        faults = {
            "missing": (labels == 1) & ~scored.has_mask,
            "empty": (labels == 1) & scored.has_mask & ~masks.any(axis=(1, 2)),
            "other_size": scored.other_size,
        }
        self.mask_faults.update({name: int(found.sum()) for name, found in faults.items()})
        for known in (True, False):
            of_kind = np.flatnonzero(scored.has_mask == known)
            if of_kind.size:
                truth = masks[of_kind] if known else None
                self.metrics.update(maps[of_kind], scored.image_scores[of_kind], truth, labels[of_kind])
                self.indices += [indices[image] for image in of_kind]
                self.grids += list(scored.grids[of_kind])


class _Group:
    def __init__(self, name: str, domain: Domain) -> None:
        self.name = name
        self.domain = domain
        self.lanes = [_Lane(domain) for _ in range(_LANES)]
        self.updates: list[Future[None]] = []

    def result(self, all_labels: NDArray[np.int64]) -> GroupResult:
        wait(self.updates)
        for update in self.updates:
            update.result()
        total = AnomalyMetrics(self.domain)
        for lane in self.lanes:
            total.merge(lane.metrics)
        indices = np.concatenate([lane.indices for lane in self.lanes]).astype(int)
        grids = np.stack([grid for lane in self.lanes for grid in lane.grids])
        scores, labels = total.image_scores(), all_labels[indices]
        order = np.argsort(indices)
        return GroupResult(
            group=self.name,
            normal=int(np.count_nonzero(labels == 0)),
            anomalous=int(np.count_nonzero(labels == 1)),
            metrics=total.compute(),
            error_bound=total.error_bound,
            curves=total.curves(),
            scores=tuple(zip(indices[order].tolist(), labels[order].tolist(), scores[order].tolist(), strict=True)),
            heats=_pictured(indices, labels, scores, grids),
            mask_faults=sum((lane.mask_faults for lane in self.lanes), Counter()),
        )


def _pictured(
    indices: NDArray[np.intp], labels: NDArray[np.int64], scores: NDArray[np.float64], grids: NDArray[np.float32]
) -> tuple[Heat, ...]:
    """The images of each label with the highest and the lowest scores, their maps scaled to the group's range."""
    low, high = float(grids.min()), float(grids.max())
    chosen: dict[int, None] = {}
    for label in (0, 1):
        ranked = [image for image in np.lexsort((indices, -scores)) if labels[image] == label]
        chosen |= dict.fromkeys([*ranked[:_PICTURED], *ranked[-_PICTURED:]])
    scale = high - low if high > low else 1.0
    return tuple(
        Heat(int(indices[image]), int(labels[image]), float(scores[image]), (grids[image] - low) / scale)
        for image in chosen
    )
