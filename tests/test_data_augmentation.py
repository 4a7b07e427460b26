"""Image and mask are augmented together, as PIL and SciPy would do it step by step."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from moeclip_hf.data.augmentation import Transforms, apply_transforms, draw_transforms


def transforms(degrees=0.0, shift=(0, 0), flip_horizontal=False, flip_vertical=False):
    return Transforms(
        torch.tensor([degrees]),
        torch.tensor([shift], dtype=torch.float32),
        torch.tensor([flip_horizontal]),
        torch.tensor([flip_vertical]),
    )


def augment(images, masks, generator):
    return apply_transforms(images, masks, draw_transforms(len(images), *images.shape[-2:], generator))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def smooth_image(height=40, width=56):
    noise = np.random.default_rng(0).random((3, height, width))
    image = np.stack([ndimage.gaussian_filter(channel, 2) for channel in noise])
    return torch.tensor((image - image.min()) / np.ptp(image), dtype=torch.float32)[None]


def blob_mask(height=40, width=56):
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[0, 8:17, 30:44] = 255
    return mask


def pil_rotated(array, degrees, resample):
    return np.asarray(Image.fromarray(array).rotate(degrees, resample))


@pytest.mark.parametrize("degrees", [-30.0, 12.5, 30.0])
def test_a_rotation_is_pils(degrees):
    image, mask = smooth_image(), blob_mask()

    rotated, rotated_mask = apply_transforms(image, mask, transforms(degrees=degrees))

    inner = np.s_[8:-8, 12:-12]  # PIL repeats the edge's pixels where interpolation reaches beyond the frame
    for channel, expected in zip(rotated[0].numpy(), image[0].numpy(), strict=True):
        expected = pil_rotated(expected, degrees, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(channel[inner], expected[inner], atol=1e-3)
    expected_mask = pil_rotated(mask[0].numpy(), degrees, Image.Resampling.NEAREST) > 0
    assert (rotated_mask[0].numpy() != expected_mask).sum() <= 2


def test_a_shift_moves_whole_pixels_and_fills_with_zeros():
    image, mask = smooth_image(), blob_mask()

    shifted, shifted_mask = apply_transforms(image, mask, transforms(shift=(5, -3)))

    expected = ndimage.shift(image.numpy(), (0, 0, -3, 5), order=0)
    np.testing.assert_allclose(shifted.numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(shifted_mask.numpy(), ndimage.shift(mask.numpy(), (0, -3, 5), order=0) > 0)


@pytest.mark.parametrize(("flip", "axis"), [("flip_horizontal", 3), ("flip_vertical", 2)])
def test_a_flip_mirrors(flip, axis):
    image, mask = smooth_image(), blob_mask()

    flipped, flipped_mask = apply_transforms(image, mask, transforms(**{flip: True}))

    torch.testing.assert_close(flipped, image.flip(axis), atol=1e-5, rtol=0)
    assert torch.equal(flipped_mask, mask.flip(axis - 1) // 255)


def test_all_steps_together_are_one_after_the_other():
    image, mask = smooth_image(), blob_mask()
    stepwise, stepwise_mask = image, mask
    for step in ({"degrees": 25.0}, {"shift": (8, -6)}, {"flip_horizontal": True}, {"flip_vertical": True}):
        stepwise, stepwise_mask = apply_transforms(stepwise, stepwise_mask, transforms(**step))

    at_once, mask_at_once = apply_transforms(image, mask, transforms(25.0, (8, -6), True, True))

    torch.testing.assert_close(at_once, stepwise, atol=1e-4, rtol=0)
    assert torch.equal(mask_at_once, stepwise_mask)
    assert (at_once[..., -8:] == 0).all()
    assert (at_once[..., :6, :] == 0).all()


def test_a_marked_region_moves_with_its_mask():
    images = torch.zeros(16, 3, 64, 64)
    masks = torch.zeros(16, 64, 64)
    images[:, :, 20:36, 24:44] = 1.0
    masks[:, 20:36, 24:44] = 1.0

    images, masks = augment(images, masks, seeded(1))

    assert set(masks.unique().tolist()) == {0.0, 1.0}
    bright = images.mean(1) > 0.5
    assert ((bright != masks.bool()).flatten(1).sum(1) <= 6).all()
    assert (bright.flatten(1).sum(1) > 200).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.int64])
def test_masks_keep_their_type_and_are_one_where_not_zero(dtype):
    masks = blob_mask().to(dtype)

    _, augmented = augment(smooth_image(), masks, seeded(0))

    assert augmented.dtype == dtype
    assert set(augmented.unique().tolist()) == {0, 1}


def test_half_precision_images_keep_their_type():
    image, _ = augment(smooth_image().bfloat16(), blob_mask(), seeded(0))

    assert image.dtype == torch.bfloat16


def test_equal_seeds_give_equal_results_whatever_else_draws():
    images, masks = smooth_image().repeat(4, 1, 1, 1), blob_mask().repeat(4, 1, 1)
    first, second = seeded(3), seeded(3)

    one = [augment(images, masks, first) for _ in range(2)]
    torch.manual_seed(99)
    two = [augment(images, masks, second) for _ in range(2)]

    assert all(torch.equal(a, b) for pair in zip(one, two, strict=True) for a, b in zip(*pair, strict=True))
    assert not torch.equal(one[0][0], one[1][0])
    assert not torch.equal(one[0][0], augment(images, masks, seeded(4))[0])


def test_each_step_happens_to_half_the_images_within_its_limits():
    drawn = draw_transforms(4000, 100, 200, seeded(0))

    shifted = (drawn.shift != 0).any(1)
    for happened in (drawn.degrees != 0, shifted, drawn.flip_horizontal, drawn.flip_vertical):
        assert happened.float().mean().item() == pytest.approx(0.5, abs=0.03)
    together = (drawn.degrees != 0) & drawn.flip_vertical
    assert together.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert 29.5 < drawn.degrees.abs().max() <= 30
    assert 28 <= drawn.shift[:, 0].abs().max() <= 30
    assert 14 <= drawn.shift[:, 1].abs().max() <= 15
    assert drawn.degrees[drawn.degrees != 0].mean().abs() < 1.5


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 40, 56\) do not fit masks of shape \(1, 56, 40\)"):
        augment(smooth_image(), blob_mask().transpose(1, 2), seeded(0))
