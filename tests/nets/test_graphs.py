"""The networks are Stable Diffusion's: parameter counts, names, and numbers against diffusers."""

import pytest
import torch

from ldm.latents.space import Pixels
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.unet import UNet
from ldm.types import Cond, DenoiserDims

diffusers = pytest.importorskip("diffusers")


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_sd1_unet_has_exactly_the_published_parameters():
    with torch.device("meta"):
        assert count(UNet(DenoiserDims(sample=4, tokens=768))) == 859_520_964


def test_sd1_autoencoder_has_exactly_the_published_parameters():
    with torch.device("meta"):
        assert count(KLAutoencoder()) == 83_653_863


def assert_same_shapes(ours, theirs):
    shapes = lambda module: {k: tuple(v.shape) for k, v in module.state_dict().items()}  # noqa: E731
    assert shapes(ours) == shapes(theirs)


def test_sd1_names_and_shapes_are_those_of_diffusers():
    with torch.device("meta"):
        assert_same_shapes(
            UNet(DenoiserDims(sample=4, tokens=768)),
            diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        )
        assert_same_shapes(
            KLAutoencoder(),
            diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            ),
        )


def randomised(module):
    """Every parameter random, norms included, so that no wrong wiring hides behind a 1 or a 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


@pytest.mark.parametrize("linear", [False, True])
def test_unet_agrees_with_diffusers_in_float64(linear):
    ours = randomised(
        UNet(
            DenoiserDims(sample=4, tokens=24),
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            attention=(True, True, False),
            num_heads=(2, 4, 4),
            norm_groups=8,
            linear_projection=linear,
        )
    )
    theirs = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=8,
        cross_attention_dim=24,
        use_linear_projection=linear,
    ).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, tokens = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 24).double()
    t = torch.tensor([3, 977])
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    expected = theirs(x, t, tokens, encoder_attention_mask=mask).sample
    got = ours(x, t, Cond(tokens=tokens, mask=mask))
    assert (got - expected).norm() / expected.norm() < 1e-10


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_autoencoder_agrees_with_diffusers_in_float64(channels):
    ours = randomised(
        KLAutoencoder(3, block_out_channels=(8, 16, 16), norm_groups=4, image_channels=channels)
    )
    theirs = diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=3,
        norm_num_groups=4,
    ).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image, z = torch.rand(2, channels, 16, 24).double() * 2 - 1, torch.randn(2, 3, 4, 6).double()
    expected, posterior = theirs.encode(image).latent_dist, ours.encode(image)
    assert torch.allclose(posterior.mean, expected.mean, rtol=1e-10, atol=1e-12)
    assert torch.allclose(posterior.log_var, expected.logvar, rtol=1e-10, atol=1e-12)
    assert torch.allclose(ours.decode(z), theirs.decode(z).sample, rtol=1e-10, atol=1e-12)


def test_patches_are_channels_of_an_autoencoder_of_fewer_levels():
    options = {"latent_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_groups": 4}
    patched = randomised(KLAutoencoder(**options, patch_size=4))
    plain = KLAutoencoder(**options, image_channels=48).double()
    plain.load_state_dict(patched.state_dict(), strict=True)
    image, z = torch.rand(2, 3, 16, 24).double() * 2 - 1, torch.randn(2, 3, 2, 3).double()
    squares = image.reshape(2, 3, 4, 4, 6, 4).permute(0, 1, 3, 5, 2, 4).reshape(2, 48, 4, 6)
    assert patched.factor == 8
    assert torch.equal(patched.encode(image).mean, plain.encode(squares).mean)
    drawn = plain.decode(z).reshape(2, 3, 4, 4, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 24)
    assert torch.equal(patched.decode(z), drawn)
    with pytest.raises(ValueError, match=r"divisible by 8, got 20x24"):
        patched.encode(torch.zeros(1, 3, 20, 24))
    with pytest.raises(ValueError, match=r"net\.patch_size: got 0, expected at least 1"):
        KLAutoencoder(**options, patch_size=0)


def test_sizes_that_cannot_be_halved_are_refused_by_name():
    unet = UNet(DenoiserDims(sample=1), (8, 8, 8), 1, (False,) * 3, 1, 4)
    with pytest.raises(ValueError, match=r"divisible by 4, got 6x8.*size of images"):
        unet(torch.zeros(1, 1, 6, 8), torch.zeros(1), Cond())
    with pytest.raises(ValueError, match=r"divisible by 2, got 7x8"):
        KLAutoencoder(block_out_channels=(8, 8), norm_groups=4).encode(torch.zeros(1, 3, 7, 8))


def test_masked_tokens_do_not_matter():
    unet = randomised(UNet(DenoiserDims(sample=2, tokens=8), (8, 8), 1, (True, True), 2, 4))
    x, t, tokens = torch.randn(2, 2, 4, 4).double(), torch.tensor([1, 500]), torch.randn(2, 4, 8).double()
    mask = torch.tensor([[True, True, False, False]] * 2)
    changed = tokens.clone()
    changed[:, 2:] += 1.0
    same = unet(x, t, Cond(tokens=changed, mask=mask))
    assert torch.equal(unet(x, t, Cond(tokens=tokens, mask=mask)), same)
    assert not torch.allclose(unet(x, t, Cond(tokens=changed)), same)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_unet_of_ddpm_is_diffusers_unet2d(channels):
    arguments = {"attention": (False, True), "num_heads": 2, "norm_groups": 4, "transformers": False}
    ours = randomised(UNet(DenoiserDims(Pixels(channels).channels), (8, 16), 2, **arguments))
    theirs = diffusers.UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        freq_shift=0,
        downsample_padding=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        attention_head_dim=8,
        norm_num_groups=4,
        flip_sin_to_cos=True,
    ).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, t = torch.randn(2, channels, 8, 8).double(), torch.tensor([3, 977])
    got, expected = ours(x, t, Cond()), theirs(x, t).sample
    assert (got - expected).norm() / expected.norm() < 1e-10
    with pytest.raises(ValueError, match=r"denoiser\.transformers: got false with condition tokens"):
        UNet(DenoiserDims(sample=3, tokens=4), (8, 16), 2, **arguments)
