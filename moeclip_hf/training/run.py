"""A training run from a plain CLIP and a data set to a complete checkpoint."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig, ProgressCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from moeclip_hf.data.check import Problem, check_rows
from moeclip_hf.errors import CheckpointError, DatasetError, MoECLIPError, MoECLIPWarning, UnreadableImageError
from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
from moeclip_hf.modeling.image_processing_moeclip import MoECLIPImageProcessor
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, PROCESSOR_FILES, check_processor, fetch_clip
from moeclip_hf.stored_weights import MOECLIP_PARTS, check_weights, read_headers, refuse_non_finite
from moeclip_hf.training.curves import draw_training_curves
from moeclip_hf.training.monitor import ProgressBar
from moeclip_hf.training.recipes import Recipe, apply_recipe, draw_experts
from moeclip_hf.training.samples import TrainingSamples, refuse_streamed
from moeclip_hf.training.trainer import MoECLIPTrainer, own_weights

if TYPE_CHECKING:
    import datasets

CURVES_FILE = "training_curves.png"
UNREADABLE_FILE = "unreadable.txt"
"""File of a run's folder that lists the images it could not use, a line each."""

_NAMED = 10

# What a trained part was made for; other settings, as lambda or how many experts see a token, may change.
_PARTS_SETTINGS = (
    "moe_layers", "num_experts", "lora_rank", "use_fofs",
    "feature_layers", "image_feature_layer", "shared_projections",
)  # fmt: skip


def start_model(
    clip: str | PathLike[str],
    recipe: Recipe,
    seed: int = 0,
    image_size: int | None = None,
    fresh: bool = False,
    revision: str | None = None,
    **config: Any,
) -> tuple[MoECLIPModel, MoECLIPProcessor]:
    """
    A MoECLIP that starts from a plain CLIP as a recipe tells, or goes on from a MoECLIP checkpoint.

    Args:
        clip: a folder or a Hub id; "embedded" for the checkpoint that comes with the package.
        recipe ([`Recipe`]): what it sets of the model goes before what the checkpoint says.
        seed (`int`): of the new parts.
        image_size (`int`, *optional*): pixels that images are resized to; by default 518 for a CLIP of patch 14 and
            336 pixels, as the method does, and any other checkpoint's own size.
        fresh (`bool`): of a MoECLIP checkpoint take the CLIP alone, and draw the rest anew.
        revision (`str`, *optional*): of a Hub repository.
        config: other fields of `MoECLIPConfig`, such as `num_experts`.

    Returns:
        the model in float32 and its processor.

    Raises:
        CheckpointError: it cannot be loaded; it lacks weights, of a plain CLIP or with `fresh` those of the CLIP; it
            is to go on with other blocks, taps, experts or projections than its parts were trained for; or new experts
            would lie behind the last tap.
    """
    source = str(EMBEDDED_CHECKPOINT) if clip == "embedded" else str(clip)
    set_seed(seed)
    try:
        folder = fetch_clip(source, revision)
        settings = apply_recipe(MoECLIPConfig.from_pretrained(folder, **config), recipe)
        goes_on = not fresh and _is_moeclip(folder)
        if goes_on:
            _refuse_other_parts(MoECLIPConfig.from_pretrained(folder), settings)
        else:
            _refuse_idle_experts(settings)
        check_weights(source, read_headers(folder), MoECLIPModel, settings, () if goes_on else MOECLIP_PARTS)
        loaded: Any = MoECLIPModel.from_pretrained(
            folder,
            config=settings,
            dtype=torch.float32,
            ignore_mismatched_sizes=fresh,
            output_loading_info=True,
        )
        processor = _load_processor(source, folder, settings, image_size)
    except Exception as error:  # whatever a missing, foreign or damaged checkpoint leads to
        reason = " ".join(str(error).split()).removeprefix(f"{source}: ") or type(error).__name__
        raise CheckpointError(f"{source}: cannot be loaded to train on: {reason}") from error
    model, report = loaded
    own = own_weights(model)
    lacking = sorted(set(report["missing_keys"]) - (set() if goes_on else own))
    if lacking:
        whose = "its" if goes_on else "CLIP's"
        raise CheckpointError(f"{source}: lacks {len(lacking)} of {whose} weights ({lacking[0]}, ...).")
    refuse_non_finite(source, model.state_dict().items())
    if fresh:
        set_seed(seed)
        clip_weights = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
        # The towers are built in the type that the checkpoint is stored in.
        model = MoECLIPModel(settings).float()
        model.load_state_dict(clip_weights, strict=False)
    if not goes_on:
        draw_experts(model, recipe, seed)
    model.name_or_path = model.config.name_or_path = source
    return model, processor


