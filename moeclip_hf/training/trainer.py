"""Training on `transformers.Trainer`: it brings devices, precision, accumulation, DDP, FSDP, trackers and resuming.

What is MoECLIP's own stands here: the balance term over all processes, a learning rate for the experts, and
checkpoints that hold what trains alone and appear whole or not at all.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from moeclip_hf.data.records import digest_rows
from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.modeling.configuration_moeclip import MoECLIPConfig
from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
from moeclip_hf.modeling.moe_lora import load_variation
from moeclip_hf.modeling.processing_moeclip import MoECLIPProcessor
from moeclip_hf.pretrained import describe_computation, is_hub_id
from moeclip_hf.stored_weights import MOECLIP_PARTS, digest_weights, is_finite
from moeclip_hf.training.monitor import TrainingMonitor
from moeclip_hf.training.recipes import Recipe, describe_recipe
from moeclip_hf.training.samples import EpochSampler, SampleDropout, TrainingSamples, sample_dropout
from moeclip_hf.training.sharding import make_shardable, whole

TRAINED_WEIGHTS = "trained.safetensors"
"""File of a training checkpoint with MoECLIP's own parts; the frozen CLIP is not in it."""

RECIPE_FILE = "recipe.json"

# What a resumed run may do otherwise: train for longer, and spread a step's images over other processes.
_MAY_CHANGE = ("num_epochs", "batch_size")

_STAGING = ".staging"


