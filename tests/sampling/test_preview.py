"""Previews are written every so many steps, and change no image."""

import pytest
import torch
from PIL import Image

from ldm.diffusion.guidance import Unguided
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.schedule import Linear
from ldm.sampling.preview import Previewed, write_previews

BATCH = {"key": ["b", "c"]}


class Model:
    def cond(self, batch):
        return lambda x, t: 0.5 * x.tanh()


def draw(sampler, guidance):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return sampler(guidance(Model(), BATCH), sampler.steps(Linear()), x)


@pytest.mark.parametrize("sampler", [DDIM(6), Heun(6)])
def test_steps_are_counted_and_images_are_the_same(sampler):
    shown = []
    guidance = Previewed(Unguided(), 2, lambda batch, step, x0: shown.append((batch["key"], step, x0.shape)))
    assert torch.equal(draw(sampler, guidance), draw(sampler, Unguided()))
    assert shown == [(["b", "c"], step, (2, 3, 4, 4)) for step in (2, 4, 6)]


def test_files_name_the_first_image_and_the_step(tmp_path):
    old = tmp_path / "previews" / "000000-step-007.png"
    old.parent.mkdir()
    old.touch()
    show = write_previews(tmp_path, ["a", "b", "c"], lambda latent: latent)
    draw(DDIM(6), Previewed(Unguided(), 3, show))
    names = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert names == ["000001-step-003.png", "000001-step-006.png"]
    assert Image.open(tmp_path / "previews" / names[0]).size == (10, 4)
