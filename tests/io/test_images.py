"""Images as bytes and files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.io.images import check_finite, from_bytes, grid, read_text, to_bytes, write_png


def test_bytes_round_trip_exactly_and_outside_values_are_clamped():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(levels)), levels)
    assert to_bytes(torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def test_grid_places_images_in_rows_on_white():
    images = torch.stack([torch.full((3, 4, 5), i, dtype=torch.uint8) for i in range(5)])
    drawn = grid(images, columns=3)
    assert drawn.shape == (3, 2 * 4 + 2, 3 * 5 + 2 * 2)
    for i, (top, left) in enumerate([(0, 0), (0, 7), (0, 14), (6, 0), (6, 7)]):
        assert (drawn[:, top : top + 4, left : left + 5] == i).all()
    assert (drawn[:, 4:6] == 255).all() and (drawn[:, 6:, 14:] == 255).all()
    with pytest.raises(ValueError, match="got no images"):
        grid(images[:0])


def test_png_holds_pixels_and_text(tmp_path):
    image = torch.randint(0, 256, (3, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path, text = tmp_path / "new" / "a.png", {"prompt": "ein grüner Kreis 圆", "seed": "7"}
    write_png(path, image, text)
    assert read_text(path) == text
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert torch.equal(pixels, image)
    assert os.listdir(path.parent) == ["a.png"]


def test_an_image_that_is_not_finite_is_named_and_not_black():
    images = torch.zeros(3, 3, 2, 2)
    check_finite(images, ["a", "b", "c"])
    images[1, 0, 0, 0], images[2] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="2 of 3 images are not finite, the first is that of 'b': "):
        check_finite(images, ["a", "b", "c"])
