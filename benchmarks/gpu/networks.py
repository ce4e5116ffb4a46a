"""Networks of the benchmark, built on the device, and how each is called in a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.interop.diffusers_configs import unet_config, vae_config
from ldm.interop.latents import of_factor
from ldm.interop.model import arguments
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.clip import CLIPModel
from ldm.nets.unet import UNet
from ldm.types import Cond, DenoiserDims

Call = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Size:
    """Sizes of what is timed.

    Args:
        unet: Arguments of the U-Net, and of its tokens (L, D), the latent's side and the batch.
        tokens: Length and width of the condition.
        latent: Side of the latent.
        autoencoder: Arguments of the autoencoder.
        image: Side of the image.
        clip: Arguments of the CLIP.
        batches: Samples of a step of U-Net, autoencoder, CLIP.
    """

    unet: dict[str, Any]
    tokens: tuple[int, int]
    latent: int
    autoencoder: dict[str, Any]
    image: int
    clip: dict[str, Any]
    batches: tuple[int, int, int]


_SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_groups": 4}
SIZES = {
    "sd1": Size(
        {},
        (77, 768),
        32,
        {},
        256,
        {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12, "head_width": 64},
            "text_cfg": {"context_length": 77, "width": 512, "heads": 8, "layers": 12},
        },
        (64, 12, 512),
    ),
    "tiny": Size(
        {**_SMALL, "attention": [False, True], "num_heads": 2},
        (5, 16),
        8,
        _SMALL,
        16,
        {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
            "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
        },
        (2, 2, 4),
    ),
}


def build(name: str, ours: bool, size: Size, device: torch.device) -> nn.Module:
    """Build a network with random weights, ours or that of diffusers or open_clip, of the same shapes."""
    with device:
        torch.manual_seed(0)
        if name == "clip":
            net: nn.Module = CLIPModel(**size.clip)
        elif ours:
            dims = DenoiserDims(sample=4, tokens=size.tokens[1])
            net = UNet(dims, **size.unet) if name == "unet" else KLAutoencoder(**size.autoencoder)
        else:
            net = _theirs(name, size)
    return net.to(device).to(memory_format=torch.channels_last)


def _theirs(name: str, size: Size) -> nn.Module:
    import diffusers  # here: parts without it run where it is not

    if name == "unet":
        given = arguments(UNet, size.unet)
        net: nn.Module = diffusers.UNet2DConditionModel.from_config(unet_config(given, 4, 4, size.tokens[1]))
    else:
        net = diffusers.AutoencoderKL.from_config(
            vae_config(arguments(KLAutoencoder, size.autoencoder), of_factor(1.0, 4))
        )
    return net


def call(name: str, ours: bool, size: Size, batch: int, device: torch.device) -> Call:
    """Return a function from a network to a loss, on random inputs."""
    if name == "unet":
        x = torch.randn(batch, 4, size.latent, size.latent, device=device)
        t, tokens = (
            torch.randint(0, 1000, (batch,), device=device),
            torch.randn(batch, *size.tokens, device=device),
        )
        if ours:
            return lambda net: net(x, t, Cond(tokens=tokens)).float().square().mean()
        return lambda net: net(x, t, tokens).sample.float().square().mean()
    image = torch.rand(batch, 3, size.image, size.image, device=device) * 2 - 1
    if name == "autoencoder":
        if ours:
            return lambda net: net.decode(net.encode(image).mean).float().square().mean()
        return lambda net: net.decode(net.encode(image).latent_dist.mean).sample.float().square().mean()
    side = size.clip["vision_cfg"]["image_size"]
    image = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    ids = torch.randint(1, 49000, (batch, size.clip["text_cfg"]["context_length"]), device=device)

    def contrast(net: Any) -> Tensor:
        model = net.model
        features = (model.encode_image(image), model.encode_text(ids))
        one, other = (F.normalize(each.float(), dim=-1) for each in features)
        logits = model.logit_scale.exp() * one @ other.T
        labels = torch.arange(batch, device=device)
        return (
            nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)
        ) / 2

    return contrast
