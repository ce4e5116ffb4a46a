"""What a discriminator costs a training step: ``python -m benchmarks.adversarial``.

Steps of the same networks in turn: errors and LPIPS alone; with a discriminator and the adaptive weight, as
``Autoencoder`` computes them; and the alternating scheme of taming-transformers and latent-diffusion, written
out: a pass of the autoencoder for each player, the loss with LPIPS in both, and the adaptive weight by two
more passes through the losses. LPIPS has random weights: only its cost matters.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.losses import L1, LPIPS, Adversarial, LossTerm
from ldm.losses.adversarial import Hinge
from ldm.losses.kl import kl_to_standard_normal
from ldm.nets.autoencoder import DiagonalGaussian, KLAutoencoder
from ldm.nets.discriminator import PatchGAN
from ldm.nets.lpips import trunk
from ldm.rng import SampleNoise
from ldm.stages.autoencoder import Autoencoder

SIZES = {"demo": ((16, 32, 64), 1, 8), "small": ((32, 64, 128), 1, 16), "sd": ((128, 256, 512, 512), 2, 32)}
"""Widths of the autoencoder's levels, blocks of each, groups of the norms."""
Step = Callable[[], None]


def build(size: str, channels: int, terms: list[LossTerm]) -> tuple[Autoencoder, PatchGAN]:
    """Build the stage, and a discriminator of its own."""
    widths, layers, groups = SIZES[size]
    torch.manual_seed(0)
    discriminator = PatchGAN(channels, norm_groups=min(32, channels))
    stage = Autoencoder(KLAutoencoder(4, widths, layers, groups), 1e-6, None, terms, L1())
    return stage.train().to(memory_format=torch.channels_last), discriminator


def ours(stage: Autoencoder, image: Tensor) -> Step:
    """One step as ``ldm.fit`` takes it, with one optimizer for both players."""
    keys = [str(i) for i in range(len(image))]
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        stage.losses({"key": keys, "image": image}, SampleNoise(0, keys))["loss"].backward()
        optimizer.step()

    return step


def alternating(
    stage: Autoencoder, discriminator: nn.Module, perceptual: LossTerm, image: Tensor, lean: bool
) -> Step:
    """Two passes, one for each player, as published; or the second without losses and their gradients."""
    net, game, last = stage.net, Hinge(), stage.net.last_layer.weight
    players = [torch.optim.AdamW(m.parameters(), lr=1e-5) for m in (net, discriminator)]
    keys = [str(i) for i in range(len(image))]

    def reconstruct() -> tuple[Tensor, DiagonalGaussian]:
        posterior = net.encode(image)
        return net.decode(posterior.sample(SampleNoise(0, keys).like(posterior.mean))), posterior

    def losses() -> tuple[Tensor, Tensor, Tensor]:
        output, posterior = reconstruct()
        error = L1()({"image": image}, {"image": output}) + perceptual({"image": image}, {"image": output})
        return output, error.mean(), kl_to_standard_normal(posterior.mean, posterior.log_var).mean()

    def step() -> None:
        output, error, kl = losses()
        generator = game.generator(discriminator(output)).mean()
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (error, generator)]
        adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()
        players[0].zero_grad()
        (error + 1e-6 * kl + 0.5 * adaptive * generator).backward()
        players[0].step()
        with torch.set_grad_enabled(not lean):
            output = reconstruct()[0] if lean else losses()[0]
        players[1].zero_grad()
        game.discriminator(discriminator(image), discriminator(output.detach())).mean().backward()
        players[1].step()

    return step


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Take the steps in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--channels", type=int, default=64, help="Channels of the discriminator's first layer."
    )
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    image = torch.rand(options.batch, 3, options.image_size, options.image_size) * 2 - 1
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "vgg.pth")
        torch.save({f"features.{k}": v for k, v in trunk("vgg").state_dict().items()}, weights)

        def perceptual() -> LPIPS:
            term = LPIPS(weights)
            term.prepare()
            return term

        plain, judge = build(options.size, options.channels, [perceptual()])
        game, _ = build(options.size, options.channels, [perceptual(), Adversarial(judge)])
        steps = {
            "without discriminator": ours(plain, image),
            "both players in one step": ours(game, image),
        }
        for name, lean in (("alternating passes", False), ("alternating, the second without losses", True)):
            other, theirs = build(options.size, options.channels, [])
            steps[name] = alternating(other, theirs, perceptual(), image, lean)
        seconds = measure(steps, options.rounds)
    report(seconds)


def report(seconds: dict[str, list[float]]) -> None:
    """Print medians of the steps, and of their ratios within a round."""
    one, both, two, lean = seconds.values()
    print("| step | ms | ratio |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(value / base for value, base in zip(values, one, strict=True))
        print(f"| {name} | {statistics.median(values) * 1e3:.0f} | {ratio:.2f} |")
    for name, others in (("alternating passes", two), ("alternating, the second without losses", lean)):
        ratio = statistics.median(a / b for a, b in zip(both, others, strict=True))
        print(f"| both players in one step / {name} | | {ratio:.2f} |")


if __name__ == "__main__":
    main()
