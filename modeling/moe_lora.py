"""Mixtures of LoRA experts with a norm-matched residual (MoECLIP, arXiv 2603.03101, sections 3.2 to 3.4).

The one home of this maths: pure functions, and `MoELora`, the module that holds their parameters. Shapes: `...` any
leading dimensions (images, tokens), d features, K experts, r the rank of an expert.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

# Added to norms so that a token whose experts answer with zero stays finite.
_NORM_EPS = 1e-6


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Norms, softmaxes and cosines are not taken in half precision; float64 stays what it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager:
    """A context in which products keep the types of what they are given, on the device of a tensor."""
    return maybe_autocast(tensor.device.type, enabled=False)


def vector_norm(vectors: torch.Tensor) -> torch.Tensor:
    """Lengths of vectors (..., d), (..., 1), accumulated in float32 at least."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=dtype)


def fofs_projection(num_features: int, num_experts: int, rank: int, generator: torch.Generator | None = None):
    """
    Draw the projections of frozen orthogonal feature separation (FOFS).

    The features are cut into K contiguous chunks, the first `d mod K` of them one longer. An expert's projection is
    zero outside its chunk and holds there the transposed Q factor of a Gaussian matrix, so that the rows of all
    experts are orthonormal: `A_i A_j^T` is the identity for i = j and zero otherwise.

    Args:
        num_features (`int`): d.
        num_experts (`int`): K.
        rank (`int`): r, at most `d // K`.
        generator (`torch.Generator`, *optional*): source of the Gaussians.

    Returns:
        `torch.Tensor` of shape (K, r, d), float32.
    """
    if num_features // num_experts < rank:
        raise ValueError(
            f"rank ({rank}) exceeds the {num_features // num_experts} features that each of num_experts "
            f"({num_experts}) gets of {num_features}."
        )
    projection = torch.zeros(num_experts, rank, num_features, dtype=torch.float32)
    start = 0
    for expert, chunk in enumerate(torch.arange(num_features).tensor_split(num_experts)):
        stop = start + len(chunk)
        gaussian = torch.randn(len(chunk), rank, generator=generator, dtype=torch.float32)
        projection[expert, :, start:stop] = torch.linalg.qr(gaussian).Q.T
        start = stop
    return projection


