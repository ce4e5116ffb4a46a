"""Distances and a discriminator on features of a frozen network: gradients reach the image alone."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldm.losses import Adversarial, FeatureDistance
from ldm.nets.clip import CLIPModel
from ldm.nets.discriminator import FeatureDiscriminator
from ldm.nets.frozen import Frozen

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
BLOCK = "model.visual.transformer.resblocks.0"


class Pyramid(nn.Module):
    """Two convolutions, and the mean of the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 6, 3, stride=2)

    def image_features(self, image):
        return self.two(self.one(image).relu()).mean((2, 3))


class Tower(Frozen):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(CLIPModel(16, VISION, TEXT))

    def image_features(self, image):
        return self.module.image_features(image)


def images(n=2):
    return torch.rand(2, n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_it_is_the_distance_of_unit_features_averaged_over_positions_and_layers():
    made, real = images()
    net, total = Pyramid(), 0.0
    x, y = net.one(made), net.one(real)
    for one, other in ((x, y), (net.two(x.relu()), net.two(y.relu()))):
        one, other = F.normalize(one, dim=1), F.normalize(other, dim=1)
        total = total + (one - other).square().sum(1).mean((1, 2)) / 2
    found = FeatureDistance(Pyramid, ["one", "two"], reduction="mean")({"image": real}, {"image": made})
    assert torch.allclose(found, total, rtol=1e-5)
    summed = FeatureDistance(Pyramid, ["one", "two"])({"image": real}, {"image": made})
    assert torch.allclose(summed, found * 3 * 16 * 16)
    cosine = F.cosine_similarity(net.image_features(made), net.image_features(real))
    vector = FeatureDistance(Pyramid, reduction="mean")({"image": real}, {"image": made})
    assert torch.allclose(vector, 2 - 2 * cosine, atol=1e-6)


@pytest.mark.parametrize(("build", "layers"), [(Pyramid, ["two"]), (Tower, [BLOCK]), (Tower, [])])
def test_its_gradient_reaches_the_image_and_nothing_is_trained_or_saved(build, layers):
    made, real = images()
    term = FeatureDistance(build, layers)
    made.requires_grad_()
    term({"image": real}, {"image": made}).sum().backward()
    assert made.grad.abs().sum() > 0 and made.grad.isfinite().all()
    assert not list(term.parameters()) and not term.state_dict()
    assert not term({"image": real}, {"image": real}).any()


def test_a_discriminator_on_features_trains_its_heads_alone():
    made, real = images()
    made.requires_grad_()
    term = Adversarial(FeatureDiscriminator(Pyramid, {"one": 4, "two": 6}, channels=8))
    assert term.discriminator(real).shape == (2, 7 * 7 + 3 * 3)
    term({"image": real}, {"image": made}).sum().backward()
    assert made.grad.abs().sum() > 0 and all(p.grad is None for p in term.parameters())
    term.own_loss({"image": real}, {"image": made}).sum().backward()
    assert {name.split(".")[1] for name, p in term.named_parameters() if p.grad is not None} == {"heads"}
    assert all(name.startswith("discriminator.heads.") for name in term.state_dict())


def test_what_an_extractor_lacks_is_said_in_one_line():
    with pytest.raises(ValueError, match=r"extractor: Linear has no image_features\(image\)"):
        FeatureDistance(partial(nn.Linear, 1, 1)).prepare()
    with pytest.raises(ValueError, match=r"Pyramid has no module 'three', expected such as one, two"):
        FeatureDistance(Pyramid, ["three"]).prepare()
    with pytest.raises(ValueError, match=r"discriminator.layers: one has 4 channels, got 5"):
        FeatureDiscriminator(Pyramid, {"one": 5})(images()[0])
