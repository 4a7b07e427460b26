"""Timing of several pieces of code side by side, in turn, so that a noisy machine disturbs all of them alike."""

import time
from collections.abc import Callable
from statistics import median

from rich.progress import track


def alternate(sides: dict[str, Callable[[], object]], rounds: int, uncounted: int = 1) -> dict[str, list[float]]:
    """
    Time each side once a round.

    Args:
        sides (`dict[str, Callable]`): what to run, by name.
        rounds (`int`): counted rounds.
        uncounted (`int`): rounds before them, which fill caches.

    Returns:
        Seconds of every counted round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in track(range(uncounted + rounds), description="rounds", transient=True):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if number >= uncounted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], side: str, reference: str) -> float:
    """Median over the rounds of `side` over `reference`, each pair from the same round."""
    return median(a / b for a, b in zip(seconds[side], seconds[reference], strict=True))
