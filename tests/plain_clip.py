"""CLIP's forward pass written plainly, its parameters named and laid out as OpenAI's are."""

import torch
from torch import nn

CONTEXT_LENGTH = 12


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(quick_gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTower(nn.Module):
    def __init__(self, width: int, layers: int, patch_size: int, grid: int, embed_dim: int, heads: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        tokens = self.transformer(self.ln_pre(tokens + self.positional_embedding))
        return self.ln_post(tokens[:, 0]) @ self.proj


class PlainCLIP(nn.Module):
    """(B, 3, H, W) pixels and (P, 12) ids, the largest of which ends a text -> (B, D) and (P, D) features."""

    def __init__(
        self,
        vision_width: int = 128,
        text_width: int = 64,
        vision_layers: int = 8,
        vocab_size: int = 60,
        grid: int = 3,
        patch_size: int = 4,
        embed_dim: int = 48,
        seed: int = 0,
    ):
        super().__init__()
        torch.manual_seed(seed)
        # OpenAI's heads are 64 wide.
        self.visual = VisionTower(vision_width, vision_layers, patch_size, grid, embed_dim, vision_width // 64)
        self.transformer = Transformer(text_width, text_width // 64, 2)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT_LENGTH, text_width))
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or ".ln_" in name:
                nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
        self.eval().requires_grad_(False)

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        causal = torch.full((CONTEXT_LENGTH, CONTEXT_LENGTH), float("-inf")).triu(1)
        tokens = self.transformer(self.token_embedding(input_ids) + self.positional_embedding, causal)
        texts = self.ln_final(tokens)[torch.arange(len(input_ids)), input_ids.argmax(dim=-1)] @ self.text_projection
        return self.visual(pixels), texts


def plain_inputs(clip: PlainCLIP) -> tuple[torch.Tensor, torch.Tensor]:
    """Three images and three texts for a CLIP."""
    generator = torch.Generator().manual_seed(5)
    edge = clip.visual.conv1.kernel_size[0] * round((len(clip.visual.positional_embedding) - 1) ** 0.5)
    end = clip.token_embedding.num_embeddings - 1
    input_ids = torch.randint(1, end - 1, (3, CONTEXT_LENGTH), generator=generator)
    input_ids[:, 0] = end - 1
    for text, length in enumerate((4, 7, CONTEXT_LENGTH)):
        input_ids[text, length - 1], input_ids[text, length:] = end, 0
    return torch.randn(3, 3, edge, edge, generator=generator), input_ids


def save_torchscript(clip: PlainCLIP, path) -> None:
    """Save an archive as OpenAI's downloads are: half precision, and sizes as buffers."""
    archived = PlainCLIP()
    archived.load_state_dict(clip.state_dict())
    archived.half()
    for name in ("input_resolution", "context_length", "vocab_size"):
        archived.register_buffer(name, torch.tensor(7))
    pixels, input_ids = plain_inputs(archived)
    with torch.autocast("cpu", dtype=torch.float16):
        torch.jit.trace(archived, (pixels.half(), input_ids), check_trace=False).save(str(path))
