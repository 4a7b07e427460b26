"""Small random models for tests."""

from typing import Any

import torch

from moeclip_hf import MoECLIPConfig, MoECLIPModel

PATCH_SIZE = 4
EMBED_DIM = 24


def tiny_config(**settings: Any) -> MoECLIPConfig:
    """Eight blocks of width 32 over a 5 x 5 grid."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "image_size": 5 * PATCH_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "gelu",
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "eos_token_id": 63,
        "bos_token_id": 62,
    }
    defaults = {"lora_rank": 4, "projection_dim": EMBED_DIM}
    return MoECLIPConfig(vision_config=vision, text_config=text, **(defaults | settings))


def tiny_model(seed: int = 0, **settings: Any) -> MoECLIPModel:
    """A model whose every part is random: router and experts too, which a fresh model has at zero."""
    torch.manual_seed(seed)
    model = MoECLIPModel(tiny_config(**settings))
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.router.weight.normal_(std=0.3)
            layer.lora_B.normal_(std=0.2)
        for norm in (model.vision_model.post_layernorm, model.depthwise_adapter.layer_norm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.1)
        model.vision_model.embeddings.position_embedding.weight.normal_()
    return model.eval()


def random_anchors(num_classes: int = 1, seed: int = 1) -> torch.Tensor:
    """(C, 2, D) of unit length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(num_classes, 2, EMBED_DIM, generator=generator), dim=-1)


def random_pixels(num_images: int = 2, height: int = 20, width: int = 20, seed: int = 2) -> torch.Tensor:
    """(B, 3, H, W)."""
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_prompts(num_classes: int = 1, seed: int = 3) -> dict[str, torch.Tensor]:
    """Sentences of random tokens between begin and end of text, padded with end of text."""
    input_ids = torch.randint(1, 60, (16 * num_classes, 12), generator=torch.Generator().manual_seed(seed))
    input_ids[:, 0], input_ids[:, 8:] = 62, 63
    groups = torch.cat([torch.tensor([2 * c] * 6 + [2 * c + 1] * 10) for c in range(num_classes)])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "prompt_groups": groups}
