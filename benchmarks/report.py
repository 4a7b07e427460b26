"""What a benchmark measured: printed as tables, and kept for docs/benchmarks.md."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.alternating import ratio

PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True)
class Goal:
    """
    A figure with the value that it is to keep.

    Args:
        figure: what was measured.
        measured: its value.
        limit: what it may be at most, or, if `at_least`, has to be.
        unit: behind both.
    """

    figure: str
    measured: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def is_held(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True)
class Report:
    """
    One table.

    Args:
        title: what all sides have in common.
        rows: the heading, and a row a side.
        goals: of figures in it.
        pictures: files under docs/ that show it.
    """

    title: str
    rows: list[list[str]]
    goals: list[Goal] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


def timing_rows(seconds: dict[str, list[float]], reference: str, digits: int = 2) -> list[list[str]]:
    """A heading and a row a side of what [`alternate`] measured: median, least and most seconds, and the ratio."""
    rows = [["side", "median s", "min s", "max s", f"over {reference}"]]
    for name, values in seconds.items():
        times = (f"{f(values):.{digits}f}" for f in (median, min, max))
        rows.append([name, *times, f"{ratio(seconds, name, reference):.3f}"])
    return rows


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring and knows `--output`, where the reports go as JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file that also gets the figures, as JSON")
    return parser


def publish(reports: Sequence[Report], output: Path | None) -> None:
    """Print tables, and write them with the machine and the command that they are from."""
    console = Console()
    for report in reports:
        heading, *body = report.rows
        table = Table(*heading, title=report.title)
        for row in body:
            table.add_row(*row)
        console.print(table)
        for goal in report.goals:
            console.print(f"{goal.figure}: {describe(goal)}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(origin() | {"reports": [asdict(report) for report in reports]}, indent=2) + "\n")


def describe(goal: Goal) -> str:
    relation = "at least" if goal.at_least else "at most"
    measured = f"{goal.measured:.3g}"
    if float(measured) == goal.limit:  # on which side of it?
        measured = f"{goal.measured:.5g}"
    told = f"{measured}{goal.unit}, goal {relation} {goal.limit:.3g}{goal.unit}"
    return told if goal.is_held else f"{told}: missed"


def origin() -> dict[str, Any]:
    """The command, the machine, the versions and the date."""
    words = [word for word in sys.argv[1:] if not word.startswith("--output")]
    if "--output" in sys.argv:
        words.remove(sys.argv[sys.argv.index("--output") + 1])
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    return {
        "command": shlex.join(["python", "-m", module, *words]),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def processor_name() -> str:
    """What the system calls its processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
