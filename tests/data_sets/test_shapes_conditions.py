"""Further fields of the packers: masks, low resolution, maps, layouts."""

import hashlib
import io
import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.masks import random_mask
from data.shapes.conditions import NUM_LAYOUT_CLASSES, NUM_MAP_CLASSES, label_map, layout
from data.shapes.packer import MANIFEST, Settings, pack
from data.shapes.scene import COLOURS, SHAPES, render, sample_scene

SCENES = [sample_scene(0, i) for i in range(200)]


def test_masks_cover_a_tenth_to_a_half_and_depend_on_the_name_alone():
    masks = [random_mask(str(n), 32, 32) for n in range(500)]
    fractions = np.array([(mask > 127).mean() for mask in masks])
    assert fractions.min() >= 0.1 and fractions.max() <= 0.5
    assert fractions.min() < 0.15 and fractions.max() > 0.4, "the whole range"
    assert all(set(np.unique(mask)) == {0, 255} for mask in masks)
    assert np.array_equal(random_mask("7", 32, 32), masks[7])
    assert len({mask.tobytes() for mask in masks}) > 490
    everywhere = np.mean(masks, axis=0) / 255
    assert everywhere.min() > 0.02 and everywhere.max() < 0.6, "no pixel is always known or never"


@pytest.mark.parametrize("size", [(8, 8), (256, 341), (100, 40)])
def test_masks_have_any_size(size):
    assert random_mask("a", *size).shape == size


def test_a_map_names_the_colour_of_every_pixel():
    palette = np.array([(0, 0, 0), *COLOURS.values()], float)
    right = total = 0
    for scene in SCENES:
        classes, pixels = label_map(scene, 32), render(scene, 32).astype(float)
        assert classes.max() < NUM_MAP_CLASSES
        things = classes > 0
        nearest = 1 + ((pixels[things][:, None] - palette[None, 1:]) ** 2).sum(-1).argmin(1)
        right, total = right + (nearest == classes[things]).sum(), total + things.sum()
        ground = np.abs(pixels[~things] - np.array(scene.background_rgb)).max(-1)
        assert (ground < 140).all(), "no pixel of the background is mostly object"
    assert right / total > 0.93, "all but pixels on an edge"


def test_a_layout_is_the_boxes_of_the_map():
    for scene in SCENES:
        boxes = layout(scene)
        assert len(boxes) == len(scene.outlines)
        for item, thing in zip(boxes, scene.description.things, strict=True):
            assert item["label"] < NUM_LAYOUT_CLASSES
            assert list(COLOURS)[item["label"] // 6] == thing.colour
            assert SHAPES[item["label"] % 6] == thing.shape
        fine = np.argwhere(label_map(scene, 128) > 0) / 128
        left, top, right, bottom = (
            pick(item["box"][i] for item in boxes) for i, pick in enumerate((min, min, max, max))
        )
        found = [fine[:, 1].min(), fine[:, 0].min(), fine[:, 1].max(), fine[:, 0].max()]
        assert np.abs(np.array(found) - [left, top, right, bottom]).max() < 3 / 128


SMALL = {"train": 6, "val": 2, "novel": 0, "pairs": 0, "shard_size": 10}


def samples(folder):
    return list(webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False))


def test_conditions_add_members_and_change_nothing_else(tmp_path):
    assert pack(tmp_path / "plain", Settings(**SMALL))
    assert pack(tmp_path / "more", Settings(**SMALL, conditions=True))
    for plain, more in zip(samples(tmp_path / "plain"), samples(tmp_path / "more"), strict=True):
        assert set(more) - set(plain) == {"mask.png", "low.png", "map.png"}
        assert all(plain[name] == more[name] for name in ("__key__", "png", "txt"))
        extended = json.loads(more["json"])
        assert len(extended.pop("layout")) in (1, 2)
        assert extended == json.loads(plain["json"])
        image = np.asarray(Image.open(io.BytesIO(more["png"])), float)
        low = np.asarray(Image.open(io.BytesIO(more["low.png"])), float)
        assert np.abs(low - image.reshape(8, 4, 8, 4, 3).mean((1, 3))).max() <= 1.0, "Pillow rounds twice"


def test_plain_shards_are_the_bytes_that_they_always_were(tmp_path):
    pack(tmp_path, Settings(**SMALL))
    digest = hashlib.sha256((tmp_path / "train-000000.tar").read_bytes()).hexdigest()
    assert digest.startswith("f67b1af2870b3197")
    assert "conditions" not in json.loads((tmp_path / MANIFEST).read_text())


def test_a_folder_of_the_other_kind_is_refused(tmp_path):
    pack(tmp_path, Settings(**SMALL))
    with pytest.raises(ValueError, match=r"was packed with conditions=None instead of True"):
        pack(tmp_path, Settings(**SMALL, conditions=True))
    assert not pack(tmp_path, Settings(**SMALL))
    pack(tmp_path / "more", Settings(**SMALL, conditions=True))
    with pytest.raises(ValueError, match=r"was packed with conditions=True instead of False"):
        pack(tmp_path / "more", Settings(**SMALL))
