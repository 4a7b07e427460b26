"""What the ablations came to: means over seeds as tables and a picture, beside the paper's."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from moeclip_hf.data import ABLATION, ABLATION_BENCHMARKS, EXPERT_SIMILARITY
from moeclip_hf.evaluation.results import METRICS, UNDEFINED, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The paper's rows of a variant: in its ablation, and among its cosines.
PAPER_ROWS = {
    "full": ("full", "with FOFS and ETF"),
    "no-fofs": ("without FOFS", None),
    "no-etf": ("without ETF", "with FOFS"),
    "no-fofs-no-etf": ("without FOFS and ETF", "plain mixture"),
    "no-paa": ("without PAA", None),
    "no-depthwise": ("without depth-wise adapter", None),
}

COSINE = "expert_cosine"
FIGURES = {name: METRICS[name] for name in ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_aupro")}
FIGURES[COSINE] = "expert cosine"
PUBLISHED = ("image_auroc", "pixel_auroc", COSINE)


def paper_figures(variant: str) -> dict[str, float]:
    """The paper's figures of a variant, AUROC from 0 to 1; none where it has none."""
    if variant not in PAPER_ROWS:
        return {}
    name, cosine = PAPER_ROWS[variant]
    row = next(row for row in ABLATION if row.variant == name)
    figures = {name: round(getattr(row, name) / 100, 4) for name in ("image_auroc", "pixel_auroc")}
    return figures if cosine is None else figures | {COSINE: EXPERT_SIMILARITY[cosine]}


def summarise(variant: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every figure over the seeds; None where undefined."""
    values: dict[str, list[float]] = {
        name: [value for result in results if (value := result["figures"][name]) is not None]
        for name in results[0]["figures"]
    }
    return {
        "variant": variant,
        "seeds": [result["run"]["seed"] for result in results],
        "mean": {name: mean(of_seeds) if of_seeds else None for name, of_seeds in values.items()},
        "std": {name: stdev(of_seeds) if len(of_seeds) > 1 else None for name, of_seeds in values.items()},
        "values": {name: values[name] for name in FIGURES},
        "paper": paper_figures(variant),
    }


def _cell(name: str, value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return UNDEFINED
    scale, digits = (1, 3) if name.startswith(COSINE) else (100, 1)
    spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    return f"{scale * value:.{digits}f}{spread}"


def figure_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row a variant, the paper's figures last; AUROC, AP and AUPRO in percent. The first row is the heading."""
    table = [["variant", "seeds", *FIGURES.values(), *(f"paper: {FIGURES[name]}" for name in PUBLISHED)]]
    for row in rows:
        measured = [_cell(name, row["mean"][name], row["std"][name]) for name in FIGURES]
        paper = [_cell(name, row["paper"].get(name)) for name in PUBLISHED]
        table.append([row["variant"], str(len(row["seeds"])), *measured, *paper])
    return table


def cosine_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cosines between experts, a row a variant and a column a block. The first row is the heading."""
    names = [name for name in rows[0]["mean"] if name.startswith(f"{COSINE}_block_")]
    table = [["variant", *(f"block {name.rsplit('_', 1)[1]}" for name in names)]]
    for row in rows:
        table.append([row["variant"], *(_cell(name, row["mean"][name], row["std"][name]) for name in names)])
    return table


def write_reports(rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], output_dir: Path) -> None:
    """Write ablation.json, ablation.csv, ablation.md and ablation.png."""
    document = {"variants": rows, "runs": results}
    (output_dir / "ablation.json").write_text(json.dumps(document, indent=2) + "\n")
    with (output_dir / "ablation.csv").open("w", newline="", encoding="utf-8") as file:
        names = list(rows[0]["mean"])
        writer = csv.writer(file)
        heads = [f"{name}_{statistic}" for name in names for statistic in ("mean", "std")]
        writer.writerow(["variant", "seeds", *heads, *(f"{name}_paper" for name in FIGURES)])
        for row in rows:
            figures = [row[statistic][name] for name in names for statistic in ("mean", "std")]
            paper = [row["paper"].get(name) for name in FIGURES]
            writer.writerow([row["variant"], len(row["seeds"]), *figures, *paper])
    (output_dir / "ablation.md").write_text(_markdown(rows, results[0]["run"]), encoding="utf-8")
    draw(rows).savefig(output_dir / "ablation.png", dpi=110)


def _markdown(rows: Sequence[dict[str, Any]], run: Mapping[str, Any]) -> str:
    length = f"{run['steps']} steps" if run["steps"] else f"{run['recipe']['num_epochs']:g} epochs"
    parts = [
        "# Ablation",
        f"The CLIP {run['clip']}, trained on {run['train']} for {length} of {run['recipe']['batch_size']} images; "
        f"evaluated on {', '.join(run['test'])}. Means ± standard deviations over seeds; AUROC, AP and AUPRO in "
        f"percent, cosines from -1 to 1; {UNDEFINED} is undefined or not published.",
        markdown_table(figure_table(rows)),
        f"The paper's AUROC are means over {', '.join(ABLATION_BENCHMARKS)}. Beside figures of other data only the "
        f"differences between rows compare.",
        "## Mean cosine between the outputs of two experts, by block",
        markdown_table(cosine_table(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def draw(rows: Sequence[dict[str, Any]]) -> "Figure":
    """
    Draw a panel a figure and a bar a variant: how far its mean lies from the first variant's, and the cosine as it is.

    Seeds are dots; those of the first variant show how much is chance. Diamonds are the paper's.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure

    first = rows[0]
    shown = [name for name in FIGURES if any(row["mean"][name] is not None for row in rows)]
    figure = Figure(figsize=(2 + 2.7 * len(shown), 1.9 + 0.36 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        if name == COSINE:
            axes.set(title=FIGURES[name], xlabel="mean over test images")
            _draw_bars(axes, name, rows, 1, 0, 0)
        else:
            title = f"{FIGURES[name]}\n{first['variant']}: {_cell(name, first['mean'][name], first['std'][name])}"
            axes.set(title=title, xlabel=f"percentage points from {first['variant']}")
            _draw_bars(axes, name, rows, 100, first["mean"][name], first["paper"].get(name))
    panels[0].set_yticks(range(len(rows)), [row["variant"] for row in rows])
    panels[0].invert_yaxis()
    marks = {label: mark for axes in panels for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=len(marks))
    return figure


def _draw_bars(
    axes: "Axes", name: str, rows: Sequence[dict[str, Any]], scale: float, origin: float, paper_origin: float | None
) -> None:
    """One figure of all rows, `scale` times their distance from an origin; the paper's from the paper's."""
    means = {place: row["mean"][name] for place, row in enumerate(rows) if row["mean"][name] is not None}
    axes.barh(list(means), [scale * (value - origin) for value in means.values()], height=0.7, color="#9ab8d6",
              label="mean over seeds")  # fmt: skip
    seeds = [(scale * (value - origin), place) for place, row in enumerate(rows) for value in row["values"][name]]
    axes.plot(*zip(*seeds, strict=True), "o", color="#1f3b57", markersize=4, alpha=0.7, label="a seed")
    if paper_origin is not None:
        paper = [
            (scale * (row["paper"][name] - paper_origin), place)
            for place, row in enumerate(rows)
            if name in row["paper"]
        ]
        axes.plot(*zip(*paper, strict=True), "D", color="#d1495b", markersize=7, fillstyle="none", label="the paper's")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.1)
