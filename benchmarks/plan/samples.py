"""Batches without values, of the shapes that a stage trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.conditioners.layout import Layout
from ldm.conditioners.size import NUMBERS
from ldm.conditioners.super_resolution import SuperResolution
from ldm.stage_protocols import ReadsFields
from ldm.stages.stage import Stage
from ldm.types import Batch


@dataclass(frozen=True)
class Made:
    """What fields of a batch are made for.

    Args:
        stage: What reads them.
        side: Of the images.
        size: B, the number of samples.
        device: Where they are.
    """

    stage: Stage
    side: int
    size: int
    device: torch.device

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Make a tensor (B, ...) on the device."""
        return torch.zeros(self.size, *shape, dtype=dtype, device=self.device)

    def image(self, side: int) -> Tensor:
        """Make images (B, C, side, side)."""
        return self.zeros(self.stage.image_channels or 3, side, side)

    def latent(self) -> Tensor:
        """Make means and deviations (B, 2 C, h, w), as they are stored."""
        space: Any = self.stage.latents
        c, h, w = space.shape(self.side, self.side)
        return self.zeros(2 * c, h, w, dtype=torch.float16)

    def low_res(self) -> Tensor:
        """Make images in the resolution that a conditioner takes."""
        scales = [x.scale for x in self.stage.modules() if isinstance(x, SuperResolution)]
        return self.image(self.side // scales[0])

    def layout(self) -> list[Tensor]:
        """Make as many boxes of each sample as a conditioner takes: what it keeps does not depend on it."""
        boxes = max(x.max_boxes for x in self.stage.modules() if isinstance(x, Layout))
        return [torch.zeros(boxes, 5)] * self.size  # of no device: they come as they are


FIELDS: dict[str, Callable[[Made], Any]] = {
    "image": lambda made: made.image(made.side),
    "latent": Made.latent,
    "text": lambda made: [f"caption {i}" for i in range(made.size)],
    "label": lambda made: made.zeros(dtype=torch.int64),
    "mask": lambda made: made.zeros(1, made.side, made.side),
    "low_res": Made.low_res,
    "label_map": lambda made: made.zeros(made.side, made.side, dtype=torch.int64),
    "layout": Made.layout,
    "size": lambda made: made.zeros(NUMBERS),
}
"""How each field of a batch is made: shapes and dtypes as in ``Batch``, where they are on the device."""


def samples(stage: Stage, side: int, size: int, device: torch.device) -> Batch:
    """Make a batch of what a stage reads where latents are stored.

    Raises:
        ValueError: If it reads a field that is not known here.
    """
    read = stage.reads(("latent",)) if isinstance(stage, ReadsFields) else ("image",)
    if unknown := [field for field in read if field not in FIELDS]:
        raise ValueError(
            f"activations: got a stage that reads {', '.join(unknown)}, expected {', '.join(FIELDS)}"
        )
    made = Made(stage, side, size, device)
    batch: dict[str, Any] = {"key": [str(i) for i in range(size)]}
    batch.update({field: FIELDS[field](made) for field in read})
    return batch  # type: ignore[return-value]
