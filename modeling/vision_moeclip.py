"""What MoECLIP's vision tower has other than CLIP's: positions for any grid, and a leaner QuickGELU."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from .moe_lora import in_float32


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

    Written through SiLU, it keeps one tensor of the widest layer for the backward pass where CLIP's own keeps two.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.silu(1.702 * hidden_states).div_(1.702)


__all__ = ["MoECLIPQuickGELU", "MoECLIPVisionEmbeddings", "interpolate_position_embeddings"]
