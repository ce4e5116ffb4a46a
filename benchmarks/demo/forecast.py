"""How long the demo will take on this machine: a few steps of each stage, timed before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ldm.callbacks.progress import clock
from ldm.diffusion.noise import SampleNoise
from ldm.hardware import DTYPES, choose_precision
from ldm.nets.autoencoder import downsampling
from ldm.nets.unet import UNet
from ldm.stages.load import build_stage
from ldm.stages.optimization import Optimization
from ldm.types import Cond, Widths

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "demo"
ENCODING, DRAWING = 250, 190
"""Encoding 20,000 pictures and drawing 700, in training steps of the autoencoder and of the U-Net."""
STARTS = 6
"""Starting a stage, its validations, packing and measuring, in starts of a process: for the whole demo."""
STEPS = 3


def forecast(cores: int) -> dict[str, float]:
    """Estimate the seconds that each stage will take, and all of the demo.

    Args:
        cores: Cores that it may use; autoencoder and CLIP train at the same time, on half of them each.
    """
    start = time.process_time()  # of this process, which imported what theirs do
    autoencoder, clip, diffusion = (_config(name) for name in ("autoencoder", "clip", "diffusion"))
    precision = choose_precision(torch.device("cpu"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, cores // 2))
        both = {"autoencoder": _stage_step(autoencoder, precision), "clip": _stage_step(clip, precision)}
        torch.set_num_threads(cores)
        unet = _unet_step(autoencoder, clip, diffusion, precision)
    finally:
        torch.set_num_threads(threads)
    seconds = {
        "autoencoder": both["autoencoder"] * autoencoder["trainer"]["max_steps"],
        "clip": both["clip"] * clip["trainer"]["max_steps"],
        "diffusion": unet * diffusion["trainer"]["max_steps"],
    }
    rest = ENCODING * both["autoencoder"] + DRAWING * unet + STARTS * start
    total = max(seconds["autoencoder"], seconds["clip"]) + seconds["diffusion"] + rest
    return {**seconds, "total": total}


def announcement(seconds: dict[str, float]) -> str:
    """Say what ``forecast`` found, in one line."""
    stages = ", ".join(f"{name} {clock(seconds[name])}" for name in ("autoencoder", "clip", "diffusion"))
    precision = choose_precision(torch.device("cpu"))
    return (
        f"this machine needs about {clock(seconds['total'])} from nothing, in {precision}: {stages}, and the "
        "rest; autoencoder and clip train at the same time"
    )


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return config


def _stage_step(config: dict[str, Any], precision: str) -> float:
    """Time a training step of a stage that is built on no other."""
    stage, side, num = (
        build_stage(config["model"]),
        config["data"]["image_size"],
        config["data"]["batch_size"],
    )
    stage.configure_model()
    keys = [str(i) for i in range(num)]
    batch: Any = {"key": keys, "image": torch.rand(num, 3, side, side) * 2 - 1, "text": keys}
    noise = SampleNoise(0, keys)
    return _seconds(lambda: stage.losses(batch, noise)["loss"], stage, stage.optimizer, precision)


def _unet_step(
    autoencoder: dict[str, Any], clip: dict[str, Any], diffusion: dict[str, Any], precision: str
) -> float:
    """Time a training step of the U-Net, without the tokens' tower, whose share is small."""
    net = autoencoder["model"]["init_args"]["net"]["init_args"]
    text = clip["model"]["init_args"]["net"]["init_args"]["text_cfg"]
    widths = Widths(sample=net["latent_channels"], tokens=text["width"])
    unet = UNet(widths, **diffusion["model"]["init_args"]["denoiser"]["init_args"])
    unet.to(memory_format=torch.channels_last)
    num, side = diffusion["data"]["batch_size"], diffusion["data"]["image_size"]
    side //= downsampling(net["block_out_channels"])
    x, t = torch.randn(num, net["latent_channels"], side, side), torch.arange(num)
    cond = Cond(torch.randn(num, text["context_length"], text["width"]))
    recipe = build_stage(clip["model"]).optimizer  # the same as theirs, but for the rate
    return _seconds(lambda: unet(x, t, cond).float().square().mean(), unet, recipe, precision)


def _seconds(loss: Callable[[], Tensor], module: nn.Module, recipe: Optimization, precision: str) -> float:
    """Time training steps: the quickest of ``STEPS`` after one that warms up."""
    dtype = DTYPES[precision]
    setattr(module, "matrix_dtype", dtype)  # noqa: B010  (a module takes no other way to be typed)
    optimizer, times = recipe.build(module), []
    for _ in range(1 + STEPS):
        begun = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    return min(times[1:])