def _is_moeclip(source: str | PathLike[str]) -> bool:
    stored, _ = PreTrainedConfig.get_config_dict(source)
    return stored["model_type"] == MoECLIPConfig.model_type


def _refuse_other_parts(stored: MoECLIPConfig, wanted: MoECLIPConfig) -> None:
    """Refuse to go on from parts that were trained for other places or shapes: they would be lost, or misused."""
    names = _PARTS_SETTINGS if wanted.shared_projections else (*_PARTS_SETTINGS, "aggregation_sizes")
    other = [name for name in names if getattr(stored, name) != getattr(wanted, name)]
    if other:
        listed = "; ".join(f"{name} {getattr(stored, name)}, not {getattr(wanted, name)}" for name in other)
        raise CheckpointError(
            f"its parts were trained with {listed}: leave that as it is, or draw new parts (--fresh)"
        )


def _refuse_idle_experts(wanted: MoECLIPConfig) -> None:
    """Refuse experts that would be trained on the terms of their own alone, as no tap comes after them."""
    last = (wanted.feature_layers or [0])[-1]
    idle = [block for block in wanted.moe_layers or () if block >= last]
    if idle:
        rest = ",".join(str(block) for block in wanted.moe_layers or () if block < last)
        remedy = f"leave them out (--moe-layers {rest})" if rest else "name a later tap (--feature-layers)"
        raise CheckpointError(
            f"experts of moe_layers {idle} (from 0) lie behind the last tap, {last} (from 1), and would change no "
            f"score: {remedy}"
        )


def _load_processor(source: str, folder: Path, config: MoECLIPConfig, image_size: int | None) -> MoECLIPProcessor:
    """The processor of a checkpoint, without a plain CLIP's crops; of a CLIP that has none, what fits it."""
    vision: Any = config.vision_config
    if any((folder / name).is_file() for name in PROCESSOR_FILES):
        processor = MoECLIPProcessor.from_pretrained(folder, trust_remote_code=False)
    else:
        processor = MoECLIPProcessor(
            MoECLIPImageProcessor.for_clip(vision.image_size, vision.patch_size),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        )
    # Thresholds were chosen on scores of the model as it was.
    processor.image_threshold = processor.pixel_threshold = 0.5
    check_processor(source, processor)
    images = processor.image_processor
    if image_size is not None:
        processor.image_processor = MoECLIPImageProcessor(
            {"height": image_size, "width": image_size}, vision.patch_size, images.image_mean, images.image_std
        )
    return processor


def training_arguments(output_dir: str | PathLike[str], recipe: Recipe, **settings: Any) -> TrainingArguments:
    """
    Arguments of the trainer that fit a recipe.

    Args:
        output_dir: where checkpoints, and at last the trained model, are written.
        recipe ([`Recipe`])
        settings: further fields of `TrainingArguments`, such as `bf16`, `save_steps` or `report_to`.
    """
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": recipe.batch_size,
        "num_train_epochs": recipe.num_epochs,
        "max_grad_norm": recipe.max_grad_norm,
        "learning_rate": recipe.learning_rate,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "dataloader_num_workers": 2,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "dataloader_persistent_workers": settings.get("dataloader_num_workers", 2) > 0,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": 600,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "report_to": "none",
        "seed": 0,
    }
    return TrainingArguments(output_dir=str(output_dir), **(defaults | settings))


