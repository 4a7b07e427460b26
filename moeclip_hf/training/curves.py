"""The picture of a finished run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Panel titles, and what is drawn in each: names of logged figures, or the beginning of several.
_PANELS = {
    "loss": ("loss", "segmentation", "classification"),
    "auxiliary terms": ("etf", "balance"),
    "mean cosine between experts": ("expert_cosine",),
    "drift of the experts": ("expert_drift",),
    "load per expert": ("expert_load/",),
    "learning rate": ("learning_rate",),
}


def draw_training_curves(log_history: Sequence[dict[str, Any]], path: str | Path) -> None:
    """
    Draw loss terms, what the experts did and the learning rate over the steps of a run.

    Args:
        log_history: `trainer.state.log_history`.
        path: of the picture; its suffix decides on the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = [entry for entry in log_history if "loss" in entry]
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, wanted) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        names = sorted({name for entry in entries for name in entry if name.startswith(wanted)})
        for name in names:
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            axes.plot(*zip(*points, strict=True), label=name.removeprefix("expert_load/"), linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(names) > 1:
            axes.legend(fontsize="x-small", ncols=1 + len(names) // 8)
    figure.savefig(path, dpi=110)
