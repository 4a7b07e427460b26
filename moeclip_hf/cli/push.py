"""`moeclip push`: publish a checkpoint or an adapter on the Hub."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

_CARD = "For the model card"
_REPOSITORY = "The repository"


def push(
    folder: Annotated[Path, typer.Argument(help="Of a checkpoint or an adapter.", show_default=False)],
    repo_id: Annotated[
        str,
        typer.Argument(metavar="USER/NAME", help="The repository; made if it is not there.", show_default=False),
    ],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="The results.json that `moeclip evaluate` wrote of these weights.", rich_help_panel=_CARD),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the CLIP.", show_default="an adapter's own", rich_help_panel=_CARD),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="It was trained on; may be repeated.", rich_help_panel=_CARD)
    ] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0.", rich_help_panel=_CARD)] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who sees a new repository.",
            show_default="as your account is set",
            rich_help_panel=_REPOSITORY,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to.", show_default="main", rich_help_panel=_REPOSITORY)
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose it as a pull request.", rich_help_panel=_REPOSITORY)
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", rich_help_panel=_REPOSITORY)] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the repository to this folder, push nothing.", rich_help_panel=_REPOSITORY
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Publish a checkpoint or an adapter, with its processor, its code and a model card.

    It then loads with the package and, a checkpoint, without it (trust_remote_code=True). Log in once with `hf auth
    login`, or set HF_TOKEN. A README.md that is there keeps what you wrote in it.
    """
    if dry_run is not None and (private is not None or revision or create_pr or message):
        raise typer.BadParameter("--dry-run writes files alone: options of the repository mean nothing to it")

    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    from moeclip_hf.hub import push_to_hub, write_repository

    logging.disable_progress_bar()
    card: dict[str, Any] = {
        "evaluation": evaluation,
        "base_model": base_model,
        "datasets": dataset or (),
        "license": license,
    }
    if dry_run is not None:
        paths = write_repository(folder, dry_run, repo_id, **card)
        sizes = {path.relative_to(dry_run).as_posix(): path.stat().st_size for path in paths}
        if as_json:
            print(json.dumps({"repo_id": repo_id, "folder": str(dry_run), "files": sizes}))
        else:
            _print_files(sizes)
            typer.echo(f"Written to {dry_run}; nothing was pushed.")
        return
    if as_json:
        disable_progress_bars()
    commit = push_to_hub(
        folder,
        repo_id,
        **card,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
    )
    if as_json:
        facts = {"url": str(commit.repo_url), "commit": commit.oid, "commit_url": commit.commit_url}
        print(json.dumps({"repo_id": repo_id, **facts, "pull_request": commit.pr_url}))
    else:
        typer.echo(f"Opened a pull request: {commit.pr_url}" if create_pr else f"Pushed to {commit.repo_url}")
        if not (revision or create_pr):
            typer.echo(f"Try it: moeclip predict IMAGES --model {repo_id}")


def _print_files(sizes: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "bytes")
    table.columns[1].justify = "right"
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    Console().print(table)
