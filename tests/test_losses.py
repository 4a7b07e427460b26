"""The objective's terms on scores and masks, against values worked out by hand or pixel by pixel."""

import math

import pytest
import torch
from torch.nn import functional as F

from moeclip_hf.modeling.loss_moeclip import classification_loss, dice_loss, focal_loss, segmentation_loss


def test_focal_loss_of_a_pixel():
    probability, smoothing = 0.3, 1e-5
    pt = (1 - smoothing) * probability + smoothing * (1 - probability) + smoothing
    expected = -((1 - pt) ** 2) * math.log(pt)
    actual = focal_loss(torch.full((1, 1, 1, 1), probability), torch.ones(1, 1, 1, 1))
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_dice_loss_is_averaged_over_images_not_pixels():
    probability = torch.zeros(2, 1, 2, 2)
    masks = torch.zeros(2, 1, 2, 2)
    probability[0, 0, 0], masks[0, 0, 0, 0] = 1, 1  # overlap 1, total 2 + 1
    expected = 1 - ((2 * 1 + 1) / (3 + 1) + (0 + 1) / (0 + 1)) / 2
    assert dice_loss(probability, masks).item() == pytest.approx(expected)


def test_segmentation_loss_equals_a_softmax_over_two_upsampled_logits():
    generator = torch.Generator().manual_seed(0)
    normal, abnormal = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    masks = (torch.rand(2, 13, 17, generator=generator) > 0.7).float()
    expected = 0.0
    for number in range(3):
        logits = torch.stack([normal[:, number], abnormal[:, number]], dim=1)
        upsampled = F.interpolate(logits, size=(13, 17), mode="bilinear", align_corners=True)
        probabilities = upsampled.softmax(dim=1)
        for channel, target in ((0, 1 - masks), (1, masks)):
            p = probabilities[:, channel]
            overlap, total = (p * target).sum(dim=(1, 2)), p.sum(dim=(1, 2)) + target.sum(dim=(1, 2))
            expected += 1 - ((2 * overlap + 1) / (total + 1)).mean()
        one_hot = torch.stack([1 - masks, masks], dim=1).clamp(1e-5, 1 - 1e-5)
        pt = (one_hot * probabilities).sum(dim=1) + 1e-5
        expected += (-((1 - pt) ** 2) * pt.log()).mean()
    assert segmentation_loss(abnormal - normal, masks).item() == pytest.approx(expected.item(), rel=1e-5)


def test_masks_are_binary_whatever_their_values_and_channel():
    logits = torch.randn(2, 3, 4, 4)
    masks = (torch.rand(2, 8, 8) > 0.5).float()
    expected = segmentation_loss(logits, masks)
    assert torch.equal(segmentation_loss(logits, 255 * masks), expected)
    assert torch.equal(segmentation_loss(logits, masks.bool().unsqueeze(1)), expected)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_saturated_logits_give_finite_losses_and_gradients(logit):
    logits = torch.full((1, 1, 3, 3), logit, requires_grad=True)
    loss = segmentation_loss(logits, torch.ones(1, 6, 6))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_classification_loss_has_no_temperature():
    cosines = torch.tensor([[0.2, 0.5]])
    expected = math.log(math.exp(0.2) + math.exp(0.5)) - 0.5
    assert classification_loss(cosines, torch.tensor([1])).item() == pytest.approx(expected, rel=1e-6)
