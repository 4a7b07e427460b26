"""Masks are read by one rule, whatever file they come from."""

import io

import numpy as np
import pytest
from PIL import Image

from moeclip_hf.data import binarize_mask, read_mask

REGION = np.zeros((16, 24), dtype=bool)
REGION[3:9, 5:17] = True


def saved(image, kind):
    """The image as it comes back from a file."""
    file = io.BytesIO()
    image.save(file, kind)
    return Image.open(file)


def paint(mode, inside, outside):
    image = Image.new(mode, (24, 16), outside)
    image.paste(inside, (5, 3, 17, 9))
    return image


@pytest.mark.parametrize(
    ("mode", "inside", "outside"),
    [
        ("L", 1, 0),
        ("L", 255, 0),
        ("1", 1, 0),
        ("RGB", (0, 0, 1), (0, 0, 0)),
        ("RGBA", (9, 0, 0, 255), (0, 0, 0, 255)),
        ("RGBA", (9, 0, 0, 0), (0, 0, 0, 255)),
        ("LA", (1, 255), (0, 255)),
    ],
)
def test_any_value_but_zero_is_anomalous_in_any_mode(mode, inside, outside):
    np.testing.assert_array_equal(binarize_mask(saved(paint(mode, inside, outside), "PNG")), REGION)


def test_sixteen_bits_are_not_cut_to_eight():
    mask = saved(Image.fromarray(np.where(REGION, 256, 0).astype(np.uint16)), "PNG")

    assert mask.mode == "I;16"
    np.testing.assert_array_equal(binarize_mask(mask), REGION)


def test_a_palettes_colours_count_and_not_its_indices():
    mask = paint("P", 0, 1)
    mask.putpalette([255, 255, 255, 0, 0, 0])

    np.testing.assert_array_equal(binarize_mask(saved(mask, "PNG")), REGION)


def test_compression_noise_of_a_jpeg_is_not_anomalous():
    mask = saved(paint("L", 255, 0), "JPEG")

    assert (np.asarray(mask) != 0).sum() > REGION.sum()
    np.testing.assert_array_equal(binarize_mask(mask), REGION)


@pytest.mark.parametrize("size", [(48, 32), (9, 7), (31, 50)])
def test_a_mask_of_another_size_is_brought_to_the_images(size):
    mask = saved(paint("L", 255, 0), "PNG")

    read = read_mask({"image": Image.new("RGB", size), "mask": mask, "label": 1})

    np.testing.assert_array_equal(read, np.asarray(mask.resize(size, Image.Resampling.NEAREST)) > 0)


def test_a_normal_image_has_an_empty_mask_of_its_size():
    mask = read_mask({"image": Image.new("RGB", (7, 5)), "mask": None, "label": 0})

    assert mask.shape == (5, 7)
    assert mask.dtype == bool
    assert not mask.any()
