"""MoECLIP as plainly as its equations: one expert, one map and one window at a time. What the fast forms must equal.

Works on the weights of a `MoECLIPModel`; of its code it uses none, of transformers the blocks of the vision tower.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moeclip_hf import MoECLIPModel


@dataclass
class PlainOutput:
    patch_embeds: list[torch.Tensor]
    image_embeds: torch.Tensor
    etf: torch.Tensor
    balance: torch.Tensor


def unit(x: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def plain_experts(layer, x: torch.Tensor, config):
    """Route every token by itself; returns the adapted tokens, the ETF and the balance term."""
    probabilities = torch.softmax(x @ layer.router.weight.T, dim=-1)
    outputs = torch.stack(
        [
            config.lora_alpha / config.lora_rank * (x @ a.T @ b.T)
            for a, b in zip(layer.lora_A, layer.lora_B, strict=True)
        ],
        dim=-2,
    )
    adapted = x.clone()
    for image in range(x.shape[0]):
        for token in range(x.shape[1]):
            best = probabilities[image, token].argsort(descending=True)[: config.num_experts_per_tok]
            weights = probabilities[image, token, best] / probabilities[image, token, best].sum()
            mixed = sum(w * outputs[image, token, i] for w, i in zip(weights, best, strict=True))
            matched = mixed * x[image, token].norm() / (mixed.norm() + 1e-6)
            adapted[image, token] = config.residual_weight * matched + (1 - config.residual_weight) * x[image, token]
    if config.num_experts == 1:
        return adapted, x.new_zeros(()), x.new_zeros(())
    directions = unit(outputs, 1e-6)
    gram = directions @ directions.transpose(-1, -2)
    target = torch.full_like(gram[0, 0], -1 / (config.num_experts - 1)).fill_diagonal_(1)
    load = probabilities.sum(dim=(0, 1))
    return adapted, ((gram - target) ** 2).mean(), (load.std(unbiased=True) / (load.mean() + 1e-6)) ** 2


def plain_window_means(patches: torch.Tensor, grid: tuple[int, int], size: int) -> torch.Tensor:
    """(B, N, d): mean over each patch's size x size window; what lies outside the grid counts as zero."""
    height, width = grid
    padded = F.pad(patches.unflatten(1, grid), (0, 0, size // 2, size // 2, size // 2, size // 2))
    windows = [padded[:, r : r + size, c : c + size].mean(dim=(1, 2)) for r in range(height) for c in range(width)]
    return torch.stack(windows, dim=1)


def plain_forward(model: MoECLIPModel, pixel_values: torch.Tensor) -> PlainOutput:
    config, tower = model.config, model.vision_model
    patch_size = config.vision_config.patch_size
    grid = pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size

    patches = F.conv2d(pixel_values, tower.embeddings.patch_embedding.weight, stride=patch_size)
    class_token = tower.embeddings.class_embedding.expand(len(pixel_values), 1, -1)
    positions = tower.embeddings.position_embedding.weight
    side = int((len(positions) - 1) ** 0.5)
    square = positions[1:].T.reshape(1, -1, side, side)
    resampled = F.interpolate(square, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    x = torch.cat([class_token + positions[:1], patches.flatten(2).transpose(1, 2) + resampled], dim=1)
    x = tower.pre_layrnorm(x)

    taps, etf, balance = {}, x.new_zeros(()), x.new_zeros(())
    for number, block in enumerate(tower.encoder.layers, start=1):
        x = block(x, None)
        if number - 1 in config.moe_layers:
            layer = model.moe_layers[config.moe_layers.index(number - 1)]
            x, layer_etf, layer_balance = plain_experts(layer, x, config)
            etf, balance = etf + layer_etf, balance + layer_balance
        taps[number] = x[:, 1:]

    patch_embeds, projections = [], model.patch_projection.projections
    for t, number in enumerate(config.feature_layers):
        for s, size in enumerate(config.aggregation_sizes):
            pooled = tower.post_layernorm(plain_window_means(taps[number], grid, size))
            index = t if config.shared_projections else t * len(config.aggregation_sizes) + s
            projected = pooled @ projections[index].weight.T
            if config.projection_activation == "leaky_relu":
                projected = torch.where(projected > 0, projected, 0.01 * projected)
            patch_embeds.append(unit(projected))

    adapter = model.depthwise_adapter
    tokens = adapter.layer_norm(tower.post_layernorm(taps[config.image_feature_layer]))
    padded = F.pad(tokens, (0, 0, 1, 1))
    kernel = adapter.depthwise.weight[:, 0]
    mixed = sum(padded[:, i : i + tokens.shape[1]] * kernel[:, i] for i in range(3))
    image_embeds = unit(F.gelu(mixed) @ adapter.pointwise.weight.T).mean(dim=1)
    return PlainOutput(patch_embeds, image_embeds, etf, balance)
