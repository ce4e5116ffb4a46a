"""CLIP score, PSNR and retrieval: values known by hand."""

import pytest
import torch
from torch import nn

from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.features import Features, ImageText
from ldm.metrics.psnr import PSNR
from ldm.metrics.retrieval import recall_at_1


class Colours(nn.Module):
    """A picture's vector is its mean colour; a caption's, the axis of its colour."""

    def encode_image(self, image):
        return nn.functional.normalize(image.mean((2, 3)), dim=1)

    def encode_text(self, text):
        return torch.eye(3)[[["red", "green", "blue"].index(word) for word in text]]

    def image_features(self, image):
        return image.mean((2, 3))


def test_clip_score_is_a_mean_of_clamped_cosines():
    assert isinstance(Colours(), Features) and isinstance(Colours(), ImageText)
    colour = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])
    image = colour.view(3, 3, 1, 1).expand(3, 3, 2, 2)
    metric = CLIPScore(Colours())
    metric.update(image[:2], {"text": ["red", "green"]})
    metric.update(image[2:], {"text": ["blue"]})
    assert metric.compute()["clip_score"] == pytest.approx((100 + 80 + 0) / 3, rel=1e-6)


def test_clip_score_without_captions_says_what_is_missing():
    with pytest.raises(ValueError, match=r"the samples have \['image', 'key'\], expected 'text'"):
        CLIPScore(Colours()).update(torch.zeros(1, 3, 2, 2), {"key": ["a"], "image": torch.zeros(1, 3, 2, 2)})


def test_psnr_is_the_mean_over_pictures():
    image = torch.zeros(2, 3, 4, 4)
    off = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    metric = PSNR()
    metric.update(image + off, {"image": image})
    # 10 log10(2^2 / error^2) = 20 and 40 dB
    assert metric.compute()["picture_psnr"] == pytest.approx((20 + 40) / 2, rel=1e-5)


def test_recall_counts_the_nearest_both_ways():
    text = torch.eye(4)
    image = torch.eye(4)
    image[2] = torch.tensor([0.0, 0.0, 0.6, 0.8])  # nearer to another caption, yet its own caption's nearest
    assert recall_at_1(image, text) == {"image_to_text": 0.75, "text_to_image": 1.0}
    assert recall_at_1(text, image) == {"image_to_text": 1.0, "text_to_image": 0.75}
    assert recall_at_1(text, text) == {"image_to_text": 1.0, "text_to_image": 1.0}


def test_recall_takes_equal_captions_for_equally_right():
    image, text = torch.eye(3)[[0, 0, 2]], torch.eye(3)[[0, 0, 2]]
    assert recall_at_1(image, text)["image_to_text"] == pytest.approx(2 / 3)
    assert recall_at_1(image, text, ["a", "a", "b"])["image_to_text"] == 1.0
    with pytest.raises(ValueError, match="got 3 pictures and 2 captions"):
        recall_at_1(image, text[:2])
