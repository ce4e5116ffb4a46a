"""The discriminator is the published graph; the spectral norm is the largest singular value."""

import pytest
import torch
from torch import nn

from ldm.nets.discriminator import PatchGAN, SpectralConv2d


def published(norm, n_layers=3, ndf=8):
    """PatchGAN of Isola et al. 2017, sec. 6.1.2, written out: C64-C128-C256-C512 and the map of logits."""

    def block(i, o, stride):
        return [nn.Conv2d(i, o, 4, stride, 1, bias=norm is nn.Identity), norm(o), nn.LeakyReLU(0.2)]

    layers = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
    width = ndf
    for n in range(1, n_layers + 1):
        wider = ndf * min(2**n, 8)
        layers += block(width, wider, 2 if n < n_layers else 1)
        width = wider
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))


@pytest.mark.parametrize("n_layers", [1, 3, 5])
@pytest.mark.parametrize("norm", ["group", "none"])
def test_it_is_the_published_graph_with_the_same_weights(norm, n_layers):
    torch.manual_seed(0)
    kind = nn.Identity if norm == "none" else lambda width: nn.GroupNorm(4, width)
    plain = published(kind, n_layers)
    ours = PatchGAN(8, n_layers, norm, norm_groups=4)
    ours.main.load_state_dict(plain.state_dict())
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    assert torch.allclose(ours(image), plain(image), atol=1e-6)


def test_without_layers_it_judges_pixels():
    torch.manual_seed(0)
    ours = PatchGAN(8, 0, norm_groups=4)
    assert all(m.kernel_size == (1, 1) for m in ours.modules() if isinstance(m, nn.Conv2d))
    assert [m.out_channels for m in ours.modules() if isinstance(m, nn.Conv2d)] == [8, 16, 1]
    image = torch.rand(1, 3, 5, 7)
    assert ours(image).shape == (1, 1, 5, 7)


def test_three_layers_see_70_pixels():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 256, 256, requires_grad=True)
    PatchGAN(8, 3, "none")(image)[0, 0, 15, 15].backward()
    seen = image.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_logits_of_an_image_do_not_depend_on_the_others():
    torch.manual_seed(0)
    image = torch.rand(4, 3, 32, 32)
    for norm in ("group", "spectral", "none"):
        ours = PatchGAN(8, 2, norm, norm_groups=4).train()
        assert torch.allclose(ours(image)[:1], ours(image[:1]), atol=1e-6)


def test_the_spectral_norm_is_1_once_the_iterations_have_found_it():
    torch.manual_seed(0)
    layer = SpectralConv2d(3, 5, 4, 2, 1).train()
    image = torch.rand(1, 3, 8, 8)
    first = layer(image)
    assert torch.equal(layer(image), first)  # within a step nothing moves
    for _ in range(200):
        layer(image)
        layer.on_step()
    sigma = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    expected = nn.functional.conv2d(image, layer.weight / sigma, layer.bias, 2, 1)
    assert torch.allclose(layer(image), expected, atol=1e-5)


def test_too_many_layers_for_the_image_are_refused_with_the_number_that_fits():
    for size in (12, 24, 32, 64, 96):
        for num_layers in range(1, 7):
            net = PatchGAN(4, num_layers, "none")
            try:
                net.validate_size(size)
            except ValueError as error:
                fits = int(str(error).rsplit(" ", 1)[1])
                assert (
                    fits < num_layers
                    and min(PatchGAN(4, fits, "none").main(torch.rand(1, 3, size, size)).shape) > 0
                )
                with pytest.raises(RuntimeError):
                    net.main(torch.rand(1, 3, size, size))
            else:
                net.main(torch.rand(1, 3, size, size))
