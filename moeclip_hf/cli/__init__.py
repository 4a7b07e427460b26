"""The `moeclip` command. Each subcommand is a module of this package and imports what is heavy only when it runs."""

import sys
import warnings
from typing import Any

import typer

from moeclip_hf._version import __version__
from moeclip_hf.cli.app import app as page
from moeclip_hf.cli.benchmarks import benchmarks
from moeclip_hf.cli.calibrate import calibrate
from moeclip_hf.cli.convert import convert
from moeclip_hf.cli.evaluate import evaluate
from moeclip_hf.cli.explain import explain
from moeclip_hf.cli.export import export
from moeclip_hf.cli.messages import one_line
from moeclip_hf.cli.predict import predict
from moeclip_hf.cli.push import push
from moeclip_hf.cli.train import train
from moeclip_hf.errors import MoECLIPError, MoECLIPWarning

app = typer.Typer(
    name="moeclip",
    help="Zero-shot anomaly detection with MoECLIP: scores, verdicts and heat maps for parts nobody trained on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(predict)
app.command()(explain)
app.command()(train)
app.command()(evaluate)
app.command()(calibrate)
app.command()(export)
app.command()(push)
app.command("app")(page)
app.add_typer(benchmarks, name="benchmarks")
app.add_typer(convert, name="convert")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"moeclip-hf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Hold the options that stand before a subcommand."""


def main() -> None:
    """Run the command line; a mistake of the user's ends in one line on standard error and exit status 1."""
    warnings.showwarning = _show_warning
    # Of damaged EXIF and of large images, which are read all the same. Not where files are opened, which threads do,
    # since filters belong to the whole process.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        app()
    except (MoECLIPError, OSError) as error:  # a full disk, a folder that cannot be written to
        _say(error)
        sys.exit(1)


_show_others = warnings.showwarning


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if issubclass(category, MoECLIPWarning):
        _say(message)
    else:
        _show_others(message, category, filename, lineno, file, line)


def _say(message: object) -> None:
    typer.echo(f"moeclip: {one_line(str(message))}", err=True)
