"""Masks, low-resolution images, maps and layouts keep to the image's geometry."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_shards import png, write_tar

from ldm.data.decode import BadSample, SampleId
from ldm.data.fields import collate, decode_sample, whitelist
from ldm.data.module import Shards
from ldm.data.view import View

SAMPLE = SampleId("shards/train-000003.tar", "000042")
FIELDS = ["image", "mask", "low_res", "label_map", "layout"]


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def read(fields, size=8, **members):
    names = {name.replace("_", "."): content for name, content in members.items()}
    return decode_sample(names, SAMPLE, fields, View(size, size))


def scene(height: int, width: int, left: int, top: int, side: int) -> dict[str, bytes]:
    """A square at the same position in image, mask, map and layout."""
    inside = np.zeros((height, width), np.uint8)
    inside[top : top + side, left : left + side] = 1
    box = [left / width, top / height, (left + side) / width, (top + side) / height]
    meta = {"layout": [{"label": 7, "box": box}], "width": width, "height": height}
    return {
        "png": encoded(np.repeat(inside[:, :, None] * np.uint8(255), 3, 2)),
        "mask_png": encoded(inside * np.uint8(200)),
        "low_png": encoded(np.repeat(inside[::2, ::2, None] * np.uint8(255), 3, 2)),
        "map_png": encoded(inside * np.uint8(5)),
        "json": json.dumps(meta).encode(),
    }


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64), (48, 32)])
def test_everything_is_cropped_and_resized_like_the_image(height, width):
    top, left = (height - 32) // 2 + 8, (width - 32) // 2 + 16
    found = read(FIELDS, 16, **scene(height, width, left, top, 12))
    bright = found["image"][0] > 127
    assert bright.sum() == 36 and bright[4:10, 8:14].all()
    assert torch.equal(found["mask"][0].bool(), bright)
    assert torch.equal(found["label_map"] == 5, bright)
    assert torch.equal(found["low_res"][0] > 127, bright), "16 pixels of its own, half of the image's 32"
    assert torch.allclose(found["layout"], torch.tensor([[7, 0.5, 0.25, 0.875, 0.625]]))


def test_boxes_outside_the_central_square_are_left_out_and_others_cut():
    boxes = [[0.0, 0.0, 0.2, 1.0], [0.1, 0.2, 0.5, 0.6]]
    meta = {"layout": [{"label": i, "box": box} for i, box in enumerate(boxes)], "width": 200, "height": 100}
    found = read(["layout"], json=json.dumps(meta).encode())["layout"]
    assert torch.allclose(found, torch.tensor([[1, 0.0, 0.2, 0.5, 0.6]]))


def test_a_mask_is_one_from_128_on():
    grey = np.array([[0, 127], [128, 255]], np.uint8)
    assert read(["mask"], 2, mask_png=encoded(grey))["mask"].tolist() == [[[0, 0], [1, 1]]]
    assert read(["mask"], 2, mask_png=encoded(np.stack([grey] * 3, 2)))["mask"].tolist() == [[[0, 0], [1, 1]]]


def test_a_palettes_index_is_the_class():
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8)
    palette = Image.fromarray(indices, "P")
    palette.putpalette([255 - i // 3 for i in range(768)])
    out = io.BytesIO()
    palette.save(out, "PNG")
    assert torch.equal(read(["label_map"], 8, map_png=out.getvalue())["label_map"], torch.tensor(indices))
    coarse = read(["label_map"], 4, map_png=encoded(indices))["label_map"]
    assert set(coarse.flatten().tolist()) <= set(range(64)), "classes are never mixed"


@pytest.mark.parametrize(
    ("fields", "members", "message"),
    [
        (["mask"], {"png": png(0)}, r"member 'mask\.png': missing: it gives the field 'mask' \(found png\)"),
        (["low_res"], {}, r"'low\.png or low\.jpg': missing"),
        (["mask"], {"mask_png": b"x"}, r"'mask\.png': its 1 bytes are no JPEG"),
        (["label_map"], {"map_png": png(3)}, r"'map\.png': .*mode RGB holds no classes"),
        (["layout"], {"json": b'{"label": 3}'}, r"'json': missing: it gives the field 'layout'"),
        (["layout"], {"json": b'{"layout": [{"box": [0, 0, 1, 1]}]}'}, r"KeyError.*expected a list of"),
        (["layout"], {"json": b'{"layout": [{"label": -1, "box": [0, 0, 1, 1]}]}'}, r"the label is -1"),
        (["layout"], {"json": b'{"layout": [{"label": 1, "box": [0, 0, 1]}]}'}, r"expected a list of"),
        (["layout"], {"json": b'{"layout": [{"label": 1, "box": [0, 0.5, 1, 0.5]}]}'}, r"empty or outside"),
        (["layout"], {"json": b'{"layout": [{"label": 1, "box": [0, 0, 64, 64]}]}'}, r"empty or outside"),
    ],
)
def test_what_cannot_be_used_is_named(fields, members, message):
    with pytest.raises(BadSample, match=message):
        read(fields, **members)


@pytest.mark.parametrize("field", ["mask", "label_map", "low_res", "layout"])
def test_other_proportions_than_the_images_are_refused(field):
    wide, narrow = scene(32, 64, 20, 10, 8), scene(32, 48, 20, 10, 8)
    with pytest.raises(BadSample, match=r"48x32, expected .* 64x32|24x16, expected .* 64x32"):
        read(["image", field], **{**narrow, "png": wide["png"]})
    read(["image", field], **wide)


def test_boxes_of_an_image_that_is_not_square_need_its_size():
    members = scene(32, 64, 20, 10, 8)
    meta = json.loads(members["json"])
    bare = json.dumps({"layout": meta["layout"]}).encode()
    with pytest.raises(BadSample, match=r"'width' and 'height' are 1x1, expected .* 64x32"):
        read(["image", "layout"], **{**members, "json": bare})


def test_rounding_to_pixels_is_no_other_proportion():
    members = {
        "png": encoded(np.zeros((427, 640, 3), np.uint8)),
        "mask_png": encoded(np.zeros((64, 96), np.uint8)),
    }
    assert read(["image", "mask"], 32, **members)["mask"].shape == (1, 32, 32)


def test_layouts_stay_a_list():
    samples = [{"key": str(n), "layout": torch.zeros(n, 5), "mask": torch.zeros(1, 2, 2)} for n in range(3)]
    batch = collate(samples)
    assert [len(boxes) for boxes in batch["layout"]] == [0, 1, 2] and batch["mask"].shape == (3, 1, 2, 2)


def test_only_members_of_requested_fields_are_read():
    assert whitelist(["image", "text"]) == ("jpg", "jpeg", "png", "webp", "txt", "json")
    assert whitelist(["mask", "latent"]) == ("latent.npy", "latent.flip.npy", "mask.png")


@pytest.fixture
def conditioned(tmp_path):
    files = []
    for number in range(6):
        members = scene(32, 32, number, 10, 12)
        files += [(f"{number:06d}.{name.replace('_', '.')}", body) for name, body in members.items()]
    return str(write_tar(tmp_path / "train-000000.tar", files))


def module(shards, *fields, **settings):
    return Shards(shards, shards, image_size=16, batch_size=3, fields=fields, **settings)


def test_a_batch_matches_the_annotations_of_batch(conditioned):
    data = module(conditioned, *FIELDS)
    data.setup("fit")
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert {name: (tuple(batch[name].shape), batch[name].dtype) for name in FIELDS[:4]} == {
        "image": ((3, 3, 16, 16), torch.float32),
        "mask": ((3, 1, 16, 16), torch.float32),
        "low_res": ((3, 3, 16, 16), torch.float32),
        "label_map": ((3, 16, 16), torch.int64),
    }
    assert batch["mask"].unique().tolist() == [0, 1] and batch["label_map"].unique().tolist() == [0, 5]
    assert batch["low_res"].min() == -1 and batch["low_res"].max() == 1
    assert all(boxes.shape == (1, 5) for boxes in batch["layout"])


def test_validation_loads_every_field_and_training_those_it_reads(conditioned):
    data = module(conditioned, "mask")
    data.setup("fit")
    assert set(next(iter(data.val_dataloader()))) == {"key", *FIELDS}
    assert set(next(iter(data.train_dataloader()))) == {"key", "mask"}
    with pytest.raises(ValueError, match=r"data\.fields: asks for \['text'\]"):
        module(conditioned, "mask", "text").setup("fit")


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (View(16, 16), [48, 96, 0, 8, 16, 16]),  # resized to 16x32, cropped in the middle
        (View(16, 16, crop=(0.0, 0.999)), [48, 96, 0, 16, 16, 16]),
        (View(32, 16), [48, 96, 0, 24, 32, 16]),  # of 32x64 the 16 columns in the middle
        (View(24, 48), [48, 96, 0, 0, 24, 48]),
    ],
)
def test_the_size_says_how_the_image_was_resized_and_cropped(view, expected):
    wide = encoded(np.zeros((48, 96, 3), np.uint8))
    assert decode_sample({"png": wide}, SAMPLE, ["size"], view)["size"].tolist() == expected
    stated = json.dumps({"height": 48, "width": 96}).encode()
    assert decode_sample({"json": stated}, SAMPLE, ["size"], view)["size"].tolist() == expected


def test_the_original_size_is_that_before_the_shard_was_made():
    meta = {"height": 48, "width": 96, "original_height": 480, "original_width": 960}
    found = decode_sample({"json": json.dumps(meta).encode()}, SAMPLE, ["size"], View(24, 48))["size"]
    assert found.tolist() == [480, 960, 0, 0, 24, 48]
    with pytest.raises(BadSample, match=r"'original_height' and 'original_width' are .* above 0"):
        meta["original_width"] = "960"
        decode_sample({"json": json.dumps(meta).encode()}, SAMPLE, ["size"], View(24, 48))
    with pytest.raises(BadSample, match="missing: it gives the field 'size'"):
        decode_sample({"json": b"{}"}, SAMPLE, ["size"], View(24, 48))
