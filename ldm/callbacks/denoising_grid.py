"""Show what a diffusion model makes of the same images at each of a few levels of noise."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from ldm.callbacks.image_grid import ImageGrid
from ldm.io.images import to_bytes
from ldm.types import Batch, Denoise


@runtime_checkable
class Denoises(Protocol):
    """A stage that estimates x0 in a latent space, on a schedule of noise."""

    latents: Any
    objective: Any

    def cond(self, batch: Batch) -> Denoise:
        """Return the estimate x0_hat as a function of (x_t, t), conditioned on ``batch``."""
        ...


class DenoisingGrid(ImageGrid):
    """Estimates images of the validation set in one step from each of several levels of noise.

    A row of ``images/noise-levels-<samples seen>.png`` is one image: as the latent space gives it back,
    then the estimate x0_hat from x_t (Ho et al. 2020, arXiv:2006.11239, Eq. 15) at each level. Little noise
    shows what the model knows of detail, much noise what it makes of the condition alone. A level is
    sigma_t / alpha_t, sigma of Karras et al. 2022 (arXiv:2206.00364), at the closest timestep:
    rows compare between schedules. Noise depends on seed and sample alone. Other stages are left alone.

    Args:
        levels: Ratios of noise to signal, above 0; 1 holds as much of the one as of the other.
        num: Number of images.
        seed: Seed of the noise.
        folder: Where to write them; None means ``images`` in the trainer's ``default_root_dir``.
    """

    panel = "noise-levels"
    columns = 1

    def __init__(
        self,
        levels: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
        num: int = 8,
        seed: int = 0,
        folder: str | None = None,
    ) -> None:
        super().__init__(num, seed, folder)
        if not levels or min(levels) <= 0:
            raise ValueError(f"DenoisingGrid: levels: got {list(levels)}, expected ratios above 0")
        self.levels = tuple(levels)

    @override
    def fits(self, pl_module: L.LightningModule) -> bool:
        return isinstance(pl_module, Denoises)

    @override
    def metadata(self) -> dict[str, str]:
        return {"levels": " ".join(f"{level:g}" for level in self.levels)}

    @override
    def draw(self, pl_module: L.LightningModule, batch: Batch) -> Tensor:
        assert isinstance(pl_module, Denoises)
        space, schedule = pl_module.latents, pl_module.objective.schedule
        x0 = _encoded(pl_module, batch)
        noise = _noise(self.seed, batch["key"], x0)
        denoise = space.constrain(pl_module.cond(batch))
        row = [to_bytes(space.decode(x0))]
        for step in timesteps(schedule.noise_level, self.levels):
            t = torch.full((len(x0),), step, device=x0.device)
            row.append(to_bytes(space.decode(denoise(schedule.add_noise(x0, noise, t), t))))
        return torch.cat(row, dim=-1)


def timesteps(noise_level: Tensor, levels: Sequence[float]) -> list[int]:
    """Find the timestep of each level.

    Args:
        noise_level: (T,) sigma_t / alpha_t, rising; the last may be infinite.
        levels: Above 0.

    Returns:
        The timesteps whose ratios come closest, as factors.
    """
    wanted = torch.tensor(levels, dtype=noise_level.dtype).log()
    return (noise_level.clamp(1e-8, 1e8).log() - wanted[:, None]).abs().argmin(dim=1).tolist()


def _encoded(pl_module: Any, batch: Batch) -> Tensor:
    """Encode to the mean of q(z | image): (B, C, h, w)."""
    space = pl_module.latents
    if "latent" in batch:
        zeros = torch.zeros_like(batch["latent"].chunk(2, dim=1)[0])
    else:
        image = batch["image"]
        zeros = image.new_zeros(len(image), *space.shape(*image.shape[-2:]))
    x0: Tensor = space.encode(batch, zeros)
    return x0


def _noise(seed: int, keys: Sequence[str], like: Tensor) -> Tensor:
    """Draw noise like ``like``, each sample's a function of seed and key."""
    rows = []
    for key in keys:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode()))
        rows.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(rows).to(like)
