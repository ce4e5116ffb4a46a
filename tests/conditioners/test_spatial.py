"""Conditions that are maps: what they show of an image, and that the latent space stays the stage's."""

import pytest
import torch
import torch.nn.functional as F

from ldm.conditioners.inpainting import Inpainting
from ldm.conditioners.semantic import SemanticMap, class_fractions
from ldm.conditioners.super_resolution import SuperResolution
from ldm.latents.space import LatentSpace, Pixels
from ldm.nets.unet import UNet
from ldm.rng import SampleNoise
from ldm.stages.diffusion import Diffusion


class Halved(LatentSpace):
    """Means of 2x2 pixels as a latent of 3 channels, with a weight of its own."""

    channels, factor = 3, 2

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def encode(self, batch, noise):
        return F.avg_pool2d(batch["image"], 2) * self.weight + noise

    def decode(self, latent):
        return F.interpolate(latent, scale_factor=2).clamp(-1, 1)


def batch(n=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return {
        "key": [f"k{i}" for i in range(n)],
        "image": torch.rand(n, 3, size, size, generator=generator) * 2 - 1,
        "mask": (torch.rand(n, 1, size, size, generator=generator) > 0.5).float(),
        "low_res": torch.rand(n, 3, size // 4, size // 4, generator=generator) * 2 - 1,
        "label_map": torch.randint(0, 5, (n, size, size), generator=generator),
    }


def bound(conditioner, latents=None):
    conditioner.bind(latents or Halved())
    return conditioner


def stage(conditioner, latents=None):
    def unet(widths):
        return UNet(widths, [8, 8], layers_per_block=1, attention=[False, False], norm_groups=4)

    torch.manual_seed(0)
    return Diffusion(latents or Halved(), conditioner, unet)


SPATIAL = [Inpainting, SuperResolution, lambda dropout: SemanticMap(5, 2, dropout)]


def test_inpainting_shows_the_known_pixels_only():
    data = batch()
    seen = bound(Inpainting())(data).spatial
    other = {**data, "image": torch.where(data["mask"] > 0, torch.rand_like(data["image"]), data["image"])}
    assert torch.equal(seen, bound(Inpainting())(other).spatial)
    known = bound(Inpainting())({**data, "mask": torch.zeros_like(data["mask"])}).spatial
    assert torch.equal(known[:, 1:], F.avg_pool2d(data["image"], 2)) and not known[:, 0].any()


def test_inpainting_channels_are_those_of_stable_diffusion():
    """The mask as diffusers' prepare_mask_latents makes it, then the masked image's latent."""
    data = batch()
    seen = bound(Inpainting())(data).spatial
    assert torch.equal(seen[:, :1], F.interpolate(data["mask"], size=(4, 4)))
    assert torch.equal(seen[:, 1:], F.avg_pool2d(data["image"] * (data["mask"] < 0.5), 2))
    assert stage(Inpainting()).denoiser.conv_in.in_channels == 3 + 1 + 3


def test_inpainting_in_pixels_keeps_mask_and_image_as_they_are():
    data = batch()
    seen = bound(Inpainting(), Pixels())(data).spatial
    assert torch.equal(seen, torch.cat([data["mask"], data["image"] * (1 - data["mask"])], 1))


def test_nothing_known_is_a_mask_of_ones():
    data = batch()
    everything = {**data, "mask": torch.ones_like(data["mask"])}
    conditioner = bound(Inpainting())
    assert torch.equal(conditioner.null(data).spatial, conditioner(everything).spatial)


def test_a_low_resolution_image_of_the_latents_size_is_the_condition_itself():
    data = batch()
    low = F.avg_pool2d(data["image"], 2)
    assert torch.allclose(bound(SuperResolution(2))({**data, "low_res": low}).spatial, low, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_resizing_keeps_constants_and_the_range(scale):
    conditioner = bound(SuperResolution(scale))
    plain = torch.tensor([-1.0, 0.25, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    resized = conditioner({"key": ["a"], "low_res": plain}).spatial
    assert resized.shape[2:] == (2 * scale, 2 * scale)
    assert torch.allclose(resized, plain[:, :, :1, :1].expand_as(resized), atol=1e-6)
    edges = conditioner({"key": ["a"], "low_res": torch.sign(torch.randn(1, 3, 4, 4))}).spatial
    assert edges.abs().max() <= 1.0


def test_copies_of_the_wrong_scale_are_named_before_the_device():
    with pytest.raises(ValueError, match=r"size 8 have low-resolution copies of size 2, expected 4 at"):
        SuperResolution(2).check_values(batch())
    SuperResolution(4).check_values(batch())


def test_class_fractions_are_the_averaged_one_hot_map():
    label_map = batch()["label_map"]
    one_hot = F.one_hot(label_map, 5).permute(0, 3, 1, 2).float()
    assert torch.equal(class_fractions(label_map, (4, 4), 5), F.adaptive_avg_pool2d(one_hot, 4))
    assert torch.equal(class_fractions(label_map, (8, 8), 5), one_hot)
    assert torch.equal(class_fractions(label_map, (2, 2), 5).sum(1), torch.ones(3, 2, 2))


def test_a_plain_map_is_plain_at_any_size():
    conditioner = bound(SemanticMap(5, 2))
    data = {"key": ["a"], "label_map": torch.full((1, 8, 8), 3)}
    expected = conditioner.mix.weight[:, 3].view(1, 2, 1, 1).expand(1, 2, 4, 4)
    assert torch.allclose(conditioner(data).spatial, expected)
    assert torch.equal(conditioner.null(data).spatial, torch.zeros(1, 2, 4, 4))


def test_a_class_that_the_model_lacks_is_named():
    data = batch()
    data["label_map"][1, 0, 0] = 5
    with pytest.raises(ValueError, match=r"sample 'k1': class 5 of its map .* expected 0 to 4"):
        stage(SemanticMap(5, 2)).validate_batch(data)


@pytest.mark.parametrize("make", SPATIAL)
def test_dropout_replaces_all_of_a_sample_by_the_null_condition(make):
    data = batch(16)
    conditioner = bound(make(dropout=0.5))
    lost = SampleNoise(0, data["key"]).uniform() < 0.5
    spatial = conditioner.dropped(data, SampleNoise(0, data["key"])).spatial
    assert 0 < lost.sum() < 16
    assert torch.equal(spatial[lost], conditioner.null(data).spatial[lost])
    assert torch.equal(spatial[~lost], conditioner(data).spatial[~lost])
    assert not torch.equal(conditioner.null(data).spatial, conditioner(data).spatial)


@pytest.mark.parametrize("make", SPATIAL)
def test_the_latent_space_is_the_stages_alone(make):
    model = stage(make(dropout=0.0))
    assert not [name for name in model.conditioner.state_dict() if "latents" in name]
    assert [name for name in model.state_dict() if "latents" in name] == ["latents.weight"]
    assert model.conditioner.latents is model.latents
    model.to(torch.float64)
    assert model.conditioner.latents.weight.dtype == torch.float64


@pytest.mark.parametrize("make", SPATIAL)
def test_the_stage_trains_on_it_and_draws_with_it(make):
    model, data = stage(make(dropout=0.5)), batch()
    model.losses(data, SampleNoise(0, data["key"]))["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.conditioner.parameters())
    model.eval().sampler.num_steps = 2
    drawn = model.generate(data, 0)
    changed = {k: v.flip(0) if isinstance(v, torch.Tensor) else v for k, v in data.items()}
    assert drawn.shape == (3, 3, 8, 8)
    assert not torch.allclose(drawn, model.generate(changed, 0), atol=1e-3)


@pytest.mark.parametrize("make", SPATIAL)
def test_a_missing_field_is_named(make):
    with pytest.raises(ValueError, match=r"the batch has no .*: add it to data\.fields"):
        bound(make(dropout=0.0))({"key": ["a"]})
