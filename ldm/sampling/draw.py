"""Draw images for requests, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.compiler import InferenceCompiler
from ldm.data.fields import converted
from ldm.hardware import Inference, inference
from ldm.io.images import check_finite, to_levels
from ldm.sampling.requests import SampleRequest, as_batch
from ldm.types import RGB8, Batch

if TYPE_CHECKING:
    from ldm.stages.diffusion import Diffusion


@dataclass(frozen=True)
class Redraw:
    """An image to start from instead of noise (SDEdit).

    Args:
        image: (C, H, W) in [-1, 1].
        strength: Fraction of the trajectory from noise to image that is repeated, in (0, 1].
        mask: (1, H, W), 1 where to paint, 0 where the image is kept; None paints everywhere.
    """

    image: Tensor
    strength: float
    mask: Tensor | None


def draw(
    stage: Diffusion,
    requests: Sequence[SampleRequest],
    seed: int,
    batch_size: int,
    start: Redraw | None = None,
    precision: Inference = "32",
    compiler: InferenceCompiler | None = None,
) -> Iterator[Tensor]:
    """Draw images one after the other, (C, H, W) of uint8 or uint16 as trained on, with a progress bar."""
    compiler = compiler or InferenceCompiler()
    steps = stage.sampler.num_steps or stage.objective.schedule.num_steps
    num, full = len(requests), min(batch_size, len(requests))
    compiler.begin(stage.drawing_blocks(), stage.device, num * steps, full)
    bits = (stage.image_kind or RGB8).bits
    with tqdm(total=len(requests), desc="sample", unit=" images", disable=len(requests) < 2) as bar:
        for first in range(0, len(requests), batch_size):
            batch = on_device(as_batch(requests[first : first + batch_size]), stage.device)
            with inference(precision, stage.device), compiler.batch(len(batch["key"])):
                if start is None:
                    images = stage.generate(batch, seed)
                else:
                    images = stage.redraw(batch, seed, start.image, start.strength, start.mask)
            check_finite(images, batch["key"])
            bar.update(len(images))
            yield from to_levels(images, bits).cpu()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch, and turn its images, masks and maps into what stages know."""
    moved = {name: field.to(device) if isinstance(field, Tensor) else field for name, field in batch.items()}
    return converted(cast(Batch, moved))
