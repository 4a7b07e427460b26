"""A one-pass histogram of scores: exact while it is small, then within a proven relative error.

A bin is a distinct score, so ties stay ties and no range has to be known. When the distinct scores outgrow the
budget, neighbours are snapped together, finest where figures are most sensitive: at the top of the ranking.

The invariant. Let F(t) be the number of pixels scoring t or more and F'(t) what the histogram says. A coarsening
groups neighbouring bins and moves each group to its *highest* score; behind its first bin, a group holds at most
`TOLERANCE` times what lies at or above that first bin. So for every t, after m coarsenings,

    F(t) <= F'(t) <= (1 + TOLERANCE)^m F(t).

Weights (of a pixel: its share of its region) obey W(t) <= W'(t) <= W(t) + m TOLERANCE W(-inf).

Raw scores are sorted into a table of level 0, and every `FAN_IN` tables of a level are merged into one of the next, as
in a log-structured merge tree: m grows with the logarithm of the number of pixels n (m = 4 at 1 G pixels). A table
holds at most EXACT_BINS bins or, if that is more, one for each bracket of counts, (1 + ln(TOLERANCE n)) / TOLERANCE,
and of weights, 1 / TOLERANCE. So whatever the scores are, its size hardly depends on n.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 8e-6
"""Relative error one coarsening may add to a count."""

EXACT_BINS = 2**20
"""Tables of up to so many bins are never coarsened."""

CHUNK_BYTES = 2**25
"""Raw scores held back before they are sorted into a table."""

FAN_IN = 4
"""Tables of one level that make one of the next."""


@dataclass(frozen=True)
class Table:
    """Distinct scores, from the highest down, and what was seen at each."""

    scores: NDArray[np.float64]  # (n,)
    pixels: NDArray[np.int64]  # (n,)
    weights: NDArray[np.float64] | None  # (n,); None in an unweighted histogram
    coarsenings: int


class ScoreHistogram:
    """Counts of pixels by score; with `weighted`, also the sum of a weight that each pixel carries."""

    def __init__(self, weighted: bool = False) -> None:
        self.weighted = weighted
        self._levels: list[list[Table]] = [[]]
        self._pending_scores: list[NDArray[np.floating]] = []
        self._pending_weights: list[NDArray[np.float64]] = []
        self._pending_bytes = 0

    def add(self, scores: NDArray[np.floating], weights: NDArray[np.float64] | None = None) -> None:
        """Add pixels, (n,) scores and, if weighted, (n,) weights. The arrays are kept: do not write to them."""
        if not scores.size:
            return
        self._pending_scores.append(scores)
        self._pending_bytes += scores.nbytes
        if weights is not None:
            self._pending_weights.append(weights)
            self._pending_bytes += weights.nbytes
        if self._pending_bytes >= CHUNK_BYTES:
            self._fold()

    def merge(self, other: "ScoreHistogram") -> None:
        """Add all that another histogram has seen; the other one keeps what it holds."""
        for level, tables in enumerate(other.levels()):
            self._insert(level, *tables)

    def levels(self) -> list[list[Table]]:
        """The tables, by level, with everything added so far in them."""
        self._fold()
        return [list(tables) for tables in self._levels]

    @property
    def pixels(self) -> int:
        """The number of pixels seen."""
        return sum(int(table.pixels.sum()) for tables in self.levels() for table in tables)

    @property
    def relative_error(self) -> float:
        """(1 + TOLERANCE)^m - 1, for the most coarsenings that a pixel went through; 0 means exact."""
        most = max((table.coarsenings for tables in self.levels() for table in tables), default=0)
        return (1 + TOLERANCE) ** most - 1

    def table(self) -> Table | None:
        """Everything seen as one table, or None if nothing was."""
        tables = [table for tables in self.levels() for table in tables]
        return _merge(tables, budget=None) if tables else None

    def count_from(self, thresholds: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many pixels score above each of the (n,) thresholds, and how many at or above it."""
        above, at_or_above = np.zeros((2, thresholds.size), np.int64)
        for tables in self.levels():
            for table in tables:
                keys = -table.scores
                cumulative = np.concatenate([[0], np.cumsum(table.pixels)])
                above += cumulative[np.searchsorted(keys, -thresholds, side="left")]
                at_or_above += cumulative[np.searchsorted(keys, -thresholds, side="right")]
        return above, at_or_above

    def state_dict(self, prefix: str = "") -> dict[str, NDArray]:
        """The histogram as plain arrays: the tables' bins end to end, and (bins, level, coarsenings) of each table."""
        tables = [(level, table) for level, tables in enumerate(self.levels()) for table in tables]
        shapes = [(table.scores.size, level, table.coarsenings) for level, table in tables]
        state = {
            f"{prefix}tables": np.array(shapes, np.int64).reshape(-1, 3),
            f"{prefix}scores": np.concatenate([np.empty(0), *(table.scores for _, table in tables)]),
            f"{prefix}pixels": np.concatenate([np.empty(0, np.int64), *(table.pixels for _, table in tables)]),
        }
        if self.weighted:
            weights = [table.weights for _, table in tables if table.weights is not None]
            state[f"{prefix}weights"] = np.concatenate([np.empty(0), *weights])
        return state

    def load_state_dict(self, state: Mapping[str, NDArray], prefix: str = "") -> None:
        """Replace the contents by those of `state_dict`. Raises KeyError where an array is missing."""
        scores, pixels = state[f"{prefix}scores"], state[f"{prefix}pixels"]
        weights = state[f"{prefix}weights"] if self.weighted else None
        restored = ScoreHistogram(self.weighted)
        end = 0
        for bins, level, coarsenings in state[f"{prefix}tables"].tolist():
            part = slice(end, end := end + bins)
            table_weights = None if weights is None else weights[part]
            restored._insert(level, Table(scores[part], pixels[part], table_weights, coarsenings))
        vars(self).update(vars(restored))

    def _fold(self) -> None:
        if not self._pending_scores:
            return
        keys = np.concatenate(self._pending_scores)
        np.negative(keys, out=keys)
        self._pending_scores.clear()
        self._pending_bytes = 0
        if self.weighted:
            weights = np.concatenate(self._pending_weights)
            self._pending_weights.clear()
            order = np.argsort(keys)
            table = _collapse(keys[order], None, weights[order], 0, EXACT_BINS)
        else:
            keys.sort()
            table = _collapse(keys, None, None, 0, EXACT_BINS)
        self._insert(0, table)

    def _insert(self, level: int, *tables: Table) -> None:
        while tables:
            while len(self._levels) <= level:
                self._levels.append([])
            waiting = self._levels[level]
            waiting.extend(tables)
            if len(waiting) < FAN_IN:
                return
            self._levels[level] = []
            tables = (_merge(waiting, EXACT_BINS),)
            level += 1


