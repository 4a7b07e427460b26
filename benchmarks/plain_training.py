"""MoECLIP's forward pass and training step as its equations read, for other benchmarks to compare with.

One expert at a time on the tokens routed to it, attention that materialises its weights, windows unfolded and
projected size by size; in training also all experts' outputs formed for the ETF term, twelve pairs of maps upsampled,
and the text tower run in every step. It shares the weights of a `MoECLIPModel` and none of its fast forms.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPVisionModel

from moeclip_hf import MoECLIPModel


def unit(vectors: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """Vectors (..., D) of length 1."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(eps)


class PlainMoECLIP(nn.Module):
    """
    The objective of one class's images.

    Args:
        model ([`MoECLIPModel`]): whose weights are used; the towers are copied, to run with materialised attention.
    """

    def __init__(self, model: MoECLIPModel):
        super().__init__()
        self.config = model.config
        self.vision_model = CLIPVisionModel._from_config(model.config.vision_config, attn_implementation="eager")
        self.text_model = CLIPTextModel._from_config(model.config.text_config, attn_implementation="eager")
        for tower, source in ((self.vision_model, model.vision_model), (self.text_model, model.text_model)):
            tower.load_state_dict(source.state_dict())
            tower.requires_grad_(False)
        self.moe_layers = model.moe_layers
        self.projections = model.patch_projection.projections
        self.text_adapter = model.text_adapter
        self.depthwise_adapter = model.depthwise_adapter

    def anchors(self, input_ids: torch.Tensor, prompt_groups: torch.Tensor) -> torch.Tensor:
        """(2, D): the normal and the abnormal anchor."""
        embeds = unit(self.text_adapter(self.text_model(input_ids=input_ids).pooler_output))
        return torch.stack([unit(embeds[prompt_groups == group].mean(dim=0)) for group in (0, 1)])

    def adapt(
        self, layer: nn.Module, x: torch.Tensor, output_losses: bool
    ) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]:
        """The block's output adapted, its ETF and its balance term, which are 0 if not asked for."""
        config = self.config
        scaling, tokens = config.lora_alpha / config.lora_rank, x.flatten(0, 1)
        probabilities = F.linear(tokens, layer.router.weight).softmax(dim=-1)
        chosen, experts = probabilities.topk(config.num_experts_per_tok, dim=-1)
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        dropped = F.dropout(tokens, config.lora_dropout, self.training)
        mixed = torch.zeros_like(tokens)
        for expert in range(config.num_experts):
            rows, places = (experts == expert).nonzero(as_tuple=True)
            output = scaling * (dropped[rows] @ layer.lora_A[expert].T @ layer.lora_B[expert].T)
            mixed = mixed.index_add(0, rows, chosen[rows, places].unsqueeze(-1) * output)
        matched = mixed * tokens.norm(dim=-1, keepdim=True) / (mixed.norm(dim=-1, keepdim=True) + 1e-6)
        adapted = (config.residual_weight * matched + (1 - config.residual_weight) * tokens).view_as(x)
        if not output_losses or config.num_experts == 1:
            return adapted, 0.0, 0.0
        outputs = torch.stack(
            [scaling * (dropped @ a.T @ b.T) for a, b in zip(layer.lora_A, layer.lora_B, strict=True)], 1
        )
        directions = unit(outputs, 1e-6)
        gram = directions @ directions.transpose(1, 2)
        target = torch.full_like(gram[0], -1 / (config.num_experts - 1)).fill_diagonal_(1)
        load = probabilities.sum(dim=0)
        return adapted, ((gram - target) ** 2).mean(), (load.std() / (load.mean() + 1e-6)) ** 2

    def window_means(self, patches: torch.Tensor, side: int, size: int) -> torch.Tensor:
        """(B, N, d): means over windows of size x size, unfolded."""
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        windows = F.unfold(grid, size, padding=size // 2).unflatten(1, (grid.shape[1], size * size))
        return windows.mean(dim=2).transpose(1, 2)

    def score(
        self, pixel_values: torch.Tensor, anchors: torch.Tensor, output_losses: bool = False
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | float]:
        """
        Images (B, 3, S, S) against anchors (2, D).

        Returns:
            Both logits of every map (B, 2, h, w), those of the images (B, 2), and, if asked for, the ETF and the
            balance terms of all layers by their coefficients.
        """
        config, tower = self.config, self.vision_model
        x = tower.pre_layrnorm(tower.embeddings(pixel_values, interpolate_pos_encoding=True))
        side = pixel_values.shape[-1] // config.vision_config.patch_size
        taps, losses = {}, 0.0
        for index, block in enumerate(tower.encoder.layers):
            x = block(x, None)
            if index in config.moe_layers:
                layer = self.moe_layers[config.moe_layers.index(index)]
                x, etf, balance = self.adapt(layer, x, output_losses)
                losses = losses + config.etf_loss_coef * etf + config.router_aux_loss_coef * balance
            if index + 1 in config.feature_layers:
                taps[index + 1] = x[:, 1:]

        maps = []
        for tap, layer in enumerate(config.feature_layers):
            for size in config.aggregation_sizes:
                patches = self.window_means(taps[layer], side, size)
                embeds = unit(self.projections[tap](tower.post_layernorm(patches)))
                maps.append((100 * embeds @ anchors.T).transpose(1, 2).unflatten(2, (side, side)))

        adapter = self.depthwise_adapter
        tokens = adapter.layer_norm(tower.post_layernorm(taps[config.image_feature_layer]))
        mixed = F.gelu(adapter.depthwise(tokens.transpose(1, 2)).transpose(1, 2))
        image_embeds = unit(adapter.pointwise(mixed)).mean(dim=1)
        return maps, image_embeds @ anchors.T, losses

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        prompt_groups: torch.Tensor,
        labels: torch.Tensor,
        masks: torch.Tensor,
    ) -> torch.Tensor:
        """The loss (section 3.5) of images (B, 3, S, S) with masks (B, S, S) and labels (B,)."""
        anchors = self.anchors(input_ids, prompt_groups)
        maps, logits, losses = self.score(pixel_values, anchors, output_losses=True)
        return sum(map_loss(each, masks) for each in maps) + F.cross_entropy(logits, labels) + losses


def map_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Focal and both dice losses of one map's two logits (B, 2, h, w)."""
    upsampled = F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=True)
    probabilities = upsampled.softmax(dim=1)
    target = torch.stack([1 - masks, masks], dim=1).clamp(1e-5, 1 - 1e-5)
    hit = (target * probabilities).sum(dim=1) + 1e-5
    loss = (-((1 - hit) ** 2) * hit.log()).mean()
    for p, m in ((probabilities[:, 0], 1 - masks), (probabilities[:, 1], masks)):
        overlap, total = (p * m).sum(dim=(1, 2)), p.sum(dim=(1, 2)) + m.sum(dim=(1, 2))
        loss = loss + 1 - ((2 * overlap + 1) / (total + 1)).mean()
    return loss