def train(
    model: MoECLIPModel,
    processor: MoECLIPProcessor,
    rows: "datasets.Dataset",
    recipe: Recipe,
    args: TrainingArguments,
    resume: bool = False,
    dataset: str | None = None,
    skip_unreadable: bool = False,
) -> Path:
    """
    Train a model, and write it with its curves to the output folder.

    Every image and mask is read before the first step: one that cannot be used is found then, not hours later.

    Args:
        model ([`MoECLIPModel`]), processor ([`MoECLIPProcessor`]): from [`start_model`].
        rows (`datasets.Dataset`): from `moeclip_hf.data.load_data`; anomalous images need masks.
        recipe ([`Recipe`])
        args (`TrainingArguments`): from [`training_arguments`].
        resume (`bool`): go on from the last checkpoint in the output folder, if there is one.
        dataset (`str`, *optional*): Hub id of the rows, for the model card; they know their names alone.
        skip_unreadable (`bool`): leave out images that cannot be used, as [`check_rows`] tells, and say how many,
            instead of refusing the data.

    Returns:
        The output folder, which `from_pretrained` now reads.

    Raises:
        DatasetError: there are images that cannot be used; they are listed in the output folder's `unreadable.txt`.
        UnreadableImageError: naming an image that cannot be read any more.
        MoECLIPError: the output folder holds checkpoints of a run that is not resumed; data or settings do not fit;
            a package is missing; a process that reads images ends; or the disk is full.
    """
    check_installed(args)
    output_dir = Path(str(args.output_dir))
    checkpoint = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if checkpoint and not resume:
        raise MoECLIPError(f"{output_dir} holds checkpoints of another run: resume it, or name another folder.")
    rows = _usable_rows(rows, args, skip_unreadable)
    samples = TrainingSamples(rows, processor, recipe.augment, args.seed)
    trainer = MoECLIPTrainer(model, args, samples, processor, recipe, dataset)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressBar())
    if checkpoint and trainer.is_done(checkpoint):
        trainer.take_up(checkpoint)
    else:
        with _readers_named():
            trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        draw_training_curves(trainer.state.log_history, output_dir / CURVES_FILE)
    return output_dir


def _usable_rows(rows: "datasets.Dataset", args: TrainingArguments, skip_unreadable: bool) -> "datasets.Dataset":
    """The rows without those that cannot be used; each process reads its share of them."""
    refuse_streamed(rows)
    is_main = args.process_index == 0
    mine = range(args.process_index, len(rows), args.world_size)
    with tqdm(total=len(mine), desc="reading images", disable=args.disable_tqdm or not is_main, leave=False) as bar:
        found = check_rows(rows, mine, progress=lambda done, total: bar.update())
    problems = sorted(gather_object(found), key=lambda problem: problem[0])
    if not problems:
        return rows
    bad = {row for row, _ in problems}
    listed = Path(str(args.output_dir), UNREADABLE_FILE)
    if is_main:
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{_line(problem)}\n" for _, problem in problems), encoding="utf-8")
    named = "; ".join(_line(problem) for _, problem in problems[:_NAMED])
    more = f"; and so on, see {listed}" if len(problems) > _NAMED else ""
    if not skip_unreadable:
        raise DatasetError(
            f"{len(bad)} of {len(rows)} images cannot be trained on: {named}{more}. Mend them, or leave them out "
            "(--skip-unreadable)."
        )
    if is_main:
        text = f"{len(bad)} of {len(rows)} images are left out: {named}{more}"
        warnings.warn(text, MoECLIPWarning, stacklevel=3)
    return rows.select([row for row in range(len(rows)) if row not in bad])


def _line(problem: Problem) -> str:
    return f"{problem.path}: {problem.what}"


@contextmanager
def _readers_named() -> Iterator[None]:
    """Have what ends a process that reads images told in a line."""
    try:
        yield
    except UnreadableImageError as error:
        # torch puts the traceback of the process into the message.
        *_, reason = str(error).rstrip().split(f"{UnreadableImageError.__name__}: ")
        raise UnreadableImageError(reason) from error
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" in str(error):  # where a processor keeps aspect ratios
            raise MoECLIPError("images of unlike shapes make no batch: name an image size (--image-size)") from error
        if not re.search(r"DataLoader worker \(pid.*\) (is killed|exited)", str(error)):
            raise
        reason = " ".join(str(error).split())
        raise MoECLIPError(
            f"a process that reads images ended ({reason}): memory may be short; go on with fewer of them, or none "
            "(--num-workers 0), and --resume."
        ) from error


def check_installed(args: TrainingArguments) -> None:
    """
    Refuse before a run what would fail at its end.

    Raises:
        MoECLIPError: naming a package that the run needs and that is missing.
    """
    missing = [package for package in ("matplotlib", *(args.report_to or ())) if find_spec(package) is None]
    if missing:
        raise MoECLIPError(f"{missing[0]} is not installed, and this run needs it: pip install {missing[0]}")
