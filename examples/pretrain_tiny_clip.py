"""Pretrain a tiny CLIP on rendered textures with captions, for the embedded checkpoint to start from.

    python -m examples.pretrain_tiny_clip --output-dir outputs/tiny-clip [--max-steps 5000] [--batch-size 32]

The towers are transformers' `CLIPModel` at a hundredth of the size, trained from nothing: images against captions, and
two kinds of extra signal, since a CLIP of this size sees a hundred thousand images where the real one saw hundreds of
millions. Each image of an auxiliary family is also held against the caption of the opposite state ("a damaged cork"
for a faultless one); and linear heads on the patches of some blocks, thrown away at the end, learn the masks of
auxiliary families. Validation and test families are shown without defects, under their names alone. A run that is cut
off goes on where it was when the command is repeated.
"""

import argparse
import gzip
import io
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
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
from transformers.trainer_utils import get_last_checkpoint

from moeclip_hf.conversion.tokenizer import tokenizer_from_merges
from moeclip_hf.data.textures import FAMILIES, add_defect, render
from moeclip_hf.data.textures.splits import AUXILIARY_FAMILIES, SEEN_DEFECTS
from moeclip_hf.errors import DatasetError

OTHER_FAMILIES = tuple(name for name in FAMILIES if name not in AUXILIARY_FAMILIES)
IMAGE_SIZE, PATCH_SIZE, TEXT_LENGTH = 112, 8, 32
NUM_BYTE_TOKENS = 512  # each byte, within a word and at its end
NORMAL, DAMAGED = 0, 1  # states that a caption tells; from 2 on, the kinds of `SEEN_DEFECTS`
NORMAL_PHRASES = ("{}", "a {}", "the {}")
DAMAGED_PHRASES = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
SENTENCES = ("{}.", "a photo of {}.", "{}", "a close-up of {}.")
COLOURS = {
    "black": (25, 25, 25), "dark grey": (75, 75, 75), "grey": (128, 128, 128), "light grey": (180, 180, 180),
    "white": (235, 235, 235), "red": (170, 50, 45), "orange": (205, 125, 55), "brown": (115, 80, 50),
    "beige": (200, 180, 145), "yellow": (210, 195, 75), "green": (75, 125, 65), "blue": (60, 95, 160),
    "purple": (120, 70, 140), "pink": (215, 150, 165), "teal": (65, 140, 140),
}  # fmt: skip
AUXILIARY_SHARE, DAMAGED_SHARE = 0.8, 0.6
DENSE_WEIGHT, DAMAGE_WEIGHT, DICE_WEIGHT = 20.0, 5.0, 0.2  # without them little of the masks is learned in an hour
TAPS = (4, 6, 8)  # blocks, counted from 1, whose patches the linear heads read


@dataclass(frozen=True)
class Caption:
    """What a text says: which family, in which state, and a colour if it names one."""

    family: int
    state: int
    colour: int | None
    text: str


def write_caption(family: int, state: int, colour: int | None, rng: np.random.Generator) -> Caption:
    """Put into words what an image shows; `colour` is an index into `COLOURS`."""
    name = list(FAMILIES)[family].replace("_", " ")
    if colour is not None:
        name = f"{list(COLOURS)[colour]} {name}"
    if state == NORMAL:
        phrase = rng.choice(NORMAL_PHRASES).format(name)
    elif state == DAMAGED:
        phrase = rng.choice(DAMAGED_PHRASES).format(name)
    else:
        phrase = f"a {name} with {SEEN_DEFECTS[state - 2].replace('_', ' ')}"
    return Caption(family, state, colour, str(rng.choice(SENTENCES)).format(phrase))


def train_tokenizer() -> CLIPTokenizer:
    """A byte-pair encoding in which each word of the captions is one token; any other text falls into pieces."""
    phrases = (*FAMILIES, *SEEN_DEFECTS, *COLOURS, *NORMAL_PHRASES, *DAMAGED_PHRASES, *SENTENCES)
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
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    return CLIPModel(config)


