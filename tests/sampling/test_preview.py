"""Previews are written every so many steps, and change no image."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm.diffusion.guidance import Unguided
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.mean_flow import MeanFlowSampler
from ldm.diffusion.schedule import Linear, RectifiedFlow
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


def test_of_a_learned_variance_and_of_a_whole_step_the_image_is_shown():
    variance = lambda x, t: torch.cat([0.5 * x.tanh(), torch.zeros_like(x)], 1)  # noqa: E731
    average = lambda x, t: 0.5 * x.tanh() * (t[:, 1] < t[:, 0]).view(-1, 1, 1, 1)  # noqa: E731
    for sampler, estimate in ((DDPM(4), variance), (MeanFlowSampler(4), average)):
        shown = []
        model = SimpleNamespace(cond=lambda batch, estimate=estimate: estimate)
        guidance = Previewed(Unguided(), 2, lambda batch, step, x0: shown.append((step, x0)))  # noqa: B023
        sampler(guidance(model, BATCH), sampler.steps(RectifiedFlow()), torch.randn(2, 3, 4, 4))
        assert [(step, x0.shape, x0.abs().max() <= 0.5) for step, x0 in shown] == [
            (2, (2, 3, 4, 4), True),
            (4, (2, 3, 4, 4), True),
        ]


def test_files_name_the_first_image_and_the_step(tmp_path):
    old = tmp_path / "previews" / "000000-step-007.png"
    old.parent.mkdir()
    old.touch()
    show = write_previews(tmp_path, ["a", "b", "c"], lambda latent: latent)
    draw(DDIM(6), Previewed(Unguided(), 3, show))
    names = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert names == ["000001-step-003.png", "000001-step-006.png"]
    assert Image.open(tmp_path / "previews" / names[0]).size == (10, 4)
