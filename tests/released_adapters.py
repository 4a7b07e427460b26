"""Random adapters in the released format, written without the package."""

from collections.abc import Mapping
from typing import Any

import torch


def fofs_matrices(num_features: int, num_experts: int, rank: int) -> list[torch.Tensor]:
    """An (r, d) matrix an expert, rows orthonormal, zero outside its chunk; the first d mod K chunks are longer."""
    matrices, start = [], 0
    for expert in range(num_experts):
        length = num_features // num_experts + (expert < num_features % num_experts)
        matrix = torch.zeros(rank, num_features)
        matrix[:, start : start + length] = torch.linalg.qr(torch.randn(length, rank)).Q.T
        matrices.append(matrix)
        start += length
    return matrices


def random_adapter(
    vision_width: int = 128,
    text_width: int = 64,
    embed_dim: int = 48,
    num_layers: int = 4,
    num_experts: int = 4,
    rank: int = 8,
    num_projections: int = 4,
    activated: bool = False,
    fofs: bool = True,
    seed: int = 1,
) -> dict[str, Any]:
    """What a released `.pth` holds, for a CLIP of those widths."""
    torch.manual_seed(seed)
    image = {
        "det_proj.ln.weight": torch.randn(vision_width),
        "det_proj.ln.bias": torch.randn(vision_width),
        "det_proj.adapter.0.weight": torch.randn(vision_width, 1, 3),
        "det_proj.adapter.2.weight": torch.randn(embed_dim, vision_width, 1),
    }
    for projection in range(num_projections):
        name = f"seg_proj.{projection}.fc.0.weight" if activated else f"seg_proj.{projection}.fc.weight"
        image[name] = torch.randn(embed_dim, vision_width)
    for layer in range(num_layers):
        image[f"moe_adapters.{layer}.gate.weight"] = torch.randn(num_experts, vision_width)
        matrices = (
            fofs_matrices(vision_width, num_experts, rank) if fofs else torch.randn(num_experts, rank, vision_width)
        )
        for expert, matrix in enumerate(matrices):
            image[f"moe_adapters.{layer}.experts.{expert}.lora_A.weight"] = matrix
            image[f"moe_adapters.{layer}.experts.{expert}.lora_B.weight"] = torch.randn(vision_width, rank)
    return {
        "epoch": 20,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 5e-5}]},
        "text_adapter": {"0.fc.0.weight": torch.randn(embed_dim, text_width)},
        "image_adapter": image,
    }


def assert_same_adapter(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Both parts hold the same names and, bit by bit, the same float32 numbers."""
    for part in ("text_adapter", "image_adapter"):
        assert actual[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            assert actual[part][name].dtype == torch.float32
            assert torch.equal(actual[part][name], tensor), name