def _merge(tables: list[Table], budget: int | None) -> Table:
    """Several tables as one, coarsened if it has more than `budget` bins (None: never)."""
    if len(tables) == 1:
        return tables[0]
    keys = np.concatenate([table.scores for table in tables])
    np.negative(keys, out=keys)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    pixels = np.concatenate([table.pixels for table in tables])[order]
    weights = [table.weights for table in tables if table.weights is not None]
    ordered_weights = np.concatenate(weights)[order] if weights else None
    return _collapse(keys, pixels, ordered_weights, max(table.coarsenings for table in tables), budget)


def _collapse(
    keys: NDArray[np.floating],
    pixels: NDArray[np.int64] | None,
    weights: NDArray[np.float64] | None,
    coarsenings: int,
    budget: int | None,
) -> Table:
    """One bin for each distinct key, or for each group of them where there are more than `budget`.

    `keys` are negated scores in ascending order; each stands for `pixels` (None: one) and carries `weights`, if any.
    """
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    if budget is not None and starts.size > budget:
        total = keys.size if pixels is None else int(pixels.sum())
        starts = starts[_group_starts(starts, total, pixels, weights)]
        coarsenings += 1
    return Table(
        scores=-keys[starts].astype(np.float64),
        pixels=np.diff(starts, append=keys.size) if pixels is None else np.add.reduceat(pixels, starts),
        weights=None if weights is None else np.add.reduceat(weights, starts),
        coarsenings=coarsenings,
    )


def _group_starts(
    starts: NDArray[np.intp], total: int, pixels: NDArray[np.int64] | None, weights: NDArray[np.float64] | None
) -> NDArray[np.intp]:
    """Indices of the bins that open a group: those whose cumulative count or cumulative weight enters a new bracket.

    A bracket of weights is TOLERANCE of their sum.
    """
    opens = np.zeros(starts.size, bool)
    opens[0] = True
    rows = starts[1:]  # up to and with each bin but the last, to which edges fall that the others do not reach
    counts = rows if pixels is None else np.cumsum(pixels)[rows - 1]
    opens[np.searchsorted(counts, _brackets(total))] = True
    if weights is not None:
        sums = np.cumsum(weights)
        opens[np.searchsorted(sums[rows - 1], sums[-1] * np.arange(0, 1, TOLERANCE))] = True
    return np.flatnonzero(opens)


def _brackets(total: int) -> NDArray[np.int64]:
    """First counts of the brackets [e, (1 + TOLERANCE) e) up to `total`; small counts are a bracket each."""
    single, step = 1 / TOLERANCE, np.log1p(TOLERANCE)
    geometric = single * np.exp(step * np.arange(np.log(max(total / single, 1)) / step))
    return np.concatenate([np.arange(1, min(single, total + 1)), np.ceil(geometric)]).astype(np.int64)