class CaptionedTextures(Dataset):
    """Textures with captions, each drawn from (seed, index) alone; there is no end of them.

    A sample holds the pixels (3, S, S), the share of each patch that is damaged (patches,), whether the mask counts,
    its caption, and for auxiliary families the caption of the opposite state.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        auxiliary = rng.random() < AUXILIARY_SHARE
        family = str(rng.choice(AUXILIARY_FAMILIES if auxiliary else OTHER_FAMILIES))
        defect = str(rng.choice(SEEN_DEFECTS)) if auxiliary and rng.random() < DAMAGED_SHARE else None
        image = vary(zoom(family, rng), rng)
        colour = name_colour(image)
        mask = np.zeros(image.shape[:2], dtype=bool)
        if defect is not None:
            try:
                image, mask = add_defect(image, defect, rng)
            except DatasetError:  # it cannot be seen on so plain a ground
                defect = None
        image = photograph(image, rng)
        number, state = list(FAMILIES).index(family), NORMAL if defect is None else 2 + SEEN_DEFECTS.index(defect)
        told = DAMAGED if state != NORMAL and rng.random() < 0.5 else state
        told_colour = colour if rng.random() < 0.3 else None
        opposite = DAMAGED if state == NORMAL else NORMAL
        return {
            "image": image,
            "damage": patch_shares(mask),
            "has_mask": auxiliary,
            "shows": (number, state, colour),
            "caption": write_caption(number, told, told_colour, rng),
            "opposite": write_caption(number, opposite, told_colour, rng) if auxiliary else None,
        }


def zoom(family: str, rng: np.random.Generator) -> np.ndarray:
    """Render a family, at times as a crop of a larger picture, turned and flipped."""
    size = int(rng.integers(IMAGE_SIZE + 1, 2 * IMAGE_SIZE)) if rng.random() < 0.25 else IMAGE_SIZE
    image, _ = render(family, size=size, seed=int(rng.integers(2**32)))
    top, left = rng.integers(0, size - IMAGE_SIZE + 1, 2)
    image = image[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    image = np.rot90(image, int(rng.integers(4)))
    return np.ascontiguousarray(image[:, ::-1] if rng.random() < 0.5 else image)


def vary(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other colours and contrasts than the family's own; H x W x 3, uint8."""
    pixels = image.astype(np.float32) / 255
    if rng.random() < 0.3:
        pixels = pixels[..., rng.permutation(3)]
    if rng.random() < 0.1:
        pixels = 1 - pixels
    if rng.random() < 0.4:
        pixels = pixels ** np.float32(np.exp(rng.uniform(-0.6, 0.6)))
    if rng.random() < 0.4:
        pixels = np.clip((pixels - pixels.mean()) * rng.uniform(0.5, 1.6) + rng.uniform(0.25, 0.75), 0, 1)
    if rng.random() < 0.3:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    return np.round(pixels * 255).astype(np.uint8)


def photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What lens, sensor and file format do to a picture and its defect alike."""
    if rng.random() < 0.25:
        sigma = rng.uniform(0.3, 0.9)
        image = ndimage.gaussian_filter(image, (sigma, sigma, 0))
    if rng.random() < 0.3:
        channels = 1 if rng.random() < 0.5 else 3
        noise = rng.normal(0, 255 * rng.uniform(0.01, 0.06), (*image.shape[:2], channels))
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=int(rng.integers(35, 95)))
        image = np.array(Image.open(file))
    return image


def name_colour(image: np.ndarray) -> int:
    """Which of `COLOURS` comes nearest to the mean."""
    distances = np.square(np.array(list(COLOURS.values())) - image.mean(axis=(0, 1))).sum(axis=1)
    return int(distances.argmin())


def patch_shares(mask: np.ndarray) -> np.ndarray:
    """The share of each patch that lies under a mask, row by row."""
    grid = IMAGE_SIZE // PATCH_SIZE
    return mask.reshape(grid, PATCH_SIZE, grid, PATCH_SIZE).mean(axis=(1, 3), dtype=np.float32).ravel()


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


def is_true(caption: Caption, family: int, state: int, colour: int) -> bool:
    """Whether a caption is true of an image of a family, state and colour."""
    if caption.family != family or caption.colour not in (None, colour):
        return False
    return caption.state == state or (caption.state == DAMAGED and state != NORMAL)


class PretrainingModel(nn.Module):
    """A CLIP with linear heads that tell damaged patches, and its objective."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        width = clip.config.vision_config.hidden_size
        self.heads = nn.ModuleDict({str(tap): nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1)) for tap in TAPS})

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
        logits = self.heads[str(tap)](hidden_states[tap][:, 1:]).squeeze(-1)[has_mask]
        truth, probability = damage[has_mask], logits.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=logits.new_tensor(DAMAGE_WEIGHT))
        overlap = (2 * (probability * truth).sum(dim=1) + 1) / (probability.sum(dim=1) + truth.sum(dim=1) + 1)
        return cross_entropy + DICE_WEIGHT * (1 - overlap).mean()


class PretrainingTrainer(Trainer):
    """A trainer that takes samples as they come, since their order is random already, and logs the loss's parts."""

    parts: dict[str, list[torch.Tensor]] = {}

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/tiny-clip"))
    parser.add_argument("--max-steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = train_tokenizer()
    model = PretrainingModel(tiny_clip(tokenizer))
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
            weight_decay=0.05,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            dataloader_num_workers=1,
            remove_unused_columns=False,
            logging_steps=50,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to="none",
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=args.seed,
        ),
        data_collator=Collator(tokenizer),
        train_dataset=CaptionedTextures(args.max_steps * args.batch_size, args.seed),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
    if trainer.is_world_process_zero():
        model.clip.save_pretrained(args.output_dir)
        side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
        CLIPProcessor(images, tokenizer).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
