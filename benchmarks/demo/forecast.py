"""Forecast of the demo's time on this machine: a few steps of each stage, timed before it starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm import ROOMS, import_exports
from ldm.callbacks.progress import clock
from ldm.hardware import DTYPES, choose_precision, device_of
from ldm.nets.autoencoder import downsampling
from ldm.nets.unet import UNet
from ldm.optim.recipes import Optimization
from ldm.rng import SampleNoise
from ldm.runs.recipe import merged
from ldm.stages.load import build_stage
from ldm.types import Cond, DenoiserDims

STAGES = ("autoencoder", "clip", "diffusion")
ENCODING, DRAWING = 250, 190
"""Encoding 20,000 images and drawing 700, in training steps of the autoencoder and of the U-Net."""
STARTS = 6
"""Starts of stages, validations, packing and measuring in all of the demo, in starts of a process."""
STEPS = 5
CAPTION = "a large yellow ring above a small pink square on a white background"


def forecast(cores: int) -> dict[str, float]:
    """Estimate the seconds that each stage will take, and all of the demo.

    Args:
        cores: Cores that it may use; autoencoder and CLIP train at the same time, on half of them each.
    """
    import_exports(ROOMS)  # a stage does so too
    start = time.process_time()  # of this process, which imported what theirs do
    autoencoder, clip, diffusion = configs = [merged(f"demo/{name}") for name in STAGES]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, cores // 2))
        steps = [_stage_step(autoencoder), _stage_step(clip)]
        torch.set_num_threads(cores)
        steps.append(_diffusion_step(autoencoder, clip, diffusion))
    finally:
        torch.set_num_threads(threads)
    seconds = [step * config["trainer"]["max_steps"] for step, config in zip(steps, configs, strict=True)]
    first = max(seconds[:2]) if cores > 1 else sum(seconds[:2])
    rest = ENCODING * steps[0] + DRAWING * steps[2] + STARTS * start
    return {**dict(zip(STAGES, seconds, strict=True)), "total": first + seconds[2] + rest}


def announcement(seconds: dict[str, float]) -> str:
    """Say what ``forecast`` found, in one line."""
    stages = ", ".join(f"{name} {clock(seconds[name])}" for name in STAGES)
    return (
        f"this machine needs about {clock(seconds['total'])} from nothing, in {choose_precision(_device())}: "
        f"{stages}, and the rest; autoencoder and clip train at the same time"
    )


def _device() -> torch.device:
    return device_of("auto")


def _stage_step(config: dict[str, Any]) -> float:
    """Time a training step of a stage that is built on no other."""
    stage = build_stage(config["model"]).to(_device())
    stage.configure_model()
    num, side = config["data"]["batch_size"], config["data"]["image_size"]
    keys = [str(i) for i in range(num)]
    batch: Any = {
        "key": keys,
        "image": torch.rand(num, 3, side, side, device=_device()) * 2 - 1,
        "text": keys,
    }
    noise = SampleNoise(0, keys)
    return _seconds(lambda: stage.losses(batch, noise)["loss"], stage, stage.optimizer)


def _diffusion_step(autoencoder: dict[str, Any], clip: dict[str, Any], diffusion: dict[str, Any]) -> float:
    """Time a training step of the U-Net, with the text tower of its condition."""
    net = autoencoder["model"]["init_args"]["net"]
    text = clip["model"]["init_args"]["net"]["text_cfg"]
    widths = DenoiserDims(sample=net["latent_channels"], tokens=text["width"])
    unet = UNet(widths, **diffusion["model"]["init_args"]["denoiser"]["init_args"]).to(_device())
    unet.to(memory_format=torch.channels_last)
    num, side = diffusion["data"]["batch_size"], autoencoder["data"]["image_size"]
    side //= downsampling(net["block_out_channels"])
    x = torch.randn(num, net["latent_channels"], side, side, device=_device())
    t = torch.arange(num, device=_device())
    towers = build_stage(clip["model"]).to(_device())
    tower = towers.net.text_tower()  # type: ignore[union-attr, operator]

    def loss() -> Tensor:
        with torch.no_grad():
            cond = Cond(tower.encode([CAPTION] * num))
        return unet(x, t, cond).float().square().mean()

    return _seconds(loss, unet, towers.optimizer)  # the same as theirs, but for the rate


def _seconds(loss: Callable[[], Tensor], module: nn.Module, recipe: Optimization) -> float:
    """Time training steps, with the weights' average: the median of ``STEPS`` after one that warms up."""
    dtype = DTYPES[choose_precision(_device())]
    optimizer, times = recipe.build(module, dtype), []
    weights = [p.detach() for p in module.parameters()]
    averages = [p.clone() for p in weights]
    for _ in range(1 + STEPS):
        begun = time.perf_counter()
        with torch.autocast(_device().type, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, weights, 0.01)
        float(averages[0].flatten()[0])  # a GPU is done when the number is here
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])
