"""A small Stable Diffusion with random weights, in our pieces."""

import torch

from ldm.diffusion import prediction, schedule
from ldm.diffusion.samplers.ddim import DDIM
from ldm.interop.model import Latents, Network, Process, TextToImage
from ldm.interop.schedules import build, named, sampler
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.text import TextTower
from ldm.nets.unet import UNet
from ldm.types import DenoiserDims

UNET = {
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 2,
    "attention": [True, True, False],
    "num_heads": 2,
    "norm_groups": 4,
    "linear_projection": False,
    "transformers": True,
}
AUTOENCODER = {
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_groups": 4,
    "image_channels": 3,
    "attention": None,
}
TEXT = {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "context_length": 12,
    "mlp_ratio": 4.0,
    "quick_gelu": True,
    "pad_id": 49407,
}
CAPTIONS = [
    "a red ring",
    "",
    "two small circles and a very long caption that does not fit into twelve tokens",
]
PER_CHANNEL = Latents(torch.tensor([0.3, -1.2, 0.0, 2.5]), torch.tensor([0.7, 1.9, 3.3, 0.11]))
SCALED = named(schedule.ScaledLinear, num_steps=1000, beta_start=0.00085, beta_end=0.012)


def randomised(net, seed=0):
    """Every parameter random, norms included, so that no wrong name hides behind a 1 or a 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def tiny(unet=(), text=(), latents=PER_CHANNEL, kind=prediction.Velocity, made_of=SCALED, spatial=0):
    """Make a model; the arguments change that of the Stable Diffusion 1.x graph."""
    unet, text = UNET | dict(unet), TEXT | dict(text)
    torch.manual_seed(0)
    widths = DenoiserDims(AUTOENCODER["latent_channels"], tokens=text["width"], spatial=spatial)
    nets = {
        "unet": (unet, randomised(UNet(widths, **unet), 1)),
        "autoencoder": (AUTOENCODER, randomised(KLAutoencoder(**AUTOENCODER), 2)),
        "text": (text, randomised(TextTower(**text), 3)),
    }
    parts = {name: Network(arguments, net.state_dict()) for name, (arguments, net) in nets.items()}
    process = Process(made_of, named(kind), sampler(DDIM(50)))
    return TextToImage(**parts, latents=latents, process=process, image_size=16)


def same(found, expected):
    """Whether two models have equal arguments, statistics and weights, bit for bit."""
    for name in ("unet", "autoencoder", "text"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.arguments == theirs.arguments
        assert set(ours.weights) == set(theirs.weights)
        assert all(torch.equal(ours.weights[key], theirs.weights[key]) for key in ours.weights), name
    assert torch.equal(found.latents.mean, expected.latents.mean)
    assert torch.equal(found.latents.std, expected.latents.std)
    assert found.process.prediction == expected.process.prediction
    tables = [build(model.process.schedule).alpha for model in (found, expected)]
    assert torch.allclose(*tables, rtol=1e-12, atol=1e-15)
    assert found.process.schedule["class_path"] == expected.process.schedule["class_path"]
    assert found.image_size == expected.image_size
    return True


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
