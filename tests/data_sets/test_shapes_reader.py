import numpy as np
import pytest
import torch

from data.shapes.reader import FIELDS, CaptionAccuracy, parse, score
from data.shapes.scene import canonical_caption, render, sample_scene, training_captions

SCENES = [sample_scene(7, i) for i in range(300)]
IMAGES = [render(scene, 32) for scene in SCENES]


def accuracy(images, captions):
    rows = [score(p, c) for p, c in zip(images, captions, strict=True)]
    return {field: float(np.mean([row[field] for row in rows])) for field in FIELDS}


def test_every_attribute_of_real_images_is_read_right():
    assert set(accuracy(IMAGES, map(canonical_caption, SCENES)).values()) == {1.0}


def test_noise_of_25_db_does_not_matter():
    rng = np.random.default_rng(0)
    sigma = 255 / 10 ** (25 / 20)
    noisy = [np.clip(p + rng.normal(0, sigma, p.shape), 0, 255).astype(np.uint8) for p in IMAGES]
    assert accuracy(noisy, map(canonical_caption, SCENES))["all"] >= 0.99


def test_other_captions_score_below_one():
    shuffled = [canonical_caption(scene) for scene in SCENES[1:] + SCENES[:1]]
    result = accuracy(IMAGES, shuffled)
    assert result["all"] <= 0.01 and result["colour"] < 0.2


def test_every_wording_means_the_same_scene():
    for scene, image in zip(SCENES[:50], IMAGES, strict=False):
        for caption in training_captions(scene):
            assert score(image, caption)["all"], caption
            assert parse(caption).things == scene.description.things


def test_a_single_wrong_attribute_is_the_only_one_reported():
    for scene, image in zip(SCENES, IMAGES, strict=True):
        caption = canonical_caption(scene)
        if caption.startswith("a small red") or len(scene.outlines) == 2:
            continue
        thing = scene.description.things[0]
        wrong = caption.replace(thing.colour, "pink" if thing.colour != "pink" else "red")
        result = score(image, wrong)
        assert [f for f in FIELDS if not result[f]] == ["colour", "all"]


def test_a_mirrored_relation_is_wrong():
    scene, image = next(
        (s, p)
        for s, p in zip(SCENES, IMAGES, strict=True)
        if s.description.where == "left of" and s.description.things[0] != s.description.things[1]
    )
    first, last = scene.description.things
    result = score(image, f"a {last} left of a {first}")
    assert not result["position"] and result["count"] and not result["all"]


def test_a_blank_image_shows_nothing():
    blank = np.full((32, 32, 3), 248, np.uint8)
    result = score(blank, "a small red ring in the center on a white background")
    assert [f for f in FIELDS if result[f]] == ["background"]


def test_captions_of_something_else_are_refused():
    with pytest.raises(ValueError, match="got the caption 'a photo of a cat'"):
        parse("a photo of a cat")


def test_the_metric_is_the_mean_over_any_split():
    images = torch.from_numpy(np.stack(IMAGES[:20])).permute(0, 3, 1, 2) / 127.5 - 1
    text = [canonical_caption(scene) for scene in SCENES[:19]] + [canonical_caption(SCENES[0])]
    total, split = CaptionAccuracy(), CaptionAccuracy()
    total.update(images, {"text": text})
    split.update(images[:7], {"text": text[:7]})
    split.update(images[7:], {"text": text[7:]})
    assert total.compute() == split.compute()
    assert total.compute()["caption/all"] == pytest.approx(19 / 20)
    total.reset()
    assert total.compute() == {}
