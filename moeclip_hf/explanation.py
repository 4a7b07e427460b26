"""Looking inside: which expert every patch is routed to, how unlike the experts are, and what each adds to the map."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.func import functional_call

from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.modeling.image_processing_moeclip import ImageLike, to_rgb
from moeclip_hf.modeling.moe_lora import (
    MoELora,
    MoELoraOutput,
    expert_codes,
    expert_gram,
    in_float32,
    mix_experts,
    route,
    vector_norm,
)
from moeclip_hf.pretrained import Pretrained


@dataclass(frozen=True)
class LayerExplanation:
    """
    What the K experts behind one block do with a grid of h x w patches. The class token is left out.

    Args:
        block: counted from 1, as in the paper.
        probabilities: (K, h, w), the router's softmax.
        weights: (K, h, w), with which the experts are mixed: 0 where one is not chosen; they sum to 1.
        attributions: (K, h, w), what each expert's answer at each patch adds to the mean over maps and patches of the
            probability of abnormal, to first order: the gradient with respect to the block's adapted output, times the
            expert's part of that output, `lambda w_i o_i ||x|| / ||o||` with the two norms held fixed.
        output_cosine: (K, K), cosines between the experts' outputs, chosen or not; mean over patches.
    """

    block: int
    probabilities: np.ndarray
    weights: np.ndarray
    attributions: np.ndarray
    output_cosine: np.ndarray

    @property
    def top_1(self) -> np.ndarray:
        """(h, w), the expert of the largest weight, from 0."""
        return self.weights.argmax(axis=0)

    @property
    def load(self) -> list[float]:
        """K values: an expert's probability, mean over patches. They sum to 1."""
        return self.probabilities.mean(axis=(1, 2)).tolist()

    @property
    def chosen_share(self) -> list[float]:
        """K values: the share of patches an expert is chosen for. They sum to k, the experts a patch is routed to."""
        return (self.weights > 0).mean(axis=(1, 2)).tolist()

    @property
    def top_1_share(self) -> list[float]:
        """K values: the share of patches over which an expert has the largest weight. They sum to 1."""
        return (np.bincount(self.top_1.ravel(), minlength=len(self.weights)) / self.top_1.size).tolist()

    @property
    def mean_output_cosine(self) -> float | None:
        """Mean cosine between the outputs of two experts; `None` of a single one."""
        pairs = self.output_cosine[~np.eye(len(self.output_cosine), dtype=bool)]
        return float(pairs.mean()) if pairs.size else None


@dataclass(frozen=True)
class Explanation:
    """
    What a model does with one image.

    Args:
        image: RGB, W x H.
        class_name: what it is taken to show.
        score, is_anomalous, anomaly_map, regions: as in [`Prediction`].
        layers: one a mixture of experts, from the first block to the last.
    """

    image: Image.Image
    class_name: str
    score: float
    is_anomalous: bool
    anomaly_map: np.ndarray
    regions: list[dict[str, Any]]
    layers: tuple[LayerExplanation, ...]

    def summary(self) -> dict[str, Any]:
        """The figures, without maps, as plain values for JSON; experts are counted from 1."""
        return {
            "class_name": self.class_name,
            "score": self.score,
            "is_anomalous": self.is_anomalous,
            "layers": [
                {
                    "block": layer.block,
                    "mean_output_cosine": layer.mean_output_cosine,
                    "output_cosine": layer.output_cosine.tolist(),
                    "experts": [
                        {
                            "expert": expert + 1,
                            "load": layer.load[expert],
                            "chosen_share": layer.chosen_share[expert],
                            "top_1_share": layer.top_1_share[expert],
                            "attribution": float(layer.attributions[expert].sum()),
                        }
                        for expert in range(len(layer.weights))
                    ],
                }
                for layer in self.layers
            ],
        }


