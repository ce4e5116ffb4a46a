"""Does an exported run draw the same elsewhere? ``python -m benchmarks.export --diffusion RUN``.

Exports a run to diffusers, draws the same captions from the same noise by both, and compares pixels, networks
and seconds. Needs diffusers and transformers (``pip install -e '.[test]'``).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ldm.conditioners.text import CLIPText
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.samplers.ddim import DDIM
from ldm.interop.diffusers import export_pipeline
from ldm.latents.space import AutoencoderLatents
from ldm.rng import SampleNoise
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage
from ldm.types import Cond

CAPTIONS = (
    "a small red square in the center on a grey background",
    "a large yellow ring above a small pink square on a white background",
    "a small purple diamond in the top right on a black background",
    "a large blue circle in the bottom left on a white background",
    "a small green triangle left of a large orange cross on a grey background",
    "a large red ring in the center",
    "two small circles",
    "",
)


@dataclass(frozen=True)
class GeneratedImages:
    """Images and what they cost.

    Args:
        images: (B, 3, H, W) in [0, 1].
        seconds: Wall time of drawing, the median of several.
    """

    images: Tensor
    seconds: float


def noise(stage: Diffusion, keys: list[str], seed: int) -> Tensor:
    """Return the noise (B, C, h, w) that ``stage.generate`` begins with."""
    assert stage.image_size is not None
    shape = stage.latents.shape(stage.image_size, stage.image_size)
    return SampleNoise(seed, keys).like(torch.empty(len(keys), *shape))


def draw_ours(
    stage: Diffusion, captions: list[str], num_steps: int, scale: float, seed: int
) -> GeneratedImages:
    """Draw by the stage: DDIM, classifier-free guidance."""
    stage.sampler, stage.guidance = DDIM(num_steps), ClassifierFree(scale)
    start = time.perf_counter()
    images = stage.generate({"key": captions, "text": captions}, seed)
    return GeneratedImages((images + 1) / 2, time.perf_counter() - start)


def draw_theirs(
    pipeline: Any, captions: list[str], num_steps: int, scale: float, x: Tensor
) -> GeneratedImages:
    """Draw by diffusers' pipeline from the noise ``x``."""
    start = time.perf_counter()
    images = pipeline(
        captions, num_inference_steps=num_steps, guidance_scale=scale, latents=x, output_type="pt"
    ).images
    return GeneratedImages(images.float(), time.perf_counter() - start)


@torch.no_grad()
def errors(stage: Diffusion, pipeline: Any, captions: list[str], x: Tensor) -> dict[str, float]:
    """Return relative differences ||ours - theirs|| / ||theirs|| of each network on the same input."""
    conditioner, latents = stage.conditioner, stage.latents
    assert isinstance(conditioner, CLIPText) and isinstance(latents, AutoencoderLatents)
    t = torch.linspace(0, stage.objective.schedule.num_steps - 1, len(x)).long()
    ids = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    tokens = conditioner.tower.encode(captions)
    image = latents.decode(x)
    z = latents.encode({"image": image}, torch.zeros_like(x))
    posterior = pipeline.vae.encode(image).latent_dist
    factor = pipeline.vae.config.scaling_factor
    pairs = {
        "U-Net": (stage.denoiser(x, t, Cond(tokens)), pipeline.unet(x, t, tokens).sample),
        "text tower": (tokens, pipeline.text_encoder(ids).last_hidden_state),
        "encoder": (z, posterior.mean * factor),
        "decoder": (image, pipeline.vae.decode(x / factor).sample.clamp(-1, 1)),
    }
    return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--diffusion", default="runs/demo/diffusion", help="Run folder of a diffusion stage.")
    parser.add_argument("--steps", type=int, default=25, help="Steps of DDIM.")
    parser.add_argument("--guidance", type=float, default=3.0, help="Scale of classifier-free guidance.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    parser.add_argument("--rounds", type=int, default=5, help="Times each draws, in turn.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stage, captions = load_stage(options.diffusion, Diffusion), list(CAPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        export_pipeline(options.diffusion, Path(folder) / "pipeline")
        pipeline = DiffusionPipeline.from_pretrained(Path(folder) / "pipeline", local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        x = noise(stage, captions, options.seed)
        drawn = [
            (
                draw_ours(stage, captions, options.steps, options.guidance, options.seed),
                draw_theirs(pipeline, captions, options.steps, options.guidance, x),
            )
            for _ in range(options.rounds)
        ]
        ours, theirs = (
            GeneratedImages(each[0].images, median(one.seconds for one in each))
            for each in zip(*drawn, strict=True)
        )
        relative = errors(stage, pipeline, captions, x)
    furthest = 255 * (ours.images - theirs.images).abs().max().item()
    print(f"{len(captions)} images, DDIM {options.steps} steps, guidance {options.guidance}, one thread")
    print("| largest difference of a pixel | seconds, ours | seconds, diffusers |", end="")
    print(f" {' | '.join(relative)} |\n|{'---|' * (3 + len(relative))}")
    figures = " | ".join(f"{value:.1e}" for value in relative.values())
    print(f"| {furthest:.1e} of 255 | {ours.seconds:.2f} | {theirs.seconds:.2f} | {figures} |")


if __name__ == "__main__":
    main()
