"""The plain training step of the benchmark computes what the fast one does."""

import pytest
import torch
from tiny_models import random_pixels, random_prompts, tiny_model

from benchmarks.plain_training import PlainMoECLIP


def test_plain_step_has_the_loss_and_the_gradients_of_the_fast_one():
    model = tiny_model(lora_dropout=0.0).freeze_backbone().train()
    plain = PlainMoECLIP(model).train()
    prompts = random_prompts(1)
    prompts.pop("attention_mask")
    masks = torch.zeros(2, 20, 20)
    masks[1, 4:12, 3:9] = 1
    inputs = {"pixel_values": random_pixels(), "labels": torch.tensor([0, 1]), "masks": masks, **prompts}
    losses, gradients = [], []
    for side in (lambda: model(**inputs).loss, lambda: plain(**inputs)):
        loss = side()
        loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
