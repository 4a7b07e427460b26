"""What MoECLIP's vision tower has other than CLIP's: positions for any grid, and a leaner QuickGELU."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from .moe_lora import in_float32

_QUICK_GELU_SCALE = 1.702


def interpolate_position_embeddings(embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Resample the position embeddings of a square grid to another grid.

    Bicubic with antialiasing, whose cubic kernel (a = -0.5) is not that of the plain one (a = -0.75) even when
    enlarging. MoECLIP's checkpoints are trained with it; transformers' CLIP uses the plain one.

    Args:
        embeddings (`torch.Tensor`): (1 + n * n, d), the class token first.
        height (`int`), width (`int`): h and w, in patches.

    Returns:
        `torch.Tensor` of shape (1 + h * w, d).
    """
    side = round((len(embeddings) - 1) ** 0.5)
    if (height, width) == (side, side):
        return embeddings
    class_token, patches = embeddings[:1], embeddings[1:]
    grid = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(in_float32(grid), size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([class_token, grid.squeeze(0).flatten(1).T.to(embeddings.dtype)])


class MoECLIPVisionEmbeddings(CLIPVisionEmbeddings):
    """CLIP's patch, class and position embeddings, for any grid."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid = height // self.patch_size, width // self.patch_size
        own_grid = self.position_embedding(self.position_ids)[0]  # called, so that hooks may bring the weight along
        return interpolate_position_embeddings(own_grid, *grid).unsqueeze(0)


class MoECLIPQuickGELU(nn.Module):
    """
    `x sigmoid(1.702 x)`, CLIP's QuickGELU, to rounding.

    Written through SiLU, it keeps one tensor of the widest layer for the backward pass where CLIP's own keeps two, and
    goes over it once there.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return _ScaledSiLU.apply(hidden_states)
        return F.silu(_QUICK_GELU_SCALE * hidden_states).div_(_QUICK_GELU_SCALE)


class _ScaledSiLU(torch.autograd.Function):
    """`silu(a x) / a`, whose derivative is silu's at a x: the scale drops out."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        scaled = _QUICK_GELU_SCALE * hidden_states
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(_QUICK_GELU_SCALE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.silu_backward(gradient, *ctx.saved_tensors)


__all__ = ["MoECLIPQuickGELU", "MoECLIPVisionEmbeddings", "interpolate_position_embeddings"]