class MoECLIPTrainer(Trainer):
    """
    Trains MoECLIP's own parts over a frozen CLIP.

    Args:
        model ([`MoECLIPModel`]): frozen here but for its own parts, and trained in place.
        args ([`~transformers.TrainingArguments`]): devices, precision, logging and saving; optimizer and schedule are
            the recipe's. [`training_arguments`] makes fitting ones.
        samples ([`TrainingSamples`])
        processor ([`MoECLIPProcessor`])
        recipe ([`Recipe`])
        dataset (`str`, *optional*): Hub id of the samples, for the model card; their rows know their names alone.
    """

    def __init__(
        self,
        model: MoECLIPModel,
        args: TrainingArguments,
        samples: TrainingSamples,
        processor: MoECLIPProcessor,
        recipe: Recipe,
        dataset: str | None = None,
    ):
        if args.n_gpu > 1:
            raise MoECLIPError(f"there are {args.n_gpu} GPUs: start one process for each with `accelerate launch`.")
        step_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        if len(samples) < step_size:
            raise MoECLIPError(f"a step takes {step_size} images and there are {len(samples)}: lower the batch size.")
        self.recipe = recipe
        self.settings = describe_recipe(recipe) | {
            "seed": args.seed,
            "images": f"{len(samples)}, digest {digest_rows(samples.rows)[:12]}",
            "images_per_step": step_size,
        }
        base = model.name_or_path
        # For the model card. Not compared when a run is resumed, as folders may be moved meanwhile.
        self.provenance = {
            "base_model": base if is_hub_id(base) else Path(base).name or None,
            "datasets": [dataset] if dataset else samples.dataset_names,
        }
        # Not the trainer's own `processing_class`, whose special tokens it would write into the model's configuration.
        self.processor = processor
        self.sampler = EpochSampler(len(samples), args.seed, step_size)
        self.moeclip = model.freeze_backbone()
        self.output_dir = Path(str(args.output_dir))
        self.own_weights = own_weights(model)
        self.model_settings = describe_model(model, processor)
        self.experts = list(model.moe_layers)
        self.coefficients = {"etf": model.config.etf_loss_coef, "balance": model.config.router_aux_loss_coef}
        self.dropouts: list[SampleDropout] = []
        self.monitor = TrainingMonitor(model)
        self._staging: Path | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=samples,
            callbacks=[_EpochCallback(self.sampler), self.monitor],
        )
        if self.is_fsdp_enabled:
            make_shardable(model)
        self.settings["precision"] = self.accelerator.mixed_precision
        if self.accelerator.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise MoECLIPError("fp16 takes a GPU: on a CPU train in bf16 (--precision bf16), or in float32.")
        # The terms are means over a batch: of accumulated batches each counts by its share.
        self.loss_is_scaled_for_ga = False
        self.prompt_features, self.prompt_groups = self._compute_prompt_features(samples.prompt_names)

    @torch.no_grad()
    def _compute_prompt_features(self, prompt_names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the frozen text tower, once a class: (C, sentences, text width) and the groups of one class."""
        features = []
        for name in prompt_names:
            prompts = self.processor(text=[name], return_tensors="pt").to(self.moeclip.device)
            groups = prompts.pop("prompt_groups")
            features.append(self.moeclip.get_prompt_features(**prompts))
        return torch.stack(features).to(self.args.device), groups.to(self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam without weight decay, in two groups: routers and experts, and the rest."""
        if self.optimizer is None:
            recipe = self.recipe
            groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
            for name, parameter in (model or self.moeclip).named_parameters():
                if parameter.requires_grad:
                    groups["moe_layers." in name].append(parameter)
            self.optimizer = torch.optim.Adam(
                [
                    {"params": groups[False], "lr": recipe.learning_rate},
                    {"params": groups[True], "lr": recipe.expert_learning_rate},
                ],
                betas=(recipe.adam_beta1, recipe.adam_beta2),
                eps=recipe.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up, then halved at the recipe's steps."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.recipe.learning_rate_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the base class does; what that takes within the experts is taken out again, however it ends."""
        with self.monitor.watching(), sample_dropout(self.experts) as self.dropouts:
            return super().train(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective (section 3.5), with the balance term over the tokens of all processes."""
        inputs = dict(inputs)
        seeds = inputs.pop("sample_seeds").tolist()
        for dropout in self.dropouts:
            dropout.sample_seeds = seeds
        classes, class_index = inputs.pop("class_index").unique(return_inverse=True)
        first_groups = 2 * torch.arange(len(classes), device=classes.device)
        self.batch = inputs | {
            "prompt_features": self.prompt_features[classes].flatten(0, 1),
            "prompt_groups": (first_groups.unsqueeze(1) + self.prompt_groups).flatten(),
            "class_index": class_index,
        }
        outputs = model(**self.batch, output_router_logits=True)
        losses = dict(outputs.losses)
        if self.args.world_size > 1 and self.experts:
            losses["balance"] = torch.stack([global_balance_loss(logits) for logits in outputs.router_logits]).sum()
        loss = sum(self.coefficients.get(name, 1.0) * term for name, term in losses.items())
        self.monitor.count(losses, len(seeds))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the trainer tells and, beside a step's loss, what the monitor has seen since the last time."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self._refuse_non_finite()
            logs |= self.monitor.collect(self.accelerator)
            if self.recipe.learning_rate and "learning_rate" in logs:
                speed = self.recipe.expert_learning_rate / self.recipe.learning_rate
                logs["expert_learning_rate"] = speed * logs["learning_rate"]
            if self.args.max_grad_norm and "expert_grad_norm" in logs:  # seen after all gradients were scaled alike
                logs["expert_grad_norm"] *= max(1.0, logs["grad_norm"] / self.args.max_grad_norm)
        super().log(logs, start_time)

    @torch.no_grad()
    def expert_gain(self) -> float:
        """
        How much higher the last batch's segmentation loss is without the experts, over all processes.

        Of the model as it is used, without dropout; every process must call it.
        """
        lambdas = [layer.residual_weight for layer in self.experts]
        was_training = self.moeclip.training
        self.moeclip.eval()
        terms = []
        for weights in (lambdas, [0.0] * len(lambdas)):
            for layer, weight in zip(self.experts, weights, strict=True):
                layer.residual_weight = weight
            with self.compute_loss_context_manager():
                terms.append(self.moeclip(**self.batch).losses["segmentation"].float())
        for layer, weight in zip(self.experts, lambdas, strict=True):
            layer.residual_weight = weight
        self.moeclip.train(was_training)
        return float(self.accelerator.reduce(terms[1] - terms[0], "mean"))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.output_dir)

    @contextmanager
    def _staged(self, target: Path) -> Iterator[Path]:
        """
        A new folder in another, for files that are moved to their places there once all of them are written.

        Raises:
            MoECLIPError: if they cannot be written, of which nothing is left then.
        """
        staging, is_new = target / _STAGING, not target.exists()
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._staging = staging
            yield staging
        # A full disk is an error of torch's or of safetensors' own.
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise MoECLIPError(
                f"{target}: step {self.state.global_step} cannot be saved ({reason}): see to the disk, then "
                "resume from the checkpoint before."
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                if is_new:
                    with suppress(OSError):  # it holds what was written
                        target.rmdir()

    def _refuse_non_finite(self) -> None:
        """
        End a run that has diverged, before it takes the place of what it could be saved from.

        A loss alone may not be finite where half precision leaves out the step.

        Raises:
            MoECLIPError: a weight is not finite.
        """
        trained = (parameter for parameter in self.moeclip.parameters() if parameter.requires_grad)
        if not all(is_finite(whole(parameter)) for parameter in trained):
            raise MoECLIPError(
                f"{self.output_dir}: at step {self.state.global_step} the weights are not finite any more and are not "
                "saved: train anew with a lower learning rate, or with max_grad_norm 1. Checkpoints before are kept."
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save what a run goes on from. The folder takes its name last: one that is there is whole."""
        self._refuse_non_finite()
        if self.experts:
            self.log({"expert_gain": self.expert_gain()})
        with self._staged(self.output_dir) as staging:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (written,) = staging.iterdir()
                _write_through(written)
                target = self.output_dir / written.name
                if target.exists():
                    os.replace(target, staging / "replaced")
                os.replace(written, target)
                _sync(self.output_dir)
        if self.args.should_save:
            rotate_checkpoints(str(self.output_dir), self.args.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save a complete checkpoint for `from_pretrained`: configuration, all weights, processor and recipe.

        Args:
            output_dir (`str`, *optional*): that of the run by default.

        Raises:
            MoECLIPError: the weights are not finite, or cannot be written.
        """
        state = self._state_dict()
        if _internal_call:
            self._save_own_weights(Path(str(output_dir)), state)
            return
        self._refuse_non_finite()
        target = Path(output_dir or self.output_dir)
        with self._staged(target) as staging:
            if self.args.should_save:
                self.moeclip.save_pretrained(staging, state_dict=state)
                self.processor.save_pretrained(staging)
                _write_json(staging / RECIPE_FILE, self._describe_run())
                _write_through(staging)
                # The configuration last: without it the folder is no checkpoint.
                for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
                    os.replace(file, target / file.name)
                _sync(target)

    def _describe_run(self) -> dict[str, Any]:
        """What a card tells: the run as it went, which may have ended before the recipe's last epoch."""
        went = {
            "selection": f"the last of {self.state.global_step} steps",
            "num_epochs": round(self.state.epoch or 0, 4),
        }
        return self.provenance | self.settings | went

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save the model, and publish it with its code and a model card from the main process.

        Args:
            commit_message, token, revision, private: as of [`moeclip_hf.hub.push_to_hub`]; those of the arguments by
                default, as is the repository.
            blocking: has to be so.
            kwargs: further arguments of [`moeclip_hf.hub.push_to_hub`].

        Returns:
            `CommitInfo` in the main process, `None` in others.
        """
        from moeclip_hf.hub import push_to_hub

        if not blocking:
            raise MoECLIPError("a model is pushed while the caller waits: leave blocking as it is.")
        self.save_model()
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        return push_to_hub(
            self.output_dir,
            str(self.hub_model_id),
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            **kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing: a checkpoint to resume from holds what trains alone, and no other can load it."""

    def _state_dict(self) -> dict[str, torch.Tensor]:
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model)
        return self.moeclip.state_dict()

    def _save_own_weights(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: state[name].detach().cpu().contiguous() for name in self.own_weights}
        save_file(weights, folder / TRAINED_WEIGHTS, metadata={"format": "pt"})
        self.processor.save_pretrained(folder)
        _write_json(folder / RECIPE_FILE, self.settings | {"model": self.model_settings})

    def is_done(self, checkpoint: str) -> bool:
        """Whether a checkpoint was saved at this run's last step; the trainer would take one more."""
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * self.sampler.steps_per_epoch)
        return _saved_state(checkpoint).global_step >= steps

    def take_up(self, checkpoint: str) -> None:
        """Take a checkpoint's weights and history, and train no further."""
        self._load_from_checkpoint(checkpoint)
        self.state = _saved_state(checkpoint)
        self.state.is_world_process_zero = self.is_world_process_zero()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load MoECLIP's own parts; refuse a checkpoint of another recipe or model."""
        folder = Path(resume_from_checkpoint)
        try:
            weights = load_file(folder / TRAINED_WEIGHTS)
            saved = json.loads((folder / RECIPE_FILE).read_text())
            saved |= saved.pop("model", {})
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: cannot be resumed from: {error}") from error
        for name, value in (self.settings | self.model_settings).items():
            if name not in saved:
                raise CheckpointError(f"{folder}: does not record {name}, as an earlier version wrote it: train anew.")
            if name not in _MAY_CHANGE and saved[name] != value:
                raise CheckpointError(f"{folder}: was trained with {name} {saved.get(name)}, not {value}.")
        if set(weights) != self.own_weights:
            odd = sorted(set(weights) ^ self.own_weights)
            raise CheckpointError(f"{folder}: does not fit the model; {odd[0]} is in one of them only.")
        # Works on sharded models, too.
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model or self.moeclip, dict(weights), options=options)


class _EpochCallback(TrainerCallback):
    """Tells the sampler which epoch it is: the trainer's own way does not reach one within a sharded batch sampler."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.epoch = int(state.epoch or 0)


def _saved_state(checkpoint: str) -> TrainerState:
    path = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        return TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be resumed from: {error}") from error


def own_weights(model: MoECLIPModel) -> set[str]:
    """Names of what a checkpoint must hold beside the CLIP: all that trains, and the frozen projections of FOFS."""
    return {name for name in model.state_dict() if name.startswith(MOECLIP_PARTS)}


def describe_model(model: MoECLIPModel, processor: MoECLIPProcessor) -> dict[str, Any]:
    """What stays as it is when a run is resumed: the settings of MoECLIP's parts, the input's size, and the CLIP."""
    clip = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(MOECLIP_PARTS)}
    settings = {name: getattr(model.config, name) for name in MoECLIPConfig.__annotations__}
    return (
        describe_computation(model, processor)
        | settings
        | {
            "image_size": dict(processor.image_processor.size),
            "clip": f"digest {digest_weights(clip)[:12]}",
        }
    )


def global_balance_loss(router_logits: torch.Tensor) -> torch.Tensor:
    """
    The balance term of one layer over the tokens of all processes.

    The load is summed over the processes before its variation is taken, which is not linear in it. A process's own
    share carries the gradient, times the number of processes, by which DDP divides.

    Args:
        router_logits (`torch.Tensor`): (B, tokens, K), of this process.
    """
    load = router_logits.softmax(dim=-1).flatten(0, -2).sum(dim=0)
    total = load.detach().clone()
    distributed.all_reduce(total)
    return load_variation(total + distributed.get_world_size() * (load - load.detach()))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _write_through(folder: Path) -> None:
    """Have all files of a folder on the disk, so that no power cut leaves a name without its contents."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
