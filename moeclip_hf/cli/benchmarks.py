"""`moeclip benchmarks`: what the 14 benchmarks are, whether a copy on disk is complete, and a synthetic one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeclip_hf.cli.progress import progress_bar

if TYPE_CHECKING:
    from moeclip_hf.data import Benchmark, CheckReport

benchmarks = typer.Typer(help="List the benchmarks, check a copy on disk, or write a synthetic one.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


@benchmarks.callback(invoke_without_command=True)
def list_benchmarks(context: typer.Context, as_json: AsJson = False) -> None:
    """List the benchmarks that moeclip reads, with their sizes and published results."""
    from moeclip_hf.data import BENCHMARKS

    if context.invoked_subcommand is not None:
        return
    if as_json:
        typer.echo(json.dumps([_facts(benchmark) for benchmark in BENCHMARKS.values()], indent=2))
    else:
        _print_table(list(BENCHMARKS.values()))


@benchmarks.command()
def check(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Benchmarks to check, or 'all'.")],
    data_dir: Annotated[Path, typer.Option(help="A benchmark's root, or the folder that holds the benchmarks.")],
    as_json: AsJson = False,
) -> None:
    """Compare copies of benchmarks with what they should hold, and read every image and mask.

    The exit status is 0 when nothing is wrong.
    """
    from moeclip_hf.data import BENCHMARKS, get_benchmark

    wanted = list(BENCHMARKS.values()) if names == ["all"] else [get_benchmark(name) for name in names]
    reports = [_check(benchmark, data_dir, quiet=as_json) for benchmark in wanted]
    if as_json:
        typer.echo(json.dumps([_findings(report) for report in reports], indent=2))
    else:
        for report in reports:
            _print_report(report)
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


@benchmarks.command()
def textures(
    out: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    families: Annotated[str | None, typer.Option(help="Textures, with commas between; all by default.")] = None,
    defects: Annotated[str | None, typer.Option(help="Defects, with commas between; all by default.")] = None,
    normal: Annotated[int, typer.Option(min=0, help="Normal test images a class.")] = 20,
    anomalous: Annotated[int, typer.Option(min=0, help="Anomalous test images a class.")] = 20,
    train: Annotated[int, typer.Option(min=0, help="Normal training images a class.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Side of the images in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal images.")] = 0,
) -> None:
    """Write a benchmark of synthetic textures with exact masks, in MVTec AD's tree."""
    from moeclip_hf.data.textures import write_texture_benchmark

    with progress_bar("textures") as progress:
        write_texture_benchmark(
            out,
            families.split(",") if families else None,
            defects.split(",") if defects else None,
            normal=normal,
            anomalous=anomalous,
            train=train,
            size=size,
            seed=seed,
            progress=progress,
        )
    typer.echo(f"wrote {out}")


def _check(benchmark: Benchmark, data_dir: Path, quiet: bool) -> CheckReport:
    from moeclip_hf.data import check_benchmark

    with progress_bar(benchmark.name, quiet) as progress:
        return check_benchmark(benchmark, data_dir, progress)


def _facts(benchmark: Benchmark) -> dict[str, Any]:
    return {
        "name": benchmark.name,
        "aliases": list(benchmark.aliases),
        "domain": benchmark.domain,
        "classes": dict(benchmark.classes),
        "groups": benchmark.groups,
        "normal": benchmark.normal,
        "anomalous": benchmark.anomalous,
        "has_masks": benchmark.has_masks,
        "published": asdict(benchmark.published),
        "reproduced": asdict(benchmark.reproduced),
    }


def _findings(report: CheckReport) -> dict[str, Any]:
    return {
        "name": report.benchmark.name,
        "ok": report.ok,
        "normal": report.normal,
        "anomalous": report.anomalous,
        "masks": report.masks,
        "problems": [asdict(problem) for problem in report.problems],
    }


def _print_table(rows: list[Benchmark]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moeclip_hf.data import PUBLISHED_MEAN

    caption = "Images: normal/anomalous. AUROC: as published, in %; '-' where not published or not defined."
    table = Table(caption=caption, show_footer=True)
    table.add_column("name", footer="mean", no_wrap=True)
    table.add_column("domain", no_wrap=True)
    table.add_column("classes", justify="right")
    table.add_column("images", justify="right")
    table.add_column("masks")
    table.add_column("image AUROC", justify="right", footer=_percent(PUBLISHED_MEAN.image_auroc))
    table.add_column("pixel AUROC", justify="right", footer=_percent(PUBLISHED_MEAN.pixel_auroc))
    for row in rows:
        table.add_row(
            row.name,
            row.domain,
            str(len(row.classes)),
            f"{row.normal}/{row.anomalous}",
            "yes" if row.has_masks else "no",
            _percent(row.published.image_auroc),
            _percent(row.published.pixel_auroc),
        )
    Console().print(table)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _print_report(report: CheckReport) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    verdict = "[green]complete[/]" if report.ok else f"[red]problems: {len(report.problems)}[/]"
    counts = f"{report.normal} normal, {report.anomalous} anomalous, {report.masks} masks"
    console.print(f"[bold]{report.benchmark.name}[/]: {verdict} ({counts})")
    for problem in report.problems:
        console.print(f"  {escape(problem.path + ' ' if problem.path else '')}{escape(problem.what)}")
