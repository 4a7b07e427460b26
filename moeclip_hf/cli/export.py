"""`moeclip export`: a checkpoint as an ONNX graph for some classes."""

import json
from pathlib import Path
from typing import Annotated

import typer


def export(
    output: Annotated[Path, typer.Option(help="New folder for the graph and the processor.", show_default=False)],
    class_name: Annotated[
        list[str] | None,
        typer.Option(help='What images will show, such as "metal nut"; once for each class.', show_default="object"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or Hub id.", show_default="the embedded demonstration")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a checkpoint on the Hub.", show_default="main")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also write a graph with weights of 8 bits, smaller and less exact.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Export a checkpoint to ONNX, for use without torch's model.

    The graph takes images of any size and gives maps and scores of the named classes, whose prompts it holds.
    onnxruntime is held to the model before anything is kept. `moeclip predict --model FOLDER` uses what is exported.
    """
    from rich.console import Console
    from transformers.utils import logging

    from moeclip_hf.export import export_onnx, require_exporter
    from moeclip_hf.pretrained import load_pretrained

    require_exporter()  # before a checkpoint is downloaded
    logging.disable_progress_bar()
    pretrained = load_pretrained(model, "cpu", "float32", revision)
    with Console(stderr=True).status("exporting, which takes a minute or more"):
        exported = export_onnx(pretrained, class_name or ["object"], output, int8)
    if as_json:
        facts = {
            "folder": str(exported.folder),
            "class_names": exported.class_names,
            "bytes": exported.sizes,
            "largest_difference": exported.largest_difference,
            "int8_difference": exported.int8_difference,
        }
        print(json.dumps(facts))
        return
    differences = (exported.largest_difference, exported.int8_difference)
    for (name, size), difference in zip(exported.sizes.items(), differences, strict=False):
        typer.echo(
            f"{name}: {size / 1e6:.1f} MB; maps and scores differ from the model's by at most {difference:.1e} "
            "on random images"
        )
    typer.echo(f"Classes: {', '.join(exported.class_names)}")
    typer.echo(f"Stored in {exported.folder}; use it as: moeclip predict IMAGES --model {exported.folder}")