def explain(pretrained: Pretrained, image: ImageLike, class_name: str = "object") -> Explanation:
    """
    Score one image, and record what its experts do: one pass forward, and one back to the first of them.

    Args:
        pretrained ([`Pretrained`]): from [`load_pretrained`].
        image: as [`MoECLIPImageProcessor`] takes it.
        class_name (`str`): what it shows, such as "metal nut".

    Raises:
        CheckpointError: if the model has no experts of its own.
        MoECLIPError: if the image is too long a strip to keep its aspect ratio, or the model gives no finite scores.
    """
    model, processor = pretrained
    blocks = model.config.moe_layers
    if not blocks:
        raise CheckpointError(
            "The model has no experts of its own to explain (moe_layers is empty): of an adapter, "
            "moeclip_hf.adapters.adapter_to_full makes a model that has."
        )
    image = to_rgb(image)
    try:
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    except ValueError as error:
        raise MoECLIPError(str(error)) from error
    inputs = {"pixel_values": pixel_values, "text_embeds": pretrained.encode_class(class_name).clone()}
    # Nothing but hidden states takes part in the graph, which begins at the first experts: it costs little memory.
    weights: dict[str, torch.Tensor] = {
        name: nn.Parameter(weight.detach(), False) for name, weight in model.named_parameters()
    }
    with torch.enable_grad(), _recorded(model.moe_layers) as calls:
        outputs = functional_call(model, weights, kwargs=inputs)
        abnormal = outputs.anomaly_logits.sigmoid().mean(dim=1)
        gradients = torch.autograd.grad(
            abnormal.sum(), [call.output.hidden_states for call in calls], allow_unused=True, materialize_grads=True
        )
    try:
        result = processor.post_process_anomaly_detection(outputs, [(image.height, image.width)])[0]
    except ValueError as error:
        raise MoECLIPError(str(error)) from error
    grid = abnormal.shape[-2:]
    layers = [
        _explain_layer(block + 1, call, gradient / grid.numel(), grid)
        for block, call, gradient in zip(blocks, calls, gradients, strict=True)
    ]
    anomaly_map = result["map"].detach().cpu().numpy()
    return Explanation(
        image, class_name, result["score"], result["is_anomalous"], anomaly_map, result["regions"], tuple(layers)
    )


class _Call(NamedTuple):
    """The experts of a layer, what they were given (1, N + 1, d), and what they returned."""

    experts: MoELora
    hidden_states: torch.Tensor
    output: MoELoraOutput


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list[_Call]]:
    """Record the calls of mixtures of experts, in order, and let gradients reach what they return."""
    calls: list[_Call] = []

    def record(experts: MoELora, arguments: tuple[Any, ...], output: MoELoraOutput) -> MoELoraOutput:
        if not output.hidden_states.requires_grad:
            output = output._replace(hidden_states=output.hidden_states.detach().requires_grad_())
        calls.append(_Call(experts, arguments[0], output))
        return output

    with ExitStack() as hooks:
        for experts in layers:
            hooks.callback(experts.register_forward_hook(record).remove)
        yield calls


@torch.no_grad()
def _explain_layer(block: int, call: _Call, gradient: torch.Tensor, grid: torch.Size) -> LayerExplanation:
    experts = call.experts
    hidden_states, gradient = in_float32(call.hidden_states[0, 1:]), in_float32(gradient[0, 1:])
    lora_A, lora_B = in_float32(experts.lora_A), in_float32(experts.lora_B)
    probabilities, weights = route(call.output.router_logits[0, 1:], experts.num_experts_per_tok)
    codes = expert_codes(hidden_states, lora_A)

    update = mix_experts(codes, lora_B, weights * experts.scaling)
    norm_matching = vector_norm(hidden_states) / vector_norm(update).clamp_min(1e-6)
    # g . (B_i c_i) = (B_i^T g) . c_i: the gradient goes to r dimensions, and not every expert's code to all d.
    products = (codes * expert_codes(gradient, lora_B.transpose(1, 2))).sum(dim=-1)
    attributions = experts.residual_weight * norm_matching * experts.scaling * weights * products

    def on_grid(values: torch.Tensor) -> np.ndarray:
        return values.T.unflatten(1, grid).cpu().numpy()

    return LayerExplanation(
        block=block,
        probabilities=on_grid(probabilities),
        weights=on_grid(weights),
        attributions=on_grid(attributions),
        output_cosine=expert_gram(codes, lora_B).mean(dim=0).cpu().numpy(),
    )


__all__ = ["Explanation", "LayerExplanation", "explain"]
