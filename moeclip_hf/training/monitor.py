"""What is seen of a training run while it goes on: loss terms, speed, and what the experts do."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel
from moeclip_hf.modeling.moe_lora import MoELoraOutput, expert_codes, expert_gram
from moeclip_hf.training.sharding import whole

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingMonitor(TrainerCallback):
    """
    Gathers figures between two logs; none of them takes part in training.

    Logged, beside the trainer's own `loss`, `learning_rate` and `grad_norm`:

    - `segmentation`, `classification`, `etf`, `balance`: the unweighted terms of the loss, means over the steps.
    - `images_per_second`: of all processes.
    - `expert_load/block_<b>/<expert>`: share of the tokens' k choices that fell on an expert.
    - `expert_cosine`: mean cosine between the outputs of two experts, over pairs, tokens and layers, -1 to 1.
    - `expert_grad_norm`: of all B in the last step; the trainer logs it as it was before clipping.
    - `expert_drift`: 1 minus the cosine between all B and where they started or, from zero, where the first step of
      this process has put them, 0 to 2.

    And, whenever a checkpoint is written, `expert_gain`: of [`MoECLIPTrainer.expert_gain`].

    Args:
        model ([`MoECLIPModel`]): watched within [`~TrainingMonitor.watching`].
    """

    def __init__(self, model: MoECLIPModel):
        self.blocks = model.config.moe_layers
        self.experts = list(model.moe_layers)
        self.start = [layer.lora_B.detach().clone() for layer in self.experts]
        self.num_experts_per_tok = model.config.num_experts_per_tok
        self._reset()

    def _reset(self) -> None:
        self.steps, self.images, self.since = 0, 0, time.perf_counter()
        self.terms: dict[str, torch.Tensor] = {}
        self.choices: dict[int, torch.Tensor] = {}
        self.cosines: dict[int, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See what the experts do within the context; no hook is left on them behind it."""
        with ExitStack() as hooks:
            for number, layer in enumerate(self.experts):
                hooks.callback(layer.register_forward_hook(self._watch(number)).remove)
            yield

    def _watch(self, number: int) -> Callable[..., None]:
        def watch(layer: nn.Module, inputs: tuple[Any, ...], output: MoELoraOutput) -> None:
            if not layer.training:
                return
            with torch.no_grad():
                num_experts = output.router_logits.shape[-1]
                chosen = output.router_logits.topk(self.num_experts_per_tok, dim=-1).indices
                counts = chosen.flatten().bincount(minlength=num_experts).float()
                self.choices[number] = self.choices.get(number, 0) + counts
                if num_experts > 1:
                    gram = expert_gram(expert_codes(inputs[0], layer.lora_A), layer.lora_B).flatten(0, -3).mean(dim=0)
                    cosine = (gram.sum() - gram.trace()) / (num_experts * (num_experts - 1))
                    self.cosines[number] = self.cosines.get(number, 0) + cosine

        return watch

    def count(self, losses: dict[str, torch.Tensor], num_images: int) -> None:
        """Count one forward pass: its terms (each of shape ()) and its images."""
        for name, term in losses.items():
            self.terms[name] = self.terms.get(name, 0) + term.detach().float()
        self.steps += 1
        self.images += num_images

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reset()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = [layer.lora_B for layer in self.experts]
        self.grad_norm = _length([weight.grad for weight in weights if weight.grad is not None])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not any(weight.any() for weight in self.start):
            self.start = [whole(layer.lora_B.detach()).clone() for layer in self.experts]

    def collect(self, accelerator: "Accelerator") -> dict[str, float]:
        """Figures since the last call, over all processes, every one of which must call it."""
        figures = {name: total / self.steps for name, total in self.terms.items()}
        cosines = [total / self.steps for total in self.cosines.values()]
        if cosines:
            figures["expert_cosine"] = torch.stack(cosines).mean()
        for number, counts in self.choices.items():
            for expert, share in enumerate(counts / counts.sum()):
                figures[f"expert_load/block_{self.blocks[number]}/{expert}"] = share
        means = accelerator.reduce(torch.stack(list(figures.values())), "mean").tolist()
        logs = dict(zip(figures, means, strict=True))
        seconds = time.perf_counter() - self.since
        logs["images_per_second"] = accelerator.num_processes * self.images / seconds
        if self.experts:
            logs["expert_grad_norm"] = self.grad_norm
            logs["expert_drift"] = self._drift()
        self._reset()
        return logs

    def _drift(self) -> float:
        weights = [whole(layer.lora_B.detach()).cpu() for layer in self.experts]
        start = [weight.cpu() for weight in self.start]
        norms = _length(weights) * _length(start)
        if not norms:
            return 0.0
        return 1 - sum(float((a * b).sum()) for a, b in zip(weights, start, strict=True)) / norms


class ProgressBar(ProgressCallback):
    """The trainer's progress bar, with loss, learning rate and speed behind it rather than a line a log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shown = {"loss": "loss", "learning_rate": "lr", "images_per_second": "images/s"}
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix({short: f"{logs[name]:.3g}" for name, short in shown.items()})


def _length(tensors: list[torch.Tensor]) -> float:
    return sum(float(whole(tensor).float().square().sum()) for tensor in tensors) ** 0.5
