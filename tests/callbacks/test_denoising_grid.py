"""Estimates of x0 from fixed noise, at the configured noise levels."""

import math
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_stage import TinyStage, loader, trainer

from ldm.callbacks.denoising_grid import DenoisingGrid, timesteps
from ldm.conditioners.none import Unconditional
from ldm.diffusion.schedule import Cosine, RectifiedFlow, ScaledLinear, ZeroTerminalSNR
from ldm.io.images import read_text, to_bytes
from ldm.latents.space import LatentSpace, Pixels
from ldm.nets.unet import UNet
from ldm.stages.diffusion import Diffusion

SCHEDULES = [ScaledLinear(), Cosine(), ZeroTerminalSNR(ScaledLinear()), RectifiedFlow()]
DIM = 1 / 60
"""Latents up to 60 fit into an image."""


class Dimmed(LatentSpace):
    """Images as they are, shown dimly so that large errors are not cut off."""

    channels, factor = 3, 1

    def encode(self, batch, noise):
        return batch["image"]

    def decode(self, latent):
        return latent * DIM


class Divides(TinyStage):
    """Takes x_t / alpha_t for x0: its error is the noise level times the noise."""

    name = "diffusion"

    def __init__(self, schedule):
        super().__init__()
        self.latents, self.objective = Dimmed(), types.SimpleNamespace(schedule=schedule)

    def cond(self, batch):
        return lambda x, t: x / self.objective.schedule.at(t, x)[0]


def errors(row, batch):
    """Errors of the estimates in a drawn row, (levels, B, 3, H, W)."""
    size = batch["image"].shape[-1]
    clean, *estimates = ((row.float() / 127.5 - 1) / DIM).split(size, dim=-1)
    assert (clean - batch["image"]).abs().max() <= 0.51 / 127.5 / DIM
    return torch.stack([estimate - batch["image"] for estimate in estimates])


def sample(count=3, size=24):
    return next(iter(loader(count, count))) | {"image": torch.zeros(count, 3, size, size)}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_error_of_an_unbiased_estimate_is_the_level(schedule):
    levels = (1.0, 2.0, 4.0, 8.0)
    batch = sample()
    found = errors(DenoisingGrid(levels).draw(Divides(schedule), batch), batch)
    for level, error in zip(levels, found, strict=True):
        assert error.std() == pytest.approx(level, rel=0.05)


def test_all_levels_of_a_sample_get_the_same_noise_in_any_batch():
    batch = sample()
    found = errors(DenoisingGrid((2.0, 8.0)).draw(Divides(ScaledLinear()), batch), batch)
    assert torch.corrcoef(found[:, 1].flatten(1))[0, 1] > 0.98
    assert torch.corrcoef(found[1].flatten(1))[0, 1].abs() < 0.1
    alone = {name: field[1:2] for name, field in batch.items()}
    drawn = DenoisingGrid((2.0, 8.0)).draw(Divides(ScaledLinear()), alone)
    level = 1.01 / 127.5 / DIM  # another batch may round otherwise: by one level of uint8
    assert torch.allclose(errors(drawn, alone)[:, 0], found[:, 1], atol=level)
    other = errors(DenoisingGrid((2.0, 8.0), seed=1).draw(Divides(ScaledLinear()), batch), batch)
    assert torch.corrcoef(torch.stack([other[1], found[1]]).flatten(1))[0, 1].abs() < 0.1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_no_timestep_comes_closer_to_a_level(schedule):
    levels = (0.01, 0.3, 1.0, 5.0, 1e6)
    for level, t in zip(levels, timesteps(schedule.noise_level, levels), strict=True):
        far = [abs(math.log(min(float(known), 1e8) / level)) for known in schedule.noise_level]
        assert far[t] == min(far)


def test_a_run_leaves_a_row_per_image_at_each_validation(tmp_path):
    run = trainer(tmp_path, callbacks=[DenoisingGrid((1.0, 4.0), num=3)])
    run.fit(Divides(Cosine()), loader(100), loader(12))
    folder = tmp_path / "images"
    names = [f"noise-levels-{n:010d}.png" for n in (16, 32)]
    assert sorted(path.name for path in folder.iterdir()) == names
    first, second = (np.array(Image.open(folder / name)) for name in names)
    assert first.shape == (3 * 4 + 2 * 2, 3 * 4, 3)
    assert (first == second).all()  # this stage's estimates do not depend on what it learned
    metadata = read_text(folder / names[1])
    assert (metadata["levels"], metadata["samples"], metadata["captions"].splitlines()[2]) == (
        "1 4",
        "32",
        "caption 2",
    )


def test_a_diffusion_stage_fits_and_others_are_left_alone(tmp_path):
    torch.manual_seed(0)
    net = {"block_out_channels": [8, 8], "layers_per_block": 1, "attention": [False, False], "num_heads": 1}
    stage = Diffusion(Pixels(), Unconditional(), lambda widths: UNet(widths, norm_groups=4, **net))
    batch = next(iter(loader(2, 2)))
    strip = DenoisingGrid((1e-3,)).draw(stage.eval(), batch)
    assert strip.shape == (2, 3, 4, 8)
    assert torch.equal(strip[..., :4], to_bytes(batch["image"]))
    difference = strip[..., 4:].int() - strip[..., :4].int()
    assert difference.abs().max() < 64  # next to no noise: the estimate is next to the image
    trainer(tmp_path, callbacks=[DenoisingGrid()]).fit(TinyStage(), loader(100), loader(12))
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("levels", [(), (1.0, 0.0), (-1.0,)])
def test_levels_are_above_zero(levels):
    with pytest.raises(ValueError, match="levels: got"):
        DenoisingGrid(levels)
