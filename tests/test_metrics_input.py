"""What metrics refuse to count."""

import numpy as np
import pytest

from moeclip_hf.errors import DatasetError, MoECLIPError
from moeclip_hf.metrics import AnomalyMetrics

GOOD = {
    "pixel_scores": np.linspace(0, 1, 32).reshape(2, 4, 4),
    "image_scores": np.array([0.1, 0.9]),
    "masks": np.stack([np.zeros((4, 4)), np.eye(4)]),
    "labels": np.array([0, 1]),
}
NOT_FINITE = np.where(np.arange(32).reshape(2, 4, 4) == 9, np.nan, 0.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixel_scores": np.zeros((2, 1, 4, 4))}, MoECLIPError, r"pixel_scores must be of shape \(B, H, W\)"),
        ({"pixel_scores": np.zeros((2, 0, 4))}, MoECLIPError, r"pixel_scores must be of shape \(B, H, W\)"),
        ({"pixel_scores": NOT_FINITE}, MoECLIPError, "pixel_scores holds NaN or infinite values"),
        ({"pixel_scores": NOT_FINITE == 0}, None, ""),
        ({"pixel_scores": GOOD["pixel_scores"] * 1j}, MoECLIPError, "pixel_scores must be real numbers"),
        ({"image_scores": np.array([0.1, np.inf])}, MoECLIPError, "image_scores holds NaN or infinite values"),
        ({"image_scores": np.zeros((2, 1))}, MoECLIPError, r"image_scores must be of shape \(B,\)"),
        ({"image_scores": np.zeros(3)}, MoECLIPError, "image_scores has 3 values for the 2 maps"),
        ({"masks": np.zeros((2, 4, 5))}, DatasetError, r"masks must be of shape \(2, 4, 4\)"),
        ({"masks": np.zeros((2, 3, 4, 4))}, DatasetError, r"masks must be of shape \(2, 4, 4\)"),
        ({"masks": 255 * GOOD["masks"]}, DatasetError, "masks must hold 0 and 1 only"),
        ({"masks": np.full((2, 4, 4), np.nan)}, DatasetError, "masks must hold 0 and 1 only"),
        ({"labels": np.array([0, 2])}, DatasetError, "labels must hold 0 and 1 only"),
        ({"labels": np.zeros(3)}, DatasetError, r"labels must be of shape \(2,\)"),
    ],
)
def test_bad_input_is_named_in_one_line_and_adds_nothing(change, error, message):
    metrics = AnomalyMetrics("industrial")
    metrics.update(**GOOD)
    before = metrics.compute()
    if error is None:
        metrics.update(**GOOD | change)
        return
    with pytest.raises(error, match=message) as raised:
        metrics.update(**GOOD | change)
    assert "\n" not in str(raised.value)
    assert metrics.compute() == before
    assert metrics.num_images == 2


def test_an_unknown_domain_is_refused():
    with pytest.raises(MoECLIPError, match="industrial, medical, not 'food'"):
        AnomalyMetrics("food")
