"""A view's crop and flip: the same for all that lies on an image."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.data import raster
from ldm.data.decode import SampleId
from ldm.data.fields import decode_sample
from ldm.data.view import View

SIZES = [(1, 1), (5, 9), (9, 5), (31, 32), (32, 48), (427, 640), (1000, 3)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_square_view_without_crop_is_the_central_square(height, width):
    side = min(height, width)
    assert View(8, 8).box(height, width) == ((height - side) // 2, (width - side) // 2, side, side)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (40, 8)])
def test_a_crop_is_the_largest_with_the_proportions_of_the_view_and_reaches_every_side(height, width, shape):
    high, wide = View(*shape).box(height, width)[2:]
    assert (high == height and wide <= width) or (wide == width and high <= height)
    assert abs(high * shape[1] - wide * shape[0]) <= max(shape) / 2 or 1 in (high, wide)
    ends = [View(*shape, crop=(at, at)).box(height, width)[:2] for at in (0.0, 1 - 2**-32)]
    assert ends == [(0, 0), (height - high, width - wide)]


def test_every_position_of_a_crop_is_as_likely():
    lefts = [View(8, 8, crop=(0.0, n / 600)).box(10, 13)[1] for n in range(600)]
    assert np.bincount(lefts).tolist() == [150] * 4


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def scene(height: int, width: int, box: tuple[int, int, int, int]) -> dict[str, bytes]:
    """White in the box (top, left, height, width), in image, mask, map and layout; the low image is half."""
    top, left, high, wide = box
    inside = np.zeros((height, width), np.uint8)
    inside[top : top + high, left : left + wide] = 255
    corners = [left / width, top / height, (left + wide) / width, (top + high) / height]
    meta = {"layout": [{"label": 3, "box": corners}], "height": height, "width": width}
    coloured = np.repeat(inside[:, :, None], 3, 2)
    return {
        "png": png(coloured),
        "mask.png": png(inside),
        "map.png": png(inside // 51),
        "low.png": png(coloured[::2, ::2]),
        "json": json.dumps(meta).encode(),
    }


def drawn(layout: Tensor, height: int, width: int) -> Tensor:
    left, top, right, bottom = (layout[0, 1:] * torch.tensor([width, height, width, height])).round().int()
    found = torch.zeros(height, width, dtype=torch.bool)
    found[top:bottom, left:right] = True
    return found


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [None, (0.0, 0.0), (0.4, 0.7), (0.99, 0.99)])
@pytest.mark.parametrize(("shape", "resized"), [((32, 32), 1), ((16, 16), 2), ((16, 24), 2), ((8, 4), 4)])
def test_mask_map_boxes_and_low_resolution_show_what_the_image_shows(shape, resized, crop, flip):
    view = View(*shape, flip=flip, crop=crop)
    members = scene(48, 64, (16, 20, 16, 28))
    names = ["image", "mask", "label_map", "layout", "low_res"]
    found = decode_sample(members, SampleId("a.tar", "k"), names, view)
    white = found["mask"][0].bool()
    assert white.shape == shape and white.sum() > 0
    assert torch.equal(found["label_map"] == 5, white)
    edges = 2 * sum(shape)  # pixels that a crop at an odd position cuts in halves
    assert ((found["image"][0] > 127) ^ white).sum() <= edges
    assert (drawn(found["layout"], *shape) ^ white).sum() <= edges
    low = found["low_res"][:1, :, :]
    assert abs(low.shape[1] * shape[1] - low.shape[2] * shape[0]) <= max(shape)
    as_low = torch.nn.functional.interpolate(white[None, None].float(), low.shape[1:], mode="nearest-exact")
    assert ((low[0] > 127) ^ as_low[0, 0].bool()).sum() <= 2 * sum(low.shape[1:])
    unflipped = decode_sample(members, SampleId("a.tar", "k"), names[:3], View(*shape, crop=crop))
    for name in names[:3]:
        assert torch.equal(found[name], unflipped[name].flip(-1) if flip else unflipped[name])


def test_a_view_without_resizing_is_a_slice():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    view = View(10, 10, crop=(0.5, 0.5))
    top, left, high, wide = view.box(20, 30)
    assert torch.equal(raster.shown(image, View(20, 20)), image[:, :, 5:25])
    assert torch.equal(raster.shown(image, view, resize=False), image[:, top:, left : left + wide])
    assert (top, high, wide) == (0, 20, 20)
