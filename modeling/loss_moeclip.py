"""The terms of MoECLIP's objective on scores and masks (arXiv 2603.03101, section 3.5)."""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_FOCAL_GAMMA = 2
# Smooths the focal loss's target and keeps its logarithm finite.
_FOCAL_SMOOTHING = 1e-5


def focal_loss(anomaly_probability: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """
    Binary focal loss with gamma 2, averaged over the pixels of all images.

    Args:
        anomaly_probability (`torch.Tensor`): (B, M, H, W), 0 to 1.
        masks (`torch.Tensor`): (B, 1, H, W), 0 or 1.

    Returns:
        `torch.Tensor` of shape (M,): one loss a map.
    """
    target = masks.clamp(_FOCAL_SMOOTHING, 1 - _FOCAL_SMOOTHING)
    probability_of_target = target * anomaly_probability + (1 - target) * (1 - anomaly_probability) + _FOCAL_SMOOTHING
    loss = -((1 - probability_of_target) ** _FOCAL_GAMMA) * probability_of_target.log()
    return loss.mean(dim=(0, 2, 3))


def dice_loss(probability: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """
    `1 - mean over images of (2 |p m| + 1) / (|p| + |m| + 1)`.

    Args:
        probability (`torch.Tensor`): p, (B, M, H, W), 0 to 1.
        masks (`torch.Tensor`): m, (B, 1, H, W), 0 or 1.

    Returns:
        `torch.Tensor` of shape (M,): one loss a map.
    """
    overlap = (probability * masks).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + masks.sum(dim=(2, 3))
    return (1 - (2 * overlap + 1) / (total + 1)).mean(dim=0)


def map_loss(anomaly_logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """
    Focal loss, dice of the normal and dice of the abnormal area, summed over the given maps.

    Args:
        anomaly_logits (`torch.Tensor`): (B, M, h, w), logit of abnormal minus logit of normal, per patch.
        masks (`torch.Tensor`): (B, 1, H, W), 0 or 1.
    """
    upsampled = F.interpolate(anomaly_logits, size=masks.shape[-2:], mode="bilinear", align_corners=True)
    abnormal = upsampled.sigmoid()
    losses = focal_loss(abnormal, masks) + dice_loss(1 - abnormal, 1 - masks) + dice_loss(abnormal, masks)
    return losses.sum()


def segmentation_loss(anomaly_logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """
    L_seg: focal loss, dice of the normal and dice of the abnormal area, summed over the maps.

    A softmax over two logits is a sigmoid of their difference, and upsampling is linear: one channel a map is enough.
    The maps are taken one after the other, and in the backward pass again: a map of the images' size stays in the
    processor's cache, and none has to be kept.

    Args:
        anomaly_logits (`torch.Tensor`): (B, M, h, w), logit of abnormal minus logit of normal, per patch.
        masks (`torch.Tensor`): (B, H, W) or (B, 1, H, W); any value but 0 is abnormal.
    """
    masks = (masks if masks.dim() == 4 else masks.unsqueeze(1)).ne(0).to(anomaly_logits.dtype)
    maps = anomaly_logits.split(1, dim=1)
    return torch.stack([checkpoint(map_loss, one, masks, use_reentrant=False) for one in maps]).sum()


def classification_loss(logits_per_image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    L_ac: cross-entropy of an image's cosines with the normal and the abnormal anchor, without a temperature.

    Args:
        logits_per_image (`torch.Tensor`): (B, 2), cosines.
        labels (`torch.Tensor`): (B,), 0 normal or 1 abnormal.
    """
    return F.cross_entropy(logits_per_image, labels.long())


__all__ = ["classification_loss", "dice_loss", "focal_loss", "map_loss", "segmentation_loss"]
