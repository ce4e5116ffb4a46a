"""The metrics on real images, and on images that are wrong in one way."""

import pytest
import torch

from data.shapes.conditions import label_map, layout
from data.shapes.metrics import KnownPSNR, LayoutAccuracy, MapAgreement, nearest_classes
from data.shapes.scene import render, sample_scene
from ldm.io.images import from_bytes

SCENES = [sample_scene(1, i) for i in range(60)]


def batch():
    boxes = [
        torch.tensor([[item["label"], *item["box"]] for item in layout(scene)], dtype=torch.float32)
        for scene in SCENES
    ]
    images = torch.stack([torch.from_numpy(render(scene, 32)).permute(2, 0, 1) for scene in SCENES])
    maps = torch.stack([torch.from_numpy(label_map(scene, 32)).long() for scene in SCENES])
    return {"image": from_bytes(images), "label_map": maps, "layout": boxes}


def measured(metric, images, data):
    for part in (slice(0, 20), slice(20, None)):
        metric.update(images[part], {name: field[part] for name, field in data.items()})
    return metric.compute()


def test_real_images_agree_with_their_own_maps():
    data = batch()
    values = measured(MapAgreement(), data["image"], data)
    assert values["map/all"] > 0.97 and values["map/objects"] > 0.92
    other = measured(MapAgreement(), data["image"].flip(0), data)
    assert other["map/objects"] < 0.4


def test_a_wrong_colour_costs_its_pixels():
    data = batch()
    wrong = {**data, "label_map": torch.where(data["label_map"] > 0, 9 - data["label_map"], 0)}
    assert measured(MapAgreement(), data["image"], wrong)["map/objects"] < 0.05
    grounds = data["label_map"] == 0
    is_ground = (nearest_classes(((data["image"] + 1) * 127.5).round().to(torch.uint8)) == 0)[grounds]
    assert is_ground.float().mean() > 0.99


def test_real_images_show_their_own_layouts():
    data = batch()
    values = measured(LayoutAccuracy(), data["image"], data)
    assert values == {"layout/count": 1.0, "layout/class": 1.0, "layout/position": 1.0, "layout/all": 1.0}
    mirrored = measured(LayoutAccuracy(), data["image"].flip(3), data)
    assert mirrored["layout/class"] == 1.0 and mirrored["layout/position"] < 0.5


def test_known_psnr_looks_at_known_pixels_only():
    data = batch()
    data["mask"] = torch.zeros(60, 1, 32, 32)
    data["mask"][:, :, :, :16] = 1.0
    images = data["image"].clone()
    images[:, :, :, :16] = 0.0
    images[:, :, :, 16:] += 0.02
    assert measured(KnownPSNR(), images, data)["known/psnr"] == pytest.approx(40.0, abs=1e-3)
