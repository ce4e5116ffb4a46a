"""Are the networks as fast as diffusers'? ``python -m benchmarks.speed [--size sd1 --device cuda]``.

The same weights in ours and in diffusers', the same input, in turn: forward and backward, and forward alone,
of U-Net and autoencoder. Ours lie in memory as ``ldm.fit`` lays them; diffusers' are timed in that layout
too, and the faster of the two counts. Needs diffusers (``pip install -e '.[test]'``).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ldm.interop.diffusers_configs import unet_config, vae_config
from ldm.interop.latents import of_factor
from ldm.interop.model import arguments
from ldm.nets.autoencoder import KLAutoencoder, downsampling
from ldm.nets.unet import UNet
from ldm.runs.recipe import merged
from ldm.types import Cond, DenoiserDims


@dataclass(frozen=True)
class Size:
    """What is timed.

    Args:
        diffusion: Configuration of a U-Net.
        autoencoder: Configuration of its autoencoder.
        tokens: Length and width of the condition.
    """

    diffusion: str
    autoencoder: str
    tokens: tuple[int, int]

    def arguments(self, name: str, network: str) -> dict[str, Any]:
        """Return all arguments of a network: those of the configuration, and else its own."""
        given = merged(name)["model"]["init_args"].get(network, {})
        given = {} if isinstance(given, str) else given.get("init_args", given)
        return arguments(UNet if network == "denoiser" else KLAutoencoder, given)

    def data(self, name: str) -> tuple[int, int]:
        """Return the samples of a batch, and the side of the images."""
        data = merged(name)["data"]
        return data["batch_size"], data.get("image_size") or merged(self.autoencoder)["data"]["image_size"]


SIZES = {
    "demo": Size("demo/diffusion", "demo/autoencoder", (20, 96)),
    "sd1": Size("diffusion/sd1", "autoencoder/kl-f8", (77, 512)),
}
Step = Callable[[nn.Module], Tensor]


def networks(size: Size) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Build ours and diffusers', with the same weights."""
    unet = size.arguments(size.diffusion, "denoiser")
    autoencoder = size.arguments(size.autoencoder, "net")
    channels, width = autoencoder["latent_channels"], size.tokens[1]
    ours: dict[str, nn.Module] = {
        "U-Net": UNet(DenoiserDims(sample=channels, tokens=width), **unet),
        "autoencoder": KLAutoencoder(**autoencoder),
    }
    theirs = {
        "U-Net": UNet2DConditionModel.from_config(unet_config(unet, channels, channels, width)),
        "autoencoder": AutoencoderKL.from_config(vae_config(autoencoder, of_factor(1.0, channels))),
    }
    for name, module in ours.items():
        theirs[name].load_state_dict(module.state_dict())
    return {name: (ours[name], theirs[name]) for name in ours}


def steps(size: Size, batch: int | None, device: torch.device) -> dict[str, tuple[Step, Step]]:
    """Return how each network is called: ours, diffusers'."""
    autoencoder = size.arguments(size.autoencoder, "net")
    (num, side), (num_images, image_side) = size.data(size.diffusion), size.data(size.autoencoder)
    latents = side // downsampling(autoencoder["block_out_channels"])
    x = torch.randn(batch or num, autoencoder["latent_channels"], latents, latents, device=device)
    t = torch.randint(0, 1000, (len(x),), device=device)
    tokens = torch.randn(len(x), *size.tokens, device=device)
    image = torch.rand(batch or num_images, 3, image_side, image_side, device=device) * 2 - 1

    def autoencode(net: Any) -> Tensor:
        found: Tensor = net.decode(net.encode(image).mean)
        return found

    def their_autoencode(net: Any) -> Tensor:
        found: Tensor = net.decode(net.encode(image).latent_dist.mean).sample
        return found

    return {
        "U-Net": (lambda net: net(x, t, Cond(tokens=tokens)), lambda net: net(x, t, tokens).sample),
        "autoencoder": (autoencode, their_autoencode),
    }


def seconds(net: nn.Module, step: Step, train: bool, precision: str, device: torch.device) -> float:
    """Time one call."""
    start = _now(device)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with torch.set_grad_enabled(train), torch.autocast(device.type, dtype, enabled=dtype is not None):
        loss = step(net).float().square().mean()
    if train:
        loss.backward()
        net.zero_grad(set_to_none=True)
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed", "16-mixed"], default="32-true")
    parser.add_argument("--batch", type=int, help="Samples of a step; default: the configuration's.")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    size, device = SIZES[options.size], torch.device(options.device)
    print(f"{options.size}, {options.precision}, {device}, {torch.get_num_threads()} threads; medians in ms")
    print("| what | ours | diffusers | diffusers, channels last | ours / the faster |\n|---|---|---|---|---|")
    calls = steps(size, options.batch, device)
    for name, (ours, theirs) in networks(size).items():
        last: dict[str, Any] = {"memory_format": torch.channels_last}
        ways = {
            "ours": (ours.to(device).to(**last), calls[name][0]),
            "theirs": (theirs.to(device), calls[name][1]),
            "theirs, last": (copy.deepcopy(theirs).to(**last), calls[name][1]),
        }
        for train, what in ((True, "forward and backward"), (False, "forward")):
            found: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(options.rounds + 2):
                for way, (net, step) in ways.items():
                    found[way].append(seconds(net, step, train, options.precision, device))
            ms = {way: 1000 * statistics.median(times[2:]) for way, times in found.items()}
            ratio = ms["ours"] / min(ms["theirs"], ms["theirs, last"])
            cells = " | ".join(f"{ms[way]:.1f}" for way in ways)
            print(f"| {name}, {what} | {cells} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