def route(router_logits: torch.Tensor, num_experts_per_tok: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Choose and weigh the experts of every token: softmax, keep the k largest, scale their sum to 1.

    Args:
        router_logits (`torch.Tensor`): (..., K), float32.
        num_experts_per_tok (`int`): k.

    Returns:
        The probabilities (..., K) of all experts, and the weights (..., K), zero for the experts not chosen.
    """
    probabilities = router_logits.softmax(dim=-1)
    if num_experts_per_tok == router_logits.shape[-1]:
        return probabilities, probabilities
    # As softmax over the chosen alone, whose gradient with respect to the others is zero, and no rounding error: Adam
    # would make whole steps of that.
    chosen, experts = router_logits.topk(num_experts_per_tok, dim=-1, sorted=False)
    return probabilities, torch.zeros_like(probabilities).scatter(-1, experts, chosen.softmax(dim=-1))


def expert_codes(hidden_states: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
    """`A_i x` of all experts in one product: (..., d) and (K, r, d) give (..., K, r)."""
    return F.linear(hidden_states, lora_A.flatten(0, 1)).unflatten(-1, lora_A.shape[:2])


def mix_experts(codes: torch.Tensor, lora_B: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_i w_i B_i c_i` in one product: codes (..., K, r), lora_B (K, d, r), weights (..., K) give (..., d)."""
    weighted = (codes * weights.unsqueeze(-1).to(codes.dtype)).flatten(-2)
    return F.linear(weighted, lora_B.transpose(0, 1).flatten(1))


def norm_matched_residual(hidden_states: torch.Tensor, update: torch.Tensor, residual_weight: float) -> torch.Tensor:
    """
    `lambda o ||x|| / (||o|| + 1e-6) + (1 - lambda) x`: the experts' answer, brought to its token's length, mixed in.

    Norms and the sum are taken in float32. An update of zero leaves `(1 - lambda) x`, not x, and its gradient is
    large.

    Args:
        hidden_states (`torch.Tensor`): x, (..., d).
        update (`torch.Tensor`): o, (..., d). Where no gradients are recorded, the result may take its memory.
        residual_weight (`float`): lambda, 0 to 1.
    """
    scale = residual_weight * vector_norm(hidden_states) / (vector_norm(update) + _NORM_EPS)
    # Tokens are megabytes: writing to memory that is at hand costs less than half of writing to new memory.
    in_place = update.dtype == scale.dtype and not torch.is_grad_enabled()
    scaled = update.mul_(scale) if in_place else update * scale
    return scaled.add_(hidden_states, alpha=1 - residual_weight).to(hidden_states.dtype)


def load_variation(load: torch.Tensor) -> torch.Tensor:
    """
    Squared coefficient of variation of the experts' load: the balance term of one layer.

    It is not linear in the load, so that of a batch spread over processes needs the load summed over them first.

    Args:
        load (`torch.Tensor`): (K,). With K = 1 the load cannot vary: 0.
    """
    if len(load) == 1:
        return load.new_zeros(())
    return (load.std() / (load.mean() + 1e-6)) ** 2


def balance_loss(probabilities: torch.Tensor) -> torch.Tensor:
    """
    Squared coefficient of variation of the experts' load, the router probabilities summed over tokens.

    Args:
        probabilities (`torch.Tensor`): (..., K). With K = 1 the load cannot vary: 0.
    """
    return load_variation(probabilities.flatten(0, -2).sum(dim=0))


def expert_gram(codes: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """
    Cosines between the outputs of all experts, token by token, without forming the outputs.

    `(B_i c_i) . (B_j c_j) = c_i^T (B_i^T B_j) c_j` needs the r-dimensional codes and a small matrix alone.

    Args:
        codes (`torch.Tensor`): (..., K, r). The scale of an expert's output does not matter to its cosines.
        lora_B (`torch.Tensor`): (K, d, r).

    Returns:
        `torch.Tensor` of shape (..., K, K), float32; outputs shorter than 1e-6 count as of that length.
    """
    codes, lora_B = in_float32(codes), in_float32(lora_B)
    with without_autocast(codes):
        products = torch.einsum("idp,jdq->ipjq", lora_B, lora_B)
        gram = torch.einsum("...ip,ipjq,...jq->...ij", codes, products, codes)
    squared_norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(_NORM_EPS**2)
    inverse_norms = squared_norms.rsqrt()
    return gram * inverse_norms.unsqueeze(-1) * inverse_norms.unsqueeze(-2)


def etf_loss(codes: torch.Tensor, lora_B: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """
    Distance of the experts' outputs from a simplex equiangular tight frame (ETF).

    Mean squared difference, over tokens and all K x K entries, of the outputs' cosines from 1 on the diagonal and
    -1 / (K - 1) off it. With K = 1 there is nothing to spread: 0.

    Args:
        codes (`torch.Tensor`): (..., K, r).
        lora_B (`torch.Tensor`): (K, d, r).
        scaling (`float`): the scale of an expert's output, `alpha / r`; it matters only to outputs near zero.
    """
    num_experts = codes.shape[-2]
    if num_experts == 1:
        return in_float32(codes.new_zeros(()))
    gram = expert_gram(codes * scaling, lora_B)
    identity = torch.eye(num_experts, dtype=gram.dtype, device=gram.device)
    target = identity - (1 - identity) / (num_experts - 1)
    return (gram - target).square().mean()


class MoELoraOutput(NamedTuple):
    """
    What a `MoELora` returns.

    Args:
        hidden_states (`torch.Tensor`): (..., d), the adapted output of a block, or what `mix` adds to a linear layer.
        router_logits (`torch.Tensor`): (..., K), float32.
        etf_loss (`torch.Tensor`, *optional*): (), if asked for.
        balance_loss (`torch.Tensor`, *optional*): (), if asked for.
    """

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    etf_loss: torch.Tensor | None
    balance_loss: torch.Tensor | None


class MoELoraRouter(nn.Module):
    """A linear router without bias, in float32 whatever the model's type: (..., d) -> (..., K)."""

    def __init__(self, num_features: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, num_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with without_autocast(hidden_states):
            return F.linear(in_float32(hidden_states), in_float32(self.weight))


class MoELora(nn.Module):
    """
    The mixture of LoRA experts behind one block, or beside one linear layer.

    Args:
        num_features (`int`): d, the width of the block.
        num_outputs (`int`, *optional*): the features of an expert's answer, where they are not d as well.
        num_experts (`int`): K.
        num_experts_per_tok (`int`): k.
        rank (`int`): r.
        alpha (`float`): an expert's output is scaled by `alpha / r`.
        dropout (`float`): on the experts' input while training; the router reads the input as it is.
        residual_weight (`float`): lambda.
        use_fofs (`bool`): `lora_A` is a buffer of frozen orthogonal projections, or else a trained parameter.
    """

    def __init__(
        self,
        num_features: int,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.05,
        residual_weight: float = 0.1,
        use_fofs: bool = True,
        num_outputs: int | None = None,
    ):
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.scaling = alpha / rank
        self.residual_weight = residual_weight
        self.use_fofs = use_fofs
        self.router = MoELoraRouter(num_features, num_experts)
        self.dropout = nn.Dropout(dropout)
        lora_A = torch.empty(num_experts, rank, num_features)
        if use_fofs:
            self.register_buffer("lora_A", lora_A)
        else:
            self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(torch.empty(num_experts, num_outputs or num_features, rank))

    def reset_parameters(self) -> None:
        """Start at zero router and zero B, as the paper does, and draw A; leave alone what a checkpoint filled."""
        init.zeros_(self.router.weight)
        init.zeros_(self.lora_B)
        if getattr(self.lora_A, "_is_hf_initialized", False):
            return
        num_experts, rank, num_features = self.lora_A.shape
        if self.use_fofs:
            projection = fofs_projection(num_features, num_experts, rank)
        else:
            bound = num_features**-0.5  # Kaiming-uniform with a = sqrt(5), as in LoRA
            projection = torch.empty(num_experts, rank, num_features).uniform_(-bound, bound)
        init.copy_(self.lora_A, projection)

    def mix(self, hidden_states: torch.Tensor, output_losses: bool = False) -> MoELoraOutput:
        """
        Answer with the experts alone: `sum_i w_i (alpha / r) B_i A_i x`, without the residual.

        Args:
            hidden_states (`torch.Tensor`): (..., d).
            output_losses (`bool`): also compute the ETF and the balance term.
        """
        router_logits = self.router(hidden_states)
        probabilities, weights = route(router_logits, self.num_experts_per_tok)
        # One mask serves all experts: with FOFS each reads features of its own, so that theirs are independent.
        codes = expert_codes(self.dropout(hidden_states), self.lora_A)
        return MoELoraOutput(
            hidden_states=mix_experts(codes, self.lora_B, weights * self.scaling),
            router_logits=router_logits,
            etf_loss=etf_loss(codes, self.lora_B, self.scaling) if output_losses else None,
            balance_loss=balance_loss(probabilities) if output_losses else None,
        )

    def forward(self, hidden_states: torch.Tensor, output_losses: bool = False) -> MoELoraOutput:
        """
        Adapt a block's output: the experts' answer and the norm-matched residual.

        Args:
            hidden_states (`torch.Tensor`): (..., d), all tokens, the class token too.
            output_losses (`bool`): also compute the ETF and the balance term.
        """
        # Experts that come from a PEFT adapter may be float32 over a model in half precision.
        inputs = hidden_states.to(self.lora_B.dtype)
        output = self.mix(inputs, output_losses)
        adapted = norm_matched_residual(inputs, output.hidden_states, self.residual_weight)
        return output._replace(hidden_states=adapted.to(hidden_states.dtype))


@contextmanager
def record_outputs(model: nn.Module) -> Iterator[list[MoELoraOutput]]:
    """
    Record what the experts of a PEFT adapter return within the context, in the order in which they run.

    A wrapped block can hand on nothing but its hidden states, and the loss terms and router logits of its experts go
    this way. Experts that gradient checkpointing runs again, later, are not recorded twice.

    Args:
        model (`nn.Module`): the model that holds the adapter, or a part of it.
    """
    outputs: list[MoELoraOutput] = []
    # Known by the attribute: the model may come from a repository's own copy of this file, the adapter may not.
    layers = [module for module in model.modules() if "moe_lora_outputs" in vars(module)]
    for layer in layers:
        vars(layer)["moe_lora_outputs"] = outputs
    try:
        yield outputs
    finally:
        for layer in layers:
            vars(layer)["moe_lora_outputs"] = None


__all__ = [
    "MoELora",
    "MoELoraOutput",
    "MoELoraRouter",
    "balance_loss",
    "etf_loss",
    "expert_codes",
    "expert_gram",
    "fofs_projection",
    "in_float32",
    "load_variation",
    "mix_experts",
    "norm_matched_residual",
    "record_outputs",
    "route",
    "vector_norm",
    "without_autocast",
]
