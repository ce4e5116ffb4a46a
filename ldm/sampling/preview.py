"""Images as they are estimated while they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from typing_extensions import override

from ldm.diffusion.guidance import Guidance
from ldm.io.images import grid, write_png
from ldm.types import Batch, Conditional, Denoise

FOLDER = "previews"
"""In the folder of the images."""
MOST = 64
"""Images of a preview, at most."""
Show = Callable[[Batch, int, Tensor], None]
"""Takes the batch, the number of the step, and x0_hat (B, C, h, w)."""


class Previewed(Guidance):
    """A guidance whose estimates are shown while images are drawn. The images are the same.

    Args:
        guidance: What estimates.
        every: Steps from one view to the next; a step is what has a timestep of its own.
        show: What shows them.
    """

    def __init__(self, guidance: Guidance, every: int, show: Show) -> None:
        super().__init__()
        self.guidance, self.every, self.show = guidance, every, show

    @property
    @override
    def upstream(self) -> dict[str, str]:
        return self.guidance.upstream

    @property
    @override
    def uses_uncond(self) -> bool:
        return self.guidance.uses_uncond

    @override
    def __call__(self, model: Conditional, batch: Batch) -> Denoise:
        """Estimate as ``guidance`` does, and show every so many steps."""
        denoise = self.guidance(model, batch)
        seen: list[float] = []

        def shown(x_t: Tensor, t: Tensor) -> Tensor:
            x0 = denoise(x_t, t)
            step = float(t.flatten()[0])
            if not seen or step != seen[-1]:
                seen.append(step)
                if len(seen) % self.every == 0:
                    self.show(batch, len(seen), x0[:, : x_t.shape[1]])
            return x0

        return shown


def write_previews(out: Path, keys: Sequence[str], decode: Callable[[Tensor], Tensor]) -> Show:
    """Write previews as ``previews/000000-step-010.png``: the first image of the batch, and the step.

    Earlier ones in the folder are deleted.

    Args:
        out: Folder of the images.
        keys: Keys of all images, in their order.
        decode: Maps latents to images in [-1, 1].
    """
    position = {key: i for i, key in enumerate(keys)}
    for earlier in (out / FOLDER).glob("*-step-*.png"):
        earlier.unlink()

    def show(batch: Batch, step: int, x0: Tensor) -> None:
        path = out / FOLDER / f"{position[batch['key'][0]]:06d}-step-{step:03d}.png"
        write_png(path, grid(decode(x0[:MOST].float())), {"step": str(step)})

    return show
