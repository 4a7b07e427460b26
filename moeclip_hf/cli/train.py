"""`moeclip train`: from a plain CLIP and a data set with masks to a checkpoint."""

import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moeclip_hf.cli.usage import LARGEST_EDGE

_MODEL_SETTINGS = frozenset({
    "num_experts", "num_experts_per_tok", "lora_rank", "lora_alpha", "use_fofs", "moe_layers", "feature_layers",
    "aggregation_sizes", "shared_projections", "projection_activation", "image_feature_layer",
})  # fmt: skip
_LISTS = ("halve_at", "moe_layers", "feature_layers", "aggregation_sizes")


class RecipeName(StrEnum):
    """Recipes by name."""

    paper = "paper"
    paper_literal = "paper-literal"
    released = "released"


class Precision(StrEnum):
    """Types that the forward pass computes in; weights and norms stay in float32."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Tracker(StrEnum):
    """Where curves are sent while a run goes on."""

    none = "none"
    tensorboard = "tensorboard"
    trackio = "trackio"
    wandb = "wandb"


def _recipe(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default="the recipe's", rich_help_panel="Recipe")


def _model(help: str, min: int | None = None, max: int | None = None) -> Any:
    return typer.Option(help=help, min=min, max=max, show_default="the checkpoint's", rich_help_panel="Model")


def _run(help: str, *names: str, min: int | None = None) -> Any:
    return typer.Option(*names, help=help, min=min, rich_help_panel="Run")


def _precision(help: str, *names: str, min: int | None = None) -> Any:
    return typer.Option(*names, help=help, min=min, rich_help_panel="Memory and precision")


def train(
    output_dir: Annotated[Path, typer.Option(help="Where checkpoints and, at last, the model are written.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Benchmark, index file, folder or Hub data set, with masks.",
            show_default="--data-dir, a folder of one's own",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that holds a benchmark, or a folder of one's own.")
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the data; the method trains on test images.")] = "test",
    classes: Annotated[str | None, typer.Option(help="Names, with commas.", show_default="all")] = None,
    class_name: Annotated[
        str | None,
        typer.Option(
            help='What a folder of one class of one\'s own shows, such as "metal nut".', show_default="object"
        ),
    ] = None,
    skip_unreadable: Annotated[
        bool,
        typer.Option(
            "--skip-unreadable", help="Leave out images that cannot be read, or whose masks do not fit, and say so."
        ),
    ] = False,
    clip: Annotated[
        str, typer.Option(help="Plain CLIP, or a MoECLIP to go on from: folder, Hub id or embedded.")
    ] = "openai/clip-vit-large-patch14-336",
    revision: Annotated[str | None, typer.Option(help="Of a CLIP on the Hub.", show_default="main")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Of a MoECLIP take the CLIP alone.")] = False,
    recipe: Annotated[RecipeName, typer.Option(help="See docs/training.md.")] = RecipeName.paper,
    num_epochs: Annotated[float | None, _recipe("Passes over the data.")] = None,
    batch_size: Annotated[int | None, _recipe("Images a process and step.")] = None,
    learning_rate: Annotated[float | None, _recipe("Of projections and adapters.")] = None,
    expert_learning_rate: Annotated[float | None, _recipe("Of routers and experts.")] = None,
    adam_beta1: Annotated[float | None, _recipe("Of Adam.")] = None,
    adam_beta2: Annotated[float | None, _recipe("Of Adam.")] = None,
    adam_epsilon: Annotated[float | None, _recipe("Of Adam.")] = None,
    warmup_steps: Annotated[int | None, _recipe("Steps over which learning rates rise from zero.")] = None,
    halve_at: Annotated[str | None, _recipe("Steps at which learning rates are halved, with commas.")] = None,
    max_grad_norm: Annotated[float | None, _recipe("Norm to which gradients are scaled down; 0 for never.")] = None,
    expert_std: Annotated[float | None, _recipe("Deviation that B is drawn with.")] = None,
    router_std: Annotated[float | None, _recipe("Deviation that G is drawn with.")] = None,
    augment: Annotated[bool | None, _recipe("Rotate, shift and flip.", "--augment/--no-augment")] = None,
    etf_loss_coef: Annotated[float | None, _recipe("Weight of the ETF term.")] = None,
    router_aux_loss_coef: Annotated[float | None, _recipe("Weight of the balance term.")] = None,
    lora_dropout: Annotated[float | None, _recipe("Dropout on the experts' input.")] = None,
    residual_weight: Annotated[float | None, _recipe("lambda: how much of a block's output the experts make.")] = None,
    hidden_act: Annotated[str | None, _recipe("Activation of both towers.")] = None,
    num_experts: Annotated[int | None, _model("K.")] = None,
    num_experts_per_tok: Annotated[int | None, _model("k.")] = None,
    lora_rank: Annotated[int | None, _model("r.")] = None,
    lora_alpha: Annotated[float | None, _model("alpha.")] = None,
    use_fofs: Annotated[bool | None, _model("Frozen orthogonal feature separation.")] = None,
    moe_layers: Annotated[str | None, _model("Adapted blocks, counted from 0, with commas.")] = None,
    feature_layers: Annotated[str | None, _model("Taps, counted from 1, with commas.")] = None,
    aggregation_sizes: Annotated[str | None, _model("Windows of patch averages, with commas.")] = None,
    shared_projections: Annotated[bool | None, _model("One projection a tap.")] = None,
    projection_activation: Annotated[str | None, _model("Activation behind the projections of patches.")] = None,
    image_feature_layer: Annotated[int | None, _model("Tap that the image embedding is made from.")] = None,
    image_size: Annotated[int | None, _model("Pixels that images are resized to.", min=1, max=LARGEST_EDGE)] = None,
    max_steps: Annotated[int, _run("End after so many steps, whatever the epochs; -1 for never.")] = -1,
    seed: Annotated[int, _run("Decides on everything random.")] = 0,
    resume: Annotated[bool, _run("Go on from the last checkpoint in the output folder.", "--resume")] = False,
    save_steps: Annotated[int, _run("Steps between checkpoints.", min=1)] = 500,
    save_total_limit: Annotated[int, _run("Checkpoints that are kept.", min=1)] = 2,
    logging_steps: Annotated[int, _run("Steps between logs.", min=1)] = 10,
    tracker: Annotated[Tracker, _run("Where curves are sent.")] = Tracker.tensorboard,
    num_workers: Annotated[int, _run("Processes that read images, a training process.", min=0)] = 2,
    cpu: Annotated[bool, _run("Leave accelerators alone.", "--cpu")] = False,
    gradient_accumulation_steps: Annotated[int, _precision("Batches a step.", min=1)] = 1,
    activation_checkpointing: Annotated[
        bool, _precision("Compute blocks again in the backward pass.", "--activation-checkpointing")
    ] = False,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Type of the forward pass.",
            show_default="the launcher's, or else no",
            rich_help_panel="Memory and precision",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was trained as JSON, and all else on standard error.")
    ] = False,
) -> None:
    """Train MoECLIP's parts over a frozen CLIP.

    On several GPUs or nodes: `accelerate launch examples/train.py` with the same options.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    source = data_dir if dataset is None else dataset
    if source is None:
        raise typer.BadParameter("name a data set: --dataset, with --data-dir for a benchmark, or --data-dir alone")

    from transformers.utils import logging

    from moeclip_hf.data import load_data
    from moeclip_hf.pretrained import is_hub_id
    from moeclip_hf.processes import leave_processes
    from moeclip_hf.training import RECIPES, get_recipe, start_model, training_arguments
    from moeclip_hf.training import train as run_training
    from moeclip_hf.training.run import check_installed
    from moeclip_hf.training.trainer import RECIPE_FILE

    if precision is not None:  # goes before what `accelerate launch` was configured with
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision.value
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    given |= {name: _numbers(name, given[name]) for name in _LISTS if name in given}
    recipe_names = {field.name for field in fields(RECIPES[recipe.value])}
    chosen = get_recipe(recipe.value, **{name: given[name] for name in recipe_names & given.keys()})
    args = training_arguments(
        output_dir,
        chosen,
        max_steps=max_steps,
        seed=seed,
        save_steps=save_steps,
        save_total_limit=save_total_limit,
        logging_steps=logging_steps,
        report_to=tracker.value,
        dataloader_num_workers=num_workers,
        use_cpu=cpu,
        gradient_accumulation_steps=gradient_accumulation_steps,
        activation_checkpointing=activation_checkpointing,
        bf16=precision is Precision.bf16,
        fp16=precision is Precision.fp16,
        # A bar for people, a line a log for files. By itself the trainer would ask transformers' verbosity.
        disable_tqdm=not sys.stderr.isatty(),
    )
    check_installed(args)
    rows = load_data(source, data_dir, split, classes.split(",") if classes else None, class_name=class_name)
    model, processor = start_model(
        clip,
        chosen,
        seed,
        image_size,
        fresh,
        revision,
        **{name: given[name] for name in _MODEL_SETTINGS & given.keys()},
    )
    hub_id = dataset if dataset is not None and is_hub_id(dataset) else None
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        run_training(model, processor, rows, chosen, args, resume, hub_id, skip_unreadable)
    if args.process_index == 0 and as_json:
        print(json.dumps({"checkpoint": str(output_dir), **json.loads((output_dir / RECIPE_FILE).read_text())}))
    elif args.process_index == 0:
        typer.echo(f"Trained model written to {output_dir}; try: moeclip predict IMAGES --model {output_dir}")
    leave_processes()


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError:
        hint = f"--{name.replace('_', '-')}"
        raise typer.BadParameter(
            f"{text!r} must be whole numbers with commas between, such as 6,12", param_hint=hint
        ) from None
