"""A step of `examples.pretrain_tiny_clip`: its precision, and Muon over all matrices of a shape at once.

    python -m benchmarks.pretraining [--rounds 15]

Forward and backward pass of a batch of random images; and the optimizer's step of the vision tower's matrices.
"""

from collections.abc import Callable

import torch
from torch.optim import Muon

from benchmarks.alternating import alternate
from benchmarks.report import Report, argument_parser, publish, timing_rows
from examples.captioned_textures import IMAGE_SIZE, PATCH_SIZE
from examples.pretrain_tiny_clip import TEXT_LENGTH, BatchedMuon, PretrainingModel, tiny_clip, train_tokenizer

IMAGES = 16
FLOAT32, ONE_BY_ONE = "float32", "torch.optim.Muon"
ATTENTIONS = {"sdpa": "attention too", "eager": "attention too, as plain products"}


def random_batch(vocabulary: int) -> dict[str, torch.Tensor]:
    """A batch in the shapes of the pretraining's: images, their captions and as many opposite ones."""
    captions = torch.randint(vocabulary, (2 * IMAGES, TEXT_LENGTH // 2))
    return {
        "pixel_values": torch.randn(IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE),
        "input_ids": captions,
        "attention_mask": torch.ones_like(captions),
        "matches": torch.eye(IMAGES, 2 * IMAGES, dtype=torch.bool),
        "damage": torch.rand(IMAGES, (IMAGE_SIZE // PATCH_SIZE) ** 2),
        "has_mask": torch.ones(IMAGES, dtype=torch.bool),
    }


def step_of(model: PretrainingModel, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(**batch)["loss"].backward()

    return step


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    batch = random_batch(len(tokenizer))
    models = {
        FLOAT32: PretrainingModel(tiny_clip(tokenizer)),
        "bfloat16": PretrainingModel(tiny_clip(tokenizer), torch.bfloat16),
    }
    for attention, told in ATTENTIONS.items():
        model = models[f"bfloat16, {told}"] = PretrainingModel(tiny_clip(tokenizer), torch.bfloat16)
        model.clip.set_attn_implementation({"vision_config": attention})
    passes = alternate({name: step_of(model, batch) for name, model in models.items()}, args.rounds)

    layers = models[FLOAT32].clip.vision_model.encoder.layers
    matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
    settings = {"lr": 1e-3, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = {ONE_BY_ONE: Muon(matrices, **settings), "a shape at once": BatchedMuon(matrices, **settings)}
    steps = alternate({name: optimizer.step for name, optimizer in optimizers.items()}, args.rounds)
    title = f"Pretraining of the embedded checkpoint's CLIP, {IMAGES} images of {IMAGE_SIZE} px"
    publish(
        [
            Report(f"{title}, forward and backward", timing_rows(passes, FLOAT32, digits=3)),
            Report(f"{title}, Muon's step of {len(matrices)} matrices", timing_rows(steps, ONE_BY_ONE, digits=3)),
        ],
        args.output,
    )


if __name__ == "__main__":
    main()
