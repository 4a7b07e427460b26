"""`moeclip explain`: what the experts do with an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeclip_hf.cli.messages import one_line
from moeclip_hf.cli.predict import shortened

if TYPE_CHECKING:
    from moeclip_hf.explanation import Explanation


def explain(
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    class_name: Annotated[str, typer.Option(help='What the image shows, such as "metal nut".')] = "object",
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or Hub id.", show_default="the embedded demonstration")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a checkpoint on the Hub.", show_default="main")] = None,
    output_dir: Annotated[Path, typer.Option(help="Where pictures and figures are written.")] = Path("moeclip-output"),
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.", show_default="the best there is")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, not as a table.")] = False,
) -> None:
    """Show which expert every patch of an image is routed to, and what each expert adds to the anomaly map.

    Writes two pictures, NAME_routing.png and NAME_attributions.png, and the figures, NAME_experts.json: how much each
    expert is used, and how alike their outputs are.
    """
    from transformers.utils import logging

    from moeclip_hf.explanation import explain as explain_image
    from moeclip_hf.prediction import read_image
    from moeclip_hf.pretrained import load_pretrained
    from moeclip_hf.visualization import draw_attributions, draw_routing
    from moeclip_hf.writing import save_picture, write_whole

    logging.disable_progress_bar()
    picture = read_image(image)
    pretrained = load_pretrained(model, device, revision=revision)
    explanation = explain_image(pretrained, picture, class_name)

    output_dir.mkdir(parents=True, exist_ok=True)
    stem = shortened(image.stem)
    routing, attributions, figures = (
        output_dir / f"{stem}_{name}" for name in ("routing.png", "attributions.png", "experts.json")
    )
    save_picture(draw_routing(explanation, pretrained.processor.pixel_threshold), routing)
    save_picture(draw_attributions(explanation), attributions)
    facts = {"image": str(image), **explanation.summary(), "routing": str(routing), "attributions": str(attributions)}
    write_whole(figures, (json.dumps(facts, indent=2) + "\n").encode())
    if as_json:
        print(json.dumps(facts))
    else:
        _print_table(explanation)
        typer.echo(one_line(f"Written: {routing}, {attributions}, {figures}"))


def _print_table(explanation: Explanation) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    verdict = "anomalous" if explanation.is_anomalous else "normal"
    title = Text(f"{explanation.class_name}: {verdict}, score {explanation.score:.4f}", "italic")
    headings = ("block", "expert", "load", "chosen", "top-1", "adds to the map", "cosine of experts")
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    for layer in explanation.layers:
        cosine = layer.mean_output_cosine
        for expert, attribution in enumerate(layer.attributions.sum(axis=(1, 2))):
            shares = (layer.load[expert], layer.chosen_share[expert], layer.top_1_share[expert])
            of_layer = (str(layer.block), "-" if cosine is None else f"{cosine:.2f}") if expert == 0 else ("", "")
            cells = (*(f"{share:.1%}" for share in shares), f"{attribution:+.1e}")
            last = expert == len(layer.attributions) - 1
            table.add_row(of_layer[0], str(expert + 1), *cells, of_layer[1], end_section=last)
    Console().print(table)
