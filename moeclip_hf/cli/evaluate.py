"""`moeclip evaluate`: the benchmark protocol, on one process or several."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeclip_hf.cli.predict import Dtype
from moeclip_hf.cli.progress import progress_bar
from moeclip_hf.cli.usage import LARGEST_EDGE

if TYPE_CHECKING:
    from datasets import Dataset

    from moeclip_hf.data.registry import Domain
    from moeclip_hf.evaluation import EvaluationResult

_UNFINISHED = ".unfinished"


class DomainName(StrEnum):
    """How strongly maps are smoothed, and how an image's score is made."""

    industrial = "industrial"
    medical = "medical"


def evaluate(
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that holds the benchmarks, or a folder of one's own.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Benchmarks with commas between, or 'all'; an index file, folder or Hub id.",
            show_default="--data-dir, a folder of one's own",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or Hub id.", show_default="the embedded demonstration")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a checkpoint on the Hub.", show_default="main")] = None,
    classes: Annotated[str | None, typer.Option(help="With commas between.", show_default="all")] = None,
    class_name: Annotated[
        str | None,
        typer.Option(
            help='What a folder of one class of one\'s own shows, such as "metal nut".', show_default="object"
        ),
    ] = None,
    domain: Annotated[DomainName, typer.Option(help="Of data that is no benchmark's.")] = DomainName.industrial,
    output_dir: Annotated[Path, typer.Option(help="Where results and pictures are written.")] = Path(
        "moeclip-evaluation"
    ),
    pictures: Annotated[bool, typer.Option(help="Draw curves, and the images it went best and worst on.")] = True,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=LARGEST_EDGE, help="Edge that images and masks are resized to.", show_default="the model's"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed at once, a process.")] = 8,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.", show_default="the best there is")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type to compute in.", show_default="float16 on CUDA, else float32")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, not as tables.")] = False,
) -> None:
    """Evaluate a checkpoint on benchmarks, or on a data set of one's own, by the benchmark protocol.

    On several processes: accelerate launch -m moeclip_hf.cli evaluate ... An evaluation that was interrupted goes on
    when the same command is given again.
    """
    if dataset is None and data_dir is None:
        raise typer.BadParameter("name a data set: --dataset with --data-dir, or --data-dir alone")

    from transformers.utils import logging

    from moeclip_hf.evaluation import evaluate as run_evaluation
    from moeclip_hf.evaluation import write_reports
    from moeclip_hf.evaluation.pictures import require_matplotlib, write_pictures
    from moeclip_hf.evaluation.protocol import provenance
    from moeclip_hf.evaluation.results import drop_repetitions, set_aside
    from moeclip_hf.pretrained import load_pretrained
    from moeclip_hf.processes import join_processes, leave_processes

    logging.disable_progress_bar()
    is_main = join_processes()
    if pictures:
        require_matplotlib()
    data_sets = _read_data_sets(dataset, data_dir, classes, class_name, domain.value)
    pretrained = load_pretrained(model, device, dtype.value if dtype else None, revision)
    # Beside unfinished batches of its data sets stand the results of the run that was interrupted, and goes on.
    goes_on = any((output_dir / _UNFINISHED / name).exists() for name in data_sets)
    kept = set_aside(output_dir) if is_main and not goes_on else None
    results = []
    for name, rows in data_sets.items():
        with progress_bar(name, quiet=as_json or not is_main) as progress:
            result = run_evaluation(
                pretrained,
                rows,
                batch_size=batch_size,
                image_size=image_size,
                resume_dir=output_dir / _UNFINISHED / name,
                progress=progress,
            )
        results.append(result)
        if is_main:
            write_reports(results, provenance(pretrained), output_dir)
            if pictures:
                write_pictures(result, rows, output_dir)
            if not as_json:
                _print_result(result)
    if is_main:
        _finish(results, provenance(pretrained), output_dir, as_json)
        drop_repetitions(output_dir)
        if kept is not None and kept.exists():
            typer.echo(f"The results that were in {output_dir} are kept in {kept}.", err=True)
    leave_processes()


def _read_data_sets(
    dataset: str | None, data_dir: Path | None, classes: str | None, class_name: str | None, domain: Domain
) -> dict[str, Dataset]:
    """The data sets by name, all of them read before the first is evaluated."""
    from moeclip_hf.data import BENCHMARKS, load_data
    from moeclip_hf.errors import DatasetError

    wanted: list[Any] = [data_dir] if dataset is None else dataset.split(",")
    if dataset == "all":
        wanted = list(BENCHMARKS)
    data_sets = {}
    for source in wanted:
        named = classes.split(",") if classes else None
        rows = load_data(source, data_dir, classes=named, class_name=class_name, domain=domain)
        name = next(iter(rows["dataset"]), None)
        if name is None:
            raise DatasetError(f"{source}: holds no images")
        if name in data_sets:
            raise DatasetError(f"{source}: a data set named {name} is evaluated already: evaluate them one by one")
        _tell_benchmark(source, name, rows)
        data_sets[name] = rows
    return data_sets


def _tell_benchmark(source: str | Path, name: str, rows: Dataset) -> None:
    """Say how a benchmark is evaluated as one, where a folder only bears its name."""
    import warnings

    from moeclip_hf.data import find_benchmark
    from moeclip_hf.errors import MoECLIPWarning

    benchmark = find_benchmark(name)
    if benchmark and Path(source).is_dir() and not benchmark.is_own(set(rows["prompt_name"]), rows["domain"][0]):
        text = (
            f"{source}: is read as a folder of one's own, without {benchmark.name}'s prompts and domain: if it is the "
            f"benchmark, say --dataset {benchmark.name} --data-dir {source}"
        )
        warnings.warn(text, MoECLIPWarning, stacklevel=3)


def _finish(results: list[EvaluationResult], belongs_to: dict[str, Any], output_dir: Path, as_json: bool) -> None:
    import shutil
    from contextlib import suppress

    from moeclip_hf.evaluation.results import summary_table, to_document

    for result in results:  # another evaluation may have left its own there, or be under way
        folder = output_dir / _UNFINISHED / result.dataset
        shutil.rmtree(folder)
        with suppress(OSError):  # not empty
            os.removedirs(folder.parent)
    if as_json:
        print(json.dumps(to_document(results, belongs_to)))
        return
    if len(results) > 1:
        _print_table(summary_table(results), "all data sets")
    typer.echo(f"Written to {output_dir}{'' if output_dir.is_absolute() else ' (in this folder)'}")


def _print_result(result: EvaluationResult) -> None:
    from moeclip_hf.evaluation.results import caveats, dataset_table

    _print_table(dataset_table(result), f"{result.dataset} ({result.domain}), in percent")
    for note in caveats(result):
        typer.echo(note)


def _print_table(rows: list[list[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heading, *body = rows
    table = Table(title=title)
    for number, name in enumerate(heading):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for number, row in enumerate(body):
        is_last_group = number + 1 < len(body) and body[number + 1][0] == "mean"
        table.add_row(*map(Text, row), end_section=is_last_group)
    Console().print(table)
