"""Images as bytes and files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_png

from ldm.io.images import check_finite, displayed, from_bytes, grid, read_text, to_bytes, to_levels, write_png


def test_bytes_round_trip_exactly_and_outside_values_are_clamped():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(levels)), levels)
    assert to_bytes(torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def test_every_one_of_65536_values_makes_the_round_trip():
    levels = torch.arange(65536).to(torch.uint16).view(1, 256, 256)
    image = from_bytes(levels)
    assert image.dtype == torch.float32 and image.unique().numel() == 65536
    assert image.min() == -1 and image.max() == 1
    assert torch.equal(to_levels(image, 16), levels)
    assert to_levels(torch.tensor([-3.0, -1.0, 1.0, 2.0]), 16).tolist() == [0, 0, 65535, 65535]


def test_a_grid_shows_grey_and_the_first_three_channels_in_8_bits():
    grey = torch.arange(65536).to(torch.uint16).view(16, 1, 64, 64)
    shown = displayed(grey)
    assert shown.shape == (16, 3, 64, 64) and shown.dtype == torch.uint8
    assert torch.equal(shown[:, 0].double(), (grey[:, 0].double() / 257).round())
    assert torch.equal(shown, displayed(from_bytes(grey)))
    four = torch.randint(0, 256, (2, 4, 5, 5)).byte()
    assert torch.equal(displayed(four), four[:, :3])
    assert grid(four).shape == (3, 5, 12) and grid(grey[:1]).shape == (3, 64, 64)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_holds_each_kind_and_text(tmp_path, channels, dtype):
    image = torch.randint(0, torch.iinfo(dtype).max, (channels, 6, 7)).to(dtype)
    text = {"prompt": "ein grüner Kreis 圆", "seed": "7"}
    write_png(tmp_path / "a.png", image, text)
    assert read_text(tmp_path / "a.png") == text
    read = decode_png(torch.frombuffer(bytearray((tmp_path / "a.png").read_bytes()), dtype=torch.uint8))
    assert read.dtype == dtype and torch.equal(read, image)


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
