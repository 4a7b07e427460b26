"""Pretrain a tiny CLIP on rendered textures with captions, for the embedded checkpoint to start from.

    python -m examples.pretrain_tiny_clip --output-dir outputs/tiny-clip [--max-steps 11000] [--batch-size 16]

The towers are transformers' `CLIPModel` at a hundredth of the size, trained from nothing: images against captions, and
two kinds of extra signal, since a CLIP of this size sees 176,000 images where the real one saw hundreds of millions.
Each image of an auxiliary family is also held against the caption of the opposite state ("a damaged cork" for a
faultless one); and linear heads on the patches of some blocks, thrown away at the end, learn the masks of auxiliary
families. Validation and test families are shown without defects, under their names alone. Images are crops of 112
pixels at several scales, so that the CLIP can be run on larger images, its position embeddings interpolated, as the
real one is. Processors that multiply bfloat16 do so in the vision tower (`--precision`), in seven tenths of the time
that float32 takes. A run that is cut off goes on where it was when the command is repeated.
"""

import argparse
import gzip
import math
import re
import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import (
    AttentionInterface,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import is_torch_bf16_gpu_available

from examples.captioned_textures import (
    COLOURS,
    DAMAGED_PHRASES,
    IMAGE_SIZE,
    NORMAL_PHRASES,
    PATCH_SIZE,
    SENTENCES,
    SUBJECTS,
    CaptionedTextures,
    is_true,
    render_pictures,
)
from moeclip_hf.cli.progress import progress_bar
from moeclip_hf.conversion.tokenizer import tokenizer_from_merges
from moeclip_hf.data.textures.splits import SEEN_DEFECTS
from moeclip_hf.processes import leave_processes

TEXT_LENGTH = 32
NUM_BYTE_TOKENS = 512  # each byte, within a word and at its end
DENSE_WEIGHT, DAMAGE_WEIGHT, DICE_WEIGHT = 20.0, 5.0, 0.2  # without them little of the masks is learned in an hour
MUON_SPEED, WEIGHT_DECAY = 2.0, 0.05
FLOAT32_ATTENTION = "sdpa_float32"
BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")  # of processors; emulated it is slower than float32
TAPS = (4, 6, 8)  # blocks, counted from 1, whose patches the linear heads read


def train_tokenizer() -> CLIPTokenizer:
    """A byte-pair encoding in which each word of the captions is one token; any other text falls into pieces."""
    phrases = (*SUBJECTS, *SEEN_DEFECTS, *COLOURS, *NORMAL_PHRASES, *DAMAGED_PHRASES, *SENTENCES)
    merges = learn_merges({word for phrase in phrases for word in re.findall("[a-z]+", phrase)})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "merges.txt.gz"
        path.write_bytes(gzip.compress("\n".join(["#version", *map(" ".join, merges)]).encode()))
        tokenizer = tokenizer_from_merges(path, NUM_BYTE_TOKENS + len(merges) + 2)
    tokenizer.model_max_length = TEXT_LENGTH
    return tokenizer


def learn_merges(words: Collection[str]) -> list[tuple[str, str]]:
    """Join the most frequent pair until every word is whole; the library's trainer settles ties as it happens to."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in sorted(words)]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        first, second = best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == best:
                    word[place : place + 2] = [first + second]
                place += 1
    return merges


def tiny_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of 2.6 million parameters, not trained."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = CLIPTextConfig(
        **sizes,
        num_hidden_layers=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=8, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))
    with torch.no_grad():
        clip.vision_model.embeddings.patch_embedding.weight.copy_(cosine_filters())
        clip.vision_model.embeddings.position_embedding.weight[1:] = sine_positions(vision.hidden_size)
    return clip


def cosine_filters() -> torch.Tensor:
    """
    Filters (128, 3, P, P) that patches start with, of which a tiny CLIP has too few images to find good ones: those of
    the discrete cosine transform, all 64 of the brightness and 32 of each of two colour differences, finer ones and
    colours amplified as much as they are weaker in pictures.
    """
    steps = torch.arange(PATCH_SIZE)
    waves = torch.cos(torch.pi * (steps + 0.5) * steps[:, None] / PATCH_SIZE) * (2 / PATCH_SIZE) ** 0.5
    waves[0] /= 2**0.5
    by_frequency = sorted((math.hypot(u, v), u, v) for u in range(PATCH_SIZE) for v in range(PATCH_SIZE))
    filters = []
    for channels, count, gain in (((1, 1, 1), 64, 1), ((1, -1, 0), 32, 2), ((1, 1, -2), 32, 2)):
        unit = F.normalize(torch.tensor(channels, dtype=torch.float32), dim=0)
        for frequency, u, v in by_frequency[:count]:
            pattern = torch.outer(waves[u], waves[v])
            filters.append(gain * (1 + frequency) / PATCH_SIZE * unit[:, None, None] * pattern)
    return torch.stack(filters)


def sine_positions(width: int) -> torch.Tensor:
    """Position embeddings (patches, width) to start with: sines and cosines of row and column."""
    grid, count = IMAGE_SIZE // PATCH_SIZE, width // 4
    angles = torch.arange(grid)[:, None] / 100 ** (torch.arange(count) / count)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(grid, grid, -1), waves[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


@dataclass
class Collator:
    """Samples to a batch: B images, B captions and the opposite captions behind them."""

    tokenizer: CLIPTokenizer

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        captions = [sample["caption"] for sample in samples]
        captions += [sample["opposite"] for sample in samples if sample["opposite"] is not None]
        texts = [caption.text for caption in captions]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        pixels = torch.from_numpy(np.stack([sample["image"] for sample in samples])).permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
        return {
            "pixel_values": (pixels - mean) / std,
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "matches": torch.tensor(
                [[is_true(caption, *sample["shows"]) for caption in captions] for sample in samples]
            ),
            "damage": torch.from_numpy(np.stack([sample["damage"] for sample in samples])),
            "has_mask": torch.tensor([sample["has_mask"] for sample in samples]),
        }


def float32_attention(module: nn.Module, *states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
    """Attention whatever autocast says: in bfloat16 its backward pass takes a CPU twice as long as in float32."""
    with torch.autocast(states[0].device.type, enabled=False):
        return sdpa_attention_forward(module, *(state.float() for state in states[:3]), *states[3:], **options)


AttentionInterface.register(FLOAT32_ATTENTION, float32_attention)


class PretrainingModel(nn.Module):
    """
    A CLIP with linear heads that tell damaged patches, and its objective.

    Args:
        clip: to pretrain.
        dtype: of the products in the vision tower's linear layers. Weights, attention, the text tower and the loss
            stay in float32.
    """

    def __init__(self, clip: CLIPModel, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.clip, self.dtype = clip, dtype
        clip.set_attn_implementation({"vision_config": FLOAT32_ATTENTION})
        width = clip.config.vision_config.hidden_size
        self.heads = nn.ModuleDict({str(tap): nn.Linear(width, 1) for tap in TAPS})

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        matches: torch.Tensor,
        damage: torch.Tensor,
        has_mask: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The loss and its two parts, in the shapes of [`Collator`]."""
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            vision = self.clip.vision_model(pixel_values, output_hidden_states=True)
        text = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask)
        images = F.normalize(self.clip.visual_projection(vision.pooler_output), dim=-1)
        texts = F.normalize(self.clip.text_projection(text.pooler_output), dim=-1)
        logits = self.clip.logit_scale.clamp(max=4.6052).exp() * images @ texts.T
        contrastive = (self.match_loss(logits, matches) + self.match_loss(logits.T, matches.T)) / 2
        dense = torch.stack([self.damage_loss(tap, vision.hidden_states, damage, has_mask) for tap in TAPS]).mean()
        return {
            "loss": contrastive + DENSE_WEIGHT * dense,
            "contrastive": contrastive.detach(),
            "dense": dense.detach(),
        }

    @staticmethod
    def match_loss(logits: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
        """Cross-entropy to an even spread over all that match; rows without a match do not count."""
        matched = matches.sum(dim=1)
        losses = -(logits.log_softmax(dim=1) * matches).sum(dim=1) / matched.clamp(min=1)
        return losses.sum() / (matched > 0).sum()

    def damage_loss(self, tap: int, hidden_states: Any, damage: torch.Tensor, has_mask: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of a block's patches and a share of dice, where masks count."""
        patches = self.clip.vision_model.post_layernorm(hidden_states[tap][has_mask, 1:])  # as MoECLIP reads them
        logits = self.heads[str(tap)](patches).squeeze(-1)
        truth, probability = damage[has_mask], logits.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=logits.new_tensor(DAMAGE_WEIGHT))
        overlap = (2 * (probability * truth).sum(dim=1) + 1) / (probability.sum(dim=1) + truth.sum(dim=1) + 1)
        return cross_entropy + DICE_WEIGHT * (1 - overlap).mean()


class BatchedMuon(torch.optim.Muon):
    """
    torch's Muon, with Nesterov's momentum and steps scaled to AdamW's, which orthogonalises all matrices of one shape
    at once. The matrices of a tiny CLIP are so small that one by one most of the time goes into calls.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(weight.shape, []).append(weight)
            for shape, weights in alike.items():
                updates = orthogonalise([self.accelerate(weight, group["momentum"]) for weight in weights], group)
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def accelerate(self, weight: nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's step before it is orthogonalised."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum_buffer"], momentum)


def orthogonalise(matrices: list[torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    """Newton-Schulz iterations, as in torch's Muon, of matrices of one shape; in bfloat16."""
    a, b, c = settings["ns_coefficients"]
    narrow = [matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.bfloat16().T for matrix in matrices]
    x = torch.stack([matrix / matrix.norm().clamp(min=settings["eps"]) for matrix in narrow])
    for _ in range(settings["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrices[0].shape[0] <= matrices[0].shape[1] else x.mT


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices of the vision tower's blocks and AdamW for all other parameters, as one optimizer."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], learning_rate: float):
        # Muon's steps are scaled to be as long as AdamW's, and may be some times longer.
        muon = BatchedMuon(
            matrices, lr=MUON_SPEED * learning_rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
        super().__init__([*matrices, *others], {})
        self.parts = (muon, adamw)
        self.share_groups()

    def share_groups(self) -> None:
        """Let a schedule reach the groups of both."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.share_groups()


class PretrainingTrainer(Trainer):
    """A trainer with Muon that takes samples as they come, in random order already, and logs the loss's parts."""

    parts: dict[str, list[torch.Tensor]] = {}

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = dict(self.model.named_parameters())
            blocks = re.compile(r"clip\.vision_model\.encoder\.layers\..*\.weight")
            matrices = {name: weight for name, weight in named.items() if blocks.match(name) and weight.ndim == 2}
            others = [weight for name, weight in named.items() if name not in matrices]
            self.optimizer = MuonWithAdamW(list(matrices.values()), others, self.args.learning_rate)
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        for name in ("contrastive", "dense"):
            self.parts.setdefault(name, []).append(outputs[name])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.parts:
            logs |= {name: round(float(torch.stack(values).mean()), 4) for name, values in self.parts.items()}
            self.parts.clear()
        super().log(logs, *args, **kwargs)


def multiplies_bfloat16() -> bool:
    """Whether the accelerator, or else the processor, multiplies bfloat16."""
    if torch.accelerator.is_available():
        return is_torch_bf16_gpu_available()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BFLOAT16_PRODUCTS)


def last_whole_checkpoint(run: Path) -> str | None:
    """The newest checkpoint of a run. One that a kill cut short lacks the trainer's state, written last, and goes."""
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (folder / TRAINER_STATE_NAME).is_file():
            shutil.rmtree(folder)
    return get_last_checkpoint(str(run)) if run.is_dir() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/tiny-clip"))
    parser.add_argument("--max-steps", type=int, default=11000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16" if multiplies_bfloat16() else "no")
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    pictures = args.output_dir / "pictures.npy"
    with progress_bar("Rendering textures") as progress:
        render_pictures(pictures, progress)
    tokenizer = train_tokenizer()
    model = PretrainingModel(tiny_clip(tokenizer), torch.bfloat16 if args.precision == "bf16" else torch.float32)
    run = args.output_dir / "run"
    trainer = PretrainingTrainer(
        model,
        TrainingArguments(
            output_dir=str(run),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.max_steps // 20,
            max_grad_norm=1.0,
            dataloader_num_workers=int(torch.accelerator.is_available()),  # a CPU's cores multiply without a pause
            remove_unused_columns=False,
            logging_steps=50,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to="none",
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=args.seed,
        ),
        data_collator=Collator(tokenizer),
        train_dataset=CaptionedTextures(pictures, args.max_steps * args.batch_size, args.seed),
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(run))
    if trainer.is_world_process_zero():
        model.clip.save_pretrained(args.output_dir)
        side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
        # A tokenizer of its own: that of the collator would tell how batches were padded and cut.
        CLIPProcessor(images, train_tokenizer()).save_pretrained(args.output_dir)
    leave_processes()


if __name__ == "__main__":
    main()
